"""Next-token prediction of a text as it stands, and of the answers of fine-tuning."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal, final

import numpy as np

from raysweep.objectives.base import IGNORED, Arrays, DecoderObjective, Ints, Loss, Specials

if TYPE_CHECKING:
    import torch


@final
class CausalLM(DecoderObjective):
    """Next-token prediction."""

    name: Literal["causal_lm"] = "causal_lm"
    """Which objective."""

    is_likelihood: ClassVar[bool] = True

    def predicts(self) -> str:
        """See `ObjectiveSpec.predicts`."""
        return "every token but the first, from those before it"

    def extra_tokens(self) -> tuple[str, ...]:
        """None."""
        return ()

    def input_length(self, sequence_length: int) -> int:
        """As many."""
        return sequence_length

    def prepare(self, ids: Ints, draw: np.random.Generator, specials: Specials) -> Arrays:
        """The text, of which every token but the first is predicted."""
        return {"input_ids": ids, "labels": ids}


@final
class AnswerLM(Loss):
    """Next-token prediction of the few tokens that are labelled: the output layer sees no others."""

    name: Literal["answer_lm"] = "answer_lm"

    def num_predicted(self, batch: Mapping[str, Any]) -> int:
        """As by `CausalLM.num_predicted`."""
        return CausalLM().num_predicted(batch)

    def loss_sum(self, model: torch.nn.Module, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """The same number as `CausalLM.loss_sum` but for rounding."""
        from raysweep.objectives.cross_entropy import cross_entropy_sum
        from raysweep.objectives.inputs import model_inputs
        from raysweep.objectives.logits import logits_at

        labels = batch["labels"][:, 1:]
        rows, columns = (labels != IGNORED).nonzero(as_tuple=True)
        logits, _ = logits_at(model, rows, columns, **model_inputs(model, batch), use_cache=False)
        return cross_entropy_sum(logits, labels[rows, columns], ignored=IGNORED)
