"""Recall, regret and NDCG of the first few, beside a naive reference; pairs by their difference."""

import math

import numpy as np
import pytest

from raysweep.analysis.gaps import gap_pairs
from raysweep.analysis.score_differences import between
from raysweep.analysis.selection import halves, select


def naive(indicator, scores, k):
    """(recall, regret, NDCG) of one table, whose indicator has no ties."""
    ours, best = (sorted(range(len(scores)), key=lambda row, by=by: -by[row])[:k] for by in (indicator, scores))
    top = max(scores[row] for row in ours)

    def gain(rows):
        return sum(scores[row] / math.log2(2 + place) for place, row in enumerate(rows))

    return len(set(ours) & set(best)) / k, max(scores) - top, gain(ours) / gain(best)


def test_means_over_halves_of_the_variants():
    generator = np.random.default_rng(0)
    scores = generator.random(20)
    scores[0], scores[1] = 0.0, 1.0  # Gains are then the scores themselves.
    indicator = scores + generator.normal(size=20) / 3
    variants = [f"{row // 2:02}" for row in range(20)]
    drawn = halves(variants, 200)
    assert (drawn.rows[:200] + drawn.rows[200:] == 1).all()  # The two of a pair have nothing in common.
    assert (drawn.rows.sum(axis=1) == 10).all()
    for each in select(indicator, scores, drawn):
        expected = [naive(indicator[rows], scores[rows], each.k) for rows in drawn.rows.astype(bool)]
        assert [each.recall.value, each.regret.value, each.ndcg.value] == pytest.approx(np.mean(expected, axis=0))
        assert each.num_variants == 5
        assert each.recall.low < each.recall.value < each.recall.high


def test_equal_values_are_half_of_the_best_and_half_of_the_worst_order():
    scores = np.arange(8.0)
    [first, *_] = select(np.zeros(8), scores, halves([str(row) for row in range(8)], 300))
    assert first.recall.value == 0.5
    [first, *_] = select(scores, scores, halves([str(row) for row in range(8)], 300))
    assert (first.recall.value, first.regret.value, first.ndcg.value) == (1.0, 0.0, 1.0)


def test_a_table_of_few_checkpoints_has_no_first_five():
    assert [each.k for each in select(np.arange(9.0), np.arange(9.0), halves(list("abcdefghi")))] == [1, 3]
    assert select(np.zeros(0), np.zeros(0), halves([])) == []


def test_pairs_by_gap_are_each_pair_once_and_equal_ones_apart():
    values = np.exp(np.random.default_rng(0).normal(size=30) / 10)
    values[1] = values[0] * 1.001
    values[2] = np.nan
    parts = gap_pairs(values)
    assert parts[0].pairs[0, 1]
    assert sum(part.pairs.sum() for part in parts) == 29 * 28
    assert np.ptp([part.pairs.sum() for part in parts[1:]]) <= 2
    assert all(np.isfinite([part.low, part.high]).all() for part in parts)
    assert gap_pairs(np.full(3, np.nan)) == []
    groups = np.arange(30) % 2
    alike = gap_pairs(values, groups)
    assert sum(part.pairs.sum() for part in alike) == 15 * 14 + 14 * 13
    assert not any(part.pairs[groups[:, None] != groups].any() for part in alike)


@pytest.mark.parametrize("spread", [0.7, 2.0])
def test_the_ceiling_is_what_the_true_scores_reach(spread):
    # 200 tables of 60: the mean share has a standard error of 0.003, and the estimate is low by 0.01 at 0.7.
    generator = np.random.default_rng(0)
    stated, reached = [], []
    for _ in range(200):
        truth = spread * generator.normal(size=60)
        scores = truth + generator.normal(size=60)
        names = [str(row) for row in range(60)]
        stated.append(between(scores, errors=np.ones(60), noise=[], checkpoints=names).ceiling())
        order = np.sign(truth[:, None] - truth) == np.sign(scores[:, None] - scores)
        reached.append(order[np.triu_indices(60, 1)].mean())
    assert np.mean(stated) == pytest.approx(np.mean(reached), abs=0.015)
    assert math.isnan(between(np.arange(3.0), errors=None, noise=[], checkpoints=["a", "b", "c"]).ceiling())
