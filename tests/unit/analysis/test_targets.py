"""Targets other than the mean score: of one task, of a family, in nats, or better where they are lower."""

import numpy as np
import pandas as pd
import pytest

from raysweep.analysis.budget_page import known_of, known_of_run, left_out
from raysweep.analysis.earlier import EARLIER_LOSS
from raysweep.analysis.formatting import amount, is_share, unit
from raysweep.analysis.learning import mean_ranks
from raysweep.analysis.ranking import rank
from raysweep.analysis.sections import ranking_table
from raysweep.analysis.worth import own_stages
from raysweep.scores import Column
from raysweep.spec import Metric

COLUMNS = (
    Column("sft", Metric("mean_forgetting", "min", "nats/token")),
    Column("sft", Metric("mean_log_likelihood", "max", "nats/token")),
    Column("sft", Metric("mean_score", "max", "share")),
    Column("sft", Metric("score", "max", "share"), "arc"),
    Column("sft", Metric("score", "max", "share"), "boolq"),
    Column("sft", Metric("mean_score", "max", "share"), "cms", ("arc", "boolq")),
    Column("mine", Metric("x", "max")),
)


def table(num: int = 12) -> pd.DataFrame:
    names = [f"c{place:02}" for place in range(num)]
    rising = np.linspace(0.1, 0.9, num)
    rows = {"variant": names, "trial": names, "checkpoint": names, "status": "done", "seed": 0, "step": 1}
    scores = {
        "sft/mean_forgetting": rising,
        "sft/mean_score": rising,
        "sft/arc/score": rising,
        "sft/boolq/score": rising,
    }
    return pd.DataFrame(
        rows
        | scores
        | {"sft/mean_log_likelihood": rising - 5, "sft/cms/mean_score": rising, "mine/x": np.sin(np.arange(num) * 2.0)}
    )


def test_where_lower_is_better_the_lowest_is_bought_as_the_best():
    ranking = rank(table(), columns=COLUMNS, target="sft/mean_forgetting")
    assert (ranking.best["checkpoint"], ranking.sign) == ("c00", -1.0)
    known = known_of(ranking, {"sft": 2.0, "mine/x": 1.0})
    assert known.names[int(np.argmax(known.scores))] == "c00"


def test_a_row_that_collapsed_in_what_is_not_bought_is_bought():
    waves = np.linspace(2.0, 3.0, 20) + 0.3 * np.sin(np.arange(20.0))
    rows = table(20).assign(**{"mine/y": waves, "pretrain/loss": np.linspace(3.0, 4.0, 20)})
    rows.loc[5, "pretrain/loss"], rows.loc[6, "mine/y"] = 400.0, 400.0
    # Nor is the loss of an earlier checkpoint bought with the stages of this one.
    rows[EARLIER_LOSS.name] = waves[::-1]
    columns = [*COLUMNS, Column("mine", Metric("y", "max")), Column("pretrain", Metric("loss", "min")), EARLIER_LOSS]
    ranking = rank(rows, columns=columns, target="sft/mean_score")
    assert [flag.rows for flag in ranking.flags if flag.kind == "collapsed"] == [("c06",), ("c05",)]
    known = known_of(ranking, {"sft": 2.0, "mine/x": 1.0, "mine/y": 1.0})
    assert set(rows["checkpoint"]) - {*known.names} == {"c06"}
    assert list(left_out(ranking, known.values)) == ["c06"]


def test_hours_are_of_all_gpus_of_all_workers():
    """Of two workers of two GPUs each; of one before it was noted; of half a GPU; and of what ran on CPUs."""
    ranking = rank(table(), columns=COLUMNS, target="sft/mean_score")
    of_sft = [{"kind": "sft", "task": task, "world_size": 2, "gpus_per_worker": 2.0} for task in ("arc", "boolq")]
    of_mine = {"kind": "mine", "task": None, "world_size": 1}
    for gpus, device, hours, of in (
        (None, "cuda:0", 1.0, "GPU hours"),
        (0.5, "cuda:0", 0.5, "GPU hours"),
        (0.0, "cpu", 1.0, "GPU hours (of mine CPU worker hours)"),
    ):
        kinds = [{"device": "cuda:0"} | each for each in of_sft] + [
            of_mine | {"device": device, "gpus_per_worker": gpus}
        ]
        stages = pd.DataFrame(
            {"wall_seconds": 3600.0, "flops": None, "checkpoint": name, "id": f"{name}-{place}"} | each
            for name in ranking.checkpoints["checkpoint"]
            for place, each in enumerate(kinds)
        )
        known = known_of_run(ranking, stages)
        assert (known.hours, known.unit) == ({"sft": 8.0, "mine": hours}, of)
    stages.loc[stages["checkpoint"] == "c00", "device"] = "cuda:0"
    assert known_of_run(ranking, stages).unit == "GPU hours (of mine in part CPU worker hours)"


@pytest.mark.parametrize(
    ("target", "tasks"),
    [
        ("sft/mean_score", ("arc", "boolq")),
        ("sft/cms/mean_score", ("arc", "boolq")),
        ("sft/arc/score", ("arc",)),
        ("sft/mean_log_likelihood", ("arc", "boolq")),
    ],
)
def test_fine_tuning_costs_what_the_targets_own_tasks_do(target, tasks):
    ranking = rank(table(), columns=COLUMNS, target=target)
    assert ranking.target_tasks == tasks
    stages = pd.DataFrame({"kind": ["sft", "sft", "heldout"], "task": ["arc", "boolq", None]})
    assert list(own_stages(ranking, stages)["task"].dropna()) == list(tasks)


def test_a_task_without_likelihoods_yet_has_no_column():
    ranking = rank(table(), columns=COLUMNS, target="sft/mean_log_likelihood")
    names = [column.name for column in ranking_table(ranking, {}).columns]
    assert "mean log-likelihood, nats/token" in names
    assert not [name for name in names if "arc" in name]


def test_targets_have_the_unit_of_their_column():
    assert [is_share(f"sft/arc/{name}") for name in ("score", "f1", "valid_score", "log_likelihood")] == [
        *[True] * 3,
        False,
    ]
    assert (unit("sft/mean_forgetting"), amount(0.25, "sft/arc/f1")) == (" nats/token", "25.0")
    assert amount(0.25, "quantization/rise_4_bits") + unit("quantization/rise_4_bits") == "0.250 nats/token"


def test_what_is_missing_ranks_in_the_middle():
    values = np.array([[10.0, 1.0], [9.0, 2.0], [np.nan, 3.0], [np.nan, 4.0]])
    assert mean_ranks(values * [1, -1]).T.tolist() == [[0.75, 0.25, 0.5, 0.5], [0.875, 0.625, 0.375, 0.125]]
