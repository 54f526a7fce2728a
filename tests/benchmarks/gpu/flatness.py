"""A trace to 5 % and one exact v'Hv at 1B: seconds, and memory beside that of a training step."""

from __future__ import annotations

import time
from typing import Any

import torch
from subjects import LENGTHS, ON_GPU, SUBJECTS, Subject, worker
from table import Numbers, Table, in_words, peak_gib, release_memory, synchronize

from raysweep.curvature import (
    TraceSettings,
    hessian_vector_products,
    mean_token_loss,
    measure_traces,
    named_parameters,
    prepare,
    probe_vector,
)
from raysweep.curvature.language import equal_batches
from raysweep.objectives.causal_lm import CausalLM
from raysweep.train.loop import train
from raysweep.train.optimizers import AdamW
from raysweep.train.schedules import Constant

SUBJECT, LENGTH = SUBJECTS["1B"], LENGTHS[-1]
NUM_SEQUENCES = 64
TRACE, PRODUCT, STEP = (
    f"flatness of 1B, {LENGTH} tokens: a trace to 5 %",
    f"flatness of 1B, {LENGTH} tokens: one exact v'Hv of one sequence",
    f"flatness of 1B, {LENGTH} tokens: a training step of 2 sequences",
)


def main(table: Table) -> None:
    """Three rows, and the bar."""
    trace, step = table.measure(TRACE, _trace), table.measure(STEP, _step)
    if ON_GPU and trace and step:
        table.write(f"{TRACE}, beside a training step", f"{trace['gib'] / step['gib']:.2f} of its memory (bar 1.0)")
    table.measure(PRODUCT, _product)


def _ids() -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(SUBJECT.vocab_size, (NUM_SEQUENCES, LENGTH), generator=generator)
    return ids.to("cuda" if ON_GPU else "cpu")


def _timed(run: Any) -> tuple[Any, float]:
    synchronize()
    began = time.perf_counter()
    value = run()
    synchronize()
    return value, time.perf_counter() - began


def _trace() -> tuple[str, Numbers]:
    model, ids = SUBJECT.build(), _ids()
    prepare(model, twice_differentiable=False)
    batches = equal_batches({"input_ids": ids}, 2)
    release_memory()
    found, seconds = _timed(lambda: measure_traces(model, batches, TraceSettings(rse=0.05)))
    hessian, gib = found.traces.hessian, peak_gib()
    result = f"{seconds:.1f} s, {in_words(gib)}; {found.traces.num_probes} probes, "
    result += f"{hessian.stderr / abs(hessian.mean):.1%} ({found.reason})"
    return result, {"seconds": seconds, "gib": gib}


def _step() -> tuple[str, Numbers]:
    two = Subject(SUBJECT.model, SUBJECT.vocab_size, 2 * LENGTH, 1)
    ids = two.ids(LENGTH)
    release_memory()
    train(
        two.build(),
        lambda step: {"input_ids": ids, "labels": ids},
        objective=CausalLM(),
        optimizer=AdamW(lr=1e-4),
        schedule=Constant(name="constant", warmup=0.0),
        num_steps=2,
        seed=0,
        bf16=ON_GPU,
        worker=worker(two, LENGTH, compile=False),
    )
    gib = peak_gib()
    return in_words(gib), {"gib": gib}


def _product() -> tuple[str, Numbers]:
    model, ids = SUBJECT.build(), _ids()[:1]
    prepare(model)
    parameters = named_parameters(model)
    vector = probe_vector(parameters, seed=0, probe=0)

    def product() -> Any:
        return hessian_vector_products(lambda: mean_token_loss(model, {"input_ids": ids}), parameters, [vector])

    product()  # The first one is slow.
    release_memory()
    _, seconds = _timed(product)
    gib = peak_gib()
    return f"{seconds:.2f} s, {in_words(gib)}", {"seconds": seconds, "gib": gib}
