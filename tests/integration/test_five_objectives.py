"""Five ways to pretrain on one small text, each through the whole chain on Ray, with gangs of two under ZeRO-2."""

import os
from pathlib import Path

import pytest
import transformers
from pydantic import TypeAdapter
from safetensors.torch import load_file

from raysweep.analysis.tables import checkpoint_table
from raysweep.objectives.families import Objective
from raysweep.results import Results
from raysweep.runners import run_sweep
from raysweep.space import load

DATA = Path(os.environ.get("RAYSWEEP_DATA", "nowhere"))

STEPS, ROWS, LENGTH = 20, 8, 64
DECODERS = {
    "causal": {"name": "causal_lm"},
    "prefix": {"name": "prefix_lm"},
    "spans": {"name": "span_corruption", "num_sentinels": 20},
    "ul2": {"name": "ul2", "num_sentinels": 20},
}
ENCODERS = {"masked": {"name": "masked_lm"}}

PRETRAINING = f"""\
pretrain:
  data:
    name: text
    domains:
      stories:
        train: "${{RAYSWEEP_DATA}}/pretrain/stories.train.jsonl.gz"
        valid: "${{RAYSWEEP_DATA}}/pretrain/stories.valid.jsonl.gz"
    tokenizer: {{name: bpe, vocab_size: 512, num_training_bytes: 100_000}}
  optimizer: {{name: adamw, lr: 3e-3}}
  steps: {STEPS}
  batch_sequences: {ROWS}
  sequence_length: {LENGTH}
"""
MEASURED = """\
flatness: {num_sequences: 32, min_units: 4, max_units: 6}
indicators: {kshot: 2, max_examples: 20}
sft:
  tasks:
    topic:
      form: classification
      train: "${RAYSWEEP_DATA}/cls/trivia_topic.train.jsonl.gz"
      test: "${RAYSWEEP_DATA}/cls/trivia_topic.test.jsonl.gz"
      max_train_examples: 48
      max_valid_examples: 16
      max_test_examples: 24
  lrs: [1e-3]
  hyperparameters: {epochs: 1}
"""
GANG = "resources: {workers: 2, zero_stage: 2}\n"


def write_sweep(path, model, objectives, *sections):
    first, *_ = objectives.values()
    base = f"  model: {{name: {model}, hidden_size: 32, num_layers: 2, num_heads: 2}}\n  objective: {first}\n"
    axes = "".join(f"      {label}: {fields}\n" for label, fields in objectives.items())
    sweep = f"sweep:\n  pretrain.objective:\n    grid:\n{axes}"
    path.write_text(f"name: five\n{PRETRAINING}{base}{sweep}{''.join(sections)}")
    return path


def check_rows(table, objectives):
    """Each variant has every number, of its own objective, and has predicted as many tokens as its definition says."""
    assert set(table["point.pretrain.objective"]) == set(objectives)
    for metric in (
        "sft/mean_score",
        "probe/mean_score",
        "flatness/hessian_trace",
        "heldout/ppl",
        "indicators/topic/kshot",
    ):
        assert table[metric].notna().all(), metric
    for _, row in table.iterrows():
        made = TypeAdapter(Objective).validate_python(objectives[row["point.pretrain.objective"]])
        assert row["perplexity_of"] == row["flatness_of"] == f"{made.name} ({made.predicts()})"
        assert row["pretrain/num_tokens"] == STEPS * ROWS * LENGTH
    predicted = table.set_index("point.pretrain.objective")["pretrain/num_predicted_tokens"] / (STEPS * ROWS)
    of_a_row = {"causal": (63, 63), "masked": (9, 10), "prefix": (20, 44), "spans": (14, 14), "ul2": (12, 46)}
    for label in objectives:
        low, high = of_a_row[label]
        assert low <= predicted[label] <= high, label


@pytest.mark.slow
@pytest.mark.data
@pytest.mark.skipif(not DATA.is_dir(), reason="RAYSWEEP_DATA names no data pack")
@pytest.mark.parametrize(
    ("model", "objectives", "kind"),
    [("llama", DECODERS, "AutoModelForCausalLM"), ("bert", ENCODERS, "AutoModelForMaskedLM")],
)
def test_objectives_through_the_whole_chain(model, objectives, kind, tmp_path, store):
    run = run_sweep(load(write_sweep(tmp_path / "gang.yaml", model, objectives, MEASURED, GANG)), store)
    assert run.failures() == []
    table = checkpoint_table(run)
    check_rows(table, objectives)
    report = Results(run).write_report().read_text()
    for fields in objectives.values():
        assert TypeAdapter(Objective).validate_python(fields).predicts() in report
    for location in table["location"]:
        opened = getattr(transformers, kind).from_pretrained(location)
        assert opened.num_parameters() == sum(
            each.numel() for each in load_file(f"{location}/model.safetensors").values()
        )
