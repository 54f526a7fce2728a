"""Random changes of scale: the same function to rounding, and another trace."""

import copy

import pytest
import torch
from tiny_models import batch_for, build
from transformers import AutoConfig, AutoModelForMaskedLM

from raysweep.curvature.rescaling import own_seed, rescale
from raysweep.curvature.roles import roles_of


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("style", ["llama", "gpt2", "bert", "grouped"])
def test_the_function_stays_and_weights_move(style, tied):
    model = build(style, tied=tied)
    with torch.no_grad():
        for parameter in model.parameters():  # Biases and gains that matter.
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    other, again = copy.deepcopy(model), copy.deepcopy(model)
    rescale(other, torch.Generator().manual_seed(3))
    rescale(again, torch.Generator().manual_seed(3))
    ids = batch_for(model)["input_ids"]
    # Rounding of float32 sums of some 24 terms.
    seen, expected = (each(input_ids=ids, output_hidden_states=True) for each in (other, model))
    torch.testing.assert_close(seen.logits, expected.logits, rtol=1e-4, atol=1e-4)
    # What blocks add to stays; the last states are scaled by the last norm's gain, but for BERT's, whose head has it.
    states = (seen.hidden_states, expected.hidden_states)
    whole = tied or style == "bert"
    for ours, theirs in zip(*(each if whole else each[:-1] for each in states), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    assert whole or not torch.allclose(states[0][-1], states[1][-1], rtol=1e-2)
    moved = {name for name, value in model.state_dict().items() if not torch.equal(value, other.state_dict()[name])}
    assert len(moved) >= 2 * {"llama": 9, "grouped": 9, "gpt2": 8, "bert": 6}[style] - 2
    assert {roles_of(model)(name) for name in moved} == ({"blocks"} if tied else {"blocks", "head"})
    assert all(torch.equal(value, other.state_dict()[name]) for name, value in again.state_dict().items())


@pytest.mark.parametrize("name", ["roberta", "electra"])
def test_an_output_layer_of_its_own_is_scaled_where_the_head_transforms_states(name):
    sizes = {"hidden_size": 24, "embedding_size": 24, "intermediate_size": 32, "vocab_size": 50}
    shape = {"num_hidden_layers": 1, "num_attention_heads": 2, "tie_word_embeddings": False}
    config = AutoConfig.for_model(name, **sizes, **shape)
    torch.manual_seed(0)
    model = AutoModelForMaskedLM.from_config(config).eval()
    other = copy.deepcopy(model)
    rescale(other, torch.Generator().manual_seed(3))
    ids = torch.arange(2, 18)[None]
    torch.testing.assert_close(other(input_ids=ids).logits, model(input_ids=ids).logits, rtol=1e-4, atol=1e-4)
    heads = other.get_output_embeddings().weight, model.get_output_embeddings().weight
    assert not torch.allclose(*heads, rtol=1e-2)


def test_models_that_differ_have_seeds_of_their_own():
    model = build("llama")
    other = copy.deepcopy(model)
    assert own_seed(model, 0) == own_seed(other, 0) != own_seed(other, 1)
    with torch.no_grad():
        next(other.parameters()).view(-1)[-1].add_(1e-3)
    assert own_seed(model, 0) != own_seed(other, 0)
    assert own_seed(model.bfloat16(), 0) >= 0
    torch.Generator().manual_seed(2**56 - 1)  # The largest there is.


def test_a_kind_without_known_symmetries_is_an_error():
    with pytest.raises(ValueError, match="GPTNeoXForCausalLM: its symmetries are not known"):
        rescale(build("gpt_neox"), torch.Generator())
