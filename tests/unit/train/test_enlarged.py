"""A small model embedded in a larger one: the same outputs, whatever kind it is of."""

import copy

import pytest
import torch
from tiny_models import batch_for, build

from raysweep.train.enlarged import enlarged

LLAMA = {"hidden_size": 40, "num_attention_heads": 5, "num_key_value_heads": 5, "intermediate_size": 64, "head_dim": 8}
LARGER = {
    "llama": LLAMA | {"num_hidden_layers": 3},
    "gpt2": {"n_embd": 48, "n_head": 6, "n_layer": 4},
    "bert": {"hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 50},
}


def larger(model, **changes):
    config = copy.deepcopy(model.config)
    for name, value in changes.items():
        setattr(config, name, value)
    return config


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("style", LARGER)
def test_outputs_are_the_same(style, tied):
    model = build(style, tied=tied)
    with torch.no_grad():
        for parameter in model.parameters():  # Biases and gains that matter.
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    large = enlarged(model, larger(model, **LARGER[style]))
    assert large.num_parameters() > 2 * model.num_parameters()
    ids = batch_for(model)["input_ids"]
    log_p, wanted = (each(input_ids=ids).logits.log_softmax(dim=-1) for each in (large, model))
    torch.testing.assert_close(log_p, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("style", "changes", "said"),
    [
        ("llama", {"hidden_size": 8}, "hidden_size 8 is less than the 16"),
        ("llama", {"hidden_size": 32}, "a head has 16 numbers and 8 in the model"),
        ("llama", LLAMA | {"num_key_value_heads": 1}, "as many query heads share one"),
        ("gpt2", {"n_embd": 24, "n_head": 3}, "hidden_size 24 is no multiple of 16"),
        ("bert", LARGER["bert"] | {"num_hidden_layers": 3}, "keep their number"),
        ("gpt2", {"vocab_size": 99}, "vocab_size 99 is not the 23"),
    ],
)
def test_what_does_not_fit_is_named(style, changes, said):
    model = build(style)
    with pytest.raises(ValueError, match=said):
        enlarged(model, larger(model, **changes))


def test_other_kinds_are_named():
    with pytest.raises(ValueError, match="a gpt_neox model in one of gpt_neox: both are of one kind, of llama"):
        enlarged(build("gpt_neox"), build("gpt_neox").config)
