"""A ranking of a sweep that ran: its own predictions are what its errors are made of."""

import math

import pytest

from raysweep.analysis.findings import cautions
from raysweep.analysis.paired_losses import paired_difference
from raysweep.analysis.report import _read_losses
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


def test_losses_of_checkpoints_are_paired_by_their_batches(tiny_space, store):
    """Of this language the lowest loss is known; of others these are what tells checkpoints apart."""
    results = Results(run_sweep(tiny_space, store, runner="inline"))
    measured = results.stages[results.stages["kind"] == "heldout"].drop_duplicates("id").set_index("id")
    losses = measured["heldout/loss_nats_per_token"].astype(float)
    kept = {name: _read_losses(results.run, name) for name in losses.index}
    assert len(kept) == 4
    low, high = losses.idxmin(), losses.idxmax()
    value, error = paired_difference([kept[high]], [kept[low]])
    assert value == pytest.approx(losses[high] - losses[low])
    # 40 sentences, in three batches.
    (share, batches), *others = kept[low].values()
    assert (share, len(batches.losses), others) == (1.0, 3, [])
    assert 0 < error < value
    assert paired_difference([kept[low]], [kept[low]]) == (0.0, 0.0)
    two = paired_difference([kept[high], kept[low]], [kept[low], kept[low]])
    assert two == pytest.approx((value / 2, error / 2))
    assert all(map(math.isnan, paired_difference([kept[low], None], [kept[high], kept[low]])))
    # Of before losses were kept.
    store.file(low, "losses.json").unlink()
    assert _read_losses(results.run, low) is None
