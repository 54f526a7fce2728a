"""(c2) From the command to the first training step, on Ray, and where the time goes: the bar is 12 s on 2 cores."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from gang_overhead import SWEEP

ROUNDS = 3

DRIVER = """
import sys, time, json
began = float(sys.argv[1])
marks = {"driver up": time.time()}
from raysweep.runners import run_sweep
from raysweep.runners import tune
from raysweep.space import load
from raysweep.store import Store
start = tune.start_ray
def started(*args, **kwargs):
    marks["imports, sweep file"] = time.time()
    cluster = start(*args, **kwargs)
    marks["Ray started"] = time.time()
    return cluster
tune.start_ray = started
def show(event):
    names = {"trial": "first gang up", "finished": "tokenized", "progress": "first step"}
    name = names.get(event.event)
    if name and name not in marks:
        marks[name] = event.time
run_sweep(load(sys.argv[2]), Store(sys.argv[3]), show=show)
print(json.dumps({name: mark - began for name, mark in marks.items()}))
"""


def main() -> list[tuple[str, str]]:
    found = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        text = (SWEEP % "0.001").replace("steps: 20", "steps: 20\n  checkpoints: [1, 20]")
        (folder / "sweep.yaml").write_text(text)
        for index in range(ROUNDS):
            command = [
                sys.executable,
                "-c",
                DRIVER,
                str(time.time()),
                str(folder / "sweep.yaml"),
                str(folder / f"s{index}"),
            ]
            out = subprocess.run(
                command, capture_output=True, text=True, check=True, env=os.environ | {"OMP_NUM_THREADS": "1"}
            )
            found.append(json.loads(out.stdout.splitlines()[-1]))
    rows = []
    before = 0.0
    for name in found[0]:
        at = statistics.median(round_[name] for round_ in found)
        rows.append((f"(c2) {name}", f"{at:.1f} s after the command (+{at - before:.1f} s)"))
        before = at
    rows[-1] = (rows[-1][0], rows[-1][1] + " (bar 12 s)")
    return rows


if __name__ == "__main__":
    for row in main():
        print(*row, sep=": ")
