"""The trace of a gradient's covariance and the signal beside it, against draws whose law is known."""

import numpy as np
import pytest

from raysweep.curvature.gradient_noise import noise_and_signal


def test_estimates_are_unbiased_and_errors_no_smaller_than_those_of_repetitions():
    draw = np.random.default_rng(0)
    num, size = 12, 40
    mean, spread = draw.normal(size=size) * 0.5, draw.uniform(0.5, 1.5, size=size)
    trace, found, errors = float((spread**2).sum()), [], []
    for _ in range(400):
        gradients = mean + spread * draw.normal(size=(num, size))
        estimate, error = noise_and_signal(gradients @ gradients.T)
        found.append(estimate)
        errors.append(error)
    for column, truth in enumerate((trace, mean @ mean / trace)):
        values, told = np.array(found)[:, column], np.array(errors)[:, column]
        # A ratio is off by about the square of its relative error.
        assert values.mean() == pytest.approx(truth, abs=4 * values.std() / 20 + 0.02 * truth)
        # The jackknife of products of pairs is rather too large (Efron and Stein, 1981): here by a quarter.
        assert 0.8 * values.var() < (told**2).mean() < 1.7 * values.var()


def test_no_gradient_at_all_has_no_signal():
    estimate, _ = noise_and_signal(np.diag([1.0, 2.0, 3.0]))
    assert estimate == (2.0, 0.0)
    assert np.isnan(noise_and_signal(np.ones((3, 3)))[0].signal)  # Nor noise: all are the same.
    with pytest.raises(ValueError, match="batches 2: at least 3"):
        noise_and_signal(np.ones((2, 2)))
