"""Where the scalars of a run go: TensorBoard logs always; W&B and MLflow where their own variables ask for them.

A new tracker: a class with the two methods of `Tracker`, and its line in `trackers`.
"""

from __future__ import annotations

import hashlib
import importlib
import logging
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, Any, Protocol

from raysweep.run_files import TrialRow
from raysweep.runs import Run

logger = logging.getLogger(__name__)


class Tracker(Protocol):
    """What shows the scalars of trials while they run: TensorBoard, W&B, MLflow."""

    def add(self, row: TrialRow, step: int, scalars: Mapping[str, float]) -> None:
        """Numbers of a trial at a step of its pretraining."""

    def close(self) -> None:
        """All is told: write what is still held."""


def trackers(run: Run, sweep: str) -> list[Tracker]:
    """TensorBoard; W&B if WANDB_PROJECT is set, MLflow if MLFLOW_TRACKING_URI is. What is asked for and not installed,
    or cannot be reached, is warned of: a run does not end for want of a tracker.
    """
    enabled: list[Tracker] = [_Guarded("tensorboard", TensorBoard(run.folder / "tensorboard"))]
    optional: tuple[tuple[str, str, Callable[[Run, str], Tracker]], ...] = (
        ("WANDB_PROJECT", "wandb", Wandb),
        ("MLFLOW_TRACKING_URI", "mlflow", MLflow),
    )
    for variable, package, tracker in optional:
        if os.environ.get(variable):
            try:
                importlib.import_module(package)
                enabled.append(_Guarded(package, tracker(run, sweep)))
            except ImportError:
                logger.warning(
                    "%s is set, but %s is not installed: pip install 'raysweep[tracking]'", variable, package
                )
            except Exception as error:
                logger.warning("%s is left out: %s: %s", package, type(error).__name__, error)
    return enabled


class _Guarded:
    """A tracker that is given up at its first error, with a warning."""

    def __init__(self, name: str, tracker: Tracker) -> None:
        self._name, self._tracker = name, tracker
        self._is_broken = False

    def add(self, row: TrialRow, step: int, scalars: Mapping[str, float]) -> None:
        self._try(lambda: self._tracker.add(row, step, scalars))

    def close(self) -> None:
        self._try(self._tracker.close)

    def _try(self, call: Callable[[], None]) -> None:
        if not self._is_broken:
            try:
                call()
            except Exception as error:
                self._is_broken = True
                logger.warning("%s is given up for this run: %s: %s", self._name, type(error).__name__, error)


class TensorBoard:
    """A folder of logs for each trial, written without torch: the driver does without it.

    Nor by TensorBoard's own writer, whose thread dies with a traceback where the disk is full.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._files: dict[str, IO[bytes]] = {}

    def add(self, row: TrialRow, step: int, scalars: Mapping[str, float]) -> None:
        """Append an event to the trial's own file, flushed at once."""
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary

        if row.trial not in self._files:
            folder = self._folder / row.trial
            folder.mkdir(parents=True, exist_ok=True)
            # The name by which TensorBoard knows its files, in the order of their beginning.
            self._files[row.trial] = (folder / f"events.out.tfevents.{time.time():.6f}.{os.getpid()}").open("wb")
            self._write(row.trial, Event(wall_time=time.time(), file_version="brain.Event:2"))
        values = [Summary.Value(tag=name, simple_value=value) for name, value in scalars.items()]
        self._write(row.trial, Event(wall_time=time.time(), step=step, summary=Summary(value=values)))

    def _write(self, trial: str, event: Any) -> None:
        from tensorboard.summary.writer.record_writer import RecordWriter

        RecordWriter(self._files[trial]).write(event.SerializeToString())
        self._files[trial].flush()

    def close(self) -> None:
        """Close the files of all trials."""
        for file in self._files.values():
            file.close()


class Wandb:
    """A W&B run for each trial, grouped by the sweep's run; WANDB_MODE=offline keeps them in the run's folder."""

    def __init__(self, run: Run, sweep: str) -> None:
        self._folder, self._group, self._sweep = run.folder, run.name, sweep
        self._runs: dict[str, Any] = {}

    def add(self, row: TrialRow, step: int, scalars: Mapping[str, float]) -> None:
        """Log the numbers to the trial's W&B run, begun at its first ones."""
        if row.trial not in self._runs:
            self._runs[row.trial] = self._start(row)
        # A step of its own: W&B drops what comes with an earlier one than the last.
        self._runs[row.trial].log({**scalars, "step": step})

    def close(self) -> None:
        """Finish the W&B runs of all trials, which uploads what is left."""
        for run in self._runs.values():
            run.finish()

    def _start(self, row: TrialRow) -> Any:
        import wandb

        run = wandb.init(
            id=hashlib.sha256(f"{self._group}/{row.trial}".encode()).hexdigest()[:16],
            resume=None if os.environ.get("WANDB_MODE") == "offline" else "allow",
            reinit="create_new",
            name=_label(row),
            group=self._group,
            tags=list(_tags(self._sweep, row).values()),
            config={**row.point, "seed": row.seed, "trial": row.trial},
            dir=str(self._folder),
            settings=wandb.Settings(silent=True, console="off"),
        )
        run.define_metric("*", step_metric="step")
        return run


class MLflow:
    """An MLflow run for each trial, in the sweep's experiment; a resumed sweep goes on in the same ones."""

    def __init__(self, run: Run, sweep: str) -> None:
        from mlflow import MlflowClient

        self._client, self._run_name, self._sweep = MlflowClient(), run.name, sweep
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", sweep)
        known = self._client.get_experiment_by_name(name)
        self._experiment = known.experiment_id if known else self._client.create_experiment(name)
        self._runs: dict[str, str] = {}

    def add(self, row: TrialRow, step: int, scalars: Mapping[str, float]) -> None:
        """Log the numbers to the trial's MLflow run, begun at its first ones or found from an earlier try."""
        from mlflow.entities import Metric

        if row.trial not in self._runs:
            self._runs[row.trial] = self._start(row)
        now = int(time.time() * 1000)
        metrics = [Metric(name, value, now, step) for name, value in scalars.items()]
        self._client.log_batch(self._runs[row.trial], metrics=metrics)

    def close(self) -> None:
        """Mark the MLflow runs of all trials as finished."""
        for run_id in self._runs.values():
            self._client.set_terminated(run_id)

    def _start(self, row: TrialRow) -> str:
        from mlflow.entities import Param

        wanted = f"tags.raysweep_run = '{self._run_name}' and tags.trial = '{row.trial}'"
        for known in self._client.search_runs([self._experiment], filter_string=wanted):
            self._client.update_run(known.info.run_id, status="RUNNING")
            return str(known.info.run_id)
        tags = {**_tags(self._sweep, row), "raysweep_run": self._run_name, "trial": row.trial}
        run_id = self._client.create_run(self._experiment, run_name=_label(row), tags=tags).info.run_id
        params = [Param(name, str(value)) for name, value in {**row.point, "seed": row.seed}.items()]
        self._client.log_batch(run_id, params=params)
        return str(run_id)


def _tags(sweep: str, row: TrialRow) -> dict[str, str]:
    kinds = dict.fromkeys(stage.kind for stage in row.stages)
    return {"sweep": sweep, "variant": row.variant, **{f"stage.{kind}": kind for kind in kinds}}


def _label(row: TrialRow) -> str:
    point = ", ".join(f"{path.rpartition('.')[2]}={value}" for path, value in row.point.items())
    return f"{point or 'base'}, seed {row.seed}"[:120]
