"""Likelihoods of classes by the distance to the mean of a few examples of each, made honest by those examples."""

from __future__ import annotations

import math

import torch


def fitted_temperature(states: torch.Tensor, labels: torch.Tensor) -> float:
    """t >= 0 of p(c | x) ~ exp(-t |x - m_c|^2), m_c the mean of class c, that foretells examples left out best.

    Prototypes are those of Snell et al. (2017, 1703.05175), calibrated by one number (temperature scaling, Guo et al.,
    2017, 1706.04599). A normal density would take t from the variance: directions of states are not independent, so
    that in hundreds of dimensions it is sure of what is wrong. The j-th example of every class is left out at a time,
    not one alone: its class would have a mean of fewer examples than the others, which is farther from anything.
    Few examples may all be foretold, by which t had no upper end. So targets are Platt's (1999), as if each class had
    been seen once more: (n + 1) / (n + C) for the right one of C, 1 / (n + C) for another, of n examples.

    Args:
        states: [n, d], examples.
        labels: [n], in [0, C).

    Returns:
        In one over the square of the unit of states, so that another scale of them changes no likelihood. 0, all
        classes alike, where distances do not tell; NaN where no class has two examples, or states are no numbers.

    >>> states = torch.tensor([[0.0], [1.0], [4.0], [5.0]])
    >>> round(fitted_temperature(states, torch.tensor([0, 0, 1, 1])), 3)
    0.087
    """
    states, labels = states.cpu().double(), labels.cpu()
    is_class = torch.nn.functional.one_hot(labels).double()
    place = (is_class.cumsum(dim=0) * is_class).sum(dim=1)
    squares, right, is_there = [], [], []
    for each in range(1, int(place.max()) + 1):
        left_out = place == each
        given = is_class[~left_out]
        counts = given.sum(dim=0)
        # A class without another example has no mean: it is not asked for, nor foretold.
        asked = left_out & (counts[labels] > 0)
        means = given.T @ states[~left_out] / counts.clamp(min=1)[:, None]
        # Not by inner products, which lose the differences of states that are far from 0.
        apart = torch.cdist(states[asked], means, compute_mode="donot_use_mm_for_euclid_dist")
        squares.append(apart.square())
        right.append(is_class[asked])
        is_there.append((counts > 0).expand_as(apart))
    return _likeliest(torch.cat(squares), torch.cat(right), torch.cat(is_there))


def _likeliest(squares: torch.Tensor, right: torch.Tensor, is_there: torch.Tensor) -> float:
    """t >= 0 at which smoothed targets are likeliest, the only such one as their likelihood is concave in t.

    Args:
        squares: distances squared, [n, C].
        right: 1 at the right class, else 0, [n, C].
        is_there: whether the class has a mean for that example, [n, C].
    """
    if not len(squares):
        return math.nan
    targets = (len(right) * right + is_there.double()) / (len(right) + is_there.sum(dim=1, keepdim=True))
    # How much farther than the nearest: as likely, and exact where distances differ by little.
    nearest = squares.masked_fill(~is_there, math.inf).min(dim=1, keepdim=True).values
    farther = (squares - nearest).masked_fill(~is_there, 0.0)
    scale = float(farther.mean())
    if not scale > 0:  # All as near, or no numbers.
        return scale
    farther /= scale

    def slope(t: float) -> float:
        """Of the log-likelihood, by t."""
        foretold = (-t * farther).masked_fill(~is_there, -math.inf).softmax(dim=1)
        return float(((foretold - targets) * farther).sum())

    if slope(0.0) <= 0:
        return 0.0
    high = 1.0
    while slope(high) > 0:
        high *= 2
    low = 0.0
    for _ in range(60):  # Bits of a float and some.
        middle = (low + high) / 2
        low, high = (middle, high) if slope(middle) > 0 else (low, middle)
    return low / scale
