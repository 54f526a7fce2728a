"""A training that goes on, on a gang of another shape, from what the one before has saved."""

import contextlib
import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from ranks import run_ranks
from safetensors.torch import load_file
from tiny import free_port, pretrain, recipe_of

from raysweep.objectives.adversary import Adversary
from raysweep.objectives.causal_lm import CausalLM
from raysweep.objectives.families import Objective
from raysweep.resources import Resources
from raysweep.runners.processes import join_process_group, leave_process_group, make_worker
from raysweep.stages.pretrain import Recipe
from raysweep.train.optimizers import SGD, AdamW, Muon, Optimizer
from raysweep.worker import Worker


@dataclass(frozen=True)
class Case:
    """Bounds on a run with a change of gang beside one process without a break, from rounding alone.

    `loss` is relative, of every step; `weights` is the distance of all weights over how far they moved.
    """

    optimizer: Optimizer
    loss: float
    weights: float
    precision: str = "fp32"
    objective: Objective = field(default_factory=CausalLM)


# Sums of ranks are rounded otherwise: measured, losses by 2e-7 and weights by 1e-6. Muon multiplies matrices in
# bfloat16, of 8 bits: 1e-6 and 0.02; with all products in bfloat16 it is 2e-4 and 0.07. An optimizer's state that is
# lost moves losses by 1e-3 to 1e-2 and weights by 0.5 to 0.8. Lion's is of SGD's kind.
CASES = {
    "adamw": Case(AdamW(lr=1e-3), loss=1e-5, weights=1e-4),
    "sgd": Case(SGD(name="sgd", lr=1e-2), loss=1e-5, weights=1e-4),
    "muon": Case(Muon(name="muon", lr=1e-3), loss=1e-5, weights=0.05),
    # The head that an adversary goes by is solved from all moments, and amplifies their rounding.
    "adversary": Case(
        AdamW(lr=1e-3), loss=1e-5, weights=1e-3, objective=Adversary(name="adversary", strength=-0.5, ridge=0.1)
    ),
    "bf16": Case(AdamW(lr=1e-3), loss=1e-3, weights=0.2, precision="bf16"),
}


def losses_of(out: Path) -> list[float]:
    return [json.loads(line)["loss_nats_per_token"] for line in (out / "curve.jsonl").read_text().splitlines()]


def weights_of(out: Path) -> torch.Tensor:
    weights = load_file(out / "model.safetensors")
    return torch.cat([weights[name].flatten() for name in sorted(weights)])


def gangs_of(out: Path) -> list[tuple[int, int, int]]:
    gangs = json.loads((out / "gangs.json").read_text())
    return [(each["first_step"], each["num_workers"], each["zero_stage"]) for each in gangs]


def go_on(root: Path, name: str, recipe: Recipe, saved_by: str, worker: Worker) -> None:
    """Steps 5 to 12, from a copy of a state, which a gang of another shape has saved."""
    state = root / name / f"{saved_by}-{worker.world_size}-{worker.zero_stage}"
    if worker.rank == 0:
        shutil.copytree(root / name / saved_by, state)
    worker.barrier()
    out = root / name / f"{saved_by} to {worker.world_size}, {worker.zero_stage}"
    pretrain(recipe, root / "tokens", out, step=12, state=state, worker=worker)


def save(root: Path, name: str, recipe: Recipe, saved_by: str, worker: Worker) -> None:
    """Steps 1 to 5."""
    half, state = root / name / f"half of {saved_by}", root / name / saved_by
    pretrain(recipe, root / "tokens", half, step=5, state=state, worker=worker)


@contextlib.contextmanager
def gang(rank: int, num_workers: int, port: int) -> Iterator[Worker]:
    """A rank of one under ZeRO-2."""
    os.environ["OMP_NUM_THREADS"] = "1"
    resources = Resources(workers=num_workers, zero_stage=2)
    worker = make_worker(resources, rank=rank, world_size=num_workers)
    join_process_group(worker, resources, "127.0.0.1", port)
    yield worker
    leave_process_group()


def rank_of_three(rank: int, port: int, recipes: dict[str, str], folder: str) -> None:
    """Under ZeRO 2, of which each has a third of the state."""
    with gang(rank, 3, port) as worker:
        save(Path(folder), "adamw", Recipe.model_validate_json(recipes["adamw"]), "three", worker)


def rank_of_two(rank: int, port: int, recipes: dict[str, str], folder: str) -> None:
    root = Path(folder)
    with gang(rank, 2, port) as worker:
        for name, text in recipes.items():
            recipe = Recipe.model_validate_json(text)
            save(root, name, recipe, "two", worker)
            for saved_by, zero_stage in (("two", 3), ("alone", 2), ("alone", 0)):
                go_on(root, name, recipe, saved_by, replace(worker, zero_stage=zero_stage))
        recipe = Recipe.model_validate_json(recipes["adamw"])
        for zero_stage in (1, 3):
            save(root, "adamw", recipe, f"two under {zero_stage}", replace(worker, zero_stage=zero_stage))
        go_on(root, "adamw", recipe, "three", worker)


@pytest.mark.slow
def test_a_training_goes_on_on_a_gang_of_any_shape(grammar, tokens_dir, tmp_path):
    recipes = {
        name: recipe_of(
            grammar, optimizer=case.optimizer, precision=case.precision, objective=case.objective.model_dump()
        )
        for name, case in CASES.items()
    }
    for name, recipe in recipes.items():
        pretrain(recipe, tokens_dir, tmp_path / name / "whole", step=12)
        save(tmp_path, name, recipe, "alone", Worker())
    written = {name: recipe.model_dump_json(by_alias=True) for name, recipe in recipes.items()}
    run_ranks(rank_of_three, (free_port(), written, str(tmp_path)), num_ranks=3)
    run_ranks(rank_of_two, (free_port(), written, str(tmp_path)))
    gone_on = {
        "two to 2, 3": [(0, 2, 2), (5, 2, 3)],
        "two to 1, 0": [(0, 2, 2), (5, 1, 0)],
        "alone to 2, 2": [(0, 1, 0), (5, 2, 2)],
        "alone to 2, 0": [(0, 1, 0), (5, 2, 0)],
    }
    of_adamw = {
        "two under 1 to 1, 0": [(0, 2, 1), (5, 1, 0)],
        "two under 3 to 1, 0": [(0, 2, 3), (5, 1, 0)],
        "three to 2, 2": [(0, 3, 2), (5, 2, 2)],
        "three to 1, 0": [(0, 3, 2), (5, 1, 0)],
    }
    for name, recipe in recipes.items():
        cases = gone_on | (of_adamw if name == "adamw" else {})
        for saved_by in [out.removesuffix(" to 1, 0") for out in cases if out.endswith(" to 1, 0")]:
            go_on(tmp_path, name, recipe, saved_by, Worker())
        case, whole = CASES[name], tmp_path / name / "whole"
        moved = (weights_of(whole) - weights_of(tmp_path / name / "half of alone")).norm()
        for out, gangs in cases.items():
            where = f"{name}, {out}"
            other = tmp_path / name / out
            np.testing.assert_allclose(losses_of(other), losses_of(whole), rtol=case.loss, err_msg=where)
            assert (weights_of(other) - weights_of(whole)).norm() < case.weights * moved, where
            assert gangs_of(other) == gangs
