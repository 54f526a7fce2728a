"""Which learning rate counts, at which edge of its grid, and that searchers and reports are told the same numbers."""

import math
import tempfile
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import TINY

from raysweep.analysis.tables import checkpoint_table, columns_of
from raysweep.data.pcfg import PCFG
from raysweep.record import Record
from raysweep.runners.chain import leg_metrics
from raysweep.runners.journal import trial_row
from raysweep.runs import Run
from raysweep.scores import (
    Column,
    FinetuningRun,
    Result,
    checkpoint_metrics,
    column_name,
    mean_over_tasks,
    open_sides,
    pick,
)
from raysweep.space import load
from raysweep.spec import Metric
from raysweep.store import Store

KNOWN = {"started": "2026-01-01T00:00:00+00:00", "wall_seconds": 1.0}


def runs(*rows) -> list[FinetuningRun]:
    """From (rate, validation score of each seed); None for a run that diverged."""
    return [
        FinetuningRun(lr, seed, valid is None, math.nan if valid is None else valid, f"{lr}-{seed}")
        for lr, *scores in rows
        for seed, valid in enumerate(scores)
    ]


def test_the_best_mean_validation_score_is_picked_and_ties_go_to_the_smaller_rate():
    picked = pick(runs((1e-1, 0.5, 0.6), (1e-3, 0.4, 0.4), (1e-2, 0.6, 0.5)))
    assert picked.lr == 1e-2
    assert [run.seed for run in picked.runs] == [0, 1]


def test_a_rate_at_which_a_seed_diverged_is_not_picked():
    assert pick(runs((1e-3, 0.5, 0.5), (1e-2, 0.9, None))).lr == 1e-3
    assert pick(runs((1e-2, 0.9, None))) is None
    assert pick(runs((1e-3, 0.5), (1e-2, math.nan))).lr == 1e-3
    assert pick([]) is None


def test_a_rate_that_lacks_a_seed_is_not_picked():
    """By one seed it would be picked too often: of five equal ones in 29 % in place of 20 %."""
    assert pick(runs((1e-3, 0.5, 0.6), (1e-2, 0.9))).lr == 1e-3
    assert pick(runs((1e-3, 0.5), (1e-2, 0.9))).lr == 1e-2
    # What cannot be picked sets no measure.
    assert pick(runs((1e-3, 0.5), (1e-2, 0.9, None))).lr == 1e-3


@pytest.mark.parametrize(
    ("grid", "edge"),
    [
        (((1, 0.1), (2, 0.3), (3, 0.2)), None),
        (((1, 0.3), (2, 0.1)), "lowest"),
        (((1, 0.1), (2, 0.3)), "highest"),
        (((1, 0.1), (2, 0.3), (3, None)), None),  # What diverged bounds the grid.
        (((1, 0.3), (2, None)), "lowest"),
        (((1, 0.3),), None),  # One rate is no choice.
        (((1, 0.0), (2, 0.0), (3, 0.0)), "lowest"),  # Nothing was learnt: the smallest, and it is said.
    ],
)
def test_a_rate_at_the_edge_of_its_grid(grid, edge):
    assert pick(runs(*grid)).edge == edge


def test_means_over_tasks_need_all_of_them():
    assert mean_over_tasks([0.25, 0.75]) == 0.5
    assert math.isnan(mean_over_tasks([0.25, math.nan]))
    assert math.isnan(mean_over_tasks([]))


def test_stages_of_several_seeds_are_averaged():
    probes = [Result(f"probe-{seed}", "probe", "done", {"score": 0.5 + 0.2 * seed}, "t", seed=seed) for seed in (0, 1)]
    metrics = checkpoint_metrics([*probes, Result("probe-u", "probe", "missing", {}, "u")])
    assert metrics["probe/t/score"] == pytest.approx(0.6)
    assert math.isnan(metrics["probe/mean_score"])


SPACE_TEXT = TINY.replace("lrs: [1e-3, 1e-2]", "seeds: [0, 1]\n  lrs: [1e-3, 1e-2, 1e-1]").replace(
    "sft:\n  tasks:\n", "sft:\n  tasks:\n    other: {form: pcfg_span, span: 1, num_train: 40}\n"
)
OUTCOME = st.one_of(st.none(), st.just("diverged"), st.sampled_from([0.0, 0.25, 0.5, math.nan]))


@pytest.fixture(scope="module")
def trial(tmp_path_factory):
    path = tmp_path_factory.mktemp("space") / "tiny.yaml"
    path.write_text(SPACE_TEXT)
    return load(path).trial({}, 0)


def test_tasks_and_metrics_of_any_names_have_columns_of_their_own(trial):
    """A task `x` and a task `x_valid`, or one called `mean`: a slash sets a task's name apart."""
    tasks = ("x", "x_valid", "mean", "kshot", "score")
    spec = next(stage.spec for stage in trial.stages if stage.kind == "sft")
    metrics = {"score": 0.1, "valid_score": 0.2, "chance_score": 0.3}
    results = [
        Result(f"sft-{number}", "sft", "done", {name: value + number for name, value in metrics.items()}, task, 0.1, 0)
        for number, task in enumerate(tasks)
    ]
    columns = checkpoint_metrics(results)
    assert {columns[column_name("sft", name, "x_valid")] for name in metrics} == {1.1, 1.2, 1.3}
    assert columns["sft/mean_score"] == pytest.approx(2.1)
    assert columns["sft/mean/score"] == 2.1
    assert len(columns) == len(tasks) * len(metrics) + 1
    assert {metric.name for metric in spec.metrics(PCFG())} >= metrics.keys()


def test_every_column_that_a_table_may_show_is_declared(trial, store):
    for stage in trial.stages:
        spec = {"lr": getattr(stage.spec, "lr", None), "seed": getattr(stage.spec, "seed", None)}
        metrics = {metric.name: 0.5 for metric in stage.spec.metrics(trial.stages[0].spec.corpus)}
        record = Record(stage.id, stage.kind, "done", spec, dict(stage.inputs), metrics, KNOWN, {})
        store.commit(record, store.work_dir(record.id))
    run = Run.create(store, "r", sweep_text="", identity="{}")
    run.note_columns(trial.columns)
    run.add_trial(trial_row(trial))
    declared = {column.name: column for column in columns_of(run)}
    assert {name for name in checkpoint_table(run) if "/" in name} <= declared.keys()
    assert declared["probe/span/score"] == Column("probe", Metric("score", "max", "share"), "span")
    assert declared["probe/span/train_loss_nats"].metric.direction is None
    assert run.columns() == trial.columns


@settings(max_examples=60)
@given(data=st.data())
def test_searchers_and_reports_are_told_the_same_numbers(trial, data):
    """The same records, through the chain (what Optuna and ASHA see) and through the tables (what is ranked)."""
    records = {}
    for stage in trial.stages:
        outcome = data.draw(OUTCOME) if stage.kind in ("sft", "probe") else 0.5
        if outcome is None:
            continue
        status = "diverged" if outcome == "diverged" else "done"
        test = data.draw(st.floats(0, 1))
        metrics = {"score": test, "valid_score": outcome} if status == "done" else {"diverged_step": 3.0}
        spec = {"lr": getattr(stage.spec, "lr", None), "seed": getattr(stage.spec, "seed", None)}
        record = Record(stage.id, stage.kind, status, spec, dict(stage.inputs), metrics, KNOWN, {})
        records[stage.id] = record
    with tempfile.TemporaryDirectory() as root:
        store = Store(root)
        for record in records.values():
            store.commit(replace(record), store.work_dir(record.id))
        run = Run.create(store, "r", sweep_text="", identity="{}")
        run.add_trial(trial_row(trial))
        table = checkpoint_table(run)
    for _, row in table.iterrows():
        told = leg_metrics([stage for stage in trial.stages if stage.step == row["step"]], records)
        assert {"sft/mean_score", "sft/span/score", "sft/other/score"} <= set(told)
        for name, value in told.items():
            assert row.get(name, math.nan) == pytest.approx(value, nan_ok=True), name


@pytest.mark.parametrize(
    ("grid", "sides"),
    [
        (((1, 0.1), (2, 0.3), (3, 0.2)), ()),
        (((1, 0.3), (2, 0.1)), ("lowest",)),
        (((1, 0.1), (2, 0.3)), ("highest",)),
        (((1, 0.1), (2, 0.3), (3, None)), ()),
        (((1, 0.0), (2, 0.0), (3, 0.0)), ("lowest", "highest")),  # Nothing learnt yet: who knows which way.
        (((1, 0.3), (2, 0.3), (3, 0.2)), ("lowest",)),  # As good at the end as inside: it may yet rise beyond.
        (((1, 0.2), (2, 0.3), (3, 0.3)), ("highest",)),
        (((1, 0.3), (2, 0.3), (3, None)), ("lowest",)),
        (((1, None), (2, None)), ("lowest",)),
        (((1, math.nan),), ()),
    ],
)
def test_sides_on_which_a_better_rate_may_lie(grid, sides):
    assert open_sides(runs(*grid)) == sides
    # A standard error of 0.5 to 1.5 of a thousand, which is less than any of these differences.
    assert open_sides(runs(*grid), num_valid=100_000) == sides


@pytest.mark.parametrize(
    ("grid", "sides"),
    [
        # A standard error of 0.62 by 200 examples is 0.034.
        (((1e-4, 0.55), (3e-4, 0.62), (1e-3, 0.61)), ("highest",)),  # One or two of 200 examples behind.
        (
            ((1e-4, 0.59), (3e-4, 0.62), (1e-3, 0.58)),
            (),
        ),  # Scores stand still before they rise with the rate, not behind.
        (((1e-4, 0.59), (3e-4, 0.62), (1e-3, 0.60)), ("highest",)),
        (((1e-4, 0.62), (3e-4, 0.62), (1e-3, 0.60)), ("lowest", "highest")),
        (((1e-4, 0.58), (3e-4, 0.62), (1e-3, 0.58)), ()),
        (((1e-4, 0.58), (3e-4, 0.62), (1e-3, None)), ()),
        (((1e-4, 0.98), (3e-4, 1.0), (1e-3, 0.995)), ()),  # No better one can be.
    ],
)
def test_an_upper_end_within_a_standard_error_of_the_best_rate_is_open(grid, sides):
    assert open_sides(runs(*grid), num_valid=200) == sides
