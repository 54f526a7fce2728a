"""From specs to gradient steps."""
