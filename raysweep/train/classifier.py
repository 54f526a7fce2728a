"""Classification of texts: a linear head on the states of all tokens, or on their mean where lengths differ.

A head on the last token's state alone, as in GPT (Radford et al., 2018), has to learn from a few hundred labels where
to look: measured on the quickstart's checkpoints, such fine-tuning stayed 20 points below a linear probe that reads
all states. With the same states to read, fine-tuning starts where the probe does.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, final

import torch
import torch.nn.functional as F
from transformers import PreTrainedModel

from raysweep.objectives.base import IGNORED, Arrays, Floats, Ints, Loss
from raysweep.train.evaluate import ROWS_OF_STATES

Pooling = Literal["all", "mean"]


class Classifier(torch.nn.Module):
    """A language model with a new head, whose weights are drawn from `seed`.

    Args:
        model: whose last layer's states are read; its own head is left out.
        length: tokens of every row, all of whose states the head reads; None: rows differ, and it reads their mean.
        num_classes: that the head tells apart.
        seed: of the head.
    """

    def __init__(self, model: PreTrainedModel, *, length: int | None, num_classes: int, seed: int) -> None:
        super().__init__()
        self.base = model.base_model
        self._pooling: Pooling = "mean" if length is None else "all"
        num_states = length or 1
        width = num_states * model.config.hidden_size
        generator = torch.Generator().manual_seed(seed)
        self.head = torch.nn.Linear(width, num_classes)
        # 0.02 as new weights of language models have it; the more states are read, the less each counts, so that logits
        # begin as small for rows of any length.
        with torch.no_grad():
            self.head.weight.copy_(torch.randn(num_classes, width, generator=generator) * 0.02 / num_states**0.5)
            self.head.bias.zero_()

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
        """Class logits [n, num_classes].

        Args:
            input_ids: [n, L].
            attention_mask: [n, L], 0 at padding; None: there is none.
        """
        (states,) = pooled_states(self.base, input_ids, attention_mask, pooling=self._pooling)
        return self.head(states.flatten(1))  # type: ignore[no-any-return]

    def gradient_checkpointing_enable(self, **settings: Any) -> None:
        """Have the language model keep fewer activations; see its own method of this name."""
        self.base.gradient_checkpointing_enable(**settings)

    def predict(self, arrays: Arrays) -> Ints:
        """The likeliest class of each row, [n], int64; -1 where a logit is no number.

        Args:
            arrays: `input_ids` [n, L] on the host, and `lengths` and `attention_mask` where rows are padded.
        """
        logits = self._logits(arrays)
        return logits.argmax(dim=-1).where(~logits.isnan().any(dim=-1), -1).cpu().numpy()

    def log_probabilities(self, arrays: Arrays) -> Floats:
        """Of every class of each row, [n, num_classes], in nats; of the same rows as `predict`."""
        return self._logits(arrays).double().log_softmax(dim=-1).cpu().numpy()

    @torch.inference_mode()
    def _logits(self, arrays: Arrays) -> torch.Tensor:
        return torch.cat([self(*inputs) for inputs in batches(arrays, device=self.head.weight.device)])


def pooled_states(
    base: torch.nn.Module,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    pooling: Pooling,
    layers: Sequence[int | None] = (None,),
) -> list[torch.Tensor]:
    """The last layer's states, or those of layers below, all of one pass.

    Args:
        base: a model without a head.
        input_ids: [n, L].
        attention_mask: [n, L], 0 at padding, which stands on the right; None: there is none.
        pooling: "all": as they are; "mean": over the tokens of a row.
        layers: blocks that they have come through, 0 being the embeddings; None: all, and the norm that follows, as
            transformers also gives them for all blocks of most models.

    Returns:
        Of each layer [n, L, hidden], or [n, hidden].

    Raises:
        ValueError: if there are not so many blocks.
    """
    given = {} if attention_mask is None else {"attention_mask": attention_mask}
    below = [layer for layer in layers if layer is not None]
    output = base(input_ids=input_ids, use_cache=False, output_hidden_states=bool(below), **given)
    if below and (deepest := max(below)) >= len(output.hidden_states):
        raise ValueError(f"layer {deepest}: the model has {len(output.hidden_states) - 1} blocks")
    every = [output.last_hidden_state if layer is None else output.hidden_states[layer] for layer in layers]
    return every if pooling == "all" else [_mean(states, attention_mask) for states in every]


def _mean(states: torch.Tensor, attention_mask: torch.Tensor | None) -> torch.Tensor:
    if attention_mask is None:
        return states.mean(dim=1)
    mask = attention_mask[..., None].to(states.dtype)
    return (states * mask).sum(dim=1) / mask.sum(dim=1)


def batches(
    arrays: Arrays, *, device: torch.device, batch_size: int = ROWS_OF_STATES
) -> Iterator[tuple[torch.Tensor, torch.Tensor | None]]:
    """(token ids, attention mask or None) of `batch_size` rows at a time, without padding that no row of them needs.

    Args:
        arrays: `input_ids` [n, L] on the host, and `lengths` [n] and `attention_mask` [n, L] where rows are padded.
        device: to bring them to.
        batch_size: rows at a time; the last ones may be fewer.
    """
    for start in range(0, len(arrays["input_ids"]), batch_size):
        rows = slice(start, start + batch_size)
        width = int(arrays["lengths"][rows].max()) if "lengths" in arrays else arrays["input_ids"].shape[1]
        ids = torch.from_numpy(arrays["input_ids"][rows, :width]).to(device)
        mask = arrays.get("attention_mask")
        yield ids, None if mask is None else torch.from_numpy(mask[rows, :width]).to(device)


@final
class LabelLoss(Loss):
    """-log p(class of a text): cross-entropy of `Classifier`'s logits, with `labels` [n] in [0, num_classes)."""

    name: Literal["label_loss"] = "label_loss"

    def num_predicted(self, batch: Mapping[str, Any]) -> int:
        """Number of rows that have a class: not the one that stands in on a rank without rows."""
        return int((batch["labels"] != IGNORED).sum())

    def loss_sum(self, model: torch.nn.Module, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Cross-entropy in nats, summed over rows, in float32."""
        logits = model(batch["input_ids"], batch.get("attention_mask")).float()
        return F.cross_entropy(logits, batch["labels"], ignore_index=IGNORED, reduction="sum")
