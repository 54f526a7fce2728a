"""CPU time of a step of each method for flat minima beside a plain step: interleaved step by step, one process."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import numpy as np

from raysweep.allocator import keep_freed_memory
from raysweep.objectives.base import Specials
from raysweep.objectives.causal_lm import CausalLM
from raysweep.train.ascent import Step
from raysweep.train.engines import PlainEngine
from raysweep.train.flat import ASAM, EMA, LAWA, SAM, SWA, FlatSpec, GradientAgreement, LabelNoise, TracePenalty
from raysweep.train.micro_batches import Cutter
from raysweep.train.models import Llama, fuse_norms
from raysweep.train.optimizers import AdamW
from raysweep.worker import Worker

VOCAB = 2048
SPECIALS = Specials({}, VOCAB)
# Model, sequences of a step, their length, rounds.
CASES = (
    (Llama(hidden_size=128, num_layers=4, num_heads=4), 8, 128, 30),
    (Llama(hidden_size=256, num_layers=6, num_heads=4), 2, 128, 10),
)
# Method, how many times a plain step's it may take at most.
METHODS: tuple[tuple[str, FlatSpec, float], ...] = (
    ("label noise", LabelNoise(name="label_noise"), 1.03),
    ("EMA", EMA(name="ema"), 1.03),
    ("SWA, every step", SWA(name="swa", start=0.0), 1.03),
    ("LAWA, every 5 steps", LAWA(name="lawa", every=5), 1.03),
    ("SAM", SAM(name="sam"), 2.05),
    ("ASAM", ASAM(name="asam"), 2.05),
    ("cheap SAM, every 5th step", SAM(name="sam", every=5), 1.25),
    ("cheap SAM, of a quarter of the batch, every 2nd step", SAM(name="sam", part=0.25, every=2), 1.25),
    ("trace penalty, of half the batch", TracePenalty(name="trace_penalty"), 2.2),
    ("gradient agreement", GradientAgreement(name="gradient_agreement"), 2.2),
)


def stepper(spec: Llama, ids: np.ndarray, method: FlatSpec | None) -> Callable[[int], float]:
    """step -> CPU seconds of it, of a training of its own."""
    model, worker = spec.build(vocab_size=VOCAB, sequence_length=ids.shape[1], seed=0), Worker()
    fuse_norms(model)
    model.train()
    engine = PlainEngine(
        model, objective=CausalLM(), optimizer=AdamW(lr=1e-3), clip_norm=1.0, bf16=False, worker=worker
    )
    cutter = Cutter(worker, num_sequences=len(ids))
    domains = np.arange(len(ids)) % 2

    def take(number: int) -> float:
        began = time.process_time()
        batch = {"input_ids": ids, "labels": ids}
        if method:
            batch = method.relabel(batch, np.random.default_rng([0, number]), SPECIALS)
            if method.needs_domains:
                batch["domains"] = domains
        step = Step(
            engine,
            batch,
            objective=CausalLM(),
            cutter=cutter,
            worker=worker,
            draws=number,
            common_draws=number,
            number=number,
            multiplier=1.0,
        )
        loss, norm = method.take(step) if method else step.plain()
        if method:
            method.end_step(engine.tensors, engine.states, step=number, num_steps=10**6)
        assert float(loss) > 0
        assert float(norm) > 0
        return time.process_time() - began

    return take


def seconds_of(times: list[float]) -> float:
    """Of a step: mean over ten steps, of which each is a median; of cheap methods some steps are dear."""
    return statistics.mean(statistics.median(times[start::10]) for start in range(10))


def main() -> None:
    """Print the rows of a table, one model's after another's."""
    keep_freed_memory()  # As `train` does.
    for spec, num, length, rounds in CASES:
        ids = np.random.default_rng(0).integers(0, VOCAB, size=(num, length))
        takers = {name: stepper(spec, ids, method) for name, method, _ in (("plain", None, 1.0), *METHODS)}
        times: dict[str, list[float]] = {name: [] for name in takers}
        for taker in takers.values():
            for number in range(2):  # Warm.
                taker(number)
        for number in range(rounds):
            # Each begins a round in its turn, as what runs before matters to caches.
            first = number % len(takers)
            for name in [*takers][first:] + [*takers][:first]:
                times[name].append(takers[name](number))
        plain = seconds_of(times["plain"])
        size = f"{spec.num_parameters(VOCAB) / 1e6:.1f} M parameters, {num} x {length} tokens"
        for name, _, bar in METHODS:
            print(f"| {name}; {size} | {seconds_of(times[name]) / plain:.3f}x (bar {bar}x) |", flush=True)
        print(f"| a plain step; {size} | {1000 * plain:.0f} ms of CPU |", flush=True)


if __name__ == "__main__":
    main()
