"""Next-token prediction of a text as it stands, and of the answers of fine-tuning."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal, final

import numpy as np

from raysweep.objectives.base import (
    IGNORED,
    Arrays,
    DecoderObjective,
    Floats,
    Ints,
    Loss,
    Specials,
    labelled_loss_sum,
)

if TYPE_CHECKING:
    import torch

    from raysweep.objectives.optimum import TabledLaw


@final
class CausalLM(DecoderObjective):
    """Next-token prediction: the loss is -sum over t > 1 of log p(x_t | x_<t)."""

    name: Literal["causal_lm"] = "causal_lm"
    """Which objective."""

    is_likelihood: ClassVar[bool] = True

    def predicts(self) -> str:
        """Next tokens, in words; see `ObjectiveSpec.predicts`."""
        return "every token but the first, from those before it"

    def extra_tokens(self) -> tuple[str, ...]:
        """None: a text's own tokens are enough."""
        return ()

    def input_length(self, sequence_length: int) -> int:
        """As many: a row is the text."""
        return sequence_length

    def mean_predicted(self, sequence_length: int) -> float:
        """L - 1, exactly: nothing stands before the first token that it could be predicted from."""
        return sequence_length - 1

    def prepare(self, ids: Ints, draw: np.random.Generator, specials: Specials) -> Arrays:
        """The text, of which every token but the first is predicted.

        >>> CausalLM().prepare(np.array([[7, 8, 9]]), np.random.default_rng(0), Specials({}, 10))["labels"]
        array([[7, 8, 9]])
        >>> CausalLM().num_predicted({"labels": np.array([[7, 8, 9]])})  # Nothing stands before the first.
        2
        """
        return {"input_ids": ids, "labels": ids}

    @property
    def has_optimum(self) -> bool:
        """Each token has its conditional probability."""
        return True

    def conditionals(self, law: TabledLaw, ids: Ints, rows: Arrays) -> Floats:
        """p(token | those before it); see `ObjectiveSpec.conditionals`."""
        return law.token_probabilities(ids, seen="before")

    def loss_sum(self, model: torch.nn.Module, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Cross-entropy in nats, summed over the labelled tokens: all but the first, so all logits are made at once."""
        import torch.nn.functional as F

        from raysweep.objectives.cross_entropy import cross_entropy_sum
        from raysweep.objectives.inputs import model_inputs
        from raysweep.objectives.output_loss import loss_in_output

        # The labels are shifted, not the logits: these are large, and a slice of them would be a copy.
        labels = F.pad(batch["labels"][:, 1:], (0, 1), value=IGNORED)
        inputs = model_inputs(model, batch) | {"use_cache": False}
        if (loss := loss_in_output(model, labels, inputs)) is not None:
            return loss
        logits = model(**inputs).logits
        return cross_entropy_sum(logits.reshape(-1, logits.shape[-1]), labels.reshape(-1), ignored=IGNORED)


@final
class AnswerLM(Loss):
    """Next-token prediction of the few tokens that are labelled: the output layer sees no others."""

    name: Literal["answer_lm"] = "answer_lm"

    def num_predicted(self, batch: Mapping[str, Any]) -> int:
        """Number of labelled tokens: those of the answers, not of prompts or padding."""
        return CausalLM().num_predicted(batch)

    def loss_sum(self, model: torch.nn.Module, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """The same number as `CausalLM.loss_sum` but for rounding."""
        return labelled_loss_sum(model, batch, batch["labels"][:, 1:], use_cache=False)
