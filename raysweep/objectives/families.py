"""Objectives of pretraining by name. To add one: a file beside this one, and its name in the union."""

from typing import Annotated

from pydantic import Field

from raysweep.objectives.adversary import Adversary
from raysweep.objectives.causal_lm import CausalLM
from raysweep.objectives.masked_lm import MaskedLM
from raysweep.objectives.mixture import Mixture
from raysweep.objectives.prefix_lm import PrefixLM
from raysweep.objectives.soft_targets import SoftTargets
from raysweep.objectives.span_corruption import SpanCorruption
from raysweep.objectives.ul2 import UL2

# A mixture is of any of them: its fields are known only once they all are.
Objective = Annotated[
    CausalLM | MaskedLM | PrefixLM | SpanCorruption | UL2 | Mixture | Adversary | SoftTargets,
    Field(discriminator="name"),
]
Mixture.model_rebuild()
