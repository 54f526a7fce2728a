"""A ranking of a sweep that ran: its own predictions are what its errors are made of."""

from raysweep.analysis.findings import cautions
from raysweep.results import Results
from raysweep.runners import run_sweep


def test_differences_are_paired_by_the_stages_own_examples_and_set_beside_chance(tiny_space, store):
    ranking = Results(run_sweep(tiny_space, store, runner="inline")).ranking
    assert ranking.errors == "paired, one seed"
    assert ranking.num_comparisons == 6
    assert set(ranking.chance) == {"span"}
    # 20 test examples and a few steps: no score is shown to be better than the commonest answer.
    assert (ranking.num_near_chance, ranking.num_against_chance) == (4, 4)
    assert "4 of 4 scores are not clearly above chance" in cautions(ranking)[0]
    assert len(ranking.ties) == 3
