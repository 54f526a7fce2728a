"""How far a checkpoint lies from those learnt from, and pairs right by it."""

import numpy as np
import pytest

from raysweep.analysis.distances import ENDS, by_distance, distances
from raysweep.analysis.pairwise import IntervalEstimate
from raysweep.analysis.unseen import far_from, learner, on_unseen, random_splits


def test_a_distance_is_to_the_nearest_in_units_of_how_far_these_lie_apart():
    known = np.array([[0.0, 0.0], [2.0, 0.0], [4.0, 0.0]])  # Each sqrt(2) from the next, root mean square.
    values = np.array([[4.0, 6.0], [2.0, 1.0], [np.nan, 4.0], [np.nan, np.nan]])
    # Of the third one indicator alone is known.
    assert distances(values, known) == pytest.approx([3.0, 0.5, 4 / np.sqrt(2), np.nan], nan_ok=True)
    assert np.isnan(distances(values, known[:1])).all()  # One row does not say how far rows lie apart.


def test_ranges_without_pairs_are_left_out():
    found = by_distance(lambda low, high: (int(low == 1), IntervalEstimate(0.8)))
    assert [(each.low, each.high, each.num_pairs, each.accuracy.value) for each in found] == [(1.0, 2.0, 1, 0.8)]


def test_the_pairs_of_all_distances_are_those_that_are_tested():
    pytest.importorskip("lightgbm", reason="LightGBM, of the extra 'compare', is not installed")
    generator = np.random.default_rng(0)
    values = generator.normal(size=(30, 3))
    values[0] = 30.0
    scores, variants = values[:, 0] + generator.normal(size=30), [f"{row}" for row in range(30)]
    splits = random_splits(variants, num=4)
    far = far_from(values, splits)
    for own, split in zip(far, splits, strict=True):
        assert np.flatnonzero(np.isfinite(own)).tolist() == split.test.tolist()
    tested = on_unseen(learner(values, scores, variants), scores, splits, far=far)
    assert sum(each.num_pairs for each in tested.by_distance) == sum(num for _, _, num in tested.by_split)
    assert tested.by_distance[-1].high == ENDS[-1]
    # Those of the one that is far from all others: with each of the rest of its test, half of these in both orders.
    num_with = sum(len(split.test) - 1 for split in splits if 0 in split.test)
    assert tested.by_distance[-1].num_pairs == num_with
    shares = [each.accuracy.value * each.num_pairs for each in tested.by_distance]
    assert sum(shares) / sum(each.num_pairs for each in tested.by_distance) == pytest.approx(
        tested.accuracy.value, abs=0.02
    )
