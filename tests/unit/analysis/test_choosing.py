"""The checkpoint that is chosen, and the hypervolume of a front."""

import numpy as np
import pandas as pd
import pytest
from shipped import FOLDER

from raysweep.analysis.choosing import chosen_of, values_of
from raysweep.analysis.pareto import front_of, hypervolume
from raysweep.runs import Run
from raysweep.search import Choose, Goal, Within

LOSS, TRACE = "heldout/loss_nats_per_token", "flatness/hessian_trace"
FLATTEST = Choose(metric=TRACE, mode="min", within=Within(metric=LOSS, mode="min", part=0.01))


def table(losses, traces) -> pd.DataFrame:
    names = [f"c{number}" for number in range(len(losses))]
    return pd.DataFrame({"trial": names, "checkpoint": names, "step": 1, LOSS: losses, TRACE: traces})


def test_the_flattest_within_one_per_cent_of_the_best_loss_is_chosen():
    checkpoints = table([4.00, 4.039, 4.041, 4.02, np.nan], [90.0, 70.0, 10.0, 80.0, 1.0])
    chosen = chosen_of(checkpoints, FLATTEST)
    assert chosen.row["checkpoint"] == "c1"
    assert chosen.said() == (
        "lowest flatness/hessian_trace of the 3 of 4 checkpoints within 1 % of the best heldout/loss_nats_per_token"
    )
    best_score = Choose(metric=LOSS, mode="max", within=Within(metric=TRACE, mode="max", part=0.2))
    assert chosen_of(checkpoints, best_score).row["checkpoint"] == "c3"


def test_nothing_is_chosen_where_nothing_has_both_metrics():
    assert chosen_of(table([np.nan], [1.0]), FLATTEST) is None
    assert chosen_of(table([1.0], [1.0]).drop(columns=TRACE), FLATTEST) is None
    assert chosen_of(table([1.0], [1.0]), None) is None


def test_hypervolume_is_that_of_a_count_of_cells():
    draw = np.random.default_rng(0)
    for goals in (1, 2, 3):
        values = draw.integers(0, 7, size=(6, goals)).astype(float)
        cells = np.stack(np.meshgrid(*[np.arange(7)] * goals, indexing="ij"), axis=-1).reshape(-1, goals)
        dominated = (values[:, None, :] >= cells[None] + 1).all(axis=2).any(axis=0)
        assert hypervolume(values) == pytest.approx(dominated.sum())


def test_a_fronts_hypervolume_is_a_share_of_the_box_between_worst_and_best():
    goals = [Goal(metric=LOSS, mode="min"), Goal(metric=TRACE, mode="min")]
    front = front_of(table([1.0, 2.0, 3.0], [30.0, 20.0, 10.0]), goals)
    assert front.hypervolume == pytest.approx(0.25)
    assert front_of(table([1.0, 3.0], [10.0, 30.0]), goals).hypervolume == 1.0
    losses, flat = np.random.default_rng(0).random((2, 40))
    scaled = [1 - (each - each.min()) / np.ptp(each) for each in (losses, flat)]
    both = front_of(table(list(losses), list(flat)), goals).hypervolume
    assert hypervolume(np.stack(scaled, axis=1)) == pytest.approx(both)  # Of all rows, dominated ones too.
    assert np.isnan(front_of(table([1.0, 3.0], [10.0, 10.0]), goals).hypervolume)


@pytest.mark.parametrize("name", ["same_loss_sampled", "flat_minima_text", "flat_minima"])
def test_values_are_in_the_order_of_the_sweep_file_which_an_identity_forgets(store, name):
    """What studies without an adversary compare with."""
    run = Run.create(store, name, sweep_text=(FOLDER / f"{name}.yaml").read_text(), identity="{}")
    first, *_ = values_of(run).values()
    assert first[0] == "plain"


def test_values_of_a_list_are_themselves_and_of_no_sweep_file_none(store):
    text = "sweep: {pretrain.optimizer.lr: {grid: [3e-3, 1e-3]}, pretrain.steps: {randint: [1, 9]}}"
    run = Run.create(store, "listed", sweep_text=text, identity="{}")
    assert values_of(run) == {"pretrain.optimizer.lr": (3e-3, 1e-3), "pretrain.steps": ()}
    for index, unreadable in enumerate(("", "sweep: 3", "- a", "a: [")):
        run = Run.create(store, f"unreadable-{index}", sweep_text=unreadable, identity="{}")
        assert values_of(run) == {}
