"""Tables, rankings and pages of sweeps that went partly wrong, or of which there is little to say."""

import json
import math
import re

import pandas as pd
import pytest
from columns import COLUMNS

from raysweep.analysis.findings import headline
from raysweep.analysis.ranking import rank
from raysweep.analysis.tables import checkpoint_table, stage_table
from raysweep.record import Record
from raysweep.results import Results
from raysweep.run_files import StageRow, TrialRow
from raysweep.runs import Run, status
from raysweep.store import Store

KNOWN = {"started": "2026-01-01T00:00:00+00:00", "wall_seconds": 1.0, "peak_memory_bytes": 2**20, "world_size": 1,
         "device": "cpu", "host": "h", "git_commit": None, "versions": {}}  # fmt: skip
EVIL = "<img src=x onerror=alert(1)>"


@pytest.fixture
def run(store: Store) -> Run:
    """A run without trials."""
    run = Run.create(store, "r", sweep_text="x", identity="{}")
    run.note_columns(COLUMNS)
    return run


def put(store: Store, stage_id: str, metrics: dict[str, float], *, status: str = "done", **spec) -> None:
    store.commit(
        Record(stage_id, stage_id.split("-")[0], status, spec, {}, metrics, KNOWN, {}), store.work_dir(stage_id)
    )


def add_checkpoint(run: Run, name: str, fine_tuned: list[dict], **metrics: float) -> None:
    """A trial of one checkpoint: `fine_tuned` has task, lr, seed, score, valid, and status where it is not done."""
    plain = re.sub(r"\W", "_", name)  # Ids are folders' names; what a point says may be anything.
    checkpoint = f"pretrain-{plain}"
    put(run.store, checkpoint, metrics)
    stages = [StageRow(checkpoint, "pretrain", 1, checkpoint, None, {})]
    for number, one in enumerate(fine_tuned):
        stage = StageRow(f"sft-{plain}{number}", "sft", 1, checkpoint, one.get("task", "t"), {})
        status = one.get("status", "done")
        if status == "failed":
            run.add_failure(stage.id, kind="sft", trial=name, cause="out of memory", log="x.log")
        elif status != "missing":
            found = {"score": one["score"], "valid_score": one["valid"]} if status == "done" else {}
            found |= {"score_stderr": one["stderr"]} if "stderr" in one else {}
            put(run.store, stage.id, found, status=status, lr=one["lr"], seed=one.get("seed", 0))
        stages.append(stage)
    run.add_trial(TrialRow(name, f"variant-{name}", {"pretrain.x": name}, 0, tuple(stages)))


def frame(scores: list[float], **columns: list[float]) -> pd.DataFrame:
    """A checkpoint table of one checkpoint a variant."""
    names = [f"{index}" for index in range(len(scores))]
    table = pd.DataFrame({"trial": names, "variant": names, "checkpoint": names, "status": "done", "step": 1})
    return table.assign(**{"sft/mean_score": scores}, **columns)


def test_a_rate_at_which_a_seed_diverged_is_not_picked(run):
    fine_tuned = [
        {"lr": 0.1, "seed": 0, "score": 0.9, "valid": 0.9},
        {"lr": 0.1, "seed": 1, "status": "diverged"},
        {"lr": 0.01, "seed": 0, "score": 0.4, "valid": 0.4},
    ]
    add_checkpoint(run, "a", fine_tuned)
    table = checkpoint_table(run)
    assert table["sft/t/lr"][0] == 0.01
    assert table["sft/t/score"][0] == 0.4


def test_a_failed_stage_is_told_from_one_not_run_and_its_task_makes_the_mean_missing(run):
    fine_tuned = [
        {"task": "t", "lr": 0.1, "score": 0.5, "valid": 0.5},
        {"task": "u", "status": "failed"},
        {"task": "v", "status": "missing"},
    ]
    add_checkpoint(run, "a", fine_tuned)
    assert sorted(stage_table(run)["status"]) == ["done", "done", "failed", "missing"]
    table = checkpoint_table(run)
    assert table["sft/num_tasks_missing"][0] == 2
    assert math.isnan(table["sft/mean_score"][0])
    assert rank(table, columns=COLUMNS).num_unscored == 1


def test_records_without_predictions_have_the_error_of_examples_and_seeds(run):
    for name, scores in (("a", (0.40, 0.42)), ("b", (0.60, 0.66, 0.63))):
        rows = [
            {"lr": 0.1, "seed": seed, "score": score, "valid": 0.5, "stderr": 0.02} for seed, score in enumerate(scores)
        ]
        add_checkpoint(run, name, rows)
    table = checkpoint_table(run)
    # Between seeds: squared deviations 0.0002 and 0.0018, over 1 + 2 degrees of freedom. Of examples: as recorded.
    pooled = (0.0002 + 0.0018) / 3
    expected = [math.sqrt(0.02**2 + pooled / 2), math.sqrt(0.02**2 + pooled / 3)]
    # Of a record that does not say how many examples, a million: pseudo-examples change the sixth digit.
    for name in ("sft/t/score", "sft/mean_score"):
        assert list(table[f"{name}_stderr"]) == pytest.approx(expected, rel=1e-5)
    assert Results(run).ranking.errors == "unpaired"


def test_a_record_that_says_nothing_of_its_error_has_none(run):
    add_checkpoint(run, "a", [{"lr": 0.1, "score": 0.5, "valid": 0.5}])
    assert math.isnan(checkpoint_table(run)["sft/t/score_stderr"][0])
    assert Results(run).ranking.errors == "unknown"


def test_a_stage_that_two_trials_share_is_a_row_of_each_and_counts_once_in_the_report(run):
    put(run.store, "tokenize-1", {})
    for trial in ("a", "b"):
        stages = (StageRow("tokenize-1", "tokenize", None, None, None, {}),)
        run.add_trial(TrialRow(trial, trial, {}, 0, stages))
    assert list(stage_table(run)["trial"]) == ["a", "b"]
    assert "1 of 1" in Results(run).write_report().read_text()


def test_pairs_closer_than_their_noise_are_left_out_of_clear_pairs():
    errors = {"sft/mean_score_stderr": [0.01, 0.01, 0.01]}
    ranking = rank(frame([0.50, 0.51, 0.80], **{"flatness/hessian_trace": [2.0, 3.0, 1.0]}, **errors), columns=COLUMNS)
    (trace,) = (item for item in ranking.associations if item.indicator == "flatness/hessian_trace")
    assert (trace.pairs.num_pairs, trace.pairs.num_within_noise, trace.pairs.num_clear) == (3, 1, 2)
    assert trace.accuracy.value == pytest.approx(2 / 3)  # The noisy pair is the one it has wrong.
    assert trace.clear_accuracy.value == 1
    assert (ranking.num_clear, ranking.num_comparisons) == (2, 3)


def test_a_checkpoint_without_the_indicator_is_left_out_of_it_and_counted():
    ranking = rank(frame([0.1, 0.2, 0.3, 0.4], **{"heldout/ppl": [4.0, math.nan, 2.0, 1.0]}), columns=COLUMNS)
    (ppl,) = (item for item in ranking.associations if item.indicator == "heldout/ppl")
    assert (ppl.num_checkpoints, ppl.num_missing) == (3, 1)
    assert ppl.accuracy.value == 1
    assert ranking.checkpoints["rank/heldout/ppl"].isna().sum() == 1


def test_an_order_seen_before_is_named_and_equal_values_share_the_smaller_rank():
    columns = {"heldout/ppl": [8.0, 2.0, 2.0], "heldout/loss_nats_per_token": [3.0, 1.0, 1.0]}
    ranking = rank(frame([0.1, 0.2, 0.3], **columns), columns=COLUMNS)
    first, second = (item for item in ranking.associations if item.source == "measured")
    assert (first.same_order_as, second.same_order_as) == (None, first.indicator)
    assert list(ranking.checkpoints["rank/heldout/ppl"]) == [1, 1, 3]


def test_one_checkpoint_is_ranked_and_no_indicator_judged(run):
    add_checkpoint(run, "a", [{"lr": 0.1, "score": 0.5, "valid": 0.5}], loss_nats_per_token=3.0)
    ranking = rank(checkpoint_table(run), columns=COLUMNS)
    assert ranking.best["trial"] == "a"
    assert ranking.associations == ()
    assert "no indicator was measured on enough checkpoints" in Results(run).write_report().read_text()


def test_a_missing_target_column_names_those_there_are():
    with pytest.raises(ValueError, match=r"'sft/f1'.*sft/mean_score"):
        rank(frame([0.1, 0.2]), columns=COLUMNS, target="sft/f1")


def test_chart_texts_are_escaped_too(store):
    # Plotly renders HTML in its texts, and the chart data are no HTML to the page: entities are needed inside the JSON.
    run = Run.create(store, "r", sweep_text="x", identity="{}")
    run.note_columns(COLUMNS)
    for name, ppl in ((f"{EVIL}a", 2.0), (f"{EVIL}b", 3.0)):
        add_checkpoint(run, name, [{"task": EVIL, "lr": 0.1, "score": ppl / 10, "valid": 0.5}], loss_nats_per_token=ppl)
    page = Results(run).write_report().read_text()
    assert EVIL not in page
    charts = re.search(r'<script type="application/json" id="charts">(.*?)</script>', page, re.S).group(1)
    texts = json.dumps([(trace["name"], trace["text"]) for trace in json.loads(charts)["scatter"]["traces"]])
    assert "&lt;img src=x" in texts
    assert "<img" not in texts


def test_what_a_scheduler_left_out_is_pruned_not_missing(run):
    put(run.store, "pretrain-a", {})
    stages = [StageRow("pretrain-a", "pretrain", 1, "pretrain-a", None, {})]
    stages += [StageRow(f"sft-{step}", "sft", step, f"pretrain-{step}", "t", {}) for step in (1, 2)]
    stages.append(StageRow("pretrain-2", "pretrain", 2, "pretrain-2", None, {}))
    run.add_trial(TrialRow("a", "variant-a", {}, 0, tuple(stages)))
    run.add_pruned("a", 1)
    assert list(stage_table(run)["status"]) == ["done", "missing", "pruned", "pruned"]
    counts = status(run)["stages"]
    assert (counts["sft"]["pruned"], counts["sft"]["to_do"], counts["pretrain"]["pruned"]) == (1, 1, 1)
    run.add_trial(TrialRow("b", "variant-b", {}, 0, tuple(stages)))
    assert status(run)["stages"]["sft"]["pruned"] == 0  # Another trial needs it.


def test_a_checkpoint_that_two_trials_measure_on_other_text_does_not_tie_with_itself(run):
    for name, score in (("a", 0.8), ("b", 0.3)):
        put(run.store, f"fetch-{name}", {"num_parameters": 10.0})
        put(run.store, f"sft-{name}", {"score": score, "valid_score": 0.5, "score_stderr": 0.02}, lr=0.1, seed=0)
    for text in ("wiki", "news"):
        for name in ("a", "b"):
            trace = {"hessian_trace": {"wiki": 1.0, "news": 2.0}[text]}
            put(run.store, f"flatness-{text}{name}", trace)
            stages = (
                StageRow(f"fetch-{name}", "fetch", None, None, None, {}),
                StageRow(f"flatness-{text}{name}", "flatness", 0, f"fetch-{name}", None, {}),
                StageRow(f"sft-{name}", "sft", 0, f"fetch-{name}", "t", {}),
            )
            point = {"pretrain.from": name, "pretrain.data": text}
            run.add_trial(TrialRow(f"{text}-{name}", f"variant-{text}{name}", point, 0, stages))
    ranking = Results(run).ranking
    assert list(ranking.checkpoints["checkpoint"]) == ["fetch-a", "fetch-a", "fetch-b", "fetch-b"]
    assert sorted(ranking.checkpoints["flatness/hessian_trace"]) == [1, 1, 2, 2]
    assert len(set(ranking.labels.values())) == 4, "each row says on which text it was measured"
    assert ranking.ties == ()
    assert ranking.gap.value == pytest.approx(0.5)
    assert ranking.second["checkpoint"] == "fetch-b"
    assert "50.0 [" in headline(ranking)
    assert "points above the next" in headline(ranking)
    assert Results(run).write_report().exists()
