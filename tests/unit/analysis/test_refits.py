"""How a statistic of a fit varies: by halves of the variants, where the answer is known, and of few without each."""

import numpy as np
import pytest
from benchmarks.indicator_truth import World, associations, table

from raysweep.analysis.beyond_config import num_parameters
from raysweep.analysis.pairwise import interval, wilson
from raysweep.analysis.refits import FREEDOM, MAX_LEFT_OUT, NUM_PAIRS, parts_of

ALL = np.ones((48, 48), dtype=bool)
"""Pairs: of all variants."""


def test_halves_tell_the_variance_of_a_mean_and_hold_its_chance():
    # 600 tables: the mean variance has a standard error of about 1.5 %, coverage one of 0.9 points.
    num, share = 40, 0.4
    parts = parts_of([f"{row:02}" for row in range(num)], num_parameters=4)
    assert parts.rows.sum(axis=1).tolist() == [num // 2] * (2 * NUM_PAIRS)
    assert not (parts.rows[:NUM_PAIRS] & parts.rows[NUM_PAIRS:]).any()
    held, variances = [], []
    for seed in range(600):
        values = np.clip(share + np.random.default_rng(seed).normal(size=num) / 8, 0, 1)
        halves = np.array([values[rows].mean() for rows in parts.rows])
        found = parts.interval(float(values.mean()), halves, ALL[:num, :num])
        variance = np.mean(np.subtract(*np.split(halves, 2)) ** 2) / 4
        freedom = 1 / (1 / (num - 1) + 1 / FREEDOM)
        assert found == wilson(float(values.mean()), variance, num_clusters=num, freedom=freedom)
        held.append(found.low <= share <= found.high)
        variances.append(variance)
    assert np.mean(variances) == pytest.approx(1 / 64 / num, rel=0.06)
    assert 0.93 <= np.mean(held) <= 0.97


def test_a_statistic_that_most_halves_lack_has_no_interval():
    parts = parts_of([f"{row:02}" for row in range(20)], num_parameters=4)
    values = np.random.default_rng(0).random(2 * NUM_PAIRS)
    values[: NUM_PAIRS // 3] = np.nan
    assert np.isfinite(parts.interval(0.5, values, ALL[:20, :20]).low)
    values[: 2 * NUM_PAIRS // 3] = np.nan
    assert np.isnan(parts.interval(0.5, values, ALL[:20, :20]).low)


def test_few_variants_are_left_out_one_at_a_time():
    parts = parts_of(list("aabbccdde"), num_parameters=4)
    assert parts.rows.sum(axis=1).tolist() == [7, 7, 7, 7, 8]
    assert parts.interval(0.5, np.arange(5) / 9, ALL[:9, :9]) == interval(0.5, np.arange(5) / 9)


@pytest.mark.parametrize("num", [40, 14], ids=["halves", "one at a time"])
def test_variants_without_a_pair_of_what_is_measured_do_not_count(num):
    variants = [f"{row:02}" for row in range(num)]
    parts = parts_of(variants, num_parameters=4)
    by_part = np.random.default_rng(0).random(len(parts.rows)) / 9

    def among(first):
        """The pairs of the first variants."""
        pairs = np.eye(num, dtype=bool)
        pairs[:first, :first] = True
        return pairs

    assert np.isnan(parts.interval(0.5, by_part, among(4)).low)
    some, every = (parts.interval(0.5, by_part, among(first)) for first in (8, num))
    if parts.are_halves:
        variance = np.mean(np.subtract(*np.split(by_part, 2)) ** 2) / 4
        assert some == wilson(0.5, variance, num_clusters=8, freedom=1 / (1 / 7 + 1 / FREEDOM))
    else:
        # Without those that have none the fit is another one, too, so that the variance is of all.
        assert some == wilson(0.5, 13**2 / 14 * by_part.var(ddof=1), num_clusters=8)
    assert some != every


def test_many_variants_are_left_out_in_groups_of_like_size():
    variants = [f"{row:02}" for row in range(99) for _ in range(2)]
    parts = parts_of(variants, num_parameters=99)  # As of a random search, where each has a rate of its own.
    left_out = (~parts.rows).sum(axis=1)
    assert len(parts.rows) == 33 <= MAX_LEFT_OUT
    assert left_out.tolist() == [6] * 33
    assert (~parts.rows).sum(axis=0).tolist() == [1] * 198
    assert (parts.rows[:, ::2] == parts.rows[:, 1::2]).all()


def test_intervals_of_a_fit_on_the_configuration_hold_the_truth_and_are_not_too_wide():
    """By the jackknife, 99 % were held, with intervals of 0.24."""
    found = [associations(table(World(48), np.random.default_rng([7, seed])), "x") for seed in range(40)]
    for estimates in ([each["all together"].accuracy for each in found], [each["x"].added for each in found]):
        truth = np.mean([each.value for each in estimates])
        # Where 95 is true, fewer than 34 of 40 have a chance of one in 300.
        assert sum(each.low <= truth <= each.high for each in estimates) >= 34
        assert np.mean([each.high - each.low for each in estimates]) < 0.21


def test_halves_have_more_variants_than_the_fit_has_parameters():
    variants = [f"{row:02}" for row in range(24)]
    assert parts_of(variants, num_parameters=10).are_halves
    assert not parts_of(variants, num_parameters=11).are_halves
    # Rates and names: an intercept, three more rates, whose order is a function of these, and two more names.
    assert num_parameters(table(World(48), np.random.default_rng(0))[["point.lr", "point.name"]]) == 6
