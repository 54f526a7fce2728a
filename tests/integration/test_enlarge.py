"""Models of two sizes, measured in the parametrisation of a third: its function is each one's, its flatness its own."""

import pytest
import torch
from tiny import TINY

from raysweep.errors import SpaceError
from raysweep.estimates import estimate
from raysweep.runners import run_sweep
from raysweep.space import load
from raysweep.train.checkpoints import load_model
from raysweep.worker import Worker

BASE = TINY[: TINY.index("indicators:")]
SMALL = "{name: llama, hidden_size: 16, num_layers: 1, num_heads: 2}"
MASKED = "\n  objective: {name: masked_lm}"
LLAMA = "{name: llama, hidden_size: %d, num_layers: %d, num_heads: %d}"
BERT = "{name: bert, hidden_size: %d, num_layers: %d, num_heads: %d, num_positions: 8}"
GPT2 = (
    "{name: transformers, architecture: GPT2LMHeadModel, fields: {n_embd: %d, n_layer: %d, n_head: %d, n_positions: 8}}"
)


def sweep(small: str, larger: str, *, objective: str = "") -> str:
    text = BASE.replace("[6, 12]", "[12]").replace("{grid: [1e-2, 3e-3]}", "{grid: [1e-2]}")
    return text.replace(SMALL, small + objective) + f"enlarge: {{model: {larger}}}\n"


@pytest.mark.parametrize(
    ("small", "larger", "objective"),
    [
        (LLAMA % (16, 1, 2), LLAMA % (24, 2, 3), ""),
        (GPT2 % (16, 1, 2), GPT2 % (32, 2, 4), ""),
        (BERT % (16, 1, 2), BERT % (32, 1, 4), MASKED),
    ],
)
def test_flatness_is_that_of_the_enlarged_checkpoint(sweep_file, store, small, larger, objective):
    space = load(sweep_file(sweep(small, larger, objective=objective)))
    run_sweep(space, store, runner="inline")
    [point] = space.points()
    stages = {stage.kind: stage for stage in space.trial(point, 0).stages}
    records = {kind: store.get(stage.id) for kind, stage in stages.items()}
    assert stages["flatness"].inputs["checkpoint"] == stages["enlarge"].id
    assert stages["heldout"].inputs["checkpoint"] == stages["enlarge"].checkpoint == stages["pretrain"].id
    small_model, large = (load_model(store.folder(stages[kind].id)) for kind in ("pretrain", "enlarge"))
    assert large.num_parameters() > 2 * small_model.num_parameters()
    ids = torch.arange(1, 13).reshape(3, 4)
    logs = [model(input_ids=ids).logits.log_softmax(dim=-1) for model in (small_model, large)]
    torch.testing.assert_close(*logs, rtol=1e-5, atol=1e-5)
    assert records["enlarge"].metrics["largest_difference"] < 1e-5
    own = stages["flatness"].spec.run(
        {kind: store.folder(stages[stage].id) for kind, stage in (("checkpoint", "pretrain"), ("tokens", "tokenize"))},
        out=store.work_dir("own"),
        worker=Worker(),
    )
    assert records["flatness"].metrics["fisher_trace"] not in (0, pytest.approx(own["fisher_trace"], rel=1e-3))


def test_what_does_not_fit_is_told_before_anything_runs(sweep_file):
    path = sweep_file(sweep(SMALL, LLAMA % (24, 2, 2)))
    with pytest.raises(SpaceError, match=r"enlarge\.model: a head has 12 numbers .* and 8 in pretrain\.model"):
        load(path)
    with pytest.raises(SpaceError, match=r"num_layers 1 is less than the 3 of pretrain\.model"):
        load(path, ["enlarge.model.num_heads=3", "enlarge.model.num_layers=1", "pretrain.model.num_layers=3"])


def test_a_model_of_other_settings_is_not_measured(sweep_file, store):
    untied = LLAMA.replace("}", ", tie_embeddings: false}")
    run = run_sweep(load(sweep_file(sweep(SMALL, untied % (24, 2, 3)))), store, runner="inline")
    [failure] = run.failures()
    assert "one matrix embeds and predicts in one of the two models alone" in failure["cause"]


def test_a_plan_counts_the_larger_model(sweep_file, store):
    spaces = [load(sweep_file(sweep(SMALL, larger))) for larger in (LLAMA % (16, 1, 2), LLAMA % (32, 2, 4))]
    memory = [estimate(space, store, mfu=0.4, peak_flops=1e12).memory_bytes["flatness"] for space in spaces]
    assert memory[1] > 2 * memory[0]
