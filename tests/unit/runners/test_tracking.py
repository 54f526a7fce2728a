"""Scalars go where the environment asks, and no tracker can end a run."""

import logging
import sys
from types import ModuleType

import pytest

from raysweep.runners.journal import Journal, trial_row
from raysweep.runners.tracking import trackers
from raysweep.runs import Run


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
    common = {"trial": trial.id, "kind": "pretrain", "stage": trial.stages[1].id}
    journal({"event": "trial", "row": trial_row(trial)})
    for step, loss in ((1, 3.0), (2, 2.5)):
        journal({"event": "progress", "step": step, "loss": loss, **common})
    sft = next(stage for stage in trial.stages if stage.kind == "sft")
    scored = {"stage": sft.id, "kind": "sft", "task": "span", "step": 6, "metrics": {"score": 0.75}}
    journal({"event": "finished", **common, **scored})
    journal.close()


def test_wandb_offline(run, tiny_space, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_PROJECT", "mine")
    monkeypatch.setenv("WANDB_MODE", "offline")
    tell(run, tiny_space)
    (log,) = (run.folder / "wandb").glob("offline-run-*/run-*.wandb")
    text = log.read_bytes()
    for word in (b"pretrain/loss", b"sft/span/score", b"variant-", b"tiny", b"0.75", b"pretrain.optimizer.lr"):
        assert word in text


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
