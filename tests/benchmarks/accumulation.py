"""How far a step's gradient in bfloat16 is off that in float32, by what DeepSpeed adds micro-batches up in.

python tests/benchmarks/accumulation.py

One process under each stage of ZeRO, a Llama of 0.1 M parameters, 64 sequences in 1 and in 64 micro-batches: the
distance from the gradient of all of them at once in float32, over its norm.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))

from tiny import free_port

from raysweep.objectives.causal_lm import CausalLM
from raysweep.resources import Resources
from raysweep.runners.processes import join_process_group, leave_process_group, make_worker
from raysweep.train import deepspeed_engine
from raysweep.train.deepspeed_engine import DeepSpeedEngine
from raysweep.train.engines import PlainEngine
from raysweep.train.models import Llama
from raysweep.train.optimizers import AdamW
from raysweep.worker import Worker

VOCAB, LENGTH, SEQUENCES = 512, 32, 64
IDS = torch.from_numpy(np.random.default_rng(0).integers(0, VOCAB, size=(SEQUENCES, LENGTH)))
SUMS = {"float32": deepspeed_engine.SUMS_IN_FP32, "bfloat16": {}}
GIVEN = {"objective": CausalLM(), "optimizer": AdamW(lr=1e-3), "clip_norm": None}


def gradient(num_micro_batches: int, *, bf16: bool, worker: Worker, sums: Mapping[str, Any] | None = None) -> Tensor:
    """Of the mean loss, by name; `sums` None: by plain torch."""
    model = Llama(hidden_size=64, num_layers=2, num_heads=2).build(vocab_size=VOCAB, sequence_length=LENGTH, seed=0)
    if sums is None:
        engine = PlainEngine(model, bf16=bf16, worker=worker, **GIVEN)
    else:
        deepspeed_engine.SUMS_IN_FP32 = dict(sums)
        engine = DeepSpeedEngine(
            model,
            bf16=bf16,
            worker=worker,
            num_micro_batches=num_micro_batches,
            micro_batch_sequences=SEQUENCES // num_micro_batches,
            has_own_steps=True,
            **GIVEN,
        )
    batches = [{"input_ids": ids, "labels": ids} for ids in IDS.chunk(num_micro_batches)]
    engine.accumulate(batches, num_tokens=SEQUENCES * (LENGTH - 1))
    found = dict(zip(map(id, engine.tensors), engine.take(), strict=True))
    pairs = engine._stepped.items()
    whole = {name: piece.join(found[id(each)])[0] if piece else found[id(each)] for name, (each, piece) in pairs}
    flat = torch.cat([whole[name].detach().double().flatten() for name in sorted(whole)])
    engine.close()
    return flat


def main() -> None:
    """Print the table."""
    true = gradient(1, bf16=False, worker=Worker())

    def off(found: Tensor) -> str:
        return f"{(found - true).norm() / true.norm():.2%}"

    print("| ZeRO | sums in | 1 micro-batch | 64 micro-batches |")
    print("| --- | --- | --- | --- |")
    plain = [off(gradient(num, bf16=True, worker=Worker())) for num in (1, 64)]
    print(f"| none (autocast) | float32 | {' | '.join(plain)} |")
    for stage in (1, 2, 3):
        resources = Resources(workers=1, zero_stage=stage)
        worker = make_worker(resources, rank=0, world_size=1)
        join_process_group(worker, resources, "127.0.0.1", free_port())
        for word, sums in SUMS.items():
            cells = [off(gradient(num, bf16=True, worker=worker, sums=sums)) for num in (1, 64)]
            print(f"| {stage} | {word} | {' | '.join(cells)} |", flush=True)
        leave_process_group()


if __name__ == "__main__":
    main()
