"""Scalars go where the environment asks, and no tracker can end a run."""

import json
import logging
import struct
import sys
from types import ModuleType

import pytest
from ended import ended

from raysweep.events import StageProgress, TrialStarted
from raysweep.runners.journal import Journal, trial_row
from raysweep.runners.tracking import trackers
from raysweep.runs import Run
from raysweep.worker import Reached


@pytest.fixture
def run(store) -> Run:
    """A run without trials."""
    return Run.create(store, "r", sweep_text="x", identity="{}")


@pytest.fixture(autouse=True)
def quiet_environment(monkeypatch):
    """Whatever this machine's owner tracks elsewhere."""
    for variable in ("WANDB_PROJECT", "MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME"):
        monkeypatch.delenv(variable, raising=False)


def tell(run: Run, space) -> None:
    """A trial that trains two steps and fine-tunes once."""
    journal = Journal(run, lambda event: None, trackers=trackers(run, space.name))
    trial = space.trial({"pretrain.optimizer.lr": 0.01}, 0)
    journal(TrialStarted(row=trial_row(trial)))
    for at in (Reached(1, loss=3.0), Reached(2, loss=2.5)):
        journal(StageProgress(trial=trial.id, kind="pretrain", stage=trial.stages[1].id, at=at))
    sft = next(stage for stage in trial.stages if stage.kind == "sft")
    journal(ended(sft.id, trial=trial.id, task="span", step=6, metrics={"score": 0.75}))
    journal.close()


def wandb_records(log: bytes) -> list:
    """What W&B wrote offline. The format is LevelDB's log: blocks of 32 KiB, which split records."""
    from wandb.proto.wandb_internal_pb2 import Record

    records, at, held = [], 7, b""  # After its header.
    while at + 7 <= len(log):
        if (room := 2**15 - at % 2**15) < 7:
            at += room
            continue
        _checksum, length, part = struct.unpack_from("<IHB", log, at)
        held += log[at + 7 : at + 7 + length]
        at += 7 + length
        # Whole (1) or the last (4) of the parts of one.
        if part in (1, 4):
            records.append(Record.FromString(held))
            held = b""
    return records


def test_wandb_offline(run, tiny_space, monkeypatch):
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_PROJECT", "mine")
    monkeypatch.setenv("WANDB_MODE", "offline")
    tell(run, tiny_space)
    # The process that writes the log ends here, as at the end of a run's own.
    wandb.teardown()
    (log,) = (run.folder / "wandb").glob("offline-run-*/run-*.wandb")
    records = wandb_records(log.read_bytes())
    (begun,) = [record.run for record in records if record.HasField("run")]
    assert (begun.project, begun.run_group) == ("mine", "r")
    assert {"tiny", "pretrain", "sft"} < set(begun.tags)
    assert any(tag.startswith("variant-") for tag in begun.tags)
    assert {item.key: item.value_json for item in begun.config.update}["pretrain.optimizer.lr"] == "0.01"
    rows = [
        {item.nested_key[0]: json.loads(item.value_json) for item in record.history.item}
        for record in records
        if record.HasField("history")
    ]
    assert [(row["step"], row.get("pretrain/loss"), row.get("sft/span/score")) for row in rows] == [
        (1, 3.0, None),
        (2, 2.5, None),
        (6, None, 0.75),
    ]


def test_mlflow_goes_on_in_the_same_run(run, tiny_space, monkeypatch, tmp_path):
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'mlflow.db'}")
    tell(run, tiny_space)
    tell(run, tiny_space)
    client = mlflow.MlflowClient()
    experiment = client.get_experiment_by_name("tiny")
    (found,) = client.search_runs([experiment.experiment_id])
    assert found.data.metrics["sft/span/score"] == 0.75
    assert [point.value for point in client.get_metric_history(found.info.run_id, "pretrain/loss")][:2] == [3.0, 2.5]
    assert found.data.params["pretrain.optimizer.lr"] == "0.01"
    assert found.data.tags["sweep"] == "tiny"
    assert found.data.tags["variant"].startswith("variant-")
    assert found.data.tags["stage.sft"] == "sft"
    assert found.info.status == "FINISHED"


def test_a_tracker_that_is_not_installed_is_warned_of(run, monkeypatch, caplog):
    monkeypatch.setenv("WANDB_PROJECT", "mine")
    monkeypatch.setitem(sys.modules, "wandb", None)
    assert len(trackers(run, "s")) == 1
    assert "WANDB_PROJECT is set, but wandb is not installed: pip install 'raysweep[tracking]'" in caplog.text


def test_a_tracker_that_fails_is_given_up(run, tiny_space, monkeypatch, caplog):
    from raysweep.runners import tracking

    class Failing:
        def __init__(self, run, sweep):
            self.calls = 0

        def add(self, row, step, scalars):
            raise RuntimeError("no network")

        def close(self):
            raise AssertionError("asked again")

    monkeypatch.setenv("WANDB_PROJECT", "mine")
    monkeypatch.setitem(sys.modules, "wandb", ModuleType("wandb"))
    monkeypatch.setattr(tracking, "Wandb", Failing)
    with caplog.at_level(logging.WARNING):
        tell(run, tiny_space)
    assert caplog.text.count("wandb is given up for this run: RuntimeError: no network") == 1
    assert list((run.folder / "tensorboard").glob("*/events*"))
