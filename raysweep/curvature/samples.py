"""A model's own samples as text, for a model whose pretraining text is not at hand."""

from __future__ import annotations

from typing import Any

import torch

from raysweep.curvature.language import is_causal

Tensor = torch.Tensor


@torch.no_grad()
def sample_sequences(model: Any, num: int, *, length: int, start: int, seed: int, at_once: int = 32) -> Tensor:
    """Sequences drawn from the model itself, with a KV cache; ends of documents are drawn like any other token.

    On them the residual part of the Hessian is nought in expectation: it equals the Gauss-Newton matrix, the model
    being the true distribution. It is not the Hessian on the pretraining text unless the model is that text's.

    Args:
        model: a causal Hugging Face model in eval mode.
        num: of sequences.
        length: tokens of a sequence, the first included.
        start: id of the token that all begin with, which is never predicted; mostly the end of a document.
        seed: of the draws.
        at_once: sequences drawn together.

    Returns:
        ids [num, length], int64.

    Raises:
        ValueError: if the model is not causal.
    """
    from transformers import GenerationConfig

    if not is_causal(model):
        raise ValueError("a masked language model is no distribution of texts: it has no samples of its own")
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
            parts = [
                model.generate(torch.full((min(at_once, num - done), 1), start, device=device), settings)
                for done in range(0, num, at_once)
            ]
    finally:
        model.generation_config = shipped
    return torch.cat(parts)
