"""The quickstart through the inline runner, where there need be no Ray."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

import torch
from subjects import ON_GPU
from table import Numbers, Table

from raysweep import load
from raysweep.runners import run_sweep
from raysweep.store import Store

SWEEP = Path(__file__).parents[3] / "search_spaces" / "quickstart.yaml"
# On a CPU a sweep of the same stages, each of them shorter.
SHORTER = {
    "steps: 600": "steps: 20",
    "[300, 600]": "[10, 20]",
    "num_train_sentences: 40000": "num_train_sentences: 2000",
    "num_valid_sentences: 1000": "num_valid_sentences: 200",
    "grid: [1, 3]": "grid: [1]",
    "{batch_sequences: 8}": "{batch_sequences: 8, min_units: 4, max_units: 8}",
    "num_train: 600, num_valid: 300, num_test: 600": "num_train: 60, num_valid: 30, num_test: 60",
    "seeds: [0, 1]": "seeds: [0]",
    "lrs: [7e-4, 5e-3, 2e-2]": "lrs: [5e-3]",
    "epochs: 6": "epochs: 1",
}


def main(table: Table) -> None:
    """One row."""
    table.measure("the quickstart, inline" + ("" if ON_GPU else ", shortened"), _run)


def _run() -> tuple[str, Numbers]:
    text = SWEEP.read_text()
    ours = "resources: {workers: 2, zero_stage: 2}"
    changes = {ours: f"resources: {{workers: 1, gpus_per_worker: {int(ON_GPU)}}}"} | ({} if ON_GPU else SHORTER)
    for old, new in changes.items():
        assert old in text, f"{SWEEP.name} has no longer {old!r}"
        text = text.replace(old, new)
    torch.set_num_threads(1)  # Its models are too small for more.
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "quickstart.yaml"
        path.write_text(text)
        space = load(path)
        began = time.perf_counter()
        run = run_sweep(space, Store(folder), runner="inline")
        seconds = time.perf_counter() - began
        stages = {stage.id for trial in run.trials() for stage in trial.stages}
        done = sum(run.store.get(stage) is not None for stage in stages)
    if done < len(stages):
        raise RuntimeError(f"{len(stages) - done} of {len(stages)} stages failed")
    return f"{done} stages in {seconds:.0f} s", {"seconds": seconds}
