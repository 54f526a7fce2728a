"""Text tokens/s that each objective prepares on one core, beside those of pretraining's own batches."""

from __future__ import annotations

import time
from collections.abc import Iterator

import numpy as np

from raysweep.objectives.base import ObjectiveSpec, Specials
from raysweep.objectives.families import UL2, CausalLM, Mixture, SpanCorruption

VOCAB = 8192
SHAPES = ((256, 512), (32, 128))
"""Sequences of a step, and their length."""
ROUNDS = 30
BAR = 1e6
"""Tokens/s; a small model on a GPU reads about as many."""

SPANS = SpanCorruption(name="span_corruption")
PAPER = UL2(name="ul2")
OBJECTIVES: tuple[ObjectiveSpec, ...] = (
    SPANS,
    PAPER,
    Mixture(name="mixture", objectives={"causal": CausalLM(), "spans": SPANS, "ul2": PAPER}),
)


def seconds(objective: ObjectiveSpec, num: int, length: int) -> float:
    """Of one batch: the median."""
    ids = np.random.default_rng(0).integers(0, VOCAB, (num, length))
    extra = {token: VOCAB + index for index, token in enumerate(objective.extra_tokens())}
    specials = Specials(extra, VOCAB, tuple(extra.values()))
    times = []
    for step in range(ROUNDS):
        began = time.perf_counter()
        objective.prepare(ids, np.random.default_rng(step), specials)
        times.append(time.perf_counter() - began)
    return float(np.median(times))


def main() -> Iterator[tuple[str, str]]:
    for num, length in SHAPES:
        for objective in OBJECTIVES:
            rate = num * length / seconds(objective, num, length)
            name = f"(f) {objective.name} prepared, {num} x {length} tokens"
            yield name, f"{rate / 1e6:.1f}M tokens/s, one core (bar {BAR / 1e6:.0f}M)"


if __name__ == "__main__":
    for what, result in main():
        print(f"| {what} | {result} |")
