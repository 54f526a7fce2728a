"""Logits of chosen tokens only: with a small model and short answers, those of all tokens are most of the work."""

from __future__ import annotations

from typing import Any

import torch


def logits_at(model: Any, rows: torch.Tensor, columns: torch.Tensor, **inputs: Any) -> tuple[torch.Tensor, Any]:
    """Logits of the tokens at (rows[k], columns[k]), and the model's whole output.

    The hidden states are picked before the output layer, so that what a model does to logits after it (a scale, a
    soft cap) is still done. A model without such a layer, or one that gives it something else, computes all logits.

    Args:
        model: a Hugging Face causal language model, or DeepSpeed's wrapping of one.
        rows, columns: int64 [k], on the model's device.
        inputs: the model's arguments, `input_ids` [n, L] among them.

    Returns:
        Logits [k, vocabulary] in the model's type, and the output, whose `.logits` are not to be used.

    >>> ids = torch.tensor([[3, 1, 4, 1]])
    >>> logits, _ = logits_at(model, torch.tensor([0, 0]), torch.tensor([1, 3]), input_ids=ids)
    >>> torch.allclose(logits, model(input_ids=ids).logits[0, [1, 3]], atol=1e-6)
    True
    """
    head = getattr(model, "module", model).get_output_embeddings()
    shape = inputs["input_ids"].shape
    was_picked = False

    def pick(module: Any, states: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...] | None:
        nonlocal was_picked
        # Some kinds of model pick or pack positions by themselves, and rows and columns would mean others then.
        was_picked = states[0].shape[:-1] == shape
        return (states[0][rows, columns][None], *states[1:]) if was_picked else None

    handle = head.register_forward_pre_hook(pick) if head is not None else None
    try:
        output = model(**inputs)
    finally:
        if handle is not None:
            handle.remove()
    # The hook gave the output layer one row of k states, so logits are [1, k, vocabulary].
    return output.logits.flatten(0, 1) if was_picked else output.logits[rows, columns], output
