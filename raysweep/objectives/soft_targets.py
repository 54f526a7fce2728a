"""An objective without the chance of labels: the exact conditional in the place of the token that came.

Its gradient has the mean of the other's, and at a minimum no noise: a control of what that noise does.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Literal, final

import numpy as np
from pydantic import model_validator

from raysweep.objectives.base import IGNORED, Arrays, Ints
from raysweep.objectives.of_another import OfAnother

if TYPE_CHECKING:
    import torch

    from raysweep.objectives.optimum import LabelledLaw

TARGETS = "target_probabilities"
"""In a batch: p(token | seen) at each place, [n, M, tokens], float32."""


@final
class SoftTargets(OfAnother):
    """-sum over predicted t and words w of p(w | seen) log q(w | seen), p being the law of the text.

    What is predicted, and from what, is that of the objective `of`, whose loss is measured: by its minimum, and by its
    gradient on average over labels, this one is the same.
    """

    name: Literal["soft_targets"]
    """Which objective."""

    @model_validator(mode="after")
    def _known(self) -> SoftTargets:
        if not self.of.has_optimum:
            raise ValueError(f"of: the conditionals of {self.of.predicts()} are not known; use replacement: mask")
        return self

    def predicts(self) -> str:
        """What `of` predicts, in words; see `ObjectiveSpec.predicts`."""
        return f"{self.of.predicts()}; by exact probabilities in the place of tokens"

    def from_law(self, law: LabelledLaw, ids: Ints, rows: Arrays) -> Arrays:
        """The true probabilities at all places of the rows."""
        table = self.of.conditionals(law, ids, rows)
        assert table is not None  # `of` has an optimum.
        return {TARGETS: table.astype(np.float32)}

    def loss_sum(self, model: torch.nn.Module, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """See the class; of rows without TARGETS, which are measured and not trained on, the loss of `of`."""
        from raysweep.objectives.inputs import model_inputs
        from raysweep.objectives.logits import logits_at

        if TARGETS not in batch:
            return self.of.loss_sum(model, batch)
        shift = 1 if self.head == "causal" else 0
        rows, columns = (batch["labels"][:, shift:] != IGNORED).nonzero(as_tuple=True)
        logits, _ = logits_at(model, rows, columns, **model_inputs(model, batch))
        targets = batch[TARGETS][rows, columns + shift]
        # A model may have rows for tokens that no text has, such as a mask.
        return -(targets * logits.float().log_softmax(dim=-1)[:, : targets.shape[1]]).sum()
