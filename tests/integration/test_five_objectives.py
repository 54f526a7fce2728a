"""Five ways to pretrain on one small text, each through the whole chain on Ray, with gangs of two under ZeRO-2."""

import json
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
OBJECTIVES = {
    "causal": {"name": "causal_lm"},
    "masked": {"name": "masked_lm"},
    "prefix": {"name": "prefix_lm"},
    "spans": {"name": "span_corruption", "num_sentinels": 20},
    "ul2": {"name": "ul2", "num_sentinels": 20},
}
MODELS = {"masked": "bert"}
"""Of those that are not llama's."""

PRETRAINING = f"""\
name: five
pretrain:
  data:
    name: text
    domains:
      stories:
        train: "${{RAYSWEEP_DATA}}/pretrain/stories.train.jsonl.gz"
        valid: "${{RAYSWEEP_DATA}}/pretrain/stories.valid.jsonl.gz"
    tokenizer: {{name: bpe, vocab_size: 512, num_training_bytes: 100_000}}
  model: {{name: llama, hidden_size: 32, num_layers: 2, num_heads: 2}}
  optimizer: {{name: adamw, lr: 3e-3}}
  steps: {STEPS}
  batch_sequences: {ROWS}
  sequence_length: {LENGTH}
"""
AXES = "".join(f"        {label}: {json.dumps(fields)}\n" for label, fields in OBJECTIVES.items())
SWEEP = f"""\
sweep:
  objective:
    zip:
      pretrain.objective:
{AXES}\
      pretrain.model.name: [{", ".join(MODELS.get(label, "llama") for label in OBJECTIVES)}]
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


def check_rows(table):
    """Each variant has every number, of its own objective, and has predicted as many tokens as its definition says."""
    assert set(table["point.objective"]) == set(OBJECTIVES)
    for metric in (
        "sft/mean_score",
        "probe/mean_score",
        "flatness/hessian_trace",
        "heldout/ppl",
        "indicators/topic/kshot",
    ):
        assert table[metric].notna().all(), metric
    of_a_row = {"causal": (63, 63), "masked": (9, 10), "prefix": (20, 44), "spans": (14, 14), "ul2": (12, 46)}
    for _, row in table.iterrows():
        label = row["point.objective"]
        made = TypeAdapter(Objective).validate_python(OBJECTIVES[label])
        assert row["perplexity_of"] == row["flatness_of"] == f"{made.name} ({made.predicts()})"
        assert row["pretrain/num_tokens"] == STEPS * ROWS * LENGTH
        low, high = of_a_row[label]
        assert low <= row["pretrain/num_predicted_tokens"] / (STEPS * ROWS) <= high, label


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.data
@pytest.mark.skipif(not DATA.is_dir(), reason="RAYSWEEP_DATA names no data pack")
def test_objectives_through_the_whole_chain(tmp_path, store, small_pack):
    path = tmp_path / "five.yaml"
    path.write_text((PRETRAINING + SWEEP + MEASURED + GANG).replace("${RAYSWEEP_DATA}", str(small_pack)))
    run = run_sweep(load(path), store)
    assert run.failures() == []
    table = checkpoint_table(run)
    check_rows(table)
    report = Results(run).write_report().read_text()
    for label, fields in OBJECTIVES.items():
        assert TypeAdapter(Objective).validate_python(fields).predicts() in report
        location = table.set_index("point.objective")["location"][label]
        kind = transformers.AutoModelForMaskedLM if label in MODELS else transformers.AutoModelForCausalLM
        weights = load_file(f"{location}/model.safetensors").values()
        assert kind.from_pretrained(location).num_parameters() == sum(each.numel() for each in weights)
