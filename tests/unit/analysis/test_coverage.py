"""Stated intervals hold the truth of simulated sweeps; the whole table is of benchmarks/score_coverage.py."""

import pytest
from benchmarks.score_coverage import Sweep, pair_coverage, score_coverage


@pytest.mark.parametrize(
    "sweep",
    [
        Sweep(0.25, "0/1", 2, 300, num_tasks=2, num_checkpoints=8, luck=0.15),
        Sweep(0.25, "0/1", 1, 100, num_tasks=1, num_checkpoints=8, luck=0.0),
        Sweep(0.25, "F1", 3, 100, num_tasks=1, num_checkpoints=8, luck=0.15),
    ],
    ids=str,
)
def test_scores_and_differences_hold_the_truth_as_often_as_they_say(sweep):
    # 100 sweeps of 8 checkpoints, which share examples: a standard error of coverage of 1 % at most.
    found = score_coverage(sweep, num_sweeps=100)
    assert 0.92 <= found.scores <= 0.98
    assert 0.92 <= found.differences <= 0.98
    assert found.all_pairs >= 0.91
    assert found.best_named >= 0.95
    assert found.wrong_clear <= 0.05


@pytest.mark.parametrize("slope", [0.0, 0.7])
def test_pair_shares_hold_the_truth_with_few_variants(slope):
    # 200 sweeps: a standard error of 1.5 %. With few variants the intervals are on the wide side.
    found = pair_coverage(8, 3, slope, num_sweeps=200)
    assert all(share >= 0.92 for share in found.values()), found
