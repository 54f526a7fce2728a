"""What a model is called with for a batch: one function, for training, held-out loss and curvature alike."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

Tensor = torch.Tensor


def model_inputs(model: Any, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The arguments of a model's forward pass.

    Args:
        model: a Hugging Face language model, or DeepSpeed's wrapping of one.
        batch: `input_ids` [n, M], and optionally `attention_mask` [n, M] (1 is read, 0 is padding) or `prefix_lengths`
            [n]: of each row's first so many tokens all see each other. Others, such as labels, are left out.

    Returns:
        `input_ids`; `attention_mask` [n, M], or [n, 1, M, M] where there are prefixes; `position_ids` [n, M] where
        there is padding on the left, which must not shift positions.
    """
    given = {"input_ids": batch["input_ids"]}
    if (mask := batch.get("attention_mask")) is not None:
        given["attention_mask"] = mask
        if bool((mask[:, 0] == 0).any()):
            given["position_ids"] = (mask.cumsum(dim=1) - 1).clamp(min=0)
    if (lengths := batch.get("prefix_lengths")) is not None:
        dtype = next(model.parameters()).dtype
        given["attention_mask"] = prefix_mask(lengths, batch["input_ids"].shape[1], dtype)
    return given


def prefix_mask(prefix_lengths: Tensor, length: int, dtype: torch.dtype) -> Tensor:
    """What is added to attention scores, [n, 1, length, length]: 0 where a token (row) sees another, else the least.

    A number of the model's own type, and not a truth value: what attention by plain products would add as 1 or 0.
    """
    place = torch.arange(length, device=prefix_lengths.device)
    is_seen = (place[None, :] <= place[:, None]) | (place[None, None, :] < prefix_lengths[:, None, None])
    return torch.zeros(is_seen.shape, dtype=dtype, device=place.device).masked_fill_(~is_seen, torch.finfo(dtype).min)[
        :, None
    ]
