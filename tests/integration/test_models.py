"""Models and optimizers beyond the default ones, through whole sweeps."""

import json

import pytest
from tiny import TINY

from raysweep.runners import run_sweep
from raysweep.space import load
from raysweep.train.checkpoints import load_model

LLAMA = "{name: llama, hidden_size: 16, num_layers: 1, num_heads: 2}"
GPT2 = "{name: transformers, config: theirs, fields: {n_layer: 1}}"
MODERN_BERT = (
    "{name: transformers, architecture: ModernBertForMaskedLM, fields: {hidden_size: 16, num_hidden_layers: 1, "
    "num_attention_heads: 2, intermediate_size: 24}}\n  objective: {name: masked_lm}"
)
BERT = "{name: bert, hidden_size: 16, num_layers: 1, num_heads: 2}\n  objective: {name: masked_lm}"


@pytest.mark.parametrize(
    ("model", "optimizer", "class_name"),
    [
        (GPT2, "{name: muon, lr: 1e-2}", "GPT2LMHeadModel"),
        (MODERN_BERT, "{name: lion, lr: 1e-2}", "ModernBertForMaskedLM"),
        (BERT, "{name: muon, lr: 1e-2}", "BertForMaskedLM"),
    ],
)
def test_a_sweep_of_another_model_is_measured_and_fine_tuned(sweep_file, store, tmp_path, model, optimizer, class_name):
    (tmp_path / "theirs").mkdir()
    sizes = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32}
    (tmp_path / "theirs" / "config.json").write_text(json.dumps({"architectures": ["GPT2LMHeadModel"], **sizes}))
    changes = {
        LLAMA: model,
        "{name: adamw, lr: 1e-2}": optimizer,
        "[6, 12]": "[12]",
        "{grid: [1e-2, 3e-3]}": "{grid: [1e-2]}",
    }
    text = TINY
    for old, new in changes.items():
        text = text.replace(old, new)
    run = run_sweep(load(sweep_file(text)), store, runner="inline")
    records = {stage.kind: store.get(stage.id) for trial in run.trials() for stage in trial.stages}
    assert all(record is not None and record.status == "done" for record in records.values())
    assert {"pretrain", "flatness", "indicators", "sft"} <= records.keys()
    model = load_model(store.folder(records["pretrain"].id))
    assert type(model).__name__ == class_name
    assert records["pretrain"].metrics["num_parameters"] == model.num_parameters()
