"""What the driver keeps up with: stage ends a second through Tune, queue, events, journal and board; memory a trial.

    python tests/benchmarks/driver.py [--trials 1000] [--gangs 2]

Real Ray; trials of 15 stages that a stand-in for a gang tells of, and computes nothing. It waits, as a gang does, until
the driver has taken what was told of a checkpoint.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import ray
from ray import tune
from rich.console import Console

sys.path.insert(0, str(Path(__file__).parents[1]))

from tiny import TINY

from raysweep.board import Board
from raysweep.events import StageStarted, TrialStarted
from raysweep.plan import Stage, Trial
from raysweep.record import Record
from raysweep.runners import tune as runner
from raysweep.runners.chain import told
from raysweep.runners.channel import EventSource
from raysweep.runners.journal import Journal, trial_row
from raysweep.runs import Run
from raysweep.space import load
from raysweep.spec import canonical
from raysweep.store import Store


class StandIn(tune.Trainable):
    """Tells of every stage of its trials that it began and was finished."""

    def setup(self, config: dict[str, Any], space: Any, events: Any, **others: Any) -> None:
        self._space, self._events = space, EventSource(events)
        self.reset_config(config)

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        point = {name: new_config[name] for name in self._space.declared.sweep}
        self._legs = self._told(self._space.trial(point, new_config["seed"]))
        return True

    def _told(self, trial: Trial) -> Iterator[dict[str, Any]]:
        self._events.tell(TrialStarted(row=trial_row(trial)))
        for step, batches in trial.legs():
            for stage in [stage for batch in batches for stage in batch]:
                self._events.tell(StageStarted(trial=trial.id, stage=stage.id, kind=stage.kind))
                self._events.tell(told("finished", self._record(stage), stage, trial))
            if step is not None:
                last = step == trial.last_step
                yield {"checkpoint_step": step, "raysweep_trial": trial.id, "last": last, "ended": last, "done": last}

    def _record(self, stage: Stage) -> Record:
        metrics = {metric.name: 0.5 for metric in stage.spec.metrics(self._space.declared.pretrain.data)}
        metrics |= {"score": 0.5, "valid_score": 0.5} if stage.kind == "sft" else {}
        known = {"wall_seconds": 1.0, "world_size": 1}
        return Record(stage.id, stage.kind, "done", canonical(stage.spec), dict(stage.inputs), metrics, known, files={})

    def step(self) -> dict[str, Any]:
        leg = next(self._legs)
        self._events.wait()
        return leg

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        pass

    def load_checkpoint(self, checkpoint: Any) -> None:
        pass


def measure(folder: Path, num_trials: int, num_gangs: int) -> None:
    """Print one row for RESULTS.md, and a line for each tenth of the trials."""
    values = ", ".join(f"{1e-3 + 1e-6 * index:.6f}" for index in range(num_trials))
    resources = f"resources: {{cpus_per_worker: {os.cpu_count() / num_gangs}}}\n"
    (folder / "sweep.yaml").write_text(TINY.replace("grid: [1e-2, 3e-3]", f"grid: [{values}]") + resources)
    runner.GangTrainable = StandIn  # type: ignore[misc]
    space, store = load(folder / "sweep.yaml"), Store(folder / "store")
    run = Run.create(store, "driver", sweep_text=space.text, identity=space.identity())
    trials = [space.trial(point, 0) for point in space.points()]
    ends: list[float] = []
    memory: list[int] = []
    process = psutil.Process()

    with Board(space, console=Console(stderr=True, quiet=True)) as board:

        def show(event: Any) -> None:
            board.show(event)
            if event.event == "finished":
                ends.append(time.monotonic())
                if len(ends) % max(1, num_trials * 14 // 10) == 0:
                    memory.append(process.memory_info().rss)
                    print(f"{len(ends)} stage ends, {memory[-1] / 1e6:.0f} MB", file=sys.stderr, flush=True)

        runner.run_tune(space, store, run, Journal(run, show), trials=trials)
    ray.shutdown()
    # From the first tenth on: gangs are up.
    first = len(ends) // 10
    rate = (len(ends) - first) / (ends[-1] - ends[first])
    each = (memory[-1] - memory[0]) / (0.9 * num_trials)
    spent = process.cpu_times()
    print(
        f"| {num_trials} | {num_gangs} | {len(ends)} | {rate:.0f} | {memory[-1] / 1e6:.0f} | {each / 1e3:.0f} "
        f"| {1e3 * (spent.user + spent.system) / len(ends):.1f} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=1000)
    parser.add_argument("--gangs", type=int, default=2)
    given = parser.parse_args()
    print("| trials | gangs | stage ends | a second | RSS, MB | of it a trial, kB | driver's CPU a stage end, ms |")
    with tempfile.TemporaryDirectory() as name:
        measure(Path(name), given.trials, given.gangs)


if __name__ == "__main__":
    main()
