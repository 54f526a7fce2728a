"""Time and memory of a step of each method for flat minima, beside a plain step of the same training loop."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path

from subjects import ON_GPU, SUBJECTS, TIMED, WARM_UP, Subject, train_on, worker
from table import Numbers, Table, in_words
from throughput import Clock

from raysweep.train.flat import FlatSpec

sys.path.append(str(Path(__file__).parents[1]))
from flat_steps import METHODS  # beside this folder

NAME = "124M"
LENGTH = 1024 if ON_GPU else 16
# Of a step, which is one micro-batch: what is asked is what methods add, not what accumulation does.
SEQUENCES = 32 if ON_GPU else 8


def main(table: Table) -> None:
    """A row of each method."""
    subject = SUBJECTS[NAME]
    step = Subject(subject.model, subject.vocab_size, SEQUENCES * LENGTH, 1)
    title = f"a step of {NAME}, {SEQUENCES} sequences of {LENGTH}"
    plain = table.measure(f"{title}: plain", partial(_step, step, None))
    for name, method, bar in METHODS:
        found = table.measure(f"{title}: {name}", partial(_step, step, method))
        if plain and found:
            times = found["milliseconds"] / plain["milliseconds"]
            note = "" if ON_GPU else "; bars are for GPUs"
            table.write(f"{title}: {name}, beside a plain one", f"{times:.3f}x (bar {bar}x){note}")


def _step(subject: Subject, method: FlatSpec | None) -> tuple[str, Numbers]:
    clock = Clock()
    told = worker(subject, LENGTH, report=lambda event: clock.tick(event.step))
    train_on(subject.build(), subject.ids(LENGTH), num_steps=WARM_UP + TIMED, worker=told, flat=method)
    milliseconds = 1000 * clock.seconds / TIMED
    return f"{milliseconds:.1f} ms, {in_words(clock.gib)}", {"milliseconds": milliseconds, "gib": clock.gib}
