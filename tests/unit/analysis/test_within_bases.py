"""What goes together within bases: by hand, and by simulation with known answers."""

import math

import numpy as np
import pytest
from scipy import stats

from raysweep.analysis.within_bases import (
    correlation,
    permutation_p,
    residual_ranks,
    student,
    true_spread,
    within_recipes,
    within_recipes_p,
)

RUNS = 500
# 500 runs know a share of 0.95 to 1 point.
COVERAGE = pytest.approx(0.95, abs=4 * (0.95 * 0.05 / RUNS) ** 0.5)


def models(draw, *, bases=3, variants=9, shared=1.0, own=1.0, link=0.0):
    """A measure and a target: both have a part of the variant, and one of the model, the latter linked."""
    fixed = np.random.default_rng(5).normal(size=(2, 1, variants)) * shared
    x = draw.normal(size=(bases, variants))
    y = link * x + (1 - link**2) ** 0.5 * draw.normal(size=(bases, variants))
    return fixed[0] + own * x, fixed[1] + own * y


def test_a_correlation_is_spearmans_within_each_base():
    draw = np.random.default_rng(0)
    measure, target = models(draw, bases=4)
    each = [stats.spearmanr(x, y).statistic for x, y in zip(measure, target, strict=True)]
    found = correlation(measure, target)
    interval = stats.ttest_1samp(each, 0).confidence_interval(0.95)
    assert found.value == pytest.approx(np.mean(each))
    assert (found.low, found.high) == pytest.approx((max(-1, interval.low), min(1, interval.high)))
    # A level of its own in each base is nothing.
    assert correlation(measure + np.arange(4)[:, None] * 100, target) == found
    assert np.isnan(correlation(measure[:2], target[:2]).low)


def test_bases_that_agree_are_not_sure_beyond_all_doubt():
    found = correlation(np.tile(np.arange(4.0), (3, 1)), np.tile(np.arange(4.0), (3, 1)))
    # A standard deviation of 0.2, the distance of 0.8, the next that four ranks can give: 4.303 x 0.2 / sqrt(3).
    assert (found.value, found.low) == pytest.approx((1.0, 1 - 4.303 * 0.2 / 3**0.5), abs=1e-3)
    assert np.isnan(correlation(np.ones((3, 5)), np.random.default_rng(0).random((3, 5))).value)


def test_what_is_given_is_taken_out():
    draw = np.random.default_rng(1)
    loss = draw.normal(size=(3, 12))
    measure, target = np.exp(loss) + 0.05 * draw.normal(size=(2, 3, 12))
    assert correlation(measure, target).value > 0.95
    assert abs(correlation(measure, target, [loss]).value) < 0.75
    ranks = residual_ranks(measure, [loss])
    assert np.abs((ranks * (stats.rankdata(loss, axis=1) - 6.5)).sum(axis=1)).max() < 1e-9


def test_intervals_over_bases_hold_what_they_say():
    draw = np.random.default_rng(2)
    truth = np.mean([correlation(*models(draw, link=0.6)).value for _ in range(2 * RUNS)])
    found = [correlation(*models(draw, link=0.6)) for _ in range(RUNS)]
    assert np.mean([each.low <= truth <= each.high for each in found]) == COVERAGE


@pytest.mark.parametrize("variants", [4, 5])
def test_few_variants_make_no_interval_too_narrow(variants):
    draw = np.random.default_rng(8)
    given = {"variants": variants, "shared": 0.0, "link": 0.95}
    truth = np.mean([correlation(*models(draw, **given)).value for _ in range(RUNS)])
    found = [correlation(*models(draw, **given)) for _ in range(RUNS // 2)]
    assert np.mean([each.low <= truth <= each.high for each in found]) > 0.93


def test_a_bootstrap_of_three_bases_would_not():
    """Why there is none: all 27 samples of three bases, and their middle 95 %."""
    draw = np.random.default_rng(2)
    samples = np.stack(np.meshgrid(*[range(3)] * 3), axis=-1).reshape(-1, 3)
    each = draw.normal(size=(RUNS, 3))
    low, high = np.quantile(each[:, samples].mean(axis=2), [0.025, 0.975], axis=1)
    assert 0.61 < np.mean((low <= 0) & (high >= 0)) < 0.77
    assert student(each[0]).low < low[0]


def test_within_recipes_configuration_and_base_are_partialled_out():
    draw = np.random.default_rng(3)
    of_base, of_recipe = draw.normal(size=(2, 4, 1)) * 50, draw.normal(size=(2, 1, 9)) * 50
    measure, target = of_base + of_recipe + draw.normal(size=(2, 4, 9))
    left = [each - each.mean(0) - each.mean(1, keepdims=True) + each.mean() for each in (measure, target)]
    each = [stats.spearmanr(x, y).statistic for x, y in zip(*left, strict=True)]
    found = within_recipes(measure, target)
    # A sum of 0 over bases leaves four correlations what three independent ones would tell: sqrt(3 / 2).
    half = 1.5**0.5 * stats.t.ppf(0.975, 3) * np.std(each, ddof=1) / 2
    assert found.value == pytest.approx(np.mean(each))
    assert (found.low, found.high) == pytest.approx((max(-1, found.value - half), min(1, found.value + half)))
    assert abs(correlation(measure, target).value - found.value) > 0.05
    # What only the recipe sets has nothing left, whatever rounding makes of it; nor have two bases an interval.
    only = np.tile(of_recipe[0] / 3, (4, 1))
    assert np.isnan(within_recipes(only, target).value)
    assert np.isnan(within_recipes_p(np.stack([only, measure]), target)[1]).tolist() == [True, False]
    assert np.isnan(within_recipes(measure[:2], target[:2]).value)
    assert np.isnan(within_recipes_p(measure[None, :2], target[:2])).all()


def seeds_of_recipes(draw, *, num, bases, variants, link=0.0, alike=0.0):
    """Measures and a target whose recipes and bases differ by far more than seeds; `alike` is shared by half a base."""
    values = (1 - alike) ** 0.5 * draw.normal(size=(num + 1, bases, variants))
    halves = np.arange(variants) >= variants // 2
    values += alike**0.5 * draw.normal(size=(num + 1, bases, 2))[..., halves.astype(int)]
    values[0] = link * values[-1] + (1 - link**2) ** 0.5 * values[0]
    values += 5 * draw.normal(size=(num + 1, 1, variants)) + 5 * draw.normal(size=(num + 1, bases, 1))
    return values[:-1], values[-1]


@pytest.mark.parametrize(("bases", "variants", "alike"), [(3, 5, 0.5), (3, 8, 0.0), (5, 8, 0.5)])
def test_within_recipes_chance_is_found_as_seldom_as_is_said(monkeypatch, bases, variants, alike):
    """Level of p for one measure and for any of five, and of the interval; and of both, whatever seeds share."""
    monkeypatch.setattr("raysweep.analysis.within_bases.NUM_PERMUTATIONS", 200)
    draw = np.random.default_rng(12)
    found = np.zeros((RUNS, 4))
    for run in range(RUNS):
        measures, target = seeds_of_recipes(draw, num=5, bases=bases, variants=variants, alike=alike)
        p, corrected = within_recipes_p(measures, target)
        rho = within_recipes(measures[0], target)
        apart = rho.low > 0 or rho.high < 0
        found[run] = p[0] <= 0.05, (corrected <= 0.05).any(), apart, apart and p[0] <= 0.05
    of_one, of_any, apart, both = found.mean(axis=0)
    # 500 runs know a share of 0.05 to 1 point.
    assert max(of_one, of_any) < (0.15 if alike else 0.08)
    assert 0.02 < apart < 0.09
    assert both < 0.06


@pytest.mark.parametrize(("link", "power"), [(0.6, (0.2, 0.5)), (0.9, (0.8, 1.0))])
def test_within_recipes_three_bases_find_what_is_strong(monkeypatch, link, power):
    monkeypatch.setattr("raysweep.analysis.within_bases.NUM_PERMUTATIONS", 200)
    draw = np.random.default_rng(13)
    given = {"num": 1, "bases": 3, "variants": 8, "link": link}
    truth = np.mean([within_recipes(x[0], y).value for x, y in (seeds_of_recipes(draw, **given) for _ in range(RUNS))])
    found, covered = [], []
    for _ in range(200):  # Which know the power to 4 points.
        measures, target = seeds_of_recipes(draw, **given)
        rho = within_recipes(measures[0], target)
        covered.append(rho.low <= truth <= rho.high)
        found.append(rho.low > 0 and within_recipes_p(measures, target)[1][0] <= 0.05)
    assert power[0] <= np.mean(found) <= power[1]
    assert np.mean(covered) > 0.87


def test_chance_gives_even_p_values_though_seeds_of_a_variant_are_alike(monkeypatch):
    monkeypatch.setattr("raysweep.analysis.within_bases.NUM_PERMUTATIONS", 500)
    draw = np.random.default_rng(4)
    ps, corrected = [], []
    for _ in range(300):
        fixed = draw.normal(size=(6, 1, 8)) * 2  # Another set of variants each time, as chance would bring it.
        values = fixed + draw.normal(size=(6, 3, 8))
        p, of_all = permutation_p(values[:5], values[5])
        ps.append(p[0])
        corrected.append(of_all.min())
    for found in (ps, corrected):
        assert stats.kstest(found, "uniform").pvalue > 0.01


@pytest.mark.parametrize(
    ("bases", "variants", "of_loss"), [(3, 5, 0.0), (3, 5, 3.0), (5, 6, 1.0), (3, 8, 0.0), (3, 8, 3.0)]
)
def test_with_the_loss_given_chance_is_found_no_more_often_than_p_says(monkeypatch, bases, variants, of_loss):
    """Whether or not the loss says something of measures and transfer, which are alike for seeds of a variant."""
    monkeypatch.setattr("raysweep.analysis.within_bases.NUM_PERMUTATIONS", 200)
    draw = np.random.default_rng(9)
    num = 6
    found = np.zeros((RUNS, 2))
    for run in range(RUNS):
        values = 2 * draw.normal(size=(num + 2, 1, variants)) + draw.normal(size=(num + 2, bases, variants))
        loss, target, first = values[0], of_loss * values[0] + values[1], values[2]
        measures = of_loss * loss + np.stack([first, *(0.7 * first + 0.7 * values[3:])])
        p, corrected = permutation_p(measures, target, [loss])
        found[run] = p[0] <= 0.05, (corrected <= 0.05).any()  # Not where none is told.
    # 500 runs know a share of 0.05 to 1 point.
    assert (found.mean(axis=0) < 0.08).all()


def test_what_goes_together_beyond_the_loss_is_found():
    draw = np.random.default_rng(10)
    loss, own = draw.normal(size=(2, 3, 9))
    target = loss + own
    measures = np.stack([loss - 2 * own + 0.3 * draw.normal(size=(3, 9)), loss + 0.3 * draw.normal(size=(3, 9))])
    p, corrected = permutation_p(measures, target, [loss])
    assert corrected[0] < 0.01
    assert p[1] > 0.05
    # Of what the loss nearly orders, with a target that it nearly orders, nothing is told, and it does not count.
    nearly = loss + 0.01 * draw.normal(size=(2, 3, 9))
    assert np.isnan(permutation_p(nearly[:1], nearly[1], [loss])).all()
    assert permutation_p(np.stack([*measures, loss]), target, [loss])[1][:2] == pytest.approx(corrected)


def test_a_strong_measure_among_many_is_found_and_others_are_not():
    draw = np.random.default_rng(6)
    target = draw.normal(size=(1, 8)) + 0.1 * draw.normal(size=(3, 8))
    measures = np.stack([-target + 0.3 * draw.normal(size=(3, 8)), *draw.normal(size=(9, 3, 8))])
    p, corrected = permutation_p(measures, target)
    assert corrected[0] < 0.01
    assert (corrected >= p).all()


@pytest.mark.parametrize(
    ("orders", "expected"), [(([0, 1, 2, 3],) * 3, 2), (([0, 1, 2, 3], [0, 1, 3, 2], [0, 1, 2, 3]), 1)]
)
def test_of_four_variants_all_orders_are_tried(orders, expected):
    """The reverse is as extreme, if all bases share one order."""
    ranks = np.array(orders, dtype=float)
    p, _ = permutation_p(ranks[None], ranks)
    assert p[0] == pytest.approx(expected / 24)


@pytest.mark.parametrize("between", [0.0, 0.5, 2.0])
def test_the_true_spread_is_without_the_noise(between):
    draw = np.random.default_rng(7)

    def simulated():
        models_, draws = draw.normal(size=(3, 9, 1)) * between, 3 * draw.normal(size=(3, 1, 5))
        return true_spread(draw.normal(size=(3, 1, 1)) + models_ + draws + draw.normal(size=(3, 9, 5)))

    found = [simulated() for _ in range(RUNS)]
    covered = np.mean([each.between.low <= between <= each.between.high for each in found])
    if between:
        assert covered == COVERAGE
        assert np.mean([each.between.value**2 for each in found]) == pytest.approx(between**2, rel=0.1)
    else:  # A spread of 0 can be missed on one side alone.
        assert covered == pytest.approx(0.975, abs=0.02)
        assert stats.kstest([each.p for each in found], "uniform").pvalue > 0.01
    assert np.mean([each.noise for each in found]) == pytest.approx(1 / 5**0.5, rel=0.02)


@pytest.mark.parametrize("own", [0.0, 1.0])
def test_the_true_spread_of_one_recipe_is_without_the_recipes(own):
    draw = np.random.default_rng(14)
    recipes, bases = 3 * draw.normal(size=(1, 9, 1)), 3 * draw.normal(size=(3, 1, 1))
    found = [
        true_spread(recipes + bases + own * draw.normal(size=(3, 9, 1)) + draw.normal(size=(3, 9, 5)), of_recipe=True)
        for _ in range(RUNS)
    ]
    covered = np.mean([each.between.low <= own <= each.between.high for each in found])
    assert covered == (COVERAGE if own else pytest.approx(0.975, abs=0.02))
    assert np.mean([each.p <= 0.05 for each in found]) == pytest.approx(1.0 if own else 0.05, abs=0.03)


def test_too_few_to_tell():
    assert true_spread(np.zeros((3, 1, 5))) is None
    assert (
        true_spread(np.where(np.eye(3, 4)[:, :, None] > 0, math.nan, np.random.default_rng(0).random((3, 4, 5))))
        is None
    )
    assert np.isnan(correlation(np.zeros((3, 3)), np.zeros((3, 3))).value)
