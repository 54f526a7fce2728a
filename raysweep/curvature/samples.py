"""A model's own samples as text, for a model whose pretraining text is not at hand."""

from __future__ import annotations

import math
from typing import Any

import torch

from raysweep.curvature.dealing import Deal, one_after_another
from raysweep.curvature.language import is_causal
from raysweep.curvature.probes import key

Tensor = torch.Tensor


# Sequences drawn together: enough for a CPU to be busy, with a KV cache that any model has room for.
AT_ONCE = 32


def sample_sequences(
    model: Any, num: int, *, length: int, start: int, seed: int, deal: Deal = one_after_another
) -> Tensor:
    """Sequences drawn from the model itself, with a KV cache; ends of documents are drawn like any other token.

    On them the residual part of the Hessian is zero in expectation: it equals the Gauss-Newton matrix, the model
    being the true distribution. It is not the Hessian on the pretraining text unless the model is that text's.

    Args:
        model: a causal Hugging Face model in eval mode.
        num: of sequences.
        length: tokens of a sequence, the first included.
        start: id of the token that all begin with, which is never predicted; mostly the end of a document.
        seed: of the draws.
        deal: who draws the parts.

    Returns:
        ids [num, length], int64.

    Raises:
        ValueError: if the model is not causal.

    >>> tuple(sample_sequences(model, 3, length=5, start=0, seed=0).shape)
    (3, 5)
    """
    if not is_causal(model):
        raise ValueError("a masked language model is no distribution of texts: it has no samples of its own")

    def part(index: int) -> list[list[int]]:
        starts = torch.full((min(AT_ONCE, num - index * AT_ONCE), 1), start)
        ids: list[list[int]] = _draw(model, starts, length, key(seed, "samples", index)).tolist()
        return ids

    parts = deal(range(math.ceil(num / AT_ONCE)), part)
    return torch.tensor([row for rows in parts for row in rows], device=next(model.parameters()).device)


@torch.no_grad()
def _draw(model: Any, starts: Tensor, length: int, seed: int) -> Tensor:
    from transformers import GenerationConfig

    # The whole distribution as it is: checkpoints may ship settings for chat, such as top_k.
    settings = GenerationConfig(
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        max_new_tokens=length - 1,
        min_new_tokens=length - 1,
        eos_token_id=None,
        use_cache=True,
    )
    shipped, model.generation_config = model.generation_config, settings
    device = next(model.parameters()).device
    try:
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(seed)
            ids: Tensor = model.generate(starts.to(device), settings)
            return ids
    finally:
        model.generation_config = shipped
