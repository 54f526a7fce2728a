"""Traces by what parameters are for: the head, embeddings or blocks; and what feature norm alone explains of them.

The head's logits are z = W h of the last states h. The gradient of -log p(y) with respect to W is (p - e_y) h', so that
with y drawn from the model the head's Fisher trace is E |h|^2 (1 - sum_y p_y^2) in closed form: the norm of the
features, and how unsure the prediction is. It is most of the trace of small models, and any scale of h moves it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch

from raysweep.curvature.averages import Estimate, ratio_estimate
from raysweep.curvature.language import IGNORED, Batch, is_causal, targets, token_logits

Role = Literal["head", "embeddings", "blocks"]
ROLES: tuple[Role, ...] = ("head", "embeddings", "blocks")


def roles_of(model: Any) -> Callable[[str], Role]:
    """What a parameter, by name, is for. A matrix that both embeds and predicts is the head's, as most of its trace is.

    Args:
        model: a Hugging Face language model.

    >>> role = roles_of(model)
    >>> role("model.embed_tokens.weight"), role("model.layers.0.mlp.up_proj.weight")
    ('head', 'blocks')
    """
    head = {id(parameter) for parameter in model.get_output_embeddings().parameters()}
    embeddings = {
        id(parameter)
        for module in model.modules()
        if isinstance(module, torch.nn.Embedding)
        for parameter in module.parameters()
    }
    roles: dict[str, Role] = {
        name: "head" if id(parameter) in head else "embeddings" if id(parameter) in embeddings else "blocks"
        for name, parameter in model.named_parameters(remove_duplicate=False)
    }
    return roles.__getitem__


def blocks_of(model: Any) -> Callable[[str], str]:
    """Which block a parameter, by name, is of: "block_0" is the first; "none" of what stands outside, as a last norm.

    Args:
        model: a Hugging Face language model, whose blocks have their number in the names of their parameters.

    >>> block = blocks_of(model)
    >>> block("model.layers.0.mlp.up_proj.weight"), block("model.norm.weight")
    ('block_0', 'none')
    """
    role = roles_of(model)

    def block(name: str) -> str:
        number = re.search(r"\.(\d+)\.", name) if role(name) == "blocks" else None
        return f"block_{number[1]}" if number else "none"

    return block


@torch.no_grad()
def feature_trace(model: Any, batches: Sequence[Batch]) -> Estimate:
    """E |h|^2 (1 - sum_y p_y^2) over predicted tokens, in nats per token: the Fisher trace of a head without a bias.

    Args:
        model: in eval mode; h is what its output layer reads.
        batches: see `language`.

    Returns:
        The mean, and its standard error over batches.

    >>> bool(feature_trace(model, batches).mean > 0)
    True
    """
    sums, counts = [], []
    for batch in batches:
        read: list[torch.Tensor] = []
        handle = model.get_output_embeddings().register_forward_pre_hook(
            lambda module, inputs, read=read: read.append(inputs[0])
        )
        try:
            p = token_logits(model, batch).softmax(dim=-1)
        finally:
            handle.remove()
        states = read[0][:, :-1] if is_causal(model) else read[0]
        is_counted = targets(model, batch) != IGNORED
        each = states.double().square().sum(dim=-1) * (1 - p.double().square().sum(dim=-1))
        sums.append(float(each[is_counted].sum()))
        counts.append(float(is_counted.sum()))
    return ratio_estimate(sums, counts)
