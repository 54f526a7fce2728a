"""ZeRO-2 and -3 of one worker beside no ZeRO; and a step's gradient, in 1 micro-batch and in 8, under each stage."""

from __future__ import annotations

import socket
from functools import partial
from typing import Any

import numpy as np
from subjects import LENGTHS, ON_GPU, SUBJECTS, Subject, train_on, worker
from table import Numbers, Table
from throughput import measured, ours

from raysweep.resources import Resources
from raysweep.runners.processes import LOOPBACK, join_process_group, leave_process_group, make_worker


def main(table: Table) -> None:
    """Rows of the largest and of the smallest model."""
    resources = Resources(zero_stage=2, gpus_per_worker=int(ON_GPU))
    listener = socket.create_server((LOOPBACK, 0))
    join_process_group(
        make_worker(resources, rank=0, world_size=1),
        resources,
        LOOPBACK,
        listener.getsockname()[1],
        listener=listener,
    )
    length = LENGTHS[0]
    for stage in (2, 3):
        run = partial(ours, zero_stage=stage, compile=stage < 3)
        what = f"training 1B, {length} tokens: ours under ZeRO-{stage}" + ("" if stage < 3 else ", not compiled")
        table.measure(what, partial(measured, run, SUBJECTS["1B"], length))
    table.measure("gradient norms of 1 and 8 micro-batches, ZeRO 0 to 3", _norms)
    leave_process_group()


def _norms() -> tuple[str, Numbers]:
    subject, length = SUBJECTS["124M"], LENGTHS[-1]
    ids = np.random.default_rng(0).integers(0, subject.vocab_size, size=(8, length))
    found = {(stage, cut): _norm(subject, ids, stage, cut) for stage in range(4) for cut in (1, 8)}
    whole = found[0, 1]
    off = {key: value / whole - 1 for key, value in found.items()}
    stage, cut = max(off, key=lambda key: abs(off[key]))
    result = f"{whole:.4f} without ZeRO, in one; at most {off[stage, cut]:+.1e} off (ZeRO-{stage}, in {cut})"
    return result, {f"{stage}/{cut}": value for (stage, cut), value in found.items()}


def _norm(subject: Subject, ids: np.ndarray[Any, Any], stage: int, cut: int) -> float:
    model = subject.model.build(vocab_size=subject.vocab_size, sequence_length=ids.shape[1], seed=0)
    cuts = worker(subject, ids.shape[1], zero_stage=stage, compile=False, micro_batch_sequences=len(ids) // cut)
    return train_on(model, ids, num_steps=1, worker=cuts).grad_norms[0]
