"""Languages of a known law through the whole chain, and models that reach their objective's lowest loss."""

import math

import pytest
from tiny import results_of

from raysweep.runners import run_sweep
from raysweep.space import load

SWEEP = """\
name: chain
pretrain:
  data: {name: hmm, vocabulary: 8, num_states: 4, num_permutations: 2, sentence_length: 6,
         num_train_sentences: 400, num_valid_sentences: 40}
  model: MODEL
  objective: OBJECTIVE
  optimizer: {name: adamw, lr: 1e-2}
  steps: 12
  batch_sequences: 8
  sequence_length: 7
flatness: {num_sequences: 16, batch_sequences: 2, min_units: 4, max_units: 8}
indicators: {kshot: 2, max_examples: 20}
sft:
  tasks:
    state: {form: hmm_state, position: 3, num_train: 40, num_valid: 20, num_test: 20}
  lrs: [1e-2]
  hyperparameters: {epochs: 1}
"""


@pytest.mark.parametrize(
    ("model", "objective"),
    [
        ("{name: llama, hidden_size: 16, num_layers: 1, num_heads: 2}", "{name: causal_lm}"),
        ("{name: bert, hidden_size: 16, num_layers: 1, num_heads: 2}", "{name: masked_lm, mask: one}"),
    ],
    ids=["causal", "masked"],
)
def test_a_chain_and_its_states_through_the_whole_chain(model, objective, sweep_file, store):
    path = sweep_file(SWEEP.replace("MODEL", model).replace("OBJECTIVE", objective))
    run = run_sweep(load(path), store, runner="inline")
    metrics = {stage.rpartition("-")[0]: numbers for stage, (numbers, _) in results_of(run).items()}
    assert 0 < metrics["heldout"]["entropy_gap_stderr"] < math.inf
    assert 0 <= metrics["sft"]["score"] <= 1
