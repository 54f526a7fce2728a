"""Held-out losses: the mean is over what is predicted, the gap to the optimum has the error of a ratio."""

import math

import numpy as np
import pytest

from raysweep.train.evaluate import BATCH, HeldoutLosses


def test_mean_is_over_predicted_tokens():
    assert HeldoutLosses(np.array([6.0, 2.0]), np.array([3, 1])).mean == 2.0
    assert math.isnan(HeldoutLosses(np.array([0.0]), np.array([0])).mean)
    assert math.isnan(HeldoutLosses(np.array([np.inf]), np.array([1])).mean)


def test_gap_is_the_loss_above_the_optimum():
    optimum = np.ones(2 * BATCH + 3)
    counts = np.array([BATCH, BATCH, 3])
    losses = counts * 1.0 + np.array([1.0, 3.0, -0.5])
    gap, stderr = HeldoutLosses(losses, counts).above(optimum)
    assert gap == pytest.approx(3.5 / (2 * BATCH + 3))
    left = np.array([1.0, 3.0, -0.5]) - gap * counts
    assert stderr == pytest.approx(math.sqrt(3 / 2 * (left**2).sum()) / (2 * BATCH + 3))
    assert math.isnan(HeldoutLosses(losses[:1], counts[:1]).above(optimum[:BATCH])[1])


def test_error_of_a_gap_is_its_spread_over_draws():
    draw = np.random.default_rng(0)
    gaps, errors = [], []
    for _ in range(500):
        counts = draw.integers(1, 20, size=16)
        optimum = draw.exponential(size=(16, BATCH))
        noise = np.array([draw.normal(0.1, 0.5, size=num).sum() for num in counts])
        gap, stderr = HeldoutLosses(optimum.sum(axis=1) + noise, counts).above(optimum.ravel())
        gaps.append(gap)
        errors.append(stderr)
    # 500 draws know the spread to 3 %; that of 16 batches is a few per cent low, as a ratio's is.
    assert np.mean(gaps) == pytest.approx(0.1, abs=4 * np.std(gaps) / 500**0.5)
    assert np.mean(errors) == pytest.approx(np.std(gaps), rel=0.12)
