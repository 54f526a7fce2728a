"""Classification of sentences of one length: a linear head on the states of all tokens, as the linear probe has it.

A head on the last token's state alone, as in GPT (Radford et al., 2018), has to learn from a few hundred labels where
to look: measured on the quickstart's checkpoints, such fine-tuning stayed 20 points below a linear probe that reads
all states. With the same states to read, fine-tuning starts where the probe does.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, final

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from transformers import PreTrainedModel

from raysweep.objectives.base import IGNORED, Loss


class Classifier(torch.nn.Module):
    """A causal model with a new head for sentences of `length` tokens, whose weights are drawn from `seed`."""

    def __init__(self, model: PreTrainedModel, *, length: int, num_classes: int, seed: int) -> None:
        super().__init__()
        self.base = model.base_model
        width = length * model.config.hidden_size
        generator = torch.Generator().manual_seed(seed)
        self.head = torch.nn.Linear(width, num_classes)
        with torch.no_grad():
            self.head.weight.copy_(torch.randn(num_classes, width, generator=generator) * 0.02 / length**0.5)
            self.head.bias.zero_()

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Class logits [n, num_classes] of token ids [n, L]."""
        states = self.base(input_ids=input_ids, use_cache=False).last_hidden_state
        return self.head(states.flatten(1))  # type: ignore[no-any-return]

    def predict(self, ids: npt.NDArray[np.int64], *, batch_size: int = 128) -> Any:
        """The likeliest class of each row."""
        device = self.head.weight.device
        with torch.inference_mode():
            parts = [
                self(torch.from_numpy(ids[start : start + batch_size]).to(device)).argmax(dim=-1).cpu()
                for start in range(0, len(ids), batch_size)
            ]
        return torch.cat(parts).numpy()


@final
class Classification(Loss):
    """Cross-entropy of the class, which is the label of the last token."""

    name: Literal["classification"] = "classification"

    def num_predicted(self, batch: Mapping[str, Any]) -> int:
        """Sequences with a class."""
        return int((batch["labels"][:, -1] != IGNORED).sum())

    def loss_sum(self, model: torch.nn.Module, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """In nats, summed over sequences."""
        return F.cross_entropy(model(batch["input_ids"]).float(), batch["labels"][:, -1], reduction="sum")
