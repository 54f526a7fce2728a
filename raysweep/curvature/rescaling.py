"""Random changes of scale that leave a model's function as it is: a measure of flatness that they move is not of it.

Weights of a transformer have symmetries beside permutations (Dinh et al., 2017, arXiv 1703.04933, for ReLU networks):
the gain of a norm against the layers that read it, values against the output of attention, queries against keys, and in
a gated feed-forward layer what goes up against what comes down. Each is scaled by a random factor, and its partner by
one over it. The last norm's readers are the output layer, which is scaled where it does not embed tokens, too. Not
scaled is what all layers share, the states that blocks add to: norms' epsilons make it no exact symmetry.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from raysweep.curvature.kinds import KNOWN, Kind, kind_of

Tensor = torch.Tensor

SPREAD = 0.5
"""Standard deviation of the logarithm of a factor: most lie between 1/2.7 and 2.7."""
NORMS_OF_HEADS = ("cls.predictions.transform.LayerNorm", "lm_head.layer_norm", "generator_predictions.LayerNorm")
"""What the output layer reads in BERT, RoBERTa and ELECTRA, whose heads transform the states before."""


@torch.no_grad()
def rescale(model: Any, generator: torch.Generator, *, spread: float = SPREAD) -> None:
    """Scale a model's weights at random, in place, such that it computes the same.

    Args:
        model: of a class that `kinds` knows.
        generator: of the factors, on the CPU.
        spread: standard deviation of their logarithms.

    Raises:
        ValueError: if no symmetry of its kind is known here.

    >>> import copy
    >>> other = copy.deepcopy(model)
    >>> rescale(other, torch.Generator().manual_seed(0))
    >>> ids = batch["input_ids"]
    >>> torch.allclose(model(ids).logits, other(ids).logits, atol=1e-4)
    True
    >>> torch.allclose(model.model.embed_tokens.weight, other.model.embed_tokens.weight)
    True
    """

    def factors(num: int) -> Tensor:
        drawn = torch.randn(num, generator=generator) * spread
        return drawn.exp().to(next(model.parameters()))

    kind, layers = layers_of(model)
    scale = {"llama": _scale_llama, "gpt2": _scale_gpt2, "bert": _scale_bert}[kind]
    for layer in layers:
        scale(layer, factors, model.config)
    head = model.get_output_embeddings()
    if head.weight is not model.get_input_embeddings().weight:
        _scale_readers(_last_norm(model, kind), (head,), factors)


def own_seed(model: Any, seed: int) -> int:
    """A seed that follows from a seed and all the weights of a model, so that models that differ have others.

    >>> own_seed(model, 0) == own_seed(model, 0), own_seed(model, 0) == own_seed(model, 1)
    (True, False)
    """
    digest = hashlib.sha256(str(seed).encode())
    for parameter in model.parameters():
        digest.update(parameter.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return int.from_bytes(digest.digest()[:7])


def layers_of(model: Any) -> tuple[Kind, Any]:
    """Which kind's symmetries a model has, and its layers.

    Raises:
        ValueError: if none is known here.
    """
    name, base = type(model).__name__, model.base_model
    kind = kind_of(name)
    if kind is None:
        raise ValueError(f"{name}: its symmetries are not known; those of {KNOWN} are")
    return kind, base.layers if kind == "llama" else base.h if kind == "gpt2" else base.encoder.layer


def _last_norm(model: Any, kind: Kind) -> Any:
    if kind == "bert":
        modules = dict(model.named_modules())
        return next(modules[name] for name in NORMS_OF_HEADS if name in modules)
    return model.base_model.norm if kind == "llama" else model.base_model.ln_f


def _scale_readers(norm: Any, readers: Sequence[Any], factors: Callable[[int], Tensor]) -> None:
    """The gain and shift of a norm against the layers, of weights [out, in], that read what it gives."""
    by = factors(len(norm.weight))
    for part in (norm.weight, getattr(norm, "bias", None)):
        if part is not None:
            part.mul_(by)
    for reader in readers:
        reader.weight.div_(by)


def _scale_llama(layer: Any, factors: Callable[[int], Tensor], config: Any) -> None:
    attention, mlp = layer.self_attn, layer.mlp
    groups, head_size = config.num_key_value_heads, attention.head_dim
    queries = config.num_attention_heads // groups
    for norm, readers in (
        (layer.input_layernorm, (attention.q_proj, attention.k_proj, attention.v_proj)),
        (layer.post_attention_layernorm, (mlp.gate_proj, mlp.up_proj)),
    ):
        _scale_readers(norm, readers, factors)
    # A group of heads shares its keys and values; rotary positions turn pairs of one head, which share a factor.
    by = factors(groups)
    _rows(attention.q_proj, by.repeat_interleave(queries * head_size))
    _rows(attention.k_proj, (1 / by).repeat_interleave(head_size))
    by = factors(groups)
    _rows(attention.v_proj, by.repeat_interleave(head_size))
    attention.o_proj.weight.div_(by.repeat_interleave(queries * head_size))
    by = factors(mlp.up_proj.weight.shape[0])
    _rows(mlp.up_proj, by)
    mlp.down_proj.weight.div_(by)


def _scale_gpt2(layer: Any, factors: Callable[[int], Tensor], config: Any) -> None:
    # Its matrices stand as [in, out].
    attention = layer.attn
    for norm, reader in ((layer.ln_1, attention.c_attn), (layer.ln_2, layer.mlp.c_fc)):
        by = factors(len(norm.weight))
        norm.weight.mul_(by)
        norm.bias.mul_(by)
        reader.weight.div_(by[:, None])
    heads = config.n_head
    size = config.n_embd // heads
    keys, values = factors(heads).repeat_interleave(size), factors(heads).repeat_interleave(size)
    by = torch.cat([keys, 1 / keys, values])
    attention.c_attn.weight.mul_(by)
    attention.c_attn.bias.mul_(by)
    attention.c_proj.weight.div_(values[:, None])


def _scale_bert(layer: Any, factors: Callable[[int], Tensor], config: Any) -> None:
    # Its norms stand behind the sums that blocks add to, whose scale is everyone's: they stay.
    attention = layer.attention.self
    heads = config.num_attention_heads
    size = config.hidden_size // heads
    keys, values = factors(heads).repeat_interleave(size), factors(heads).repeat_interleave(size)
    _rows(attention.query, keys)
    _rows(attention.key, 1 / keys)
    _rows(attention.value, values)
    layer.attention.output.dense.weight.div_(values)


def _rows(linear: Any, by: Tensor) -> None:
    """Scale what a layer gives, bias included."""
    for part in _given(linear):
        part.mul_(by.view(-1, *[1] * (part.dim() - 1)))


def _given(linear: Any) -> Iterator[Tensor]:
    yield linear.weight
    if linear.bias is not None:
        yield linear.bias
