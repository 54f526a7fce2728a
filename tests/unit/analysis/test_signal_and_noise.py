"""Pairs right by how far targets differ, and how far seeds of one recipe end apart, where the answer is known."""

import numpy as np
import pandas as pd
import pytest
from benchmarks.indicator_truth import associations

from raysweep.analysis.findings import agreement_lines
from raysweep.analysis.ranking import rank
from raysweep.analysis.score_differences import between
from raysweep.analysis.sections import target_gap_table
from raysweep.analysis.seed_twins import seed_twins
from raysweep.scores import Column
from raysweep.spec import Metric


def grouped(num: int = 40) -> pd.DataFrame:
    """Two groups of scores 10 apart, of a spread of 1 within; x tells the groups apart, and nothing within them."""
    generator = np.random.default_rng(0)
    group = np.repeat([0.0, 10.0], num // 2)
    names = [f"{generator.integers(1 << 30):x}" for _ in range(num)]
    rows = {"variant": names, "trial": names, "checkpoint": names, "status": "done", "seed": 0, "step": 1}
    spread = generator.uniform(size=(2, num))
    return pd.DataFrame(rows | {"score": group + spread[0], "x": group + spread[1]})


def test_pairs_that_differ_little_are_told_by_chance_and_others_are_right():
    found = associations(grouped(), "x")["x"]
    assert [each.num_pairs for each in found.by_target_gap] == [156] * 5
    # 380 of 780 pairs are within a group, and differ by at most 1.
    assert [each.accuracy.value for each in found.by_target_gap[3:]] == [1, 1]
    assert found.by_target_gap[0].accuracy.low < 0.5 < found.by_target_gap[0].accuracy.high
    assert found.chance_within.num_pairs == pytest.approx(380, abs=80)
    assert found.chance_within.accuracy.low <= 0.5
    exact = associations(grouped().assign(x=lambda rows: rows["score"]), "x")["x"]
    assert exact.chance_within is None
    backwards = associations(grouped().assign(x=lambda rows: -rows["score"]), "x")["x"]
    assert backwards.chance_within.num_pairs == 780


def test_tables_and_sentences_say_where_signal_ends():
    rows = grouped().assign(score_stderr=0.3)
    ranking = rank(rows, columns=[Column("", Metric("x", "max"))], target="score")
    table = target_gap_table(ranking)
    assert [column.name for column in table.columns][1].endswith("(156 pairs)")
    assert table.columns[-1].name == "no better than chance up to"
    assert table.rows[0].cells[-1].sort == ranking.associations[0].chance_within.high
    assert [cell.sort for cell in table.foot[1:-1]] == [each.ceiling for each in ranking.target_gaps]
    assert any(
        line.startswith("Where signal ends: of pairs that differ by at most") for line in agreement_lines(ranking)
    )
    assert not target_gap_table(rank(rows[:2], columns=[], target="score")).rows


def test_the_ceiling_of_all_pairs_is_the_mean_of_those_of_its_parts():
    scores = np.random.default_rng(1).normal(size=12)
    differences = between(scores, errors=np.full(12, 0.5), noise=[], checkpoints=list("abcdefghijkl"))
    near = np.abs(differences.value) < 1
    num = [(part & ~np.eye(12, dtype=bool)).sum() for part in (near, ~near)]
    mean = np.average([differences.ceiling(part) for part in (near, ~near)], weights=num)
    assert differences.ceiling() == pytest.approx(mean)
    assert differences.ceiling(near) < differences.ceiling(~near)


def test_seeds_of_one_recipe_differ_by_an_offset_and_by_themselves():
    rows = pd.DataFrame(
        {"variant": list("aabbccd"), "seed": [0, 1, 0, 1, 0, 1, 0], "step": pd.Series([5] * 7, dtype="Int64")}
    )
    apart = np.array([1.0, 1.2, 1.4])  # Of each recipe's two seeds.
    scores = np.array([3.0, 4.0, 1.0, 2.2, 7.0, 8.4, 0.0])
    earlier = rows.assign(step=2, seed=rows["seed"])
    both, noise = pd.concat([earlier, rows], ignore_index=True), np.full((14, 14), 0.04)
    # Earlier checkpoints of a trajectory, whose scores are anything, do not count.
    found = seed_twins(both, np.concatenate([scores[::-1], scores]), noise)
    assert (found.num_variants, found.num_seeds) == (3, 2)
    assert found.difference == pytest.approx(np.sqrt((apart**2).mean()))
    assert found.beside_offset.value == pytest.approx(apart.std(ddof=1))
    assert found.beside_offset.low < found.beside_offset.value < found.beside_offset.high
    assert found.of_finetuning == pytest.approx(0.2)
    alone = seed_twins(rows[:2], scores[:2], noise[:2, :2])
    assert alone.difference == pytest.approx(1.0)
    assert np.isnan(alone.beside_offset.value)
    assert seed_twins(rows[rows["seed"] == 0].reset_index(drop=True), scores[::2], noise) is None
