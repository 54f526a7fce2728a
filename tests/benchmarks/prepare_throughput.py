"""(g) Text that each objective prepares in a second of one core, and its part of the training of a small model."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import numpy as np
from pretrain_throughput import SMALL, VOCAB

from raysweep.objectives.base import Arrays, ObjectiveSpec, Specials
from raysweep.objectives.families import UL2, CausalLM, Mixture, PrefixLM, SpanCorruption
from raysweep.train.loop import train
from raysweep.train.optimizers import AdamW
from raysweep.train.schedules import Constant
from raysweep.worker import Worker

ROUNDS = 30
# Sequences and their length: of a large batch, and of one that a small model trains on here.
LARGE_BATCH, SMALL_BATCH = (256, 512), (16, 128)
STEPS = 12
BAR = 0.01
"""Part of the training's time."""

SPANS = SpanCorruption(name="span_corruption")
PAPER = UL2(name="ul2")
OBJECTIVES: tuple[ObjectiveSpec, ...] = (
    CausalLM(),
    PrefixLM(name="prefix_lm"),
    SPANS,
    PAPER,
    Mixture(name="mixture", objectives={"causal": CausalLM(), "spans": SPANS, "ul2": PAPER}),
)


class Timed:
    """Batches of an objective, and the CPU seconds that each took."""

    def __init__(self, objective: ObjectiveSpec, num: int, length: int) -> None:
        self._objective = objective
        self._ids = np.random.default_rng(0).integers(0, VOCAB, (num, length))
        extra = {token: VOCAB + index for index, token in enumerate(objective.extra_tokens())}
        self._specials = Specials(extra, VOCAB, tuple(extra.values()))
        self.seconds: list[float] = []

    def __call__(self, step: int) -> Arrays:
        began = time.thread_time()
        rows = self._objective.prepare(self._ids, np.random.default_rng([0, 4, step]), self._specials)
        self.seconds.append(time.thread_time() - began)
        return rows


def rate(objective: ObjectiveSpec) -> float:
    """Tokens of text that are prepared in a second, of the median batch."""
    batches = Timed(objective, *LARGE_BATCH)
    for step in range(ROUNDS):
        batches(step)
    return LARGE_BATCH[0] * LARGE_BATCH[1] / float(np.median(batches.seconds))


def training(objective: ObjectiveSpec) -> tuple[float, float]:
    """Tokens of text that are trained on in a second, and the part of it that prepares them."""
    batches = Timed(objective, *SMALL_BATCH)
    length = objective.input_length(SMALL_BATCH[1])
    model = SMALL.build(vocab_size=VOCAB + len(objective.extra_tokens()), sequence_length=length, seed=0)
    settings: dict[str, Any] = {"optimizer": AdamW(lr=1e-3), "schedule": Constant(name="constant"), "seed": 0}
    began = time.thread_time()
    train(model, batches, objective=objective, num_steps=STEPS, worker=Worker(), **settings)
    seconds = time.thread_time() - began
    return STEPS * SMALL_BATCH[0] * SMALL_BATCH[1] / seconds, sum(batches.seconds) / seconds


def main() -> Iterator[tuple[str, str]]:
    for objective in OBJECTIVES:
        trained, part = training(objective)
        yield (
            f"(g) {objective.name}: text prepared; trained on, by {SMALL.num_parameters(VOCAB) / 1e6:.1f}M parameters",
            f"{rate(objective) / 1e6:.1f}M; {trained:,.0f} tokens/s of CPU; preparing is {part:.2%} (bar {BAR:.0%})",
        )


if __name__ == "__main__":
    for what, result in main():
        print(f"| {what} | {result} |", flush=True)
