"""Trace estimators and spectra: matrices that are known, and the full Hessian of a small transformer."""

from functools import partial

import numpy as np
import pytest
import torch
from tiny_models import batch_for, build, full_hessian

from raysweep.curvature.estimators import frobenius_norm, hutch_plus_plus, hutchinson, random_block, xtrace
from raysweep.curvature.language import mean_token_loss, prepare
from raysweep.curvature.linear import Operator, curvature_operator
from raysweep.curvature.operators import named_parameters
from raysweep.curvature.spectrum import lanczos, spectral_density, top_eigenpairs

ESTIMATORS = {
    "hutchinson": hutchinson,
    "gaussian": partial(hutchinson, distribution="gaussian"),
    "hutch++": hutch_plus_plus,
    "xtrace": xtrace,
}


def symmetric(eigenvalues: torch.Tensor, seed: int = 0) -> torch.Tensor:
    draw = torch.Generator().manual_seed(seed)
    q = torch.linalg.qr(torch.randn(len(eigenvalues), len(eigenvalues), generator=draw, dtype=torch.float64)).Q
    return q @ torch.diag(eigenvalues.double()) @ q.T


def operator_of(matrix: torch.Tensor) -> Operator:
    return Operator(lambda vector: matrix @ vector, len(matrix), matrix.dtype)


@pytest.mark.parametrize("name", ESTIMATORS)
def test_traces_are_unbiased_and_their_errors_are_what_they_say(name):
    matrix = symmetric(torch.tensor([(-1.0) ** i * 20 / (1 + i) for i in range(40)]))
    truth = float(matrix.trace())
    runs = [ESTIMATORS[name](operator_of(matrix), num_products=12, seed=seed) for seed in range(200)]
    means = np.array([run.mean for run in runs])
    spread = means.std(ddof=1)
    assert abs(means.mean() - truth) < 4 * spread / 200**0.5
    # Of 200 runs: the spread itself is known to 5 %, the mean square of the stated errors to about 10 %.
    stated = np.sqrt(np.mean([run.stderr**2 for run in runs]))
    assert stated == pytest.approx(spread, rel=0.3)


def test_low_rank_matrices_are_exact_for_the_methods_that_find_their_range():
    matrix = symmetric(torch.tensor([5.0, -3.0, 2.0] + [0.0] * 47))
    for estimator in (hutch_plus_plus, xtrace):
        found = estimator(operator_of(matrix), num_products=18)
        assert found.mean == pytest.approx(4.0, abs=1e-6)
        assert found.stderr < 1e-6


def test_low_rank_methods_pay_where_a_few_eigenvalues_make_the_trace():
    matrix = symmetric(torch.tensor([2.0**-i for i in range(60)]))
    errors = {
        name: np.std([ESTIMATORS[name](operator_of(matrix), num_products=24, seed=s).mean for s in range(40)])
        for name in ("hutchinson", "hutch++", "xtrace")
    }
    assert errors["hutch++"] < 0.1 * errors["hutchinson"]
    assert errors["xtrace"] < 0.1 * errors["hutchinson"]


def test_frobenius_norm():
    matrix = symmetric(torch.tensor([3.0, -1.0, 0.5] * 15))
    runs = [frobenius_norm(operator_of(matrix), num_products=30, seed=seed) for seed in range(100)]
    truth = float(matrix.norm())
    spread = np.std([run.mean for run in runs], ddof=1)
    assert np.mean([run.mean for run in runs]) == pytest.approx(truth, abs=0.02 * truth)
    assert np.mean([run.stderr for run in runs]) == pytest.approx(spread, rel=0.3)


def test_probe_blocks_are_keyed_by_index():
    operator = operator_of(torch.eye(9, dtype=torch.float64))
    assert torch.equal(random_block(operator, 2, seed=1), random_block(operator, 5, seed=1)[:, :2])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (partial(hutchinson, num_products=1), "num_products 1: at least 2"),
        (partial(hutch_plus_plus, num_products=5), "at least 6"),
        (partial(xtrace, num_products=2), "at least 4"),
        (partial(xtrace, num_products=30), "at most twice"),
        (partial(top_eigenpairs, num=10), "there are 9 eigenvalues"),
    ],
)
def test_too_few_products_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call(operator_of(torch.eye(9, dtype=torch.float64)))


@pytest.mark.parametrize("style", ["llama", "gpt2"])
def test_spectrum_of_a_transformer_is_that_of_its_full_hessian(style):
    model = build(style, hidden=8, vocab=7, layers=1, positions=8).double()
    prepare(model)
    batches = [batch_for(model, num=2), batch_for(model, num=1, seed=2)]
    parameters = named_parameters(model)
    whole = sum(
        full_hessian(lambda batch=batch: mean_token_loss(model, batch), parameters) * share
        for batch, share in zip(batches, (2 / 3, 1 / 3), strict=True)
    )
    values, vectors = torch.linalg.eigh(whole)
    operator = curvature_operator(model, batches)
    # Llama's norms compute in float32, whatever the model.
    near = 1e-4 if style == "llama" else 1e-7
    block = random_block(operator, 4, seed=1)
    products = whole @ block
    for found in (operator.columns(block), torch.stack([operator.product(vector) for vector in block.T], dim=1)):
        torch.testing.assert_close(found, products, rtol=0, atol=near * float(products.abs().max()))
    found = top_eigenpairs(operator, 5, num_steps=120)
    best = values.abs().argsort(descending=True)[:5]
    assert found.values == pytest.approx(values[best].numpy(), rel=near)
    assert bool((found.residuals < near * values.abs().max().item()).all())
    for index in range(5):
        assert abs(float(found.vectors[:, index] @ vectors[:, best[index]])) == pytest.approx(1, abs=near)
    # As products are those with the full matrix, its own do, at a thousandth of the time.
    density = spectral_density(operator_of(whole), num_steps=60, num_vectors=8)
    trace, square = density.total("x"), density.total("square")
    assert abs(trace.mean - float(whole.trace())) < 4 * trace.stderr
    assert abs(square.mean - float(whole.square().sum())) < 4 * square.stderr
    frobenius = frobenius_norm(operator_of(whole), num_products=40)
    assert abs(frobenius.mean - float(whole.norm())) < 4 * frobenius.stderr
    exact = Density_of(values.numpy())
    assert density.effective_rank == pytest.approx(exact.effective_rank, rel=0.15)
    assert density.stable_rank == pytest.approx(exact.stable_rank, rel=0.2)


def Density_of(values: np.ndarray):
    from raysweep.curvature.spectrum import Density

    return Density(values[None], np.full((1, len(values)), 1 / len(values)), len(values))


def test_ranks_of_known_spectra():
    flat = Density_of(np.array([2.0, -2.0, 2.0, 0.0]))
    assert flat.effective_rank == pytest.approx(3)
    assert flat.stable_rank == pytest.approx(3)
    steep = Density_of(np.array([100.0, 1e-9, 1e-9]))
    assert steep.effective_rank == pytest.approx(1, abs=1e-6)
    assert steep.total("x").mean == pytest.approx(100)


def test_density_integrates_to_one_and_sits_where_eigenvalues_are():
    matrix = symmetric(torch.cat([torch.full((90,), 1.0), torch.full((10,), 8.0)]))
    density = spectral_density(operator_of(matrix), num_steps=10, num_vectors=20)
    grid = np.linspace(-2, 12, 1401)
    heights = density.at(grid, width=0.2)
    assert float(np.trapezoid(heights, grid)) == pytest.approx(1, abs=1e-3)
    above = float(np.trapezoid(heights[grid > 4], grid[grid > 4]))
    assert above == pytest.approx(0.1, abs=0.04)


def test_lanczos_keeps_its_basis_orthogonal_and_brings_no_copies():
    # One eigenvalue far out: without re-orthogonalisation it would come back after about 20 steps.
    matrix = symmetric(torch.cat([torch.tensor([1000.0]), torch.linspace(0, 1, 149)])).float()
    operator = operator_of(matrix)
    found = lanczos(operator, random_block(operator, 1, seed=0)[:, 0], num_steps=80)
    off = found.basis.T @ found.basis - torch.eye(found.basis.shape[1])
    assert float(off.abs().max()) < 1e-5
    values = found.eigen()[0]
    assert int((values > 500).sum()) == 1


def test_lanczos_ends_where_the_space_does():
    matrix = torch.diag(torch.tensor([1.0, 1.0, 4.0, 4.0], dtype=torch.float64))
    found = lanczos(operator_of(matrix), torch.ones(4, dtype=torch.float64), num_steps=4)
    assert found.eigen()[0] == pytest.approx([1.0, 4.0])
    assert found.basis.shape == (4, 2)


def test_differences_and_the_gauss_newton_matrix_have_spectra_too():
    model = build("gpt2", hidden=8, vocab=7, layers=1).double()
    prepare(model)
    batches = [batch_for(model)]
    exact = top_eigenpairs(curvature_operator(model, batches), 2, num_steps=60)
    near = top_eigenpairs(curvature_operator(model, batches, products="gradient_differences"), 2, num_steps=60)
    assert near.values == pytest.approx(exact.values, rel=1e-5)
    gauss_newton = top_eigenpairs(curvature_operator(model, batches, matrix="gauss_newton"), 3, num_steps=60)
    assert bool((gauss_newton.values > 0).all())
