"""Flatness and indicators over a gang: the same bits for any number of workers."""

import json
import math
import os
import shutil
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp
from ranks import run_ranks
from safetensors.torch import load_file, save_file
from tiny import free_port, pretrain, recipe_of

from raysweep.objectives.masked_lm import MaskedLM
from raysweep.objectives.prefix_lm import PrefixLM
from raysweep.resources import Resources
from raysweep.runners.processes import join_process_group, leave_process_group, make_worker
from raysweep.spec import fingerprint
from raysweep.stages.base import Subject
from raysweep.stages.flatness import Flatness, Shape
from raysweep.stages.indicators import Indicators
from raysweep.tasks.spans import PCFGSpan
from raysweep.train.models import Bert, Llama
from raysweep.worker import StateDir, Worker

MEASURES = {"mix": {"pcfg": 1.0}, "sequence_length": 5}


def specs(grammar):
    task = PCFGSpan(form="pcfg_span", span=2, num_train=30, num_valid=10, num_test=20).bind(grammar)
    return [
        Flatness(
            num_sequences=64,
            batch_sequences=2,
            min_units=8,
            max_units=40,
            own_samples=40,
            shape=Shape(num_sequences=4, num_steps=4, num_vectors=2, geodesic_rho=0.1),
            **MEASURES,
        ),
        Indicators(kshot=2, tasks={"a": task, "b": task}),
    ]


def rank_main(rank: int, world_size: int, port: int, folder: str, zero_stage: int, flatness: str, *others: str) -> None:
    os.environ["OMP_NUM_THREADS"] = "1"
    resources = Resources(workers=world_size, zero_stage=zero_stage)
    worker = make_worker(resources, rank=rank, world_size=world_size)
    join_process_group(worker, resources, "127.0.0.1", port)
    inputs = {role: Path(folder) / role for role in ("checkpoint", "tokens")}
    made = [Flatness.model_validate_json(flatness), *map(Indicators.model_validate_json, others)]
    found = [spec.run(inputs, Path(folder), worker) for spec in made]
    (Path(folder) / f"found-{world_size}-{rank}.json").write_text(json.dumps(found))
    leave_process_group()


SMALL = {"model": Llama(hidden_size=16, num_layers=1, num_heads=2), "steps": 20, "batch_sequences": 8}


@pytest.fixture
def inputs(grammar, tokens_dir, tmp_path):
    """A checkpoint of a few steps, and its text."""
    pretrain(recipe_of(grammar, **SMALL), tokens_dir, tmp_path / "checkpoint", step=20)
    torch.set_num_threads(1)
    return {"checkpoint": tmp_path / "checkpoint", "tokens": tokens_dir}


def spawn(world_size: int, *args: object) -> None:
    run_ranks(rank_main, (world_size, free_port(), *args), world_size)


@pytest.mark.slow
def test_one_two_and_four_workers_agree_to_the_bit(grammar, inputs, tmp_path):
    made = specs(grammar)
    alone = [spec.run(inputs, tmp_path, Worker()) for spec in made]
    texts = [spec.model_dump_json(by_alias=True) for spec in made]
    for world_size in (2, 4):
        spawn(world_size, str(tmp_path), 2, *texts)
        for rank in range(world_size):
            assert json.loads((tmp_path / f"found-{world_size}-{rank}.json").read_text()) == alone
    assert alone[0]["hessian_trace_stderr"] > 0
    assert alone[0]["num_probes"] > 8
    assert alone[0]["samples_hessian_trace"] != alone[0]["hessian_trace"]
    assert alone[0]["eigenvalue_1"] <= alone[0]["frobenius_norm"] * 2
    assert alone[0]["worst_sharpness"] > 0
    assert alone[0]["worst_sharpness_geodesic"] > 0
    # Killed at any time, and begun again: what was saved is taken, and the numbers are the same.
    state = Worker(state_dir=StateDir(tmp_path / "state"))
    assert made[0].run(inputs, tmp_path, state) == alone[0]
    saved = sorted((tmp_path / "state").iterdir())
    assert {path.name.rsplit("-", 2)[0] for path in saved} == {"units", "samples", "units-of-samples", "shape"}
    for path in saved:
        text = path.read_text()
        path.write_text(text[: len(text) // 2])
    assert made[0].run(inputs, tmp_path, state) == alone[0]


def test_blocks_are_told_one_by_one_from_the_same_work(inputs, tmp_path):
    given = {"num_sequences": 16, "min_units": 6, "max_units": 8, "parts": True, "products": "exact", **MEASURES}
    plain, told = (Flatness(num_blocks=num, **given).run(inputs, tmp_path, Worker()) for num in (0, 2))
    assert {name: told[name] for name in plain} == plain
    for trace in ("fisher", "hessian"):
        first, second, error = (told[f"{trace}_trace_block_{end}"] for end in ("0", "1", "0_stderr"))
        # Of this model of one block all but the last norm is in it.
        assert first == pytest.approx(told[f"{trace}_trace_blocks"], rel=0.5)
        assert error > 0
        assert math.isnan(second)
    with pytest.raises(ValueError, match="num_blocks: 2 needs traces of single parameters: set parts: true"):
        Flatness(num_blocks=2, **given | {"parts": False})


@pytest.mark.slow
@pytest.mark.parametrize(
    ("batch_sequences", "with_parts", "products"),
    [(1, True, "gradient_differences"), (3, True, "logit_differences"), (3, False, "gradient_differences")],
)
def test_a_sharded_model_gives_the_same_traces(batch_sequences, with_parts, products, inputs, tmp_path):
    spec = Flatness(
        num_sequences=24,
        batch_sequences=batch_sequences,
        min_units=6,
        max_units=8,
        products=products,
        parts=with_parts,
        **MEASURES,
    )
    whole = spec.run(inputs, tmp_path, Worker())
    parts = json.loads((tmp_path / "parameters.json").read_text()) if with_parts else {}
    spawn(2, str(tmp_path), 3, spec.model_dump_json(by_alias=True))
    (sharded,) = json.loads((tmp_path / "found-2-0.json").read_text())
    assert json.loads((tmp_path / "found-2-1.json").read_text()) == [sharded]
    assert sharded.keys() == whole.keys()
    assert sharded["num_probes"] == whole["num_probes"]
    assert sharded["fisher_trace"] == pytest.approx(whole["fisher_trace"], rel=1e-3)
    # Differences carry the rounding of logits and gradients, which differ with the rows that are computed together.
    assert sharded["hessian_trace"] == pytest.approx(whole["hessian_trace"], rel=5e-3)
    assert (tmp_path / "parameters.json").exists() == with_parts
    found = json.loads((tmp_path / "parameters.json").read_text()) if with_parts else {}
    assert found.keys() == parts.keys()
    for name, part in parts.items():
        assert found[name]["fisher"]["mean"] == pytest.approx(part["fisher"]["mean"], rel=1e-5)
        assert (found[name]["hessian"] is None) == (products == "logit_differences")
        if part["hessian"]:
            size = abs(whole["hessian_trace"])
            assert found[name]["hessian"]["mean"] == pytest.approx(part["hessian"]["mean"], rel=1e-2, abs=1e-3 * size)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("objective", "model"),
    [
        (PrefixLM(name="prefix_lm"), Llama(hidden_size=16, num_layers=1, num_heads=2)),
        (MaskedLM(name="masked_lm", mask="one"), Bert(name="bert", hidden_size=16, num_layers=1, num_heads=2)),
    ],
    ids=["prefix_lm", "masked_lm"],
)
def test_a_sharded_model_gives_the_traces_of_its_own_objective(objective, model, grammar, inputs, tmp_path):
    shutil.rmtree(inputs["checkpoint"])
    recipe = recipe_of(grammar, **SMALL | {"model": model, "objective": objective})
    pretrain(recipe, inputs["tokens"], inputs["checkpoint"], step=20)
    given = {"num_sequences": 24, "batch_sequences": 3, "min_units": 6, "max_units": 8}
    spec = Flatness(**given).bind(Subject(grammar, objective, 5, tasks={}))
    whole = spec.run(inputs, tmp_path, Worker())
    spawn(2, str(tmp_path), 3, spec.model_dump_json(by_alias=True))
    (sharded,) = json.loads((tmp_path / "found-2-0.json").read_text())
    assert sharded["num_tokens"] == whole["num_tokens"]
    assert sharded["fisher_trace"] == pytest.approx(whole["fisher_trace"], rel=1e-3)
    assert sharded["hessian_trace"] == pytest.approx(whole["hessian_trace"], rel=1e-2)


@pytest.mark.slow
def test_a_sharded_checkpoint_that_lacks_a_tensor_is_refused(inputs, tmp_path):
    path = inputs["checkpoint"] / "model.safetensors"
    tensors = load_file(path)
    del tensors["model.layers.0.self_attn.q_proj.weight"]
    save_file(tensors, path, metadata={"format": "pt"})
    spec = Flatness(num_sequences=8, min_units=4, max_units=4, **MEASURES)
    with pytest.raises(mp.ProcessRaisedException, match=r"missing model\.layers\.0\.self_attn\.q_proj\.weight"):
        spawn(2, str(tmp_path), 3, spec.model_dump_json(by_alias=True))


def test_a_model_may_be_rescaled_by_factors_of_its_own(inputs, tmp_path):
    shared = Flatness(num_sequences=16, batch_sequences=4, min_units=4, max_units=4, rescaled=True, **MEASURES)
    own = shared.with_(rescaled="own")
    assert fingerprint(own) != fingerprint(shared)
    found, of_own, again = (spec.run(inputs, tmp_path, Worker()) for spec in (shared, own, own))
    assert of_own == again
    assert of_own["hessian_trace"] == found["hessian_trace"]
    assert of_own["rescaled_hessian_trace"] not in (found["rescaled_hessian_trace"], of_own["hessian_trace"])
