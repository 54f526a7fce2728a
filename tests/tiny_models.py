"""Language models of every style, small enough for full matrices."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import (
    BertConfig,
    BertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
)

from raysweep.curvature.language import IGNORED, mean_token_loss, prepare, targets, token_logits
from raysweep.curvature.operators import named_parameters

CAUSAL = ["llama", "gpt2", "gpt_neox"]
STYLES = [*CAUSAL, "bert"]


def build(
    style: str, *, tied: bool = True, hidden: int = 16, vocab: int = 23, layers: int = 2, positions: int = 64
) -> Any:
    """A model with weights large enough for its Hessian to be far from its Gauss-Newton part; in eval mode."""
    torch.manual_seed(0)
    common = {"vocab_size": vocab, "tie_word_embeddings": tied, "initializer_range": 0.3}
    sizes = {
        "hidden_size": hidden,
        "intermediate_size": hidden + 8,
        "num_hidden_layers": layers,
        "num_attention_heads": 2,
        **common,
    }
    if style in ("llama", "grouped"):
        # Grouped: two heads of queries share one of keys and values.
        heads = {"num_attention_heads": 4, "num_key_value_heads": 2} if style == "grouped" else {}
        config = LlamaConfig(attention_bias=True, bos_token_id=0, eos_token_id=0, **(sizes | heads))
        return LlamaForCausalLM(config).eval()
    if style == "gpt2":
        config = GPT2Config(
            n_embd=hidden, n_layer=layers, n_head=2, n_positions=positions, bos_token_id=0, eos_token_id=0, **common
        )
        return GPT2LMHeadModel(config).eval()
    if style == "gpt_neox":
        return GPTNeoXForCausalLM(GPTNeoXConfig(bos_token_id=0, eos_token_id=0, **sizes)).eval()
    config = BertConfig(max_position_embeddings=positions, pad_token_id=0, **sizes)
    return BertForMaskedLM(config).eval()


def batch_for(model: Any, *, num: int = 3, length: int = 6, seed: int = 1) -> dict[str, torch.Tensor]:
    """Random ids; a masked model gets labels at a third of the positions."""
    draw = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, model.config.vocab_size, (num, length), generator=draw)
    if not isinstance(model, BertForMaskedLM):
        return {"input_ids": ids}
    hidden = torch.rand(ids.shape, generator=draw) < 0.33
    hidden[:, 0] = True
    return {"input_ids": ids.masked_fill(hidden, 1), "labels": ids.masked_fill(~hidden, -100)}


def flat(tensors: dict[str, torch.Tensor]) -> torch.Tensor:
    """All parts in a row, in float64."""
    return torch.cat([tensor.detach().flatten().double() for tensor in tensors.values()])


def all_gradients(outputs: Sequence[torch.Tensor], parameters: dict[str, torch.Tensor]) -> torch.Tensor:
    """Gradients of each entry of `outputs`, all in one batched pass. [entries, P], float64."""
    sizes = [output.numel() for output in outputs]
    num = sum(sizes)
    units = torch.eye(num, dtype=outputs[0].dtype).split(sizes, dim=1)
    one_for_each = [unit.reshape(num, *output.shape) for unit, output in zip(units, outputs, strict=True)]
    parts = torch.autograd.grad(
        outputs, list(parameters.values()), grad_outputs=one_for_each, is_grads_batched=True, allow_unused=True
    )
    rows = [
        torch.zeros(num, parameter.numel()) if part is None else part.reshape(num, -1)
        for part, parameter in zip(parts, parameters.values(), strict=True)
    ]
    return torch.cat([row.double() for row in rows], dim=1)


def full_hessian(loss: Callable[[], torch.Tensor], parameters: dict[str, torch.Tensor]) -> torch.Tensor:
    """Of a scalar function, by double backward. [P, P], float64."""
    return all_gradients(torch.autograd.grad(loss(), list(parameters.values()), create_graph=True), parameters)


def full_gauss_newton(model: Any, batch: dict[str, torch.Tensor], parameters: dict[str, torch.Tensor]) -> torch.Tensor:
    """By definition, from the Jacobian: J' (diag p - p p') J, averaged over tokens. [P, P], float64."""
    logits = token_logits(model, batch)[targets(model, batch) != IGNORED]
    p = logits.detach().softmax(dim=-1).double()
    jacobian = all_gradients([logits], parameters).view(*p.shape, -1)
    off_mean = jacobian - (p[..., None] * jacobian).sum(dim=1, keepdim=True)
    return torch.einsum("tv, tvi, tvj -> ij", p, jacobian, off_mean) / len(p)


def small(style: str = "llama", *, tied: bool = True) -> tuple[Any, dict[str, torch.Tensor]]:
    """A model of one block that is ready to be measured, small enough for `matrices`, and a batch."""
    model = build(style, tied=tied, hidden=4, vocab=5, layers=1, positions=8)
    prepare(model)
    return model, batch_for(model)


def matrices(model: Any, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """The Hessian of the mean token loss, and its Gauss-Newton part, both [P, P], made in float64."""
    double = model.double()
    parameters = named_parameters(double)
    hessian = full_hessian(lambda: mean_token_loss(double, batch), parameters)
    gauss_newton = full_gauss_newton(double, batch, parameters)
    model.float()
    return hessian, gauss_newton
