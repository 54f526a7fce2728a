"""Curvature against closed forms and full matrices, in float64."""

import math

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from raysweep.curvature.operators import hessian_vector_products, inner, mean_token_loss, named_parameters, prepare
from raysweep.curvature.probes import probe_vector
from raysweep.curvature.trace import fisher_trace_unit, hessian_trace_unit, sample_labels, summarize


def some_ids() -> torch.Tensor:
    return torch.randint(0, 7, (2, 5), generator=torch.Generator().manual_seed(3))


def tiny_llama(*, tied: bool = True) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=7, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, initializer_range=0.4, tie_word_embeddings=tied, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    model = LlamaForCausalLM(config).double()
    prepare(model)
    return model


def full_hessian(model, ids) -> torch.Tensor:
    """By forming every column: slow, and simple."""
    parameters = named_parameters(model)
    sizes = [parameter.numel() for parameter in parameters.values()]
    columns = []
    for index in range(sum(sizes)):
        unit = torch.zeros(sum(sizes), dtype=torch.float64)
        unit[index] = 1
        pieces = zip(parameters.items(), unit.split(sizes), strict=True)
        vector = {name: piece.view_as(parameter) for (name, parameter), piece in pieces}
        product = hessian_vector_products(lambda: mean_token_loss(model, ids), parameters, [vector])[0]
        columns.append(torch.cat([product[name].flatten() for name in parameters]))
    return torch.stack(columns)


def test_products_of_a_quadratic_are_its_matrix():
    draw = torch.Generator().manual_seed(0)
    matrix = torch.randn(5, 5, generator=draw, dtype=torch.float64)
    matrix = matrix + matrix.T
    x = torch.randn(5, generator=draw, dtype=torch.float64, requires_grad=True)
    vectors = [{"x": torch.randn(5, generator=draw, dtype=torch.float64)} for _ in range(3)]
    products = hessian_vector_products(lambda: x @ matrix @ x / 2, {"x": x}, vectors)
    for vector, product in zip(vectors, products, strict=True):
        torch.testing.assert_close(product["x"], matrix @ vector["x"], rtol=1e-12, atol=1e-12)


def test_trace_of_softmax_regression_is_its_closed_form():
    # L(W) = CE(softmax(W x), y): the Hessian is (diag p - p p') (x) x x', its trace (1 - |p|^2) |x|^2.
    draw = torch.Generator().manual_seed(0)
    weight = torch.randn(4, 3, generator=draw, dtype=torch.float64).requires_grad_()
    x = torch.randn(3, generator=draw, dtype=torch.float64)
    loss = lambda: torch.nn.functional.cross_entropy(weight @ x, torch.tensor(2))  # noqa: E731
    trace = 0.0
    for index in range(12):
        unit = torch.zeros(12, dtype=torch.float64)
        unit[index] = 1
        vector = {"w": unit.view(4, 3)}
        trace += inner(vector, hessian_vector_products(loss, {"w": weight}, [vector])[0])
    p = (weight @ x).softmax(dim=0)
    assert trace == pytest.approx(float((1 - p.square().sum()) * x.square().sum()), rel=1e-12)


@pytest.mark.parametrize("tied", [True, False])
def test_hessian_of_a_transformer_is_symmetric_and_the_estimate_unbiased(tied):
    model, ids = tiny_llama(tied=tied), some_ids()
    hessian = full_hessian(model, ids)
    # The model computes its norms in float32, at 6e-8 of numbers of order 1.
    torch.testing.assert_close(hessian, hessian.T, rtol=0, atol=1e-5)
    truth = float(hessian.trace())
    units = [hessian_trace_unit(model, ids, seed=0, unit=unit) for unit in range(200)]
    estimate = summarize(units)
    assert abs(estimate.mean - truth) < 4 * estimate.stderr
    # Var of a Rademacher probe: 2 (|H|_F^2 - sum of squared diagonal).
    variance = 2 * float(hessian.square().sum() - hessian.diagonal().square().sum())
    assert np.var(units, ddof=1) == pytest.approx(variance, rel=0.5)


def test_fisher_is_the_gauss_newton_trace():
    model, ids = tiny_llama(), some_ids()
    parameters = list(named_parameters(model).values())
    truth = 0.0
    for row in ids:
        logits = model(input_ids=row[None], use_cache=False).logits[0, :-1]
        for position in logits:
            p = position.softmax(dim=0).detach()
            for label, probability in enumerate(p):
                gradients = torch.autograd.grad(-position.log_softmax(0)[label], parameters, retain_graph=True)
                truth += float(probability) * sum(float(g.square().sum()) for g in gradients) / ids[:, 1:].numel()
    estimate = summarize([fisher_trace_unit(model, ids, seed=0, unit=unit) for unit in range(300)])
    assert abs(estimate.mean - truth) < 4 * estimate.stderr
    assert estimate.stderr < 0.1 * truth


def test_ghost_norms_and_gradients_give_one_fisher_trace(monkeypatch, caplog):
    import raysweep.curvature.trace as trace

    model, ids = tiny_llama(), some_ids()
    ghost = fisher_trace_unit(model, ids, seed=0, unit=3)

    def refuse(*args):
        raise ValueError("no rule")

    monkeypatch.setattr(trace, "GhostNorms", refuse)
    with caplog.at_level("INFO"):
        assert fisher_trace_unit(model, ids, seed=0, unit=3) == pytest.approx(ghost, rel=1e-5)
    assert "one sequence at a time: no rule" in caplog.text


def test_sampled_labels_follow_the_distribution():
    logits = torch.log(torch.tensor([0.5, 0.25, 0.25])).expand(40_000, 3)
    counts = torch.bincount(sample_labels(logits, seed=1), minlength=3) / 40_000
    # Standard error of a share: 0.0025 at most.
    torch.testing.assert_close(counts, torch.tensor([0.5, 0.25, 0.25]), atol=0.01, rtol=0)


def test_probes_are_keyed_by_seed_probe_and_name():
    like = {"a": torch.zeros(1000), "b": torch.zeros(1000)}
    first = probe_vector(like, seed=0, probe=0)
    assert torch.equal(first["a"], probe_vector({"a": like["a"]}, seed=0, probe=0)["a"])
    assert not torch.equal(first["a"], first["b"])
    assert not torch.equal(first["a"], probe_vector(like, seed=0, probe=1)["a"])
    assert not torch.equal(first["a"], probe_vector(like, seed=1, probe=0)["a"])
    assert set(first["a"].tolist()) == {-1.0, 1.0}
    assert abs(float(first["a"].mean())) < 4 / math.sqrt(1000)


def test_intervals_are_calibrated():
    draw = np.random.default_rng(0)
    inside = 0
    for _ in range(500):
        estimate = summarize(draw.normal(3.0, 2.0, size=30).tolist())
        inside += abs(estimate.mean - 3.0) < 2.045 * estimate.stderr  # Student's t, 29 degrees of freedom
    assert 0.93 <= inside / 500 <= 0.97


def test_what_cannot_be_measured_is_named():
    x = torch.ones(2, requires_grad=True)
    unused = torch.ones(2, requires_grad=True)
    with pytest.raises(ValueError, match="parameter 'unused' takes no part"):
        hessian_vector_products(lambda: x.square().sum(), {"x": x, "unused": unused}, [{"x": x, "unused": x}])
    with pytest.raises(ValueError, match="the loss is nan"):
        hessian_vector_products(lambda: x.sum() * math.nan, {"x": x}, [{"x": x}])
    with pytest.raises(ValueError, match="at least one unit"):
        summarize([])


def test_loss_is_hugging_faces():
    model, ids = tiny_llama(), some_ids()
    assert float(mean_token_loss(model, ids)) == pytest.approx(float(model(ids, labels=ids).loss), abs=1e-5)


def test_attention_is_switched_and_dropout_off(caplog):
    model = LlamaForCausalLM(
        LlamaConfig(vocab_size=7, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2)
    )
    model.train()
    model.set_attn_implementation("sdpa")
    with caplog.at_level("INFO"):
        prepare(model)
    assert "switched from sdpa to eager" in caplog.text
    assert not model.training
