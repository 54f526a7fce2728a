"""What units of a trace compute, against full matrices."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tiny_models import CAUSAL, STYLES, batch_for, build, full_hessian, matrices, small

import raysweep.curvature.units as units
from raysweep.curvature.differences import step_for
from raysweep.curvature.language import prepare, targets, token_logits
from raysweep.curvature.operators import MovableParameters, named_parameters
from raysweep.curvature.units import Unit, fisher_unit, probe_unit, response_unit, sample_labels


@pytest.mark.parametrize("style", STYLES)
def test_probes_are_unbiased_with_the_variance_that_theory_gives(style):
    model, batch = small(style)
    hessian, gauss_newton = matrices(model, batch)
    movable = MovableParameters(named_parameters(model), 1e-3)

    def probes(products, num):
        given = {"seed": 0, "products": products, "movable": movable}
        return [probe_unit(model, batch, Unit("probe", 0, draw), **given) for draw in range(num)]

    found = probes("exact", 200)
    tokens = found[0]["num_tokens"]
    assert tokens == (targets(model, batch) != -100).sum()
    for names, matrix in ((("gauss_newton",), gauss_newton), (("gauss_newton", "residual"), hessian)):
        values = np.array([sum(unit[name] for name in names) for unit in found]) / tokens
        assert abs(values.mean() - float(matrix.trace())) < 4 * values.std(ddof=1) / math.sqrt(200)
        # Var of v'Av for signs: 2 (|A|_F^2 - sum of squared diagonal).
        variance = 2 * float(matrix.square().sum() - matrix.diagonal().square().sum())
        assert values.var(ddof=1) == pytest.approx(variance, rel=0.5)
    # Differences over this step are off from exact products with the same vectors by a hundredth of that trace at most.
    room = 0.01 * float(gauss_newton.trace()) * tokens
    for products in ("logit_differences", "gradient_differences"):
        for name in ("gauss_newton", "residual"):
            off = [one[name] - exact[name] for one, exact in zip(probes(products, 20), found[:20], strict=True)]
            assert abs(np.mean(off)) < 4 * np.std(off, ddof=1) / math.sqrt(20) + room
    start = 0
    for name, parameter in named_parameters(model).items():
        values = np.array([unit[f"parameter/{name}"] / tokens for unit in found])
        stop = start + parameter.numel()
        truth = float(hessian.diagonal()[start:stop].sum())
        # Some blocks have no variance but rounding.
        assert abs(values.mean() - truth) < 4.5 * values.std(ddof=1) / math.sqrt(200) + 1e-4
        start = stop


@pytest.mark.parametrize("sampling", ["sequence", "token"])
@pytest.mark.parametrize("style", STYLES)
def test_fisher_draws_are_unbiased_for_the_gauss_newton_trace(style, sampling):
    model, batch = small(style)
    _, gauss_newton = matrices(model, batch)
    found = [fisher_unit(model, batch, Unit("fisher", 0, draw), seed=0, sampling=sampling) for draw in range(100)]
    values = np.array([unit["fisher"] / unit["num_tokens"] for unit in found])
    stderr = values.std(ddof=1) / math.sqrt(len(values))
    assert abs(values.mean() - float(gauss_newton.trace())) < 4 * stderr
    assert stderr < 0.15 * float(gauss_newton.trace())


def test_empirical_fisher_is_of_the_data():
    model, batch = small()
    found = fisher_unit(model, batch, Unit("fisher", 0, 0), seed=0, labels="data")
    truth = 0.0
    for row in batch["input_ids"]:
        loss = F.cross_entropy(token_logits(model, {"input_ids": row[None]})[0], row[1:], reduction="sum")
        truth += sum(float(g.square().sum()) for g in torch.autograd.grad(loss, list(model.parameters())))
    assert found["fisher"] == pytest.approx(truth, rel=1e-5)


@pytest.mark.parametrize("style", CAUSAL)
def test_hessian_is_the_fisher_where_the_model_is_the_truth(style):
    # All texts of two tokens after a first one, each weighted by the model's own probability.
    model = build(style, hidden=4, vocab=4, layers=1).double()
    prepare(model)
    parameters = named_parameters(model)
    texts = torch.cartesian_prod(torch.tensor([1]), torch.arange(4), torch.arange(4))
    batch = {"input_ids": texts}

    def log_likelihood():
        logits = token_logits(model, batch)
        return -F.cross_entropy(logits.flatten(0, 1), texts[:, 1:].flatten(), reduction="none").view(-1, 2).sum(dim=1)

    weights = log_likelihood().detach().exp()
    assert float(weights.sum()) == pytest.approx(1)
    loss = lambda: -(weights * log_likelihood()).sum() / 2  # noqa: E731
    hessian = full_hessian(loss, parameters)
    fisher = 0.0
    for weight, each in zip(weights, log_likelihood(), strict=True):
        gradients = torch.autograd.grad(each, list(parameters.values()), retain_graph=True)
        fisher += float(weight) * sum(float(g.square().sum()) for g in gradients) / 2
    assert float(hessian.trace()) == pytest.approx(fisher, rel=1e-5)
    movable = MovableParameters(parameters, 1e-4)
    # And the residual that control variates are made of has mean nought there, text by text of the model's own.
    residuals = np.zeros(len(texts))
    for index in range(len(texts)):
        one = {"input_ids": texts[index : index + 1]}
        given = {"seed": 0, "products": "logit_differences", "movable": movable}
        residuals[index] = probe_unit(model, one, Unit("probe", 0, 0), **given)["residual"]
    assert abs(float(weights.numpy() @ residuals)) < 1e-3 * np.abs(residuals).max()


def test_ghost_norms_and_gradients_give_one_fisher_trace(monkeypatch, caplog):
    model, batch = small()
    ghost = fisher_unit(model, batch, Unit("fisher", 2, 1), seed=0)

    def refuse(*args):
        raise ValueError("no rule")

    monkeypatch.setattr(units, "GhostNorms", refuse)
    with caplog.at_level("INFO"):
        slow = fisher_unit(model, batch, Unit("fisher", 2, 1), seed=0)
    assert slow == pytest.approx(ghost, rel=1e-4)
    assert "one sequence at a time: no rule" in caplog.text


def test_sampled_labels_follow_the_distribution():
    p = torch.tensor([0.5, 0.25, 0.25]).expand(40_000, 3)
    counts = torch.bincount(sample_labels(p, seed=1), minlength=3) / 40_000
    # Standard error of a share: 0.0025 at most.
    torch.testing.assert_close(counts, torch.tensor([0.5, 0.25, 0.25]), atol=0.01, rtol=0)


def test_a_batch_whose_loss_is_not_finite_is_named():
    model, batch = small()
    with torch.no_grad():
        model.lm_head.weight[0, 0] = math.nan
    movable = MovableParameters(named_parameters(model), 1e-3)
    with pytest.raises(ValueError, match=r"batch 7: .* is nan"):
        probe_unit(model, batch, Unit("probe", 7, 0), seed=0, products="logit_differences", movable=movable)
    with pytest.raises(ValueError, match=r"batch 8: .* is nan"):
        fisher_unit(model, batch, Unit("fisher", 8, 0), seed=0)


def test_exact_products_that_are_wrong_are_found_out(monkeypatch):
    model, batch = small()
    movable = MovableParameters(named_parameters(model), 1e-3)
    given = {"seed": 0, "products": "exact", "movable": movable, "check": True}
    probe_unit(model, batch, Unit("probe", 0, 0), **given)

    class Cut(torch.autograd.Function):
        """Its tangents, too, can be differentiated only once, and nothing tells."""

        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            ctx.save_for_forward(x)
            return x.square()

        @staticmethod
        def backward(ctx, gradient):
            return 2 * ctx.saved_tensors[0].detach() * gradient

        @staticmethod
        def jvp(ctx, tangent):
            return (2 * ctx.saved_tensors[0] * tangent).detach()

    monkeypatch.setattr(model.model.layers[0].mlp.act_fn, "forward", Cut.apply)
    with pytest.raises(ValueError, match=r"no right second derivative, .* measure with logit differences"):
        probe_unit(model, batch, Unit("probe", 0, 0), **given)


@pytest.mark.parametrize("style", STYLES)
def test_how_far_the_logits_move_is_about_the_gauss_newton_form(style):
    model, batch = small(style)
    movable = MovableParameters(named_parameters(model), math.nan)
    given = {"seed": 1, "movable": movable, "distribution": "rademacher"}
    moved = response_unit(model, batch, Unit("response", 0, 0), **given)
    exact = probe_unit(model, batch, Unit("probe", 0, 0), products="exact", **given)
    assert moved["gauss_newton"] == pytest.approx(exact["gauss_newton"], rel=0.2)
    assert moved["num_tokens"] == exact["num_tokens"]


@pytest.mark.parametrize("style", ["gpt2", "bert"])
def test_a_padding_token_that_is_read_counts_for_every_kind_of_product(style):
    model = build(style, hidden=4, vocab=5, layers=1)
    model.get_input_embeddings().padding_idx = 2
    prepare(model)
    model.double()
    batch = batch_for(model)
    assert (batch["input_ids"] == 2).any()
    given = {"seed": 1, "movable": MovableParameters(named_parameters(model), 1e-4)}
    exact, *differences = (
        probe_unit(model, batch, Unit("probe", 0, 0), products=products, **given)
        for products in ("exact", "logit_differences", "gradient_differences")
    )
    for found in differences:
        for name in ("gauss_newton", "residual"):
            assert found[name] == pytest.approx(exact[name], rel=1e-3, abs=1e-3 * exact["gauss_newton"])


def test_no_step_for_weights_of_nought():
    model, batch = small()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    movable = MovableParameters(named_parameters(model), math.nan)
    with pytest.raises(ValueError, match="the chosen parameters are all 0"):
        response_unit(model, batch, Unit("response", 0, 0), seed=1, movable=movable, distribution="rademacher")


def test_no_step_without_a_trace():
    with pytest.raises(ValueError, match=r"no step for differences: Gauss-Newton trace 0\.0"):
        step_for(0.0, 1.0)
