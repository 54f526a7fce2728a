"""The noise of gradients of small batches: its size, and the gradient's own beside it. Pure arithmetic."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from raysweep.curvature.estimators import at_least

Floats = npt.NDArray[np.float64]


class Noise(NamedTuple):
    """Of gradients of batches of one size."""

    trace: float
    """Tr Sigma, of the covariance of a batch's gradient."""
    signal: float
    """|G|^2 / Tr Sigma, G the gradient of all text; below 0 by chance where it is next to none."""


def noise_and_signal(products: Floats) -> tuple[Noise, Noise]:
    """Tr Sigma and |G|^2 / Tr Sigma of P independent gradients g (McCandlish et al., 2018, appendix A).

    Both sums are unbiased: Tr Sigma = mean |g|^2 - |G|^2, and |G|^2 is the mean of g.h over pairs of two different
    batches. The inverse of their ratio, times a batch's sequences, is the paper's simple noise scale; it is infinite at
    a minimum, where the ratio is 0.

    Args:
        products: g_p.g_q, [P, P]; P at least 3.

    Returns:
        The estimates, and their standard errors by leaving out a batch at a time: the jackknife, which is rather too
        large than too small (Efron and Stein, 1981).

    Raises:
        ValueError: if there are fewer than 3 batches.

    >>> estimate, error = noise_and_signal(np.array([[2.0, 1.0, 1.0], [1.0, 3.0, 1.0], [1.0, 1.0, 4.0]]))
    >>> estimate
    Noise(trace=2.0, signal=0.5)
    """
    num = len(products)
    at_least(3, num, "batches")
    total, diagonal, rows = products.sum(), np.diag(products), products.sum(axis=1)
    # Without batch p its row and its column go.
    totals, squares = total - 2 * rows + diagonal, diagonal.sum() - diagonal
    left = np.array([_noise(*of_others, num - 1) for of_others in zip(totals, squares, strict=True)])
    errors = np.sqrt((num - 1) / num * ((left - left.mean(axis=0)) ** 2).sum(axis=0))
    return Noise(*_noise(total, diagonal.sum(), num)), Noise(*map(float, errors))


def _noise(total: float, squares: float, num: int) -> tuple[float, float]:
    """From |sum g|^2, sum |g|^2 and how many there are."""
    between = (total - squares) / (num * (num - 1))
    trace = squares / num - between
    return float(trace), float(between / trace) if trace > 0 else float("nan")
