"""Downstream tasks: load, format, score."""
