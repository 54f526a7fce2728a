"""Objectives of pretraining by name. To add one: a file beside this one, and its name in the last line."""

from typing import Annotated

from pydantic import Field

from raysweep.objectives.causal_lm import CausalLM
from raysweep.objectives.masked_lm import MaskedLM
from raysweep.objectives.prefix_lm import PrefixLM

Objective = Annotated[CausalLM | MaskedLM | PrefixLM, Field(discriminator="name")]
