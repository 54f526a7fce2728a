"""Traces of a symmetric operator from products with random vectors.

`adaptive.py` is what measures a language model: it spreads its work over the text as well. These are for a fixed
matrix, and the low-rank ones pay where a few large eigenvalues make the trace or an error below about 2 % is wanted.
"""

from __future__ import annotations

import torch

from raysweep.curvature.averages import Estimate
from raysweep.curvature.linear import Operator
from raysweep.curvature.probes import key, probe_vector
from raysweep.curvature.settings import Distribution

Tensor = torch.Tensor


def random_vector(operator: Operator, index: int, *, seed: int, distribution: Distribution = "rademacher") -> Tensor:
    """A probe vector [size], a function of the seed and its index."""
    like = {"": torch.empty(operator.size, dtype=operator.dtype, device=operator.device)}
    return probe_vector(like, seed=seed, probe=index, distribution=distribution)[""]


def random_block(operator: Operator, num: int, *, seed: int, distribution: Distribution = "rademacher") -> Tensor:
    """The first `num` of them as columns [size, num]."""
    rows = [random_vector(operator, index, seed=seed, distribution=distribution) for index in range(num)]
    return torch.stack(rows).T


def hutchinson(
    operator: Operator, *, num_products: int, seed: int = 0, distribution: Distribution = "rademacher"
) -> Estimate:
    """Mean of v'Av over random v (Hutchinson, 1990).

    Raises:
        ValueError: if there are fewer than 2 products.
    """
    at_least(2, num_products)
    probes = random_block(operator, num_products, seed=seed, distribution=distribution)
    return Estimate.of(_forms(probes, operator.columns(probes)))


def hutch_plus_plus(operator: Operator, *, num_products: int, seed: int = 0) -> Estimate:
    """Hutch++ (Meyer et al., 2021, arXiv 2010.09649): exact on a random low-rank part, probes for what is left.

    Their algorithm 1. A third of the products makes the low-rank part, a third its trace, a third the probes.
    `stderr` is that of the probes of the rest, given the low-rank part.

    Raises:
        ValueError: if there are fewer than 6 products.
    """
    at_least(6, num_products)
    rank, rest = num_products // 3, num_products - 2 * (num_products // 3)
    basis = torch.linalg.qr(operator.columns(random_block(operator, rank, seed=key(seed, "low rank")))).Q
    trace = float((basis * operator.columns(basis)).sum(dtype=torch.float64))
    probes = random_block(operator, rest, seed=key(seed, "rest"))
    probes -= basis @ (basis.T @ probes)
    estimate = Estimate.of(_forms(probes, operator.columns(probes)))
    return Estimate(trace + estimate.mean, estimate.stderr, estimate.df)


def xtrace(operator: Operator, *, num_products: int, seed: int = 0) -> Estimate:
    """XTrace (Epperly, Tropp, Webber, 2024, arXiv 2301.07825): each vector probes what the others' range leaves.

    With Q the orthonormal basis of A times all vectors, that of all but the i-th is Q(I - s s')Q', where s is the
    normalised i-th column of R^-T. Vectors are Gaussian, scaled to the sphere of the complement (their section 2.3).
    `stderr` is the spread of the estimates over the vectors, as theirs; they are not quite independent.

    Raises:
        ValueError: if there are fewer than 4 products, or more than twice the matrix's size.
    """
    at_least(4, num_products)
    num = num_products // 2
    if num > operator.size:
        raise ValueError(f"num_products {num_products}: a matrix of size {operator.size} takes at most twice as many")
    omega = random_block(operator, num, seed=seed, distribution="gaussian")
    y = operator.columns(omega)
    factors = torch.linalg.qr(y)
    q, r = factors.Q, factors.R.double()
    # Singular where the vectors span all of the range; what is left of it is then nought.
    r = r + torch.eye(num, dtype=r.dtype, device=r.device) * torch.finfo(y.dtype).eps * r.norm()
    s = torch.linalg.inv(r).T
    s = s / s.norm(dim=0)
    h = (q.T @ operator.columns(q)).double()
    w = (q.T @ omega).double()
    x = w - s * (s * w).sum(dim=0)
    forms = (w * r).sum(dim=0) - 2 * (r * x).sum(dim=0) + (x * (h @ x)).sum(dim=0)
    left = omega.double().square().sum(dim=0) - x.square().sum(dim=0)
    forms = forms * (operator.size - num + 1) / left
    return Estimate.of((h.trace() - (s * (h @ s)).sum(dim=0) + forms).tolist())


def frobenius_norm(operator: Operator, *, num_products: int, seed: int = 0) -> Estimate:
    """Frobenius norm: the root of the mean of |Av|^2; its error by the delta method.

    Raises:
        ValueError: if there are fewer than 2 products.
    """
    at_least(2, num_products)
    block = operator.columns(random_block(operator, num_products, seed=seed))
    return Estimate.of(_forms(block, block)).root()


def _forms(left: Tensor, right: Tensor) -> list[float]:
    """Inner products of the columns of two blocks."""
    return [float((one * other).sum(dtype=torch.float64)) for one, other in zip(left.T, right.T, strict=True)]


def at_least(least: int, num: int, name: str = "num_products") -> None:
    """Raises ValueError if there are fewer."""
    if num < least:
        raise ValueError(f"{name} {num}: at least {least}")
