"""A small model as a point of a larger one's weights, with the same function: sizes compared in one parametrisation.

As paper 1 does (Liu et al., 2022, arXiv 2210.14199, appendix B), which does not say how. Ours: what the small model has
not is zero, and each head keeps its size. A mean of squares (Llama) sees zeros as more features, which the norms' gains
make up for; a layer norm also takes the mean off, so there features are repeated instead, a whole number of times, and
whoever reads them takes the mean of the copies.
"""

from __future__ import annotations

import copy
from typing import Any

import torch

Tensor = torch.Tensor


@torch.no_grad()
def enlarged(model: Any, config: Any) -> Any:
    """A new model that computes what `model` does, to rounding, with the shape of `config`.

    Args:
        model: of the Llama, GPT-2 or BERT kind; left as it is.
        config: of the same kind, at least as large in every way: its size of a head is the same; of GPT-2 and BERT the
            hidden size is a multiple, and of BERT, whose norms come last, the number of layers is the same.

    Returns:
        A model in evaluation mode; its epsilon of a mean of squares is made to fit.

    Raises:
        ValueError: names what does not fit.

    >>> import transformers
    >>> larger = {"hidden_size": 24, "num_attention_heads": 3, "num_key_value_heads": 3, "head_dim": 8}
    >>> large = transformers.LlamaConfig.from_dict(model.config.to_dict() | larger)
    >>> ids = torch.tensor([[3, 1, 4, 1, 5]])
    >>> torch.allclose(enlarged(model, large)(ids).logits, model(ids).logits, atol=1e-5)
    True
    """
    kind, config = model.config.model_type, copy.deepcopy(config)
    if kind not in _KINDS or config.model_type != kind:
        raise ValueError(f"a {kind} model in one of {config.model_type}: both are of one kind, of {', '.join(_KINDS)}")
    _check(model.config, config)
    if kind == "llama":
        # sum x^2 / D + e d / D = d / D (sum x^2 / d + e), which the gains' sqrt(d / D) undoes.
        config.rms_norm_eps = model.config.rms_norm_eps * model.config.hidden_size / config.hidden_size
    large = type(model)(config).eval().to(next(model.parameters()))
    for parameter in large.parameters():
        parameter.zero_()
    given = dict(model.named_parameters())
    for name, parameter in large.named_parameters():
        if name in given:
            _KINDS[kind](name, given[name], parameter, model.config)
    return large


def _check(small: Any, large: Any) -> None:
    sizes = {
        "hidden_size": (small.hidden_size, large.hidden_size),
        "num_attention_heads": (small.num_attention_heads, large.num_attention_heads),
        "num_hidden_layers": (small.num_hidden_layers, large.num_hidden_layers),
    }
    for name, (has, gets) in sizes.items():
        if gets < has:
            raise ValueError(f"{name} {gets} is less than the {has} of the model to be embedded")
    heads = [each.hidden_size // each.num_attention_heads for each in (small, large)]
    if heads[0] != heads[1]:
        raise ValueError(f"a head has {heads[1]} numbers and {heads[0]} in the model to be embedded: make them equal")
    groups = [
        getattr(each, "num_key_value_heads", each.num_attention_heads) / each.num_attention_heads
        for each in (small, large)
    ]
    if small.model_type == "llama" and groups[0] != groups[1]:
        raise ValueError("num_key_value_heads: as many query heads share one as in the model to be embedded")
    if small.tie_word_embeddings != large.tie_word_embeddings:
        raise ValueError("tie_word_embeddings: one matrix embeds and predicts in one of the two models alone")
    if small.vocab_size != large.vocab_size:
        raise ValueError(f"vocab_size {large.vocab_size} is not the {small.vocab_size} of the model to be embedded")
    if large.model_type != "llama" and large.hidden_size % small.hidden_size:
        raise ValueError(f"hidden_size {large.hidden_size} is no multiple of {small.hidden_size}: features repeat")
    if large.model_type == "bert" and large.num_hidden_layers != small.num_hidden_layers:
        raise ValueError("num_hidden_layers: a layer whose norm comes last is never the identity; keep their number")


def _put_llama(name: str, small: Tensor, large: Tensor, config: Any) -> None:
    """Zeros around; gains take the smaller mean of squares into account."""
    gain = (config.hidden_size / large.shape[0]) ** 0.5 if name.endswith("norm.weight") else 1.0
    large[tuple(slice(size) for size in small.shape)] = small * gain


def _put_gpt2(name: str, small: Tensor, large: Tensor, config: Any) -> None:
    """Matrices stand as [in, out]; queries, keys and values side by side."""
    width = config.n_embd
    if name.endswith("c_attn.weight"):
        _thirds(_mean_of_copies(small, large.shape[0], dim=0), large, width)
    elif name.endswith("c_attn.bias"):
        _thirds(small, large, width)
    elif name.endswith("c_fc.weight"):
        wide = _mean_of_copies(small, large.shape[0], dim=0)
        large[:, : wide.shape[1]] = wide
    elif name.endswith("c_fc.bias"):
        large[: len(small)] = small
    elif name.endswith("c_proj.weight"):
        large[: small.shape[0]] = small.repeat(1, large.shape[1] // small.shape[1])
    elif name.endswith("lm_head.weight"):
        large.copy_(small.repeat(1, large.shape[1] // width))
    else:  # Embeddings and norms, and what is added to the sum of all blocks.
        large.copy_(small.repeat(*[1] * (small.dim() - 1), large.shape[-1] // width))
        if ".ln_f." in name:  # The output layer sums over copies.
            large.div_(large.shape[-1] // width)


def _put_bert(name: str, small: Tensor, large: Tensor, config: Any) -> None:
    """Matrices stand as [out, in]."""
    width = config.hidden_size
    if any(part in name for part in ("self.query", "self.key", "self.value", "intermediate.dense")):
        wide = _mean_of_copies(small, large.shape[1], dim=1) if small.dim() > 1 else small
        large[: len(wide)] = wide
    elif name == "cls.predictions.bias" or name.endswith("decoder.bias"):
        large.copy_(small)
    elif name.endswith("transform.dense.weight"):
        copies = large.shape[1] // width
        large.copy_(_mean_of_copies(small, large.shape[1], dim=1).repeat(copies, 1))
    elif name.endswith("output.dense.weight"):
        large[:, : small.shape[1]] = small.repeat(large.shape[0] // small.shape[0], 1)
    else:
        large.copy_(small.repeat(*[1] * (small.dim() - 1), large.shape[-1] // width))
        if "transform.LayerNorm" in name:
            large.div_(large.shape[-1] // width)


_KINDS = {"llama": _put_llama, "gpt2": _put_gpt2, "bert": _put_bert}


def _mean_of_copies(weight: Tensor, size: int, *, dim: int) -> Tensor:
    """What reads features that are repeated up to `size`, along `dim`."""
    copies = size // weight.shape[dim]
    repeats = [copies if each == dim else 1 for each in range(weight.dim())]
    return weight.repeat(*repeats) / copies


def _thirds(small: Tensor, large: Tensor, width: int) -> None:
    """Queries, keys and values of the first heads, each `width` wide, into thirds of a larger one."""
    third = large.shape[-1] // 3
    for part in range(3):
        large[..., part * third : part * third + width] = small[..., part * width : (part + 1) * width]
