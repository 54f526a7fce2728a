"""Regrets' intervals reach farther up the longer the upper tail of the scores."""

import numpy as np
import pytest

from raysweep.analysis.regrets import LONGEST, best_of_variants, few_stand_apart, regret_interval, upper_tail
from raysweep.analysis.selection import halves, select

NAMES = [f"{row:03}" for row in range(60)]


def test_a_tail_is_as_long_as_upper_scores_are_far_from_the_median():
    places = (np.arange(2000) + 0.5) / 2000
    exponential = -np.log(1 - places)
    shares = np.array([0.05, 0.1, 0.2])
    exact = (-np.log(shares) - np.log(2)).sum() / (np.log(2) + np.log(1 - shares)).sum()
    assert upper_tail(exponential) == pytest.approx(exact, rel=0.01)
    assert upper_tail(5 + 3 * exponential) == pytest.approx(upper_tail(exponential))
    assert upper_tail(-exponential) == 1.0
    assert upper_tail(np.zeros(20)) == upper_tail(np.zeros(0)) == 1.0
    assert upper_tail(np.maximum(exponential - 1, 0)) == LONGEST


def test_a_variant_counts_by_its_best_checkpoint():
    best, index = best_of_variants(np.array([1.0, 5.0, 2.0, 3.0]), ["b", "a", "b", "a"])
    assert best.tolist() == [5.0, 2.0]
    assert index.tolist() == [1, 0, 1, 0]


def test_an_upper_end_may_lie_past_what_the_table_shows():
    short, long = (regret_interval(0.8, 0.01, num_clusters=30, freedom=29, high=1.0, tail=tail) for tail in (1.0, 3.0))
    assert long.low == short.low < 0.8 < short.high < 1.1
    assert long.high == pytest.approx(0.8 + 3 * 2.045 * 0.1, abs=1e-3)
    difference = regret_interval(-0.2, 0.01, num_clusters=30, freedom=29, low=-1.0, high=1.0, tail=3.0)
    assert -1.0 < difference.low < -0.2 < difference.high == pytest.approx(-0.2 + 3 * 2.045 * 0.1, abs=1e-3)
    assert np.isnan(regret_interval(0.8, 0.01, num_clusters=2, freedom=1, high=1.0, tail=3.0).high)


def test_intervals_of_a_useless_indicator_hold_the_regret_of_log_normal_scores():
    # 200 tables: where 95 is true, a share below 90.5 has a chance of one in 400. By Wilson's interval alone it is 70.
    drawn, found = halves(NAMES, 100), []
    for number in range(200):
        generator = np.random.default_rng([3, number])
        scores, indicator = np.exp(0.8 * generator.normal(size=60)), generator.normal(size=60)
        found.append(select(indicator, scores, drawn, places=[1])[0].regret)
    truth, stated = np.mean([each.value for each in found]), [each for each in found if not np.isnan(each.low)]
    assert np.mean([each.low <= truth <= each.high for each in stated]) >= 0.905
    assert np.mean([each.high for each in stated]) < 4 * truth
    assert len(stated) >= 150


def test_intervals_are_of_sweeps_in_which_no_few_stand_apart():
    # 100 tables, half of which have a score in a hundred that is far above all others: of these none has an interval.
    # Those of the others hold the regret of sweeps without such; a share below 0.88 has a chance of one in 400.
    drawn, stated, apart = halves(NAMES, 100), [], []
    for number in range(100):
        generator = np.random.default_rng([3, number])
        scores, indicator = generator.normal(size=(2, 60))
        scores += 5 * (scores > 2.2)
        found = select(indicator, scores, drawn, places=[1])[0].regret
        (stated if scores.max() < 5 else apart).append(found)
    assert min(len(stated), len(apart)) > 30
    assert np.isnan([each.low for each in apart]).all()
    generator = np.random.default_rng(0)
    scores = generator.normal(size=(20_000, 30))
    scores = scores[scores.max(axis=1) < 2.2]
    truth = (scores.max(axis=1) - scores[:, 0]).mean()
    assert np.mean([each.low <= truth <= each.high for each in stated]) >= 0.88


def test_few_that_stand_apart_are_few_and_low_scores_do_not_hide_them():
    others = np.linspace(0, 1, 24)
    assert few_stand_apart(np.append(others, 2.1))
    assert few_stand_apart(np.array([*others, *np.linspace(2.1, 2.2, 5)]))
    assert not few_stand_apart(np.append(others, 1.9))
    assert not few_stand_apart(np.array([*others, *np.linspace(2.1, 2.2, 6)]))
    assert few_stand_apart(np.array([*others, 2.1, -50.0]))
    assert not few_stand_apart(np.zeros(24))
    assert few_stand_apart(np.array([*np.zeros(24), 1.0]))
    assert np.isnan(upper_tail(np.append(others, 2.1)))
