"""The loss within the output layer: torch's numbers, on the models that it suits, and on no others."""

import os
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from scipy import stats
from transformers import Gemma2Config, Gemma2ForCausalLM, GPT2Config, GPT2LMHeadModel

from raysweep.objectives import output_loss
from raysweep.objectives.base import IGNORED
from raysweep.objectives.causal_lm import CausalLM
from raysweep.objectives.output_loss import LossLayer, draw_classes, linear_cross_entropy_sum, use_loss_layer
from raysweep.train.models import Llama


@pytest.fixture
def small_chunks(monkeypatch):
    """Three chunks of eight tokens and twelve classes, the last one smaller."""
    monkeypatch.setattr(output_loss, "LOGIT_CHUNK_BYTES", 4 * 12 * 3)


def both(loss_of, *, bias: bool, bf16: bool = False, dtype: torch.dtype = torch.float32):
    """Loss and gradients of torch and of `loss_of`, of states, weight and bias."""
    labels = torch.tensor([3, IGNORED, 11, 0, 7, 7, IGNORED, 1])

    def theirs(states, weight, bias, labels):
        return F.cross_entropy(F.linear(states, weight, bias).float(), labels, ignore_index=IGNORED, reduction="sum")

    found = []
    for loss in (theirs, loss_of):
        torch.manual_seed(0)
        states, weight, shift = (torch.randn(size).to(dtype).requires_grad_() for size in ((8, 6), (12, 6), (12,)))
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            value = loss(states, weight, shift if bias else None, labels)
        (value / 3).backward()
        found.append([value.detach(), states.grad, weight.grad, *([shift.grad] if bias else [])])
    return zip(*found, strict=True)


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize(("bias", "compiled"), [(False, False), (True, False), (True, True)])
def test_it_is_torchs_cross_entropy(bias, compiled):
    for theirs, ours in both(partial(linear_cross_entropy_sum, compiled=compiled), bias=bias):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize(("bf16", "dtype"), [(True, torch.float32), (False, torch.bfloat16)])
def test_in_bfloat16_it_differs_by_rounding(bf16, dtype):
    for theirs, ours in both(linear_cross_entropy_sum, bias=True, bf16=bf16, dtype=dtype):
        assert ours.dtype == theirs.dtype
        # Eight bits of each product, sums of eight.
        torch.testing.assert_close(ours, theirs, rtol=2e-2, atol=2e-2)


def test_classes_are_drawn_by_their_probabilities():
    torch.manual_seed(0)
    logits = torch.randn(600)  # Three blocks, of which the last is not full.
    logits[[0, 255, 256, 599]] = -torch.inf
    num = 60_000
    drawn = draw_classes(logits.expand(num, 600), torch.rand(num, 2))
    found, possible = torch.bincount(drawn, minlength=600), logits.isfinite()
    assert not found[~possible].any()
    assert stats.chisquare(found[possible], num * logits[possible].double().softmax(0)).pvalue > 1e-3
    ends = draw_classes(logits.expand(2, 600), torch.tensor([[0.0, 0.0], [1 - 2**-24, 1 - 2**-24]]))
    assert ends.tolist() == [1, 598]


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_logits_that_are_not_finite_give_classes_all_the_same(value):
    """Training that diverged ends by its loss, which comes after."""
    drawn = draw_classes(torch.full((3, 300), value), torch.rand(3, 2))
    assert bool(((drawn >= 0) & (drawn < 300)).all())


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("compiled", [False, True])
def test_labels_that_are_drawn_on_the_way_are_those_of_the_loss(compiled):
    torch.manual_seed(0)
    states, weight = torch.randn(8, 6), torch.randn(12, 6, requires_grad=True)
    labels, draws = torch.tensor([3, IGNORED, 11, 0, 7, 7, IGNORED, 1]), torch.rand(8, 2)
    wanted = draw_classes(states @ weight.detach().T, draws).where(labels != IGNORED, IGNORED)
    assert not torch.equal(wanted, labels)
    loss = linear_cross_entropy_sum(states, weight, None, labels, draws, compiled=compiled)
    assert torch.equal(labels, wanted)
    torch.testing.assert_close(loss, F.cross_entropy(states @ weight.T, wanted, ignore_index=IGNORED, reduction="sum"))


@pytest.mark.skipif(
    not (torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET")),
    reason="liger's kernels are for GPUs, or for Triton's interpreter (TRITON_INTERPRET=1)",
)
def test_ligers_is_the_same():
    pytest.importorskip("liger_kernel")

    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        for theirs, ours in both(output_loss.liger_sum, bias=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("asking", ["states", "weight", "bias", "states weight", "weight bias", "states bias"])
def test_only_what_asks_gets_a_gradient(asking):
    """That of the others is None, and is not made: the node keeps none."""
    torch.manual_seed(0)
    labels = torch.tensor([3, IGNORED, 11, 0, 7])
    given = {name: torch.randn(size) for name, size in {"states": (5, 6), "weight": (12, 6), "bias": (12,)}.items()}
    found = []
    for names in (given, asking.split()):
        inputs = {name: value.clone().requires_grad_(name in names) for name, value in given.items()}
        loss = linear_cross_entropy_sum(*inputs.values(), labels)
        kept = dict(zip(given, loss.grad_fn.gradients, strict=True))
        assert {name for name, gradient in kept.items() if gradient is not None} == {*names}
        loss.backward()
        found.append({name: value.grad for name, value in inputs.items()})
    whole, part = found
    for name in given:
        if name in asking.split():
            torch.testing.assert_close(part[name], whole[name], rtol=0, atol=0)
        else:
            assert part[name] is None


def test_a_second_backward_pass_is_refused():
    weight = torch.randn(12, 6, requires_grad=True)
    loss = linear_cross_entropy_sum(torch.randn(4, 6), weight, None, torch.arange(4))
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="no second backward pass"):
        loss.backward()


def gpt2() -> GPT2LMHeadModel:
    return GPT2LMHeadModel(GPT2Config(vocab_size=20, n_embd=16, n_layer=1, n_head=2, n_positions=16))


def llama() -> torch.nn.Module:
    return Llama(hidden_size=16, num_layers=1, num_heads=2).build(vocab_size=20, sequence_length=8, seed=0)


def gemma2() -> Gemma2ForCausalLM:
    fields = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = Gemma2Config(vocab_size=20, head_dim=8, num_key_value_heads=2, final_logit_softcapping=5.0, **fields)
    return Gemma2ForCausalLM(config)


@pytest.mark.parametrize(("make", "suits"), [(llama, True), (gpt2, True), (gemma2, False)])
def test_a_models_loss_and_gradients_stay(make, suits):
    model = make().eval()
    names = list(model.state_dict())
    ids = torch.arange(12).reshape(2, 6)
    found = []
    for _ in range(2):
        loss = CausalLM().loss_sum(model, {"input_ids": ids, "labels": ids})
        loss.backward()
        found.append([loss.detach(), *(parameter.grad for parameter in model.parameters())])
        model.zero_grad(set_to_none=True)
        use_loss_layer(model)
    assert isinstance(model.get_output_embeddings(), LossLayer) == suits
    for before, after in zip(*found, strict=True):
        torch.testing.assert_close(after, before)
    assert list(model.state_dict()) == names
    # Without labels it gives logits, as ever.
    assert model(input_ids=ids).logits.shape == (2, 6, 20)
