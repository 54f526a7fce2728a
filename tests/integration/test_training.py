"""The training loop on real gangs: gloo, DeepSpeed ZeRO 0 to 3, interrupted and resumed to the same bits."""

import json
import os
import signal
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.multiprocessing as mp
from ranks import run_ranks
from tiny import free_port, pretrain, recipe_of, tokens_of

from raysweep.errors import Diverged
from raysweep.objectives.causal_lm import CausalLM
from raysweep.resources import Resources
from raysweep.runners.processes import join_process_group, leave_process_group, make_worker
from raysweep.stages.heldout import Heldout
from raysweep.stages.optimizer_state import OptimizerState
from raysweep.stages.phases import Before
from raysweep.stages.pretrain import Pretrain, Recipe
from raysweep.stages.trajectory import Trajectory
from raysweep.train.loop import Training, train
from raysweep.train.models import Llama
from raysweep.train.optimizers import SGD, AdamW, Lion, Muon
from raysweep.train.schedules import Constant
from raysweep.worker import StateDir, Worker


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(folder / "model.safetensors")


def same(left: Path, right: Path) -> bool:
    ours, theirs = weights_of(left), weights_of(right)
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


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
        inductor = "torch._inductor.compile_fx" in sys.modules
        (root / "found.json").write_text(json.dumps({"metrics": kept, "memory": memory, "inductor": inductor}))
    leave_process_group()


def phases_main(rank: int, port: int, zero_stage: int, recipe_json: str, folder: str) -> None:
    """One rank of a gang: 12 steps whole, and the same as 5 and then 7 of another phase, by the state between."""
    os.environ["OMP_NUM_THREADS"] = "1"
    resources = Resources(workers=2, zero_stage=zero_stage)
    worker = make_worker(resources, rank=rank, world_size=2)
    join_process_group(worker, resources, "127.0.0.1", port)
    recipe, root = Recipe.model_validate_json(recipe_json), Path(folder)
    inputs = {"tokens": root / "tokens"}
    Pretrain(recipe=recipe, seed=0, step=12).run(inputs, made(root / "whole"), worker)
    first, then = (Pretrain(recipe=recipe.with_(steps=steps), seed=0, step=steps) for steps in (5, 7))
    first.run(inputs, made(root / "first"), worker)
    OptimizerState(pretrain=first).run(inputs, made(root / "state"), worker)
    goes_on = inputs | {"start": root / "first", "optimizer": root / "state"}
    before = Before(steps=5, tokens=150, sequences=30, read={})
    then.with_(before=before).run(goes_on, made(root / "then"), worker)
    leave_process_group()


def made(folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    return folder


def gang(zero_stage: int, recipe: Recipe, folder: Path) -> dict:
    given = (free_port(), zero_stage, recipe.model_dump_json(by_alias=True), str(folder))
    run_ranks(rank_main, given)
    return json.loads((folder / "found.json").read_text())


def train_rows(model, *, worker: Worker, kill_at: int | None = None, **given) -> Training:
    """36 steps on random rows; the process is killed when it asks for the batch of step `kill_at`."""
    ids = np.random.default_rng(0).integers(0, 20, size=(40, 8))

    def batch_at(step: int) -> dict:
        if step == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        return {"input_ids": ids[step : step + 4], "labels": ids[step : step + 4]}

    settings = {"objective": CausalLM(), "optimizer": AdamW(lr=1e-2), "schedule": Constant(name="constant")}
    return train(model, batch_at, num_steps=36, seed=0, worker=worker, **(settings | given))


def killed_main(rank: int, port: int, folder: str, kill_at: int | None) -> None:
    resources = Resources(workers=2, zero_stage=2)
    worker = make_worker(resources, rank=rank, world_size=2)
    join_process_group(worker, resources, "127.0.0.1", port)
    model = Llama(hidden_size=16, num_layers=1, num_heads=2).build(vocab_size=20, sequence_length=8, seed=0)
    # Only rank 1 is killed; rank 0 dies of waiting for it.
    training = train_rows(
        model,
        worker=worker,
        kill_at=kill_at if rank == 1 else None,
        states=StateDir(Path(folder)),
        save_every_seconds=0,
    )
    if rank == 0:
        found = {"losses": training.losses, "weights": {k: v.tolist() for k, v in training.weights.items()}}
        (Path(folder) / "found.json").write_text(json.dumps(found))
    leave_process_group()


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
    (state / "step-5").rename(state / "step-9")
    (state / "step-9" / "digests.json").unlink()
    pretrain(recipe, tokens_dir, tmp_path / "resumed", step=12, state=state)
    pretrain(recipe, tokens_dir, tmp_path / "whole", step=12, state=None)
    assert same(tmp_path / "whole", tmp_path / "resumed")
    assert [path.name for path in state.iterdir()] == ["step-12"]


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("rank0-0.safetensors", "cut off"),
        ("rank0-0.safetensors", "altered"),
        ("index.json", "altered"),
        ("digests.json", "altered"),
        ("digests.json", "missing"),  # As in states of another format.
    ],
)
def test_a_damaged_state_is_not_used(grammar, tokens_dir, tmp_path, caplog, name, damage):
    recipe, state = recipe_of(grammar), tmp_path / "state"
    pretrain(recipe, tokens_dir, tmp_path / "half", step=5, state=state)
    path = state / "step-5" / name
    content = path.read_bytes()
    path.unlink()
    if damage == "cut off":
        path.write_bytes(content[:-100])
    elif damage == "altered":
        # One bit in the middle: of a weight, or of a digit.
        middle = len(content) // 2
        path.write_bytes(content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :])
    pretrain(recipe, tokens_dir, tmp_path / "resumed", step=12, state=state)
    pretrain(recipe, tokens_dir, tmp_path / "whole", step=12, state=None)
    assert same(tmp_path / "whole", tmp_path / "resumed")
    assert "step-5 is not used" in caplog.text


def test_dropout_follows_from_the_seed(tmp_path):
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(vocab_size=20, n_embd=16, n_layer=1, n_head=2, n_positions=16, bos_token_id=0, eos_token_id=0)
    start = GPT2LMHeadModel(config).state_dict()

    def losses(**given) -> list[float]:
        model = GPT2LMHeadModel(config)
        model.load_state_dict(start)
        torch.rand(1)  # what an earlier stage drew
        return train_rows(model, **({"worker": Worker()} | given)).losses

    whole = losses()
    assert whole == losses()
    losses(states=StateDir(tmp_path), stop_step=11)
    assert whole == losses(states=StateDir(tmp_path))


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
    pretrain(recipe, tokens_dir, tmp_path / "out", step=400, state=None)
    heldout = Heldout(objective=recipe.objective, mix=grammar.mix, sequence_length=recipe.sequence_length)
    metrics = heldout.run({"tokens": tokens_dir, "checkpoint": tmp_path / "out"}, tmp_path, Worker())
    # Not below it: the loss of 40 held-out sentences is compared with their own true loss.
    assert 0 < metrics["entropy_gap_nats_per_token"] < 0.15


def test_divergence_is_raised(grammar, tokens_dir, tmp_path):
    recipe = recipe_of(grammar, optimizer=SGD(name="sgd", lr=1e30), clip_norm=None)
    with pytest.raises(Diverged, match="diverged at step"):
        pretrain(recipe, tokens_dir, tmp_path / "out", step=12, state=None)


def gradient_of(worker: Worker, *, bf16: bool) -> torch.Tensor:
    """Of the mean loss over 64 sequences, as a step of plain SGD at rate 1 takes it off the weights."""
    model = Llama(hidden_size=64, num_layers=2, num_heads=2).build(vocab_size=200, sequence_length=16, seed=0)
    ids = np.random.default_rng(0).zipf(1.3, size=(64, 16)) % 200
    before = {name: value.detach().clone() for name, value in model.state_dict().items()}
    settings = {"optimizer": SGD(name="sgd", lr=1.0, momentum=0.0), "schedule": Constant(name="constant", warmup=0.0)}
    after = train(
        model,
        lambda step: {"input_ids": ids, "labels": ids},
        objective=CausalLM(),
        num_steps=1,
        seed=0,
        clip_norm=None,
        bf16=bf16,
        worker=worker,
        **settings,
    ).weights
    return torch.cat([(before[name] - after[name].float()).flatten() for name in sorted(before)])


@pytest.mark.slow
def test_gradients_of_many_micro_batches_are_summed_in_float32():
    exact, linear = gradient_of(Worker(), bf16=False), torch.nn.functional.linear
    for zero_stage in (1, 2, 3):
        resources = Resources(zero_stage=zero_stage, micro_batch_sequences=1)
        worker = make_worker(resources, rank=0, world_size=1)
        join_process_group(worker, resources, "127.0.0.1", free_port())
        try:
            error = gradient_of(worker, bf16=True) - exact
        finally:
            leave_process_group()
        # The rounding of weights and of each micro-batch's gradient makes 0.7 %; sums in bfloat16 made 1.1 %.
        assert float(error.norm() / exact.norm()) < 0.009, zero_stage
        assert torch.nn.functional.linear is linear, "what DeepSpeed replaces would stay for later stages"


class Told:
    """An objective whose loss is 0.1 nats at first and 2 nats from then on."""

    def __init__(self) -> None:
        self.values = iter([0.1] + [2.0] * 40)

    def num_predicted(self, batch):
        return 4 * 7

    def loss_sum(self, model, batch):
        return next(self.values) * 4 * 7 + 0 * sum(parameter.sum() for parameter in model.parameters())

    def learning(self):
        return None


def test_an_easy_first_batch_is_no_divergence():
    training = train_rows(torch.nn.Linear(2, 2), objective=Told(), worker=Worker())
    assert training.losses == pytest.approx([0.1] + [2.0] * 35)


@pytest.mark.slow
def test_a_killed_gang_goes_on_to_the_bit(tmp_path):
    found = {}
    for name, kills in (("killed", [27, None]), ("whole", [None])):
        (tmp_path / name).mkdir()
        for kill_at in kills:
            if kill_at is None:
                run_ranks(killed_main, (free_port(), str(tmp_path / name), None))
            else:
                with pytest.raises(mp.ProcessExitedException):
                    run_ranks(killed_main, (free_port(), str(tmp_path / name), kill_at))
                assert (tmp_path / name / "step-20").is_dir()
        found[name] = json.loads((tmp_path / name / "found.json").read_text())
    assert found["killed"] == found["whole"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("zero_stage", "precision"),
    [(3, "fp32"), (0, "bf16"), (2, "bf16")],  # Of the others, the test of every optimizer.
)
def test_gang_of_two_resumes_to_the_bit_and_gives_memory_back(grammar, tokens_dir, tmp_path, zero_stage, precision):
    recipe = recipe_of(grammar, precision=precision)
    found = gang(zero_stage, recipe, tmp_path)
    assert same(tmp_path / "whole", tmp_path / "resumed")
    assert found["metrics"][0] == found["metrics"][1]
    assert found["memory"][-1] - found["memory"][0] < 20 * 2**20
    assert not found["inductor"]  # Nothing was compiled, so what compiles was not imported, which takes seconds.
    # The same batches and weights as one process: the loss of about 2 nats differs by rounding alone, of a step's sum
    # in float32, of every layer's values in bfloat16.
    alone = pretrain(recipe, tokens_dir, tmp_path / "alone", step=12, state=None)
    tolerance = {"fp32": 1e-5, "bf16": 2e-2}[precision]
    assert found["metrics"][0]["loss_nats_per_token"] == pytest.approx(alone["loss_nats_per_token"], abs=tolerance)
    # A checkpoint keeps the weights in float32, whatever they were multiplied in.
    assert any(not torch.equal(value, value.bfloat16().float()) for value in weights_of(tmp_path / "whole").values())


OPTIMIZERS = {
    "adamw": AdamW(lr=1e-2),
    "lion": Lion(name="lion", lr=1e-3),
    "muon": Muon(name="muon", lr=1e-2, adamw_lr=3e-3),
}


def train_and_resume(recipe: Recipe, folder: Path, worker: Worker) -> None:
    """Writes whole/, resumed/ and the optimizer's state after the last step."""
    tokens, state = folder / "tokens", folder / "state"
    pretrain(recipe, tokens, folder / "whole", step=12, state=None, worker=worker)
    pretrain(recipe, tokens, folder / "half", step=5, state=state, worker=worker)
    pretrain(recipe, tokens, folder / "resumed", step=12, state=state, worker=worker)
    trajectory = Trajectory(recipe, 0, None, {"tokens": tokens})
    trajectory.train(12, replace(worker, state_dir=StateDir(state)), optimizer_out=folder / "optimizer.safetensors")


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> Callable[[dict[str, Recipe]], Path]:
    """What one process makes of recipes by `train_and_resume`, once for each precision."""
    made: dict[str, Path] = {}

    def trained(recipes: dict[str, Recipe]) -> Path:
        precision = recipes["adamw"].precision
        if precision not in made:
            made[precision] = root = tmp_path_factory.mktemp("alone")
            for name, recipe in recipes.items():
                (root / name).mkdir()
                tokens_of(recipe.data, root / name / "tokens")
                train_and_resume(recipe, root / name, Worker())
        return made[precision]

    return trained


def optimizers_main(rank: int, port: int, zero_stage: int, recipes: dict[str, str], root: str) -> None:
    resources = Resources(workers=2, zero_stage=zero_stage)
    worker = make_worker(resources, rank=rank, world_size=2)
    join_process_group(worker, resources, "127.0.0.1", port)
    for name, recipe in recipes.items():
        train_and_resume(Recipe.model_validate_json(recipe), Path(root) / name, worker)
    leave_process_group()


@pytest.mark.slow
@pytest.mark.parametrize(("zero_stage", "precision"), [(0, "fp32"), (1, "fp32"), (1, "bf16"), (2, "fp32"), (3, "fp32")])
def test_every_optimizer_steps_the_same_weights_however_they_are_cut(
    grammar, tokens_dir, tmp_path, alone, zero_stage, precision
):
    from safetensors.torch import load_file

    recipes = {name: recipe_of(grammar, optimizer=each, precision=precision) for name, each in OPTIMIZERS.items()}
    for name in recipes:
        (tmp_path / name).mkdir()
        (tmp_path / name / "tokens").symlink_to(tokens_dir)
    written = {name: recipe.model_dump_json(by_alias=True) for name, recipe in recipes.items()}
    run_ranks(optimizers_main, (free_port(), zero_stage, written, str(tmp_path)))
    for name, recipe in recipes.items():
        one, gang = alone(recipes) / name, tmp_path / name
        assert same(gang / "whole", gang / "resumed"), name
        start = recipe.model.build(vocab_size=17, sequence_length=5, seed=0).state_dict()
        ours, theirs = weights_of(one / "whole"), weights_of(gang / "whole")
        error = sum(float((ours[key] - theirs[key]).square().sum()) for key in ours) ** 0.5
        moved = sum(float((ours[key] - start[key]).square().sum()) for key in ours) ** 0.5
        # Sums of ranks are rounded otherwise. Muon multiplies matrices in bfloat16, of 8 bits, whose rounding is that
        # of the last bit: 0.01 to 0.021 of what it moves by, by the type of processor; a step in parts, or one taken
        # twice, would be off by as much as it moves.
        assert error / moved < (0.1 if precision == "bf16" else 0.05 if name == "muon" else 1e-5), name
        states = [load_file(place / "optimizer.safetensors") for place in (one, gang)]
        assert states[0].keys() == states[1].keys()
        for key in states[0]:
            assert states[0][key].shape == states[1][key].shape, key
            if precision == "fp32":
                torch.testing.assert_close(states[1][key], states[0][key], rtol=0.02, atol=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize(("zero_stage", "precision"), [(0, "fp32"), (1, "fp32"), (3, "fp32"), (2, "bf16")])
def test_a_gangs_phase_goes_on_to_the_bit_and_hands_on_to_any_gang(
    grammar, tokens_dir, tmp_path, zero_stage, precision
):
    recipe = recipe_of(grammar, precision=precision, schedule=Constant(name="constant", warmup=0.0))
    run_ranks(phases_main, (free_port(), zero_stage, recipe.model_dump_json(by_alias=True), str(tmp_path)))
    assert same(tmp_path / "whole", tmp_path / "then")
    # One process goes on from what the gang has left; after 7 steps at a rate of 0.01 only rounding lies between.
    then = Pretrain(
        recipe=recipe.with_(steps=7), seed=0, step=7, before=Before(steps=5, tokens=150, sequences=30, read={})
    )
    inputs = {"tokens": tokens_dir, "start": tmp_path / "first", "optimizer": tmp_path / "state"}
    then.run(inputs, made(tmp_path / "alone"), Worker())
    ours, theirs = weights_of(tmp_path / "then"), weights_of(tmp_path / "alone")
    tolerance = {"fp32": 1e-4, "bf16": 3e-2}[precision]
    assert all(torch.allclose(ours[name], theirs[name], atol=tolerance) for name in ours)


def test_light_modules_import_nothing_heavy():
    import subprocess

    plan = "raysweep.cli, raysweep.space, raysweep.estimates, raysweep.runners.hardware, raysweep.screen"
    code = f"import sys, {plan}; print(sorted(sys.modules))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    heavy = {"torch", "transformers", "accelerate", "deepspeed", "ray", "optuna", "pandas", "plotly"}
    assert not heavy & set(eval(out))
