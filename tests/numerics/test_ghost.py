"""Ghost norms against per-sequence gradients, for the families of models that users have."""

import pytest
import torch
import torch.nn.functional as F
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
)

from raysweep.curvature.ghost import GhostNorms


def build(name: str, *, tied: bool):
    torch.manual_seed(0)
    common = {"vocab_size": 23, "tie_word_embeddings": tied, "initializer_range": 0.2}
    if name == "llama":
        sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
        config = LlamaConfig(attention_bias=True, **sizes, **common)
        return LlamaForCausalLM(config).eval()
    if name == "gpt2":
        return GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=2, n_head=2, n_positions=64, **common)).eval()
    config = GPTNeoXConfig(hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, **common)
    return GPTNeoXForCausalLM(config).eval()


def by_backward(model, ids, labels) -> list[float]:
    norms = []
    for row, target in zip(ids, labels, strict=True):
        logits = model(input_ids=row[None], use_cache=False).logits[0, :-1]
        loss = F.cross_entropy(logits, target, ignore_index=-100, reduction="sum")
        gradients = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
        norms.append(sum(float(g.double().square().sum()) for g in gradients if g is not None))
    return norms


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("length", [6, 40])  # 40 takes the branch of long sequences and narrow layers
@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt_neox"])
def test_norms_are_those_of_the_gradients(name, length, tied):
    model = build(name, tied=tied)
    draw = torch.Generator().manual_seed(1)
    ids = torch.randint(0, 23, (5, length), generator=draw)
    labels = torch.randint(0, 23, (5, length - 1), generator=draw)
    labels[0, 3:] = -100
    ghost = GhostNorms(model, ids)
    got = ghost.squared_norms(labels)
    # float32 products, summed in another order
    torch.testing.assert_close(got, torch.tensor(by_backward(model, ids, labels)).double(), rtol=1e-5, atol=0)
    other = labels.roll(1, dims=1)
    again = ghost.squared_norms(other, last=True)
    torch.testing.assert_close(again, torch.tensor(by_backward(model, ids, other)).double(), rtol=1e-5, atol=0)
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_layer_without_a_rule_is_named():
    model = build("llama", tied=True)
    model.model.extra = torch.nn.Bilinear(2, 2, 2)
    with pytest.raises(ValueError, match=r"layer 'model\.extra' \(Bilinear\)"):
        GhostNorms(model, torch.randint(0, 23, (2, 6)))
