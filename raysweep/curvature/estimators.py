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
    """Mean of v'Av over random v, which is Tr A in expectation (Hutchinson, 1990).

    With signs the variance of one is 2 (|A|_F^2 - sum_i A_ii^2), with normal entries 2 |A|_F^2.

    Args:
        operator: symmetric, of any definiteness.
        num_products: probe vectors, a product each; at least 2.
        seed: of the vectors.
        distribution: of their entries.

    Returns:
        The trace, its standard error over vectors, and num_products - 1 degrees of freedom.

    Raises:
        ValueError: if there are fewer than 2 products.

    >>> diagonal = torch.arange(1.0, 51.0)
    >>> matrix = Operator(lambda block: diagonal[:, None] * block, size=50)
    >>> hutchinson(matrix, num_products=4).mean  # Signs have no variance on a diagonal matrix.
    1275.0
    """
    at_least(2, num_products)
    probes = random_block(operator, num_products, seed=seed, distribution=distribution)
    return Estimate.of(_forms(probes, operator.columns(probes)))


def hutch_plus_plus(operator: Operator, *, num_products: int, seed: int = 0) -> Estimate:
    """Hutch++ (Meyer et al., 2021, arXiv 2010.09649): exact on a random low-rank part, probes for what is left.

    Tr A = Tr Q'AQ + Tr (I - QQ')A(I - QQ'), with Q an orthonormal basis of A S, S random: their algorithm 1. A third of
    the products makes the low-rank part, a third its trace, a third the probes.

    Args:
        operator: symmetric.
        num_products: in all; at least 6.
        seed: of all vectors.

    Returns:
        The trace; `stderr` is that of the probes of the rest, given the low-rank part.

    Raises:
        ValueError: if there are fewer than 6 products.

    >>> factor = torch.randn(50, 3, generator=torch.Generator().manual_seed(0))
    >>> matrix = Operator(lambda block: factor @ (factor.T @ block), size=50)
    >>> estimate = hutch_plus_plus(matrix, num_products=12)  # Rank 3, of which 4 vectors find all.
    >>> abs(estimate.mean / float(factor.square().sum()) - 1) < 1e-5
    True
    """
    at_least(6, num_products)
    rank, rest = num_products // 3, num_products - 2 * (num_products // 3)
    basis = torch.linalg.qr(operator.columns(random_block(operator, rank, seed=key(seed, "low rank")))).Q
    trace = float((basis * operator.columns(basis)).sum(dtype=torch.float64))
    probes = random_block(operator, rest, seed=key(seed, "rest"))
    # x = (I - QQ')v, so that x'Ax is the form of what is left, with no product more.
    probes -= basis @ (basis.T @ probes)
    estimate = Estimate.of(_forms(probes, operator.columns(probes)))
    return Estimate(trace + estimate.mean, estimate.stderr, estimate.df)


def xtrace(operator: Operator, *, num_products: int, seed: int = 0) -> Estimate:
    """XTrace (Epperly, Tropp, Webber, 2024, arXiv 2301.07825): each vector probes what the others' range leaves.

    With Q the orthonormal basis of A times all vectors, that of all but the i-th is Q(I - s s')Q', where s is the
    normalised i-th column of R^-T. Vectors are Gaussian, scaled to the sphere of the complement (their section 2.3).

    Args:
        operator: symmetric.
        num_products: in all, two for each vector; at least 4, at most twice the matrix's size.
        seed: of the vectors.

    Returns:
        The trace; `stderr` is the spread of the estimates over the vectors, as theirs; they are not quite independent.

    Raises:
        ValueError: if there are fewer than 4 products, or more than twice the matrix's size.

    >>> values = 0.5 ** torch.arange(50.0)
    >>> matrix = Operator(lambda block: values[:, None] * block, size=50)
    >>> abs(xtrace(matrix, num_products=20).mean - 2.0) < 0.01
    True
    """
    at_least(4, num_products)
    num = num_products // 2
    if num > operator.size:
        raise ValueError(f"num_products {num_products}: a matrix of size {operator.size} takes at most twice as many")
    omega = random_block(operator, num, seed=seed, distribution="gaussian")
    y = operator.columns(omega)
    factors = torch.linalg.qr(y)
    q, r = factors.Q, factors.R.double()
    # Singular where the vectors span all of the range; what is left of it is then zero.
    r = r + torch.eye(num, dtype=r.dtype, device=r.device) * torch.finfo(y.dtype).eps * r.norm()
    # Column i is orthogonal to all columns of R but the i-th: the direction that only vector i has brought.
    s = torch.linalg.inv(r).T
    s = s / s.norm(dim=0)
    h = (q.T @ operator.columns(q)).double()
    w = (q.T @ omega).double()
    x = w - s * (s * w).sum(dim=0)
    # x'Hx - 2 r'x + w'r is v'(I - P) A (I - P) v of each vector v, P the others' projection; A v = Q r is at hand.
    forms = (w * r).sum(dim=0) - 2 * (r * x).sum(dim=0) + (x * (h @ x)).sum(dim=0)
    left = omega.double().square().sum(dim=0) - x.square().sum(dim=0)
    forms = forms * (operator.size - num + 1) / left
    return Estimate.of((h.trace() - (s * (h @ s)).sum(dim=0) + forms).tolist())


def frobenius_norm(operator: Operator, *, num_products: int, seed: int = 0) -> Estimate:
    """Frobenius norm: the root of the mean of |Av|^2 over random signs v; its error by the delta method.

    Args:
        operator: symmetric.
        num_products: probe vectors; at least 2.
        seed: of the vectors.

    Raises:
        ValueError: if there are fewer than 2 products.

    >>> matrix = Operator(lambda block: torch.tensor([3.0, 4.0])[:, None] * block, size=2)
    >>> frobenius_norm(matrix, num_products=4).mean
    5.0
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
