"""A step's gradient on real gangs: the same in 1 micro-batch and in 8, under any ZeRO, by either form of the loss."""

import json
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil
import pytest
from ranks import run_ranks
from tiny import free_port

from raysweep.objectives.causal_lm import CausalLM
from raysweep.objectives.output_loss import use_loss_layer
from raysweep.resources import Resources
from raysweep.runners.processes import join_process_group, leave_process_group, make_worker
from raysweep.train.loop import train
from raysweep.train.models import Llama
from raysweep.train.optimizers import AdamW
from raysweep.train.schedules import Constant


def steps(worker, *, bf16: bool = False, loss_layer: bool = False) -> dict[str, list[float]]:
    """Losses and gradient norms of three steps of 16 sequences."""
    ids = np.random.default_rng(0).integers(0, 40, size=(48, 12))
    model = Llama(hidden_size=32, num_layers=2, num_heads=2).build(vocab_size=40, sequence_length=12, seed=0)
    if loss_layer:
        use_loss_layer(model)

    def batch_at(step: int) -> dict:
        rows = ids[16 * step : 16 * step + 16]
        return {"input_ids": rows, "labels": rows}

    training = train(
        model,
        batch_at,
        objective=CausalLM(),
        optimizer=AdamW(lr=1e-3),
        schedule=Constant(name="constant"),
        num_steps=3,
        seed=0,
        bf16=bf16,
        worker=worker,
    )
    return {"losses": training.losses, "grad_norms": training.grad_norms}


def rank_main(rank: int, port: int, folder: str) -> None:
    os.environ["OMP_NUM_THREADS"] = "1"
    resources = Resources(workers=2, zero_stage=1)
    first = make_worker(resources, rank=rank, world_size=2)
    join_process_group(first, resources, "127.0.0.1", port)
    found = {}
    for stage in range(4):
        whole = replace(first, zero_stage=stage)
        cut = replace(whole, micro_batch_sequences=1)
        found[f"{stage}"] = steps(whole)
        found[f"{stage}, 8 micro-batches, loss in the output layer"] = steps(cut, loss_layer=True)
        found[f"{stage}, 8 micro-batches, bf16"] = steps(cut, bf16=True, loss_layer=True)
    if rank == 0:
        (Path(folder) / "found.json").write_text(json.dumps(found))
    listening = [each.laddr.ip for each in psutil.Process().net_connections() if each.status == psutil.CONN_LISTEN]
    (Path(folder) / f"listening-{rank}.json").write_text(json.dumps(listening))
    leave_process_group()


@pytest.mark.slow
def test_gradient_norms_are_equal_however_a_step_is_cut(tmp_path):
    run_ranks(rank_main, (free_port(), str(tmp_path)))
    found = json.loads((tmp_path / "found.json").read_text())
    # Whoever reaches a rank's port is let in without a key: on one machine nobody else may.
    listening = [json.loads((tmp_path / f"listening-{rank}.json").read_text()) for rank in range(2)]
    assert listening[0]
    assert {address for rank in listening for address in rank} == {"127.0.0.1"}
    alone = make_worker(Resources(), rank=0, world_size=1)
    whole, rounded = steps(alone), steps(alone, bf16=True)
    for name, given in found.items():
        # In bfloat16 weights and each micro-batch's gradient keep eight bits, whose errors cancel over a gradient.
        wanted, error = (rounded, 1e-2) if "bf16" in name else (whole, 1e-5)
        for key in ("losses", "grad_norms"):
            np.testing.assert_allclose(given[key], wanted[key], rtol=error, err_msg=f"{key}, ZeRO {name}")
