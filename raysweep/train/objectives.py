"""What is minimised. To add an objective: a spec with `loss_sum`, and its name in the last line."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Literal

from raysweep.spec import Spec

if TYPE_CHECKING:
    import torch

IGNORED = -100
"""Label of a token that is not predicted."""


class CausalLM(Spec):
    """Next-token prediction."""

    name: Literal["causal_lm"] = "causal_lm"
    """Which objective."""

    def loss_sum(self, model: torch.nn.Module, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Cross-entropy in nats, summed over the labelled tokens.

        Args:
            model: takes `input_ids` (and `attention_mask`) and gives `.logits` [n, L, vocabulary].
            batch: input_ids [n, L] and labels [n, L]; label t is predicted from the tokens before t.
        """
        import torch.nn.functional as F

        from raysweep.train.cross_entropy import cross_entropy_sum

        inputs = {name: value for name, value in batch.items() if name != "labels"}
        logits = model(**inputs, use_cache=False).logits
        # The labels are shifted, not the logits: these are large, and a slice of them would be a copy.
        labels = F.pad(batch["labels"][:, 1:], (0, 1), value=IGNORED)
        return cross_entropy_sum(logits.reshape(-1, logits.shape[-1]), labels.reshape(-1), ignored=IGNORED)


class AnswerLM(Spec):
    """Next-token prediction of the few tokens that are labelled: the output layer sees no others."""

    name: Literal["answer_lm"] = "answer_lm"

    def loss_sum(self, model: torch.nn.Module, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """The same number as `CausalLM.loss_sum` but for rounding."""
        from raysweep.train.cross_entropy import cross_entropy_sum
        from raysweep.train.logits import logits_at

        labels = batch["labels"][:, 1:]
        rows, columns = (labels != IGNORED).nonzero(as_tuple=True)
        inputs = {name: value for name, value in batch.items() if name != "labels"}
        logits, _ = logits_at(model, rows, columns, **inputs, use_cache=False)
        return cross_entropy_sum(logits, labels[rows, columns], ignored=IGNORED)


Objective = CausalLM
"""Of pretraining; `AnswerLM` is that of fine-tuning on text."""
