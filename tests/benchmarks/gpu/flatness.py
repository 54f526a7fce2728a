"""A trace to 5 % and one exact v'Hv at 1B: seconds, and memory beside that of a training step."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import torch
from subjects import LENGTHS, ON_GPU, SUBJECTS, device_name
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
from raysweep.train.loop import Training, train
from raysweep.train.optimizers import AdamW
from raysweep.train.schedules import Constant
from raysweep.worker import Worker

SUBJECT, LENGTH = SUBJECTS["1B"], LENGTHS[-1]
NUM_SEQUENCES = 512 if ON_GPU else 64
# Steps on text of a Zipf law, after which its curvature is that of a model that has learnt something.
NUM_STEPS, LR = 30, 1e-3 if ON_GPU else 1e-2
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


def _ids(num: int, seed: int) -> Any:
    return np.random.default_rng(seed).zipf(1.3, size=(num, LENGTH)) % SUBJECT.vocab_size


def _held_out(num: int) -> torch.Tensor:
    return torch.from_numpy(_ids(num, seed=0)).to(device_name())


def _trained() -> Any:
    """The model after some steps, in float32, as a checkpoint is measured."""
    trained = _train(SUBJECT.build(), num_sequences=8, num_steps=NUM_STEPS).weights
    model = SUBJECT.build()
    model.load_state_dict(trained)
    return model


def _train(model: Any, *, num_sequences: int, num_steps: int) -> Training:
    def batch_at(step: int) -> dict[str, Any]:
        ids = _ids(num_sequences, seed=1 + step)
        return {"input_ids": ids, "labels": ids}

    return train(
        model,
        batch_at,
        objective=CausalLM(),
        optimizer=AdamW(lr=LR),
        schedule=Constant(name="constant"),
        num_steps=num_steps,
        seed=0,
        bf16=ON_GPU,
        worker=Worker(device=device_name(), micro_batch_sequences=2),
    )


def _timed(run: Any) -> tuple[Any, float]:
    synchronize()
    began = time.perf_counter()
    value = run()
    synchronize()
    return value, time.perf_counter() - began


def _trace() -> tuple[str, Numbers]:
    model = _trained()
    prepare(model, twice_differentiable=False)
    batches = equal_batches({"input_ids": _held_out(NUM_SEQUENCES)}, 2)
    release_memory()
    found, seconds = _timed(lambda: measure_traces(model, batches, TraceSettings(rse=0.05)))
    hessian, gib = found.traces.hessian, peak_gib()
    result = f"{seconds:.1f} s, {in_words(gib)}; {found.traces.num_probes} probes, "
    result += f"{hessian.stderr / abs(hessian.mean):.1%} ({found.reason})"
    return result, {"seconds": seconds, "gib": gib}


def _step() -> tuple[str, Numbers]:
    model = SUBJECT.build()
    release_memory()
    _train(model, num_sequences=2, num_steps=2)
    gib = peak_gib()
    return in_words(gib), {"gib": gib}


def _product() -> tuple[str, Numbers]:
    model, ids = _trained(), _held_out(1)
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
