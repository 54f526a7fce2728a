"""What one fine-tuning rate for all would have chosen, of runs whose answer is known."""

import json

import pandas as pd
import pytest
from columns import COLUMNS

from raysweep.analysis.fixed_rates import fixed_rates
from raysweep.analysis.ranking import Ranking, rank
from raysweep.cli import main
from raysweep.record import Record
from raysweep.results import Results
from raysweep.run_files import StageRow, TrialRow
from raysweep.runs import Run
from raysweep.store import Store

KNOWN = {"started": "2026-01-01T00:00:00+00:00", "wall_seconds": 1.0, "peak_memory_bytes": 2**20, "world_size": 1,
         "device": "cpu", "host": "h", "git_commit": None, "versions": {}}  # fmt: skip
# Checkpoint -> rate -> score. Tuned, a is best by 0.1 and d last; the low rate puts d first, the high one b.
SCORES = {
    "a": {1e-3: 0.5, 1e-2: 0.8, 1e-1: 0.3},
    "b": {1e-3: 0.4, 1e-2: 0.6, 1e-1: 0.7},
    "c": {1e-3: 0.6, 1e-2: 0.5, 1e-1: 0.1},
    "d": {1e-3: 0.62, 1e-2: 0.4, 1e-1: None},  # Diverged at the high rate.
}
TUNED = {"a": 0.8, "b": 0.7, "c": 0.6, "d": 0.55}
# At d's best rate one of its two seeds is worse: both count.
SEEDS = (0.0, -0.14)


def run_of(store: Store, scores: dict[str, dict[float, float | None]]) -> Results:
    run = Run.create(store, "r", sweep_text="x", identity="{}")
    run.note_columns(COLUMNS)
    for name, by_rate in scores.items():
        stages = [StageRow(f"pretrain-{name}", "pretrain", 1, f"pretrain-{name}", None, {})]
        store.commit(
            Record(f"pretrain-{name}", "pretrain", "done", {}, {}, {}, KNOWN, {}), store.work_dir(f"pretrain-{name}")
        )
        for lr, score in by_rate.items():
            for seed, change in enumerate(SEEDS):
                stage_id = f"sft-{name}{lr:g}s{seed}"
                own = None if score is None else score + (change if (name, lr) == ("d", 1e-3) else 0)
                status, metrics = ("diverged", {}) if own is None else ("done", {"score": own, "valid_score": own})
                record = Record(stage_id, "sft", status, {"lr": lr, "seed": seed}, {}, metrics, KNOWN, {})
                store.commit(record, store.work_dir(stage_id))
                stages.append(StageRow(stage_id, "sft", 1, f"pretrain-{name}", "t", {}))
        run.add_trial(TrialRow(name, f"variant-{name}", {"pretrain.x": name}, 0, tuple(stages)))
    return Results(run)


def test_each_rate_has_the_checkpoint_that_is_best_at_it_and_what_that_loses(store):
    results = run_of(store, SCORES)
    assert dict(zip("abcd", results.checkpoints.sort_values("trial")["sft/t/score"], strict=True)) == pytest.approx(
        TUNED
    )
    low, middle, high = fixed_rates(results.ranking, results.stages)
    assert [each.lr for each in (low, middle, high)] == [1e-3, 1e-2, 1e-1]
    # By mean over seeds: c 0.6, d 0.55, a 0.5, b 0.4.
    assert (low.checkpoint, low.label) == ("pretrain-c", "x c · step 1")
    assert low.lost == pytest.approx(0.2)
    assert low.accuracy.value == pytest.approx(2 / 6)  # Of the tuned order a b c d, a b and c d.
    assert low.kendall.value == pytest.approx(-1 / 3)
    assert (middle.checkpoint, middle.lost, middle.accuracy.value) == ("pretrain-a", 0.0, 1.0)
    assert (high.checkpoint, high.num_diverged) == ("pretrain-b", 1)
    assert high.lost == pytest.approx(0.1)
    assert high.accuracy.value == pytest.approx(5 / 6)  # d comes last.


def test_a_rate_that_a_checkpoint_lacks_is_none_for_all(store):
    results = run_of(store, SCORES | {"e": {1e-3: 0.2, 1e-2: 0.3}})
    assert [each.lr for each in fixed_rates(results.ranking, results.stages)] == [1e-3, 1e-2]


def test_a_rate_that_lacks_a_seed_is_none_for_all(store):
    results = run_of(store, SCORES)
    is_lost = (results.stages["lr"] == 1e-2) & (results.stages["checkpoint"] == "pretrain-b")
    is_lost &= results.stages["stage_seed"] == 1
    stages = results.stages.assign(status=results.stages["status"].mask(is_lost, "failed"))
    assert is_lost.sum() == 1
    assert [each.lr for each in fixed_rates(results.ranking, stages)] == [1e-3, 1e-1]


def test_equal_scores_are_equal_in_whatever_order_they_are_added(store):
    """Of .1, .2, .3 and .3, .2, .1 neither is the better; the one that is best by tuned rates counts as chosen."""
    results = run_of(store, {name: {1e-3: 0.2, 1e-2: best} for name, best in (("a", 0.3), ("b", 0.5))})
    ways = {"a": (0.1, 0.2, 0.3), "b": (0.3, 0.2, 0.1)}
    first = results.stages[results.stages["kind"] == "sft"].drop_duplicates(["checkpoint", "lr"])
    parts = []
    for seed in range(3):
        part = first.assign(id=first["id"] + str(seed), stage_seed=seed)
        low = [ways[each.rpartition("-")[2]][seed] for each in part["checkpoint"]]
        part["sft/score"] = part["sft/score"].mask(part["lr"] == 1e-3, pd.Series(low, part.index))
        parts.append(part)
    found = fixed_rates(results.ranking, pd.concat(parts))[0]
    assert (found.lr, found.checkpoint, found.lost, found.accuracy.value) == (1e-3, "pretrain-b", 0.0, 0.5)


def test_a_target_that_is_not_of_fine_tuning_has_none(store):
    results = run_of(store, SCORES)
    table = results.checkpoints.assign(**{"heldout/ppl": [1.0, 2.0, 3.0, 4.0]})
    ranking = rank(table, columns=results.columns, target="heldout/ppl")
    assert fixed_rates(ranking, results.stages) == []


def test_one_rate_is_no_choice(store):
    results = run_of(store, {name: {1e-2: by_rate[1e-2]} for name, by_rate in SCORES.items()})
    assert fixed_rates(results.ranking, results.stages) == []


def test_a_target_of_which_lower_is_better_is_turned_round(store):
    results = run_of(store, SCORES)
    stages = results.stages.assign(**{"sft/forgetting_nats_per_token": -results.stages["sft/score"]})
    table = results.checkpoints.assign(**{"sft/mean_forgetting": -results.checkpoints["sft/mean_score"]})
    # Of whatever one loss: where that is not known, what is forgotten compares with nothing.
    assert rank(table, columns=results.columns, target="sft/mean_forgetting").num_comparisons == 0
    table["perplexity_of"] = "next tokens"
    ranking: Ranking = rank(table, columns=results.columns, target="sft/mean_forgetting")
    assert ranking.sign == -1
    found, usual = fixed_rates(ranking, stages), fixed_rates(results.ranking, results.stages)
    assert [(each.checkpoint, each.accuracy.value) for each in found] == [
        (each.checkpoint, each.accuracy.value) for each in usual
    ]
    assert [each.lost for each in found] == pytest.approx([each.lost for each in usual])


def test_report_terminal_and_json_say_so(store, capsys):
    page = run_of(store, SCORES).write_report().read_text()
    assert "What one fine-tuning rate for all would have chosen" in page
    assert "20.0 points" in page
    command = ["rank", "r", "--store", store.url]
    assert main(command) == 0
    assert "What one fine-tuning rate for all would have chosen" in capsys.readouterr().out
    assert main([*command, "--json"]) == 0
    rates = json.loads(capsys.readouterr().out)["fixed_rates"]
    assert pd.DataFrame(rates)["lr"].tolist() == [1e-3, 1e-2, 1e-1]
