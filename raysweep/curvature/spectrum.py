"""Eigenvalues of curvature by the Lanczos process: the largest, and the density of all.

Every new vector is made orthogonal to all earlier ones, twice: without that, rounding brings copies of eigenvalues
(Golub and Van Loan, 2013, section 10.3). So all are kept: `num_steps` times the memory of the parameters.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from raysweep.curvature.averages import Estimate
from raysweep.curvature.estimators import random_vector
from raysweep.curvature.linear import Operator

Tensor = torch.Tensor
Array = np.ndarray[tuple[int, ...], np.dtype[np.float64]]


@dataclass(frozen=True)
class Tridiagonal:
    """A = Q T Q' + rest: `diagonal` [m] and `beside` [m - 1] of T, the orthonormal `basis` Q [size, m]."""

    diagonal: Array
    beside: Array
    basis: Tensor
    rest: float
    """Norm of what the last product had outside of the basis."""

    def eigen(self) -> tuple[Array, Array]:
        """Ritz values in ascending order, and the eigenvectors of T as columns."""
        from scipy.linalg import eigh_tridiagonal

        values, vectors = eigh_tridiagonal(self.diagonal, self.beside)
        return values, vectors


def lanczos(operator: Operator, start: Tensor, *, num_steps: int) -> Tridiagonal:
    """The Lanczos process from `start`: Q'AQ = T, tridiagonal, Q a basis of start, A start, A^2 start, ...

    Args:
        operator: symmetric.
        start: [size], not zero.
        num_steps: products; it ends earlier where an invariant subspace is found.

    >>> matrix = Operator(lambda block: torch.tensor([1.0, 2.0])[:, None] * block, size=2)
    >>> values, _ = lanczos(matrix, torch.ones(2), num_steps=2).eigen()
    >>> [round(float(value), 4) for value in values]
    [1.0, 2.0]
    """
    basis = torch.empty(min(num_steps, operator.size), operator.size, dtype=operator.dtype, device=operator.device)
    basis[0] = start / start.norm()
    diagonal: list[float] = []
    beside: list[float] = []
    scale = 0.0
    for step in range(len(basis)):
        found = operator.product(basis[step])
        diagonal.append(float((found * basis[step]).sum(dtype=torch.float64)))
        scale = max(scale, float(found.norm()))
        for _ in range(2):  # Once leaves what rounding left along the basis; twice is enough (see the module).
            found = found - basis[: step + 1].T @ (basis[: step + 1] @ found)
        rest = float(found.norm())
        # Nothing is left outside but rounding: the basis spans an invariant subspace, whose eigenvalues are exact.
        if step + 1 == len(basis) or rest <= 10 * torch.finfo(operator.dtype).eps * scale:
            break
        beside.append(rest)
        basis[step + 1] = found / rest
    num = len(diagonal)
    return Tridiagonal(np.array(diagonal), np.array(beside), basis[:num].T, rest)


@dataclass(frozen=True)
class Eigenpairs:
    """Eigenvalues of the largest size, that first; vectors [size, k]; |Av - lambda v| of each.

    >>> matrix = Operator(lambda block: torch.tensor([1.0, -3.0, 2.0])[:, None] * block, size=3)
    >>> [round(float(value), 3) for value in top_eigenpairs(matrix, 2).values]
    [-3.0, 2.0]
    """

    values: Array
    vectors: Tensor
    residuals: Array


def top_eigenpairs(operator: Operator, num: int, *, num_steps: int | None = None, seed: int = 0) -> Eigenpairs:
    """Eigenvalues and vectors of the largest size, by Lanczos from a random vector.

    A residual bounds the distance of its value from an eigenvalue (Parlett, 1998, theorem 4.5.1): how far the process
    has converged, no standard error; more steps make it smaller, down to rounding. Copies of a multiple eigenvalue are
    found once.

    Args:
        operator: symmetric.
        num: how many.
        num_steps: products to take; None: 10 for each, and 20 more.
        seed: of the vector it starts from.

    Raises:
        ValueError: if `num` is not between 1 and the operator's size.

    >>> pairs = top_eigenpairs(curvature_operator(model, batches[:1]), 2)
    >>> list(abs(pairs.values)) == sorted(abs(pairs.values), reverse=True)
    True
    """
    if not 1 <= num <= operator.size:
        raise ValueError(f"num {num}: there are {operator.size} eigenvalues")
    start = random_vector(operator, 0, seed=seed, distribution="gaussian")
    found = lanczos(operator, start, num_steps=max(num, num_steps or 10 * num + 20))
    values, inner, residuals = largest(found, num)
    return Eigenpairs(values, found.basis @ torch.from_numpy(inner).to(found.basis), residuals)


def largest(found: Tridiagonal, num: int) -> tuple[Array, Array, Array]:
    """Ritz values of the largest size [k <= num], the eigenvectors of T [m, k], and the residuals [k].

    Residuals are by T, which is exact for the rounded products alone: at least the rounding of the largest value in the
    operator's precision, whatever lies below it.
    """
    values, vectors = found.eigen()
    best = np.argsort(-np.abs(values))[:num]
    inner = np.ascontiguousarray(vectors[:, best])
    rounding = torch.finfo(found.basis.dtype).eps * float(np.abs(values).max())
    return values[best], inner, np.maximum(np.abs(found.rest * inner[-1]), rounding)


@dataclass(frozen=True)
class Density:
    """The distribution of eigenvalues: `nodes` and `weights` [num_vectors, m], each row's weights summing to 1.

    Rows are quadratures from one random vector each; a mean over them estimates the mean of f over all eigenvalues.

    >>> density = Density.of([(np.array([1.0, 3.0]), np.array([0.5, 0.5]))] * 2, size=10)
    >>> density.total("x").mean
    20.0
    """

    nodes: Array
    weights: Array
    size: int

    @staticmethod
    def of(rows: Sequence[tuple[Array, Array]], size: int) -> Density:
        """From the nodes and weights of each vector; shorter rows are filled up with zeros, of weight 0."""
        width = max(len(nodes) for nodes, _ in rows)
        nodes, weights = (
            np.array([np.pad(each, (0, width - len(each))) for each in part]) for part in zip(*rows, strict=True)
        )
        return Density(nodes, weights, size)

    def total(self, f: str) -> Estimate:
        """Sum over all eigenvalues of "x" (the trace), "abs" or "square", with the error over vectors."""
        values = {"x": self.nodes, "abs": np.abs(self.nodes), "square": np.square(self.nodes)}[f]
        rows = self.size * (self.weights * values).sum(axis=1)
        return Estimate.of(rows)

    def at(self, grid: Array, *, width: float) -> Array:
        """Smoothed by a Gaussian of that standard deviation; integrates to 1 over all reals. Like `grid`."""
        off = (grid[:, None, None] - self.nodes) / width
        bumps: Array = (np.exp(-np.square(off) / 2) * self.weights).sum(axis=(1, 2))
        return bumps / (len(self.nodes) * width * math.sqrt(2 * math.pi))

    @property
    def effective_rank(self) -> float:
        """Exponential of the entropy of |eigenvalue| / sum (Roy and Vetterli, 2007): how many directions carry it."""
        sizes, weights = np.abs(self.nodes), self.size * self.weights / len(self.nodes)
        share = sizes / (weights * sizes).sum()
        with np.errstate(divide="ignore", invalid="ignore"):
            terms = np.where(share > 0, share * np.log(share), 0.0)
        return float(np.exp(-(weights * terms).sum()))

    @property
    def stable_rank(self) -> float:
        """(sum |eigenvalue|)^2 / sum of squares: the same with the 2-norm in place of the entropy; never larger."""
        return self.total("abs").mean ** 2 / self.total("square").mean


def spectral_density(operator: Operator, *, num_steps: int = 30, num_vectors: int = 4, seed: int = 0) -> Density:
    """Stochastic Lanczos quadrature (Ubaru, Chen, Saad, 2017; Ghorbani et al., 2019, arXiv 1901.10159).

    Each random vector's Gauss quadrature has the Ritz values of its Lanczos process as nodes, and the squares of the
    first entries of T's eigenvectors as weights.

    Args:
        operator: symmetric.
        num_steps: Lanczos steps of each vector, a product each.
        num_vectors: random vectors; 2 at least for an error.
        seed: of the vectors.

    >>> matrix = Operator(lambda block: 2 * block, size=20)
    >>> density = spectral_density(matrix, num_steps=3, num_vectors=2)
    >>> round(density.total("x").mean, 3), round(density.effective_rank, 3)
    (40.0, 20.0)
    """
    starts = (random_vector(operator, index, seed=seed, distribution="gaussian") for index in range(num_vectors))
    rows = [quadrature(lanczos(operator, start, num_steps=num_steps)) for start in starts]
    return Density.of(rows, operator.size)


def quadrature(found: Tridiagonal) -> tuple[Array, Array]:
    """Nodes and weights [m] of Gauss's quadrature for the start vector's spectral measure (Golub and Welsch, 1969)."""
    values, vectors = found.eigen()
    return values, np.square(vectors[0])
