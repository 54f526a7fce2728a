"""The study of a run: gone on with, and made again where it is damaged."""

import math

import pytest
from ended import ended
from handed import under_way
from tiny import ONE_CPU, TINY, put, roomy, row

from raysweep.events import TrialStarted
from raysweep.runners.optuna_search import study_search
from raysweep.runners.queue import Beginnings
from raysweep.runners.searchers import ThenShares
from raysweep.runners.trainable import SHARE
from raysweep.space import load

ADAPTIVE = TINY.replace("{grid: [1e-2, 3e-3]}", "{loguniform: [1e-4, 1e-1]}") + (
    "search: {name: optuna, num_trials: 4, objectives: [{metric: sft/mean_score, mode: max}]}\n"
)


def finish(space, store, point):
    """As if all stages of a point had been run."""
    for stage in space.trial(point, 0).stages:
        if not store.get(stage.id):
            put(store, stage.id)


@pytest.mark.parametrize("damage", [b"x" * 5000, b""])
def test_a_damaged_study_is_named_and_made_again(sweep_file, store, tmp_path, caplog, damage):
    space = load(sweep_file(ADAPTIVE))
    first, num_to_do = study_search(space, store, tmp_path)
    first.use(under_way(roomy(), Beginnings([])), [ONE_CPU])
    asked = first.suggest("a")
    first.on_trial_complete("a", {"sft/mean_score": 0.5, "last": True})
    finish(space, store, asked)
    assert num_to_do == 4
    assert study_search(space, store, tmp_path)[1] == 3
    (tmp_path / "study.db").write_bytes(damage)
    again, num_to_do = study_search(space, store, tmp_path)
    assert num_to_do == 4
    again.use(under_way(roomy(), Beginnings([])), [ONE_CPU])
    assert again.suggest("a") == asked
    assert not damage or "study.db is not used and will be re-made" in caplog.text


def test_a_finished_study_is_run_once_more_where_a_stage_is_of_another_version_now(sweep_file, store, tmp_path):
    earlier, now = (load(sweep_file(ADAPTIVE), [f"flatness.num_sequences={num}"]) for num in (16, 8))

    def run(space, num):
        """How many trials are to be run, the points of the first `num` of them, and the study."""
        search, num_to_do = study_search(space, store, tmp_path)
        search.use(under_way(roomy(), Beginnings([])), [ONE_CPU])
        points = []
        for name in "abcd"[:num]:
            points.append(search.suggest(name))
            finish(space, store, points[-1])
            search.on_trial_complete(name, {"sft/mean_score": 0.5, "last": True})
        return num_to_do, points, search._ot_study

    num_to_do, points, _ = run(earlier, 4)
    assert (num_to_do, run(earlier, 0)[0]) == (4, 0)
    # In two runs, of which the first dies.
    assert run(now, 2)[:2] == (4, points[:2])
    assert run(now, 2)[:2] == (2, points[2:])
    num_to_do, _, study = run(now, 0)
    assert num_to_do == 0
    assert [trial.params for trial in study.trials] == points * 2


def test_of_a_trial_that_failed_the_one_in_its_place_counts(sweep_file, store, tmp_path):
    space = load(sweep_file(ADAPTIVE))

    def search_of():
        search, num_to_do = study_search(space, store, tmp_path)
        search.use(under_way(roomy(), Beginnings([])), [ONE_CPU])
        return search, num_to_do

    search, _ = search_of()
    failed = search.suggest("a")
    search.on_trial_complete("a", error=True)
    search, num_to_do = search_of()
    assert (num_to_do, search.suggest("b")) == (4, failed)
    finish(space, store, failed)
    search.on_trial_complete("b", {"sft/mean_score": 0.5, "last": True})
    for _ in range(2):  # It is not run once more.
        assert search_of()[1] == 3


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
    search, num_to_do = study_search(space, store, tmp_path)
    assert num_to_do == 4
    search.use(under_way(roomy(), beginnings), [ONE_CPU])
    first = search.suggest("a")
    assert [search.suggest(name) for name in "bcdefgh"] == [None] * 7
    for stage in space.trial(first, 0).stages:
        beginnings.take(ended(stage.id))
    later = [search.suggest(name) for name in "xyz"]
    assert len({str(point) for point in (first, *later)}) == 4
    for name, point in zip("axyz", (first, *later), strict=True):
        search.on_trial_complete(name, {"heldout/ppl": 2.0, "last": True})
        finish(space, store, point)
    assert study_search(space, store, tmp_path)[1] == 0


def test_a_suggestion_is_asked_for_once_there_is_room(sweep_file, store, tmp_path):
    search, _ = study_search(load(sweep_file(ADAPTIVE)), store, tmp_path)
    search.use(under_way(roomy(max_concurrent=1), Beginnings([])), [ONE_CPU])
    assert search.suggest("a")
    assert search.suggest("b") is None
    search.on_trial_complete("a", {"sft/mean_score": 0.5, "last": True})
    assert search.suggest("b")


BOUNDED = TINY.replace("{grid: [1e-2, 3e-3]}", "{grid: [1e-2, 3e-3, 1e-3]}") + (
    "search:\n  name: optuna\n  num_trials: 6\n  objectives: [{metric: flatness/hessian_trace, mode: min}, "
    "{metric: sft/mean_score, mode: max}]\n  choose: {metric: flatness/hessian_trace, mode: min, "
    "within: {metric: heldout/loss_nats_per_token, mode: min, part: 0.01}}\n"
)


def test_optuna_is_told_how_far_a_trial_is_beyond_the_bound(sweep_file, store, tmp_path):
    search, _ = study_search(load(sweep_file(BOUNDED)), store, tmp_path)
    search.use(under_way(roomy(), Beginnings([])), [ONE_CPU])
    for name, loss in (("a", 2.0), ("b", 2.1), ("c", 1.9), ("d", 1.91)):
        assert search.suggest(name)
        goals = {"flatness/hessian_trace": 9.0, "sft/mean_score": 0.5}
        search.on_trial_complete(name, goals | {"heldout/loss_nats_per_token": loss, "last": True})
    assert search.suggest("stopped")
    search.on_trial_complete("stopped", {"heldout/loss_nats_per_token": 1.0, "last": False})
    trials = search._ot_study.trials
    found = [trial.system_attrs["constraints"][0] for trial in trials]
    # Each against the best by then: 2.0, 2.0, 1.9 and 1.9; what was stopped is never within.
    assert found[:4] == pytest.approx([-0.02, 0.08, -0.019, 0.01 - 0.019])
    assert found[4] > 1e9
    assert [trial.state.name for trial in trials] == ["COMPLETE"] * 4 + ["PRUNED"]


def test_a_study_begins_with_what_other_runs_of_the_store_gave(sweep_file, store, tmp_path):
    from raysweep.runners import run_sweep

    grid = load(sweep_file(TINY), ["sft=null", "indicators=null", "pretrain.checkpoints=[12]"])
    run_sweep(grid, store, runner="inline")
    warm = BOUNDED.replace("{metric: sft/mean_score, mode: max}", "{metric: heldout/ppl, mode: min}")
    space = load(
        sweep_file(warm), ["sft=null", "indicators=null", "search.warm_start=true", "pretrain.checkpoints=[12]"]
    )
    search, num_to_do = study_search(space, store, tmp_path)
    assert num_to_do == 6
    trials = search._ot_study.trials
    assert [trial.params["pretrain.optimizer.lr"] for trial in trials] == [1e-2, 3e-3]
    for trial in trials:
        assert trial.values[1] == pytest.approx(math.exp(trial.user_attrs["raysweep:bounded"]), rel=1e-6)
    assert min(trial.system_attrs["constraints"][0] for trial in trials) < 0
    # Opened again, it is not told twice; another recipe finds nothing.
    assert len(study_search(space, store, tmp_path)[0]._ot_study.trials) == 2
    other = load(
        sweep_file(warm), ["sft=null", "indicators=null", "search.warm_start=true", "pretrain.batch_sequences=4"]
    )
    (tmp_path / "other").mkdir()
    assert not study_search(other, store, tmp_path / "other")[0]._ot_study.trials


def test_shares_are_handed_out_once_all_suggestions_are(sweep_file, store, tmp_path):
    """The study is told of its trials alone, and of each of them."""
    many = ADAPTIVE.replace("num_trials: 4", "num_trials: 1").replace("  lrs:", "  seeds: [0, 1, 2, 3, 4, 5]\n  lrs:")
    space = load(sweep_file(many))
    search, _ = study_search(space, store, tmp_path)
    beginnings = Beginnings([])
    handed = under_way(roomy(), beginnings)
    search.use(handed, [ONE_CPU])
    searcher = ThenShares(search, handed)
    assert not searcher.is_finished()
    point = searcher.suggest("trial")
    assert searcher.is_finished(), "for now"
    trial = space.trial(point, 0)
    handed.tail.take(TrialStarted(row=row(trial.id)))
    first = next(stage for stage in trial.stages if stage.kind == "sft" and stage.step == 6)
    for stage in trial.stages:
        if (stage.step in (None, 6) and stage.kind != "sft") or stage is first:
            event = ended(stage.id, trial=trial.id, wall_seconds=20.0)
            for each in (beginnings, handed.tail.durations, handed.tail):
                each.take(event)
    share = searcher.suggest("share")
    assert {key: share[key] for key in point} == point
    assert [stage.kind for stage in trial.stages if stage.id in share[SHARE]] == ["sft"]
    searcher.on_trial_result("share", {"last": True})
    searcher.on_trial_complete("share", {"last": True})
    assert [each.state.name for each in search._ot_study.trials] == ["RUNNING"]
    searcher.on_trial_complete("trial", {"sft/mean_score": 0.5, "last": True})
    assert [each.values for each in search._ot_study.trials] == [[0.5]]
    assert searcher.is_finished()
