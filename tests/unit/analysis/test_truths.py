"""Statistics of indicators are right where the answer is known; the whole table is of benchmarks/indicator_truth.py."""

import numpy as np
import pytest
from benchmarks.indicator_truth import World, below_bayes, coverage, first_few, flagged, mirror_gain


def test_intervals_hold_the_truth():
    # 20 tables of 6 statistics: the mean share has a standard error of 4 % where these agree, and 95 is meant.
    found = coverage(World(24), num=20, num_truth=20)
    assert np.mean([share for _, share in found.values()]) >= 0.86, found


@pytest.mark.parametrize("own", [0.0, 1.0])
def test_intervals_of_the_first_few_hold_the_truth(own):
    # 100 tables: where 95 is true, a share below 88 has a chance of one in 200.
    found = coverage(World(60, seen_rate=own, seen_own=own), first_few, num=100, num_truth=150)
    assert min(share for _, share in found.values()) >= 0.88, found


@pytest.mark.parametrize("seed", range(3))
def test_a_mirror_of_the_rate_adds_nothing(seed):
    assert mirror_gain(48, seed=seed).value == 0
    assert mirror_gain(48, seed=seed, noise=0.5).low <= 0


def test_leaks_are_flagged_and_sound_indicators_are_not():
    assert [flagged(48, seed=seed, leaked=True) for seed in range(10)] == [True] * 10
    assert [flagged(48, seed=seed, leaked=False) for seed in range(10)] == [False] * 10


@pytest.mark.parametrize(("num", "num_indicators"), [(36, 5), (62, 5), (60, 40)])
def test_a_comparer_comes_within_two_points_of_the_best_there_is(num, num_indicators):
    pytest.importorskip("lightgbm", reason="LightGBM, of the extra 'compare', is not installed")
    ours, best = np.mean([below_bayes(num, num_indicators, seed=seed) for seed in range(4)], axis=0)
    assert best - ours <= 0.02
