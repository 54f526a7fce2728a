"""What a model is called with for a batch: one function, for training, held-out loss and curvature alike."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from raysweep.errors import StageError

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
        # Padding on the right shifts nothing, and some kinds of model take no position_ids.
        if bool((mask[:, 0] == 0).any()):
            given["position_ids"] = (mask.cumsum(dim=1) - 1).clamp(min=0)
    if (lengths := batch.get("prefix_lengths")) is not None:
        dtype = next(model.parameters()).dtype
        given["attention_mask"] = prefix_mask(lengths, batch["input_ids"].shape[1], dtype)
    return given


@torch.no_grad()
def check_prefixes(model: Any) -> None:
    """See that a model attends within a prefix both ways, and nowhere else ahead.

    Some kinds of model make masks of their own of what they are given, or none. Tried on four short rows that differ in
    one token each, in evaluation mode; the model is put back into its own.

    Raises:
        StageError: if it does not; names what to set in its place.
    """
    ids = torch.arange(1, 7).remainder(model.config.get_text_config().vocab_size).repeat(4, 1)
    ids[1, 0], ids[2, 2], ids[3, 4] = 0, 0, 0  # Changed: the first of a prefix of three, its last, and one after it.
    was_training = model.training
    model.eval()
    rows = {"input_ids": ids, "prefix_lengths": torch.full((4,), 3)}
    logits = model(**model_inputs(model, rows), use_cache=False).logits
    model.train(was_training)
    moves = (logits[1:] - logits[:1]).abs().amax(dim=2) > 1e-6 * logits.abs().max()  # [change, place], but for rounding
    # A model that does not look behind either, as some are initialised, tells nothing.
    # Within the prefix, the last token must reach those before it; what comes after must not reach back.
    if bool(moves[0, 1:3].all()) and not (bool(moves[1, :2].all()) and not bool(moves[2, :4].any())):
        raise StageError(
            f"{type(model).__name__} does not take an attention mask for prefixes that are seen both ways; set "
            "attention: causal in pretrain.objective, or train another model"
        )


def prefix_mask(prefix_lengths: Tensor, length: int, dtype: torch.dtype) -> Tensor:
    """What is added to attention scores, [n, 1, length, length]: 0 where a token (row) sees another, else the least.

    A number of the model's own type, and not a truth value, which attention by plain products would add as 1 or 0.

    Args:
        prefix_lengths: [n]; of each row's first so many tokens all see each other.
        length: tokens of a row.
        dtype: of the model.

    >>> (prefix_mask(torch.tensor([2]), 3, torch.float32)[0, 0] == 0).int()
    tensor([[1, 1, 0],
            [1, 1, 0],
            [1, 1, 1]], dtype=torch.int32)
    """
    place = torch.arange(length, device=prefix_lengths.device)
    is_seen = (place[None, :] <= place[:, None]) | (place[None, None, :] < prefix_lengths[:, None, None])
    return torch.zeros(is_seen.shape, dtype=dtype, device=place.device).masked_fill_(~is_seen, torch.finfo(dtype).min)[
        :, None
    ]
