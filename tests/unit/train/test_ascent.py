"""Steps of several gradients, each by a naive reference: plain torch on a float64 model, in one process."""

import math

import numpy as np
import pytest
import torch

from raysweep.objectives.base import IGNORED
from raysweep.objectives.causal_lm import CausalLM
from raysweep.objectives.masked_lm import MaskedLM
from raysweep.objectives.output_loss import use_loss_layer
from raysweep.train.ascent import DrawnLabels, Step
from raysweep.train.engines import PlainEngine
from raysweep.train.flat import ASAM, SAM, GradientAgreement, TracePenalty
from raysweep.train.micro_batches import Cutter
from raysweep.train.models import Bert, Llama
from raysweep.train.optimizers import SGD
from raysweep.worker import Worker

NUM, VOCABULARY, LR = 6, 11, 0.1
IDS = np.random.default_rng(0).integers(0, VOCABULARY, size=(NUM, 7))
SGD_STEP = SGD(name="sgd", lr=LR, momentum=0.0)


def tiny_model() -> torch.nn.Module:
    model = Llama(hidden_size=8, num_layers=1, num_heads=2).build(vocab_size=VOCABULARY, sequence_length=7, seed=0)
    with torch.no_grad():
        for parameter in model.parameters():  # Far from the flat beginning.
            parameter.mul_(3)
    return model.double()


def loss_of(model, rows=slice(None), labels=None):
    """Mean over tokens, by torch's own cross-entropy: ours has no second derivative."""
    ids = torch.from_numpy(IDS[rows])
    logits = model(input_ids=ids).logits[:, :-1].flatten(0, 1)
    return torch.nn.functional.cross_entropy(logits, ids[:, 1:].flatten() if labels is None else labels)


def gradient_of(model, loss, **given):
    return torch.autograd.grad(loss, list(model.parameters()), **given)


def flat_of(parts):
    return torch.cat([each.detach().flatten() for each in parts])


def move(model, directions, length=1.0):
    with torch.no_grad():
        for parameter, direction in zip(model.parameters(), directions, strict=True):
            parameter.add_(direction, alpha=float(length))


def taken(method, *, micro=None, number=0, domains=None):
    """The direction that a step of plain descent goes along, and the loss that it tells."""
    model, worker = tiny_model(), Worker(micro_batch_sequences=micro)
    before = flat_of(model.parameters())
    engine = PlainEngine(model, objective=CausalLM(), optimizer=SGD_STEP, clip_norm=None, bf16=False, worker=worker)
    batch = {"input_ids": IDS, "labels": IDS} | ({} if domains is None else {"domains": domains})
    step = Step(
        engine,
        batch,
        objective=CausalLM(),
        cutter=Cutter(worker, num_sequences=NUM),
        worker=worker,
        draws=4,
        common_draws=5,
        number=number,
        multiplier=1.0,
    )
    loss, norm = method.take(step)
    found = (before - flat_of(model.parameters())) / LR
    assert float(norm) == pytest.approx(float(found.norm()), rel=1e-9)
    return found, float(loss)


@pytest.mark.parametrize("part", [1.0, 0.4])
@pytest.mark.parametrize("micro", [None, 2])
def test_sam_goes_down_the_gradient_above(part, micro):
    found, loss = taken(SAM(name="sam", rho=0.3, part=part), micro=micro)
    model, rows = tiny_model(), slice(math.ceil(part * NUM))
    wanted_loss = loss_of(model, rows)
    up = gradient_of(model, wanted_loss)
    move(model, up, 0.3 / flat_of(up).norm())
    wanted = flat_of(gradient_of(model, loss_of(model)))
    torch.testing.assert_close(found, wanted, rtol=1e-8, atol=1e-10)
    assert loss == pytest.approx(float(wanted_loss.detach()), rel=1e-6)


def test_asam_moves_weights_by_their_size():
    found, _ = taken(ASAM(name="asam", rho=0.7, eta=0.02))
    model = tiny_model()
    up = gradient_of(model, loss_of(model))
    sizes = [parameter.detach().abs() + 0.02 for parameter in model.parameters()]
    norm = flat_of([size * each for size, each in zip(sizes, up, strict=True)]).norm()
    move(model, [size**2 * each for size, each in zip(sizes, up, strict=True)], 0.7 / norm)
    torch.testing.assert_close(found, flat_of(gradient_of(model, loss_of(model))), rtol=1e-8, atol=1e-10)


def test_cheap_sam_is_plain_between():
    every_third = SAM(name="sam", rho=0.3, every=3)
    model = tiny_model()
    plain = flat_of(gradient_of(model, loss_of(model)))
    for number in (1, 2):
        torch.testing.assert_close(taken(every_third, number=number)[0], plain, rtol=1e-8, atol=1e-10)
    assert not torch.allclose(taken(every_third, number=3)[0], plain, rtol=1e-3)


def drawn_from(ids, labels, seed=5):
    """A batch of which labels are drawn by a seed, as those of a step."""
    draws = np.random.default_rng(seed).random((NUM, IDS.shape[1], 2), dtype=np.float32)[: len(ids)]
    return {"input_ids": ids, "labels": labels, "draws": torch.from_numpy(draws)}


def drawn_loss(model, rows, seed=5):
    """Mean loss of the labels that are drawn by a seed."""
    ids = torch.from_numpy(IDS[rows])
    drawn = DrawnLabels(CausalLM())
    drawn.loss_sum(model, drawn_from(ids, ids, seed))
    return loss_of(model, rows, labels=drawn._kept[0][:, :-1].flatten())


@pytest.mark.parametrize("micro", [None, 2])
def test_a_trace_penalty_is_the_gradient_of_its_estimate(micro):
    method = TracePenalty(name="trace_penalty", weight=0.01, rho=1e-4, part=0.5)
    found, loss = taken(method, micro=micro)
    model = tiny_model()
    model.config._attn_implementation = "eager"  # The fused one has no second derivative.
    wanted_loss = loss_of(model)
    scores = gradient_of(model, drawn_loss(model, slice(3)), create_graph=True)
    estimate = 18 * sum((each**2).sum() for each in scores)
    wanted = flat_of(gradient_of(model, wanted_loss)) + 0.01 * flat_of(gradient_of(model, estimate))
    # Differences over rho are off by the order of rho (0.002 here), and of float32 over it.
    torch.testing.assert_close(found, wanted, rtol=0, atol=0.01 * float(wanted.abs().max()))
    assert loss == pytest.approx(float(wanted_loss.detach()), rel=1e-6)


def test_what_a_trace_penalty_estimates_is_the_fisher_trace():
    model = tiny_model()
    ids = torch.from_numpy(IDS[:1])
    logs = model(input_ids=ids).logits[0, :-1].log_softmax(-1)
    exact = sum(
        float(log.detach().exp() * flat_of(gradient_of(model, log, retain_graph=True)).square().sum()) / 6
        for log in logs.flatten()
    )
    found = [
        6 * float(flat_of(gradient_of(model, drawn_loss(model, slice(1), seed))).square().sum()) for seed in range(300)
    ]
    assert abs(np.mean(found) - exact) < 4 * np.std(found) / math.sqrt(len(found))
    assert np.std(found) / math.sqrt(len(found)) < 0.1 * exact


def test_labels_are_drawn_alike_within_the_output_layer():
    model, ids = tiny_model().float(), torch.from_numpy(IDS)
    found = []
    for _ in range(2):
        drawn = DrawnLabels(CausalLM())
        loss = drawn.loss_sum(model, drawn_from(ids, ids))
        found.append([drawn._kept[0], loss.detach(), *gradient_of(model, loss)])
        drawn.again()
        torch.testing.assert_close(drawn.loss_sum(model, {"input_ids": ids, "labels": ids}).detach(), loss.detach())
        use_loss_layer(model)
    for outside, inside in zip(*found, strict=True):
        torch.testing.assert_close(inside, outside)


def test_a_masked_models_labels_are_drawn_where_it_predicts():
    spec = Bert(name="bert", hidden_size=8, num_layers=1, num_heads=2)
    model, labels = spec.build(vocab_size=VOCABULARY, sequence_length=7, seed=0), torch.full((2, 7), IGNORED)
    labels[0, 3] = labels[1, 5] = 4
    drawn = DrawnLabels(MaskedLM(name="masked_lm"))
    drawn.loss_sum(model, drawn_from(torch.from_numpy(IDS[:2]), labels))
    assert torch.equal(drawn._kept[0] != IGNORED, labels != IGNORED)
    assert int((labels == 4).sum()) == 2  # The batch's own stay.


def test_gradient_agreement_is_the_gradient_of_the_cosine():
    domains = np.array([0, 1, 0, 1, 1, 0])
    found, loss = taken(GradientAgreement(name="gradient_agreement", weight=0.5, rho=1e-4), domains=domains)
    model = tiny_model()
    model.config._attn_implementation = "eager"
    wanted_loss = loss_of(model)
    one, other = (
        torch.cat([each.flatten() for each in gradient_of(model, loss_of(model, domains == which), create_graph=True)])
        for which in (0, 1)
    )
    penalty = -0.5 * (one @ other) / (one.norm() * other.norm())
    wanted = flat_of(gradient_of(model, wanted_loss)) + flat_of(gradient_of(model, penalty))
    torch.testing.assert_close(found, wanted, rtol=0, atol=0.01 * float(wanted.abs().max()))
    assert loss == pytest.approx(float(wanted_loss.detach()), rel=1e-6)


def test_a_batch_of_one_domain_is_stepped_plainly():
    model = tiny_model()
    found, _ = taken(GradientAgreement(name="gradient_agreement"), domains=np.zeros(NUM, np.int64))
    torch.testing.assert_close(found, flat_of(gradient_of(model, loss_of(model))), rtol=1e-8, atol=1e-10)
