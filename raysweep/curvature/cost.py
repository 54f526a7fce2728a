"""How v'Hv can be made, and what a unit of work costs. Imports nothing, so that a plan can read it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

Products = Literal["logit_differences", "gradient_differences", "exact"]
"""How v'Hv is made: 3 forward passes, 2 gradients, or one with tangents, differentiated (about 3).

Only the first says nothing of single parameters; only the last needs attention that can be differentiated twice.
"""

COST: Mapping[str, float] = {"logit_differences": 1.0, "gradient_differences": 2.0, "exact": 3.0, "fisher": 0.9}
"""Gradients that a unit costs: a forward pass is a third of one, the rest was measured."""

COPIES: Mapping[str, float] = {"logit_differences": 3.0, "gradient_differences": 6.0, "exact": 5.0}
"""Tensors of the size of the weights that a product holds: the weights, moved to one side or both, and, but for
differences of logits, whose vector is drawn piece by piece, the probe vector and gradients.

What a forward pass keeps comes on top, and `LOGITS`; see `memory.product_bytes`.
"""

LOGITS = 5
"""Tensors of the size of the logits that a product holds: here, ahead and behind, probabilities, and here of another
batch that a second probe is for."""

PILOT_FISHER = 4
"""Label draws of a first round that takes any: with fewer their variance is not known."""

UNIT_OVERHEAD_TOKENS: Mapping[str, float] = {"cpu": 100, "cuda": 4096}
"""What a probe costs beside its tokens, in tokens: its vector, moved weights, what a pass costs in itself.

Measured on a CPU: 101, 109 and 88 on a GPT-2 of 1.1 M parameters (sequences of 64 tokens), a BERT of 2.7 M and a
GPT-NeoX of 12.6 M (128), one thread. Of GPUs as of a micro-batch of training; see `devices`.
"""

TOKENS_OF_UNIT: Mapping[str, int] = {"cpu": 1024, "cuda": 4096}
"""That a probe unit reads at most of several batches: more fill no device better, and their logits take memory."""

SPREAD_AT_128_TOKENS = 0.25
"""Relative standard deviation of one probe's estimate on a batch that predicts 128 tokens, probe and text together.

Assumed for plans: 0.15 to 0.27 was measured on Llamas of 2 and 5 M parameters, trained on 1.6 and 2.4 M tokens. On
models of 0.1 M trained on a PCFG, 128 probes came to 1.6 times the error that follows from it (causal LM), 1.3 (prefix
LM), 1.0 (15 % masked) and 1.2 times (one token masked), but to 4.4 times of span corruption.
"""


def first_draws(products: Products, *, parts: bool, min_units: int) -> int:
    """Label draws of the first round; where it takes none, none are taken later.

    Parts need `min_units` of them, for an error that can be trusted. For the trace of the whole, another probe does
    more than a draw where it costs about as much.
    """
    if parts:
        return max(PILOT_FISHER, min_units)
    return 0 if products == "logit_differences" else PILOT_FISHER


def most_batches(asked: int, *, num_tokens: int, on_gpu: bool) -> int:
    """Batches of so many tokens that may share a probe vector: as many as are asked for, within `TOKENS_OF_UNIT`."""
    return max(1, min(asked, TOKENS_OF_UNIT["cuda" if on_gpu else "cpu"] // num_tokens))


def predicted(rse: float, *, num_predicted: float, min_units: int, max_units: int) -> tuple[int, float]:
    """Probe units that a target will take, within a budget, and the relative standard error after them.

    Args:
        rse: the target.
        num_predicted: tokens that a batch predicts; the variance of a unit is as its inverse.
        min_units: that are taken in any case.
        max_units: at most.
    """
    spread = SPREAD_AT_128_TOKENS * (128 / num_predicted) ** 0.5
    units = min(max(-int(-((spread / rse) ** 2) // 1), min_units), max_units)
    return units, spread / units**0.5
