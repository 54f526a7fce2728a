"""Prompts that a model has read once, to go on from: with an answer's tokens one by one, or with several choices."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from raysweep.objectives.logits import logits_at
from raysweep.tasks.rows import pad


def can_go_on(model: PreTrainedModel) -> bool:
    """Whether what the model keeps of a prompt is a key and a value per token, which can be moved and copied.

    Not so with sliding windows, recurrent states, or a model that keeps nothing.
    """
    # What follows padding has to say at which position it stands.
    if "position_ids" not in inspect.signature(model.forward).parameters:
        return False
    with torch.inference_mode():
        output = model(input_ids=torch.zeros(1, 1, dtype=torch.int64, device=model.device), use_cache=True)
    cache = getattr(output, "past_key_values", None)
    if not isinstance(cache, DynamicCache) or not cache.layers:
        return False
    # The very class: what derives from it may keep the last tokens alone, or something else.
    return all(type(layer) is DynamicLayer and layer.is_initialized for layer in cache.layers)


@dataclass(frozen=True)
class Prompts:
    """What a model for which `can_go_on` holds keeps of n prompts. To be used in inference mode."""

    model: PreTrainedModel
    cache: DynamicCache
    mask: torch.Tensor
    """[n, L]: 0 where there is padding, to the left of a prompt."""
    lengths: torch.Tensor
    """[n], without padding."""

    def select(self, rows: Sequence[int]) -> Prompts:
        """A copy of some of the prompts: what extends it leaves these as they are.

        Args:
            rows: indices, in this order; one may come several times, or not at all.
        """
        index = torch.tensor(rows, device=self.mask.device)
        cache = DynamicCache()
        for number, layer in enumerate(self.cache.layers):
            cache.update(layer.keys[index], layer.values[index], number)
        return Prompts(self.model, cache, self.mask[index], self.lengths[index])

    def extend(self, ids: torch.Tensor, *, rows: torch.Tensor, columns: torch.Tensor) -> tuple[torch.Tensor, Prompts]:
        """Read tokens behind the prompts.

        Args:
            ids: [n, k], one row for each prompt.
            rows, columns: int64 [j], of the tokens whose logits are wanted; behind the last one of a row is padding.

        Returns:
            Logits [j, vocabulary] at (rows[j], columns[j]), of the token after each; and all that was read so far, into
            which the memory of these prompts goes over: they are not to be used again.
        """
        mask = torch.cat([self.mask, torch.ones_like(ids)], dim=1)
        # Padding shares a position that is read anyway: a model may have none beyond.
        last = torch.zeros_like(self.lengths).scatter_reduce(0, rows, columns, "amax")
        places = torch.arange(ids.shape[1], device=ids.device).minimum(last[:, None])
        logits, output = logits_at(
            self.model,
            rows,
            columns,
            input_ids=ids,
            attention_mask=mask,
            position_ids=self.lengths[:, None] + places,
            past_key_values=self.cache,
            use_cache=True,
        )
        return logits, Prompts(self.model, output.past_key_values, mask, self.lengths + ids.shape[1])


def read(model: PreTrainedModel, prompts: Sequence[Sequence[int]]) -> tuple[torch.Tensor, Prompts]:
    """Logits [n, vocabulary] of the token after each prompt, and what the model keeps of them.

    Args:
        model: one for which `can_go_on` holds, in evaluation and inference mode.
        prompts: token ids, at least one each, of any lengths.
    """
    # Padded to the right, which no token before it attends to: there is no mask to compute with.
    ids, mask = (torch.from_numpy(part).to(model.device) for part in pad(prompts, value=0))
    lengths = mask.sum(dim=1)
    rows = torch.arange(len(prompts), device=model.device)
    logits, output = logits_at(model, rows, lengths - 1, input_ids=ids, use_cache=True)
    cache, width = output.past_key_values, ids.shape[1]
    if int(lengths.min()) < width:
        # Padding goes to the left, so that what follows a prompt stands right behind it.
        order = (torch.arange(width, device=model.device) + lengths[:, None]) % width
        mask = mask.gather(1, order)
        for layer in cache.layers:
            layer.keys, layer.values = (_reordered(states, order) for states in (layer.keys, layer.values))
    return logits, Prompts(model, cache, mask, lengths)


def _reordered(states: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    """states [n, heads, L, size] with L as in `order` [n, L]."""
    return states.gather(2, order[:, None, :, None].expand(-1, states.shape[1], -1, states.shape[3]))
