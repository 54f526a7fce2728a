"""Objectives of pretraining by name. To add one: a file beside this one, and its name in the last line."""

from raysweep.objectives.causal_lm import CausalLM

Objective = CausalLM
