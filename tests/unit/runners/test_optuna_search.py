"""The study of a run: gone on with, and made again where it is damaged."""

import pytest
from tiny import ONE_CPU, TINY, roomy

from raysweep.runners.optuna_search import study_search
from raysweep.runners.queue import Beginnings
from raysweep.space import load

ADAPTIVE = TINY.replace("{grid: [1e-2, 3e-3]}", "{loguniform: [1e-4, 1e-1]}") + (
    "search: {name: optuna, num_trials: 4, objectives: [{metric: sft/mean_score, mode: max}]}\n"
)


@pytest.mark.parametrize("damage", [b"x" * 5000, b""])
def test_a_damaged_study_is_named_and_made_again(sweep_file, store, tmp_path, caplog, damage):
    space = load(sweep_file(ADAPTIVE))
    first, num_to_do = study_search(space, store, tmp_path, Beginnings([]))
    first.use(roomy(), [ONE_CPU], lambda trial: ONE_CPU)
    asked = first.suggest("a")
    first.on_trial_complete("a", {"sft/mean_score": 0.5, "last": True})
    assert num_to_do == 4
    assert study_search(space, store, tmp_path, Beginnings([]))[1] == 3
    (tmp_path / "study.db").write_bytes(damage)
    again, num_to_do = study_search(space, store, tmp_path, Beginnings([]))
    assert num_to_do == 4
    again.use(roomy(), [ONE_CPU], lambda trial: ONE_CPU)
    assert again.suggest("a") == asked
    assert not damage or "study.db is not used and will be re-made" in caplog.text


PHASED = """\
name: phased
pretrain:
  data: {name: pcfg, vocabulary: 16, num_nonterminals: 4, num_rules: 2, num_words: 3, sentence_length: 4}
  model: {name: llama, hidden_size: 16, num_layers: 1, num_heads: 2}
  optimizer: {name: adamw, lr: 1e-2}
  schedule: {name: constant}
  batch_sequences: 8
  sequence_length: 5
  phases: [{name: trunk, steps: 4}, {name: decay, steps: 2}]
sweep:
  pretrain.phases.decay.optimizer.lr: {loguniform: [1e-4, 1e-1]}
search: {name: optuna, num_trials: 4, objectives: [{metric: heldout/ppl, mode: min}]}
"""


def test_a_suggestion_waits_for_its_beginning(sweep_file, store, tmp_path):
    space = load(sweep_file(PHASED))
    beginnings = Beginnings([])
    search, num_to_do = study_search(space, store, tmp_path, beginnings)
    assert num_to_do == 4
    search.use(roomy(), [ONE_CPU], lambda trial: ONE_CPU)
    first = search.suggest("a")
    assert [search.suggest(name) for name in "bcdefgh"] == [None] * 7
    for stage in space.trial(first, 0).stages:
        beginnings.take({"event": "finished", "stage": stage.id})
    later = [search.suggest(name) for name in "xyz"]
    assert len({str(point) for point in (first, *later)}) == 4
    for name in "axyz":
        search.on_trial_complete(name, {"heldout/ppl": 2.0, "last": True})
    assert study_search(space, store, tmp_path, Beginnings([]))[1] == 0


def test_a_suggestion_is_asked_for_once_there_is_room(sweep_file, store, tmp_path):
    search, _ = study_search(load(sweep_file(ADAPTIVE)), store, tmp_path, Beginnings([]))
    search.use(roomy(max_concurrent=1), [ONE_CPU], lambda trial: ONE_CPU)
    assert search.suggest("a")
    assert search.suggest("b") is None
    search.on_trial_complete("a", {"sft/mean_score": 0.5, "last": True})
    assert search.suggest("b")
