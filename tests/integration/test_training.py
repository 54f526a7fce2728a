"""The training loop on real gangs: gloo, DeepSpeed ZeRO 0 to 3, interrupted and resumed to the same bits."""

import json
import os
import socket
import sys
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp

from raysweep.errors import Diverged
from raysweep.runners.gang import join_process_group, make_worker
from raysweep.search import Resources
from raysweep.stages.pretrain import Pretrain, Recipe
from raysweep.train.models import Llama
from raysweep.train.optimizers import SGD, AdamW
from raysweep.worker import Worker


def recipe_of(grammar, **changes) -> Recipe:
    given = {
        "data": grammar,
        "model": Llama(hidden_size=16, num_layers=2, num_heads=2),
        "optimizer": AdamW(lr=1e-2),
        "steps": 12,
        "batch_sequences": 6,
        "sequence_length": 5,
    }
    return Recipe(**(given | changes))


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(folder / "model.safetensors")


def same(left: Path, right: Path) -> bool:
    ours, theirs = weights_of(left), weights_of(right)
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def pretrain(recipe: Recipe, tokens: Path, out: Path, *, step: int, state: Path | None, worker: Worker | None = None):
    from dataclasses import replace

    out.mkdir(parents=True, exist_ok=True)
    worker = replace(worker or Worker(), state_dir=state)
    return Pretrain(recipe=recipe, seed=0, step=step).run({"tokens": tokens}, out, worker)


def rank_main(rank: int, port: int, zero_stage: int, recipe_json: str, folder: str) -> None:
    """One rank of a gang: whole training, then the same in two halves from saved state, then four more, for memory."""
    os.environ["OMP_NUM_THREADS"] = "1"
    resources = Resources(workers=2, zero_stage=zero_stage)
    worker = make_worker(resources, rank=rank, world_size=2)
    join_process_group(worker, resources, "127.0.0.1", port)
    recipe, root = Recipe.model_validate_json(recipe_json), Path(folder)
    tokens = root / "tokens"
    metrics = pretrain(recipe, tokens, root / "whole", step=12, state=None, worker=worker)
    pretrain(recipe, tokens, root / "half", step=5, state=root / "state", worker=worker)
    resumed = pretrain(recipe, tokens, root / "resumed", step=12, state=root / "state", worker=worker)
    memory = []
    for index in range(5):
        pretrain(recipe, tokens, root / f"again{index}", step=2, state=None, worker=worker)
        memory.append(int(Path("/proc/self/statm").read_text().split()[1]) * 4096)
    drop = ("tokens_per_second",)
    if rank == 0:
        kept = [{name: value for name, value in part.items() if name not in drop} for part in (metrics, resumed)]
        (root / "found.json").write_text(json.dumps({"metrics": kept, "memory": memory}))


def gang(zero_stage: int, recipe: Recipe, folder: Path) -> dict:
    with socket.socket() as probe:
        probe.bind(("", 0))
        port = probe.getsockname()[1]
    mp.spawn(rank_main, (port, zero_stage, recipe.model_dump_json(by_alias=True), str(folder)), nprocs=2)
    return json.loads((folder / "found.json").read_text())


def test_saved_and_resumed_is_whole_to_the_bit(grammar, tokens_dir, tmp_path):
    recipe = recipe_of(grammar)
    whole = pretrain(recipe, tokens_dir, tmp_path / "whole", step=12, state=None)
    state = tmp_path / "state"
    pretrain(recipe, tokens_dir, tmp_path / "half", step=5, state=state)
    resumed = pretrain(recipe, tokens_dir, tmp_path / "resumed", step=12, state=state)
    assert same(tmp_path / "whole", tmp_path / "resumed")
    assert not same(tmp_path / "whole", tmp_path / "half")
    assert whole["loss_nats_per_token"] == resumed["loss_nats_per_token"]
    curves = [(tmp_path / name / "curve.jsonl").read_text() for name in ("whole", "resumed")]
    assert curves[0] == curves[1]
    assert len(curves[0].splitlines()) == 12


def test_a_state_cut_off_in_saving_is_not_used(grammar, tokens_dir, tmp_path):
    recipe, state = recipe_of(grammar), tmp_path / "state"
    pretrain(recipe, tokens_dir, tmp_path / "half", step=5, state=state)
    (state / "step-5").rename(state / ".step-9")
    pretrain(recipe, tokens_dir, tmp_path / "resumed", step=12, state=state)
    pretrain(recipe, tokens_dir, tmp_path / "whole", step=12, state=None)
    assert same(tmp_path / "whole", tmp_path / "resumed")


def test_micro_batches_change_rounding_alone(grammar, tokens_dir, tmp_path):
    recipe = recipe_of(grammar, optimizer=SGD(name="sgd", lr=0.1))
    pretrain(recipe, tokens_dir, tmp_path / "one", step=12, state=None)
    cut = Worker(micro_batch_sequences=4)
    pretrain(recipe, tokens_dir, tmp_path / "two", step=12, state=None, worker=cut)
    ours, theirs = weights_of(tmp_path / "one"), weights_of(tmp_path / "two")
    # Twelve float32 steps at rounding 1e-7 each, weights of order 0.1
    assert all(torch.allclose(ours[name], theirs[name], atol=1e-5) for name in ours)


def test_checkpoint_opens_as_hugging_face_opens_it(grammar, tokens_dir, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    pretrain(recipe_of(grammar), tokens_dir, tmp_path / "out", step=12, state=None)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    ids = tokenizer("w1 w2 w3", return_tensors="pt").input_ids
    assert ids.tolist() == [[2, 3, 4]]
    assert model(ids).logits.shape == (1, 3, 17)


def test_training_comes_near_the_entropy(grammar, tokens_dir, tmp_path):
    recipe = recipe_of(grammar, steps=400, batch_sequences=32, model=Llama(hidden_size=32, num_layers=2, num_heads=2))
    metrics = pretrain(recipe, tokens_dir, tmp_path / "out", step=400, state=None)
    # Not below it: the loss of 40 held-out sentences is compared with their own true loss.
    assert 0 < metrics["entropy_gap_nats_per_token"] < 0.15


def test_divergence_is_raised(grammar, tokens_dir, tmp_path):
    recipe = recipe_of(grammar, optimizer=SGD(name="sgd", lr=1e30), clip_norm=None)
    with pytest.raises(Diverged, match="diverged at step"):
        pretrain(recipe, tokens_dir, tmp_path / "out", step=12, state=None)


@pytest.mark.slow
@pytest.mark.parametrize("zero_stage", [0, 1, 2, 3])
def test_gang_of_two_resumes_to_the_bit_and_gives_memory_back(grammar, tokens_dir, tmp_path, zero_stage):
    recipe = recipe_of(grammar)
    found = gang(zero_stage, recipe, tmp_path)
    assert same(tmp_path / "whole", tmp_path / "resumed")
    assert found["metrics"][0] == found["metrics"][1]
    assert found["memory"][-1] - found["memory"][0] < 20 * 2**20
    # The same batches and weights as one process: the loss differs by rounding alone.
    alone = pretrain(recipe, tokens_dir, tmp_path / "alone", step=12, state=None)
    assert found["metrics"][0]["loss_nats_per_token"] == pytest.approx(alone["loss_nats_per_token"], abs=1e-3)


def test_light_modules_import_nothing_heavy():
    import subprocess

    code = "import sys, raysweep.cli, raysweep.space, raysweep.estimates, raysweep.screen; print(sorted(sys.modules))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    heavy = {"torch", "transformers", "accelerate", "deepspeed", "ray", "optuna", "pandas", "plotly"}
    assert not heavy & set(eval(out))
