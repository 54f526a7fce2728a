"""Models, optimizers, schedules and recipes, by closed forms."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from raysweep.data.pcfg import PCFG
from raysweep.objectives.base import IGNORED
from raysweep.objectives.causal_lm import CausalLM
from raysweep.objectives.masked_lm import MaskedLM
from raysweep.stages.pretrain import Recipe
from raysweep.train.models import Bert, Llama, fuse_norms
from raysweep.train.optimizers import AdamW
from raysweep.train.schedules import WSD, Constant, Cosine


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("inner", [None, 24])
def test_parameter_count_is_torchs(tied, inner):
    spec = Llama(hidden_size=16, num_layers=3, num_heads=2, intermediate_size=inner, tie_embeddings=tied)
    model = spec.build(vocab_size=50, sequence_length=8, seed=0)
    assert spec.num_parameters(50) == model.num_parameters()


@pytest.mark.parametrize("inner", [None, 24])
def test_parameter_count_of_an_encoder_is_torchs(inner):
    spec = Bert(name="bert", hidden_size=16, num_layers=3, num_heads=2, intermediate_size=inner)
    assert spec.num_parameters(50) == spec.build(vocab_size=50, sequence_length=8, seed=0).num_parameters()


def test_inputs_longer_than_a_model_takes_are_refused(grammar):
    given = {"data": grammar, "optimizer": AdamW(lr=0.1), "steps": 1, "batch_sequences": 1, "sequence_length": 5}
    bert = Bert(name="bert", hidden_size=16, num_heads=2, num_positions=4)
    with pytest.raises(ValidationError, match="inputs of 5 tokens, and model bert takes 4 at most"):
        Recipe(**given, model=bert, objective=MaskedLM(name="masked_lm"))


@pytest.mark.parametrize("bf16", [False, True])
def test_fused_norms_are_the_same_function(bf16):
    model = Llama(hidden_size=16, num_layers=2, num_heads=2).build(vocab_size=20, sequence_length=8, seed=0)
    ids = torch.arange(16).view(2, 8)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    found = []
    for _ in range(2):
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            loss = model(input_ids=ids, labels=ids).loss
        found.append([loss, *torch.autograd.grad(loss, list(model.parameters()))])
        fuse_norms(model)
    assert sum("forward" in vars(module) for module in model.modules()) == 5
    tolerance = {"rtol": 0.05, "atol": 0.01} if bf16 else {"rtol": 1e-5, "atol": 1e-6}
    for left, right in zip(*found, strict=True):
        torch.testing.assert_close(left, right, **tolerance)


def test_weights_depend_on_the_seed_alone():
    spec = Llama(hidden_size=16, num_layers=1, num_heads=2)
    torch.manual_seed(1)
    first = spec.build(vocab_size=20, sequence_length=8, seed=5)
    torch.manual_seed(2)
    state = torch.get_rng_state()
    again = spec.build(vocab_size=20, sequence_length=8, seed=5)
    assert (torch.get_rng_state() == state).all()
    pairs = zip(first.parameters(), again.parameters(), strict=True)
    assert all(torch.equal(left, right) for left, right in pairs)


def test_heads_must_divide():
    with pytest.raises(ValidationError, match="multiple of twice num_heads 4"):
        Llama(hidden_size=20, num_heads=4)


@given(steps=st.integers(1, 5000), warmup=st.floats(0, 0.5))
def test_schedules_stay_between_nought_and_one(steps, warmup):
    for schedule in (
        Constant(name="constant", warmup=warmup),
        Cosine(warmup=warmup, final=0.1),
        WSD(name="wsd", warmup=warmup),
    ):
        values = [schedule.multiplier(step, steps) for step in range(0, steps, max(1, steps // 50))]
        assert all(0 <= value <= 1 for value in values)


def test_schedules_at_their_corners():
    assert Constant(name="constant", warmup=0.1).multiplier(0, 100) == pytest.approx(0.1)
    assert Constant(name="constant", warmup=0.1).multiplier(99, 100) == 1
    assert Cosine(warmup=0, final=0.2).multiplier(50, 100) == pytest.approx(0.6)
    wsd = WSD(name="wsd", warmup=0.1, decay=0.2, final=0.0)
    assert wsd.multiplier(79, 100) == 1
    assert wsd.multiplier(90, 100) == pytest.approx(0.5)
    assert wsd.multiplier(99, 100) == pytest.approx(0.05)


def test_loss_is_hugging_faces():
    model = Llama(hidden_size=16, num_layers=2, num_heads=2).build(vocab_size=30, sequence_length=8, seed=0)
    ids = torch.randint(0, 30, (3, 8))
    labels = ids.clone()
    labels[:, :4] = IGNORED
    ours = CausalLM().loss_sum(model, {"input_ids": ids, "labels": labels}) / (3 * 4)
    theirs = model(input_ids=ids, labels=labels).loss
    # float32 sums of 12 terms of about 3.4 nats in another order
    assert float(ours) == pytest.approx(float(theirs), abs=1e-5)


def test_an_objective_and_a_model_that_do_not_go_together_are_refused():
    given = {"data": PCFG(), "optimizer": AdamW(lr=1e-3), "steps": 1, "batch_sequences": 1, "sequence_length": 33}
    with pytest.raises(ValidationError, match="masked_lm needs a masked model, and llama is a causal one"):
        Recipe(model=Llama(), objective=MaskedLM(name="masked_lm"), **given)
