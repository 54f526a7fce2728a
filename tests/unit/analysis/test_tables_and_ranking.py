"""Tables and rankings of real records: what is picked, counted and set apart; and the report's escaping."""

import json
import math
import re
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from columns import COLUMNS
from hypothesis import given, settings
from hypothesis import strategies as st

from raysweep.analysis.ranking import rank
from raysweep.analysis.tables import checkpoint_table, columns_of, stage_table, write_tables
from raysweep.analysis.terminal import format_terminal
from raysweep.record import Record
from raysweep.results import Results
from raysweep.run_files import StageRow, TrialRow
from raysweep.runs import Run
from raysweep.store import Store

KNOWN = {"started": "2026-01-01T00:00:00+00:00", "wall_seconds": 1.0, "peak_memory_bytes": 2**20, "world_size": 2,
         "device": "cpu", "host": "h", "git_commit": None, "versions": {"torch": "2"}}  # fmt: skip
EVIL = "</script><img src=x onerror=alert(1)>"


def put(store: Store, stage_id: str, metrics: dict[str, float], *, status: str = "done", **spec) -> None:
    kind = stage_id.split("-")[0]
    out = store.work_dir(stage_id)
    if kind == "pretrain" and status == "done":
        curve = [{"step": step, "loss_nats_per_token": 3.0 - step / 10, "lr": 1, "grad_norm": 1} for step in (1, 2, 3)]
        (out / "curve.jsonl").write_text("\n".join(map(json.dumps, curve)))
    store.commit(Record(stage_id, kind, status, spec, {}, metrics, KNOWN, {}), out)


def build(
    store: Store, *, num_trials: int = 4, task: str = "t", name: str = "r", value: str = "v", **more: float
) -> Run:
    """Trials whose score rises with their number; the Hessian trace falls with it, perplexity is constant."""
    run = Run.create(store, name, sweep_text=f"# {EVIL}", identity="{}")
    run.note_columns(COLUMNS)
    for trial in range(num_trials):
        checkpoint = f"pretrain-{trial}"
        stages = [StageRow(checkpoint, "pretrain", 10, checkpoint, None, {})]
        put(store, checkpoint, {"loss_nats_per_token": 2.0, "num_parameters": 10.0})
        put(store, f"flatness-{trial}", {"hessian_trace": 10.0 - trial, "hessian_trace_stderr": 0.1, **more})
        stages.append(StageRow(f"flatness-{trial}", "flatness", 10, checkpoint, None, {}))
        for lr, valid in ((1e-3, 0.5), (1e-2, 0.5), (1e-1, 0.4)):
            for seed in (0, 1):
                stage_id = f"sft-{trial}{lr}{seed}"
                score = 0.1 * trial + 0.01 * seed + (0.5 if lr == 1e-1 else 0.0) + (0.2 if lr == 1e-2 else 0.0)
                put(store, stage_id, {"score": score, "valid_score": valid}, lr=lr, seed=seed)
                stages.append(StageRow(stage_id, "sft", 10, checkpoint, task, {}))
        run.add_trial(
            TrialRow(f"trial-{trial}", f"variant-{trial}", {"pretrain.x": f"{value}{trial}"}, 0, tuple(stages))
        )
    return run


def test_rate_is_picked_by_validation_and_ties_go_to_the_smaller(store):
    table = checkpoint_table(build(store))
    assert list(table["sft/t/lr"]) == [1e-3] * 4
    assert list(table["sft/t/score"]) == pytest.approx([0.1 * trial + 0.005 for trial in range(4)])
    assert list(table["sft/t/num_seeds"]) == [2] * 4
    assert list(table["sft/mean_score"]) == pytest.approx(list(table["sft/t/score"]))


def test_a_zip_is_one_column_and_one_config_row(store):
    """What moves together cannot be told apart: two columns of it would share what one of them knows."""
    rows = build(store, num_trials=6).trials()
    run = Run.create(store, "zipped", sweep_text="", identity="{}")
    for number, row in enumerate(rows):
        run.add_trial(replace(row, point={"size": ("128 / 2", "256 / 4")[number // 3], "pretrain.x": f"v{number % 3}"}))
    ranking = rank(checkpoint_table(run), columns=COLUMNS)
    assert list(ranking.checkpoints["point.size"]) == ["256 / 4"] * 3 + ["128 / 2"] * 3
    config = [item.indicator for item in ranking.associations if item.source == "config"]
    assert config.count("point.size") == 1
    assert "size 256 / 4" in format_terminal(ranking)


def test_a_zip_whose_names_share_settings_goes_by_these(store):
    rows = build(store, num_trials=8).trials()
    run = Run.create(store, "designed", sweep_text="", identity="{}")
    lr, objective, size = "pretrain.optimizer.lr", "pretrain.objective", "pretrain.model.hidden_size"
    for number, row in enumerate(rows):
        settings = {lr: (1e-3, 1e-2)[number // 4], objective: "xy"[number % 2], size: (64, 128)[number // 4]}
        run.add_trial(replace(row, point={"variant": f"v{number}"}, settings={"variant": settings}))
    ranking = rank(checkpoint_table(run), columns=COLUMNS)
    config = {item.indicator: item for item in ranking.associations if item.source == "config"}
    assert {f"setting.variant:{size}", f"setting.variant:{objective}"} <= set(config)
    assert not {"point.variant", f"setting.variant:{lr}"} & set(config)
    assert config[f"setting.variant:{size}"].accuracy.value > 0.7
    assert ranking.skipped["point.variant"] == "what it sets has columns of its own"
    assert ranking.skipped[f"setting.variant:{lr}"] == f"moves with setting.variant:{size}"
    assert "variant v7" in format_terminal(ranking)


def test_missing_and_diverged_are_counted(store):
    run = build(store)
    put(store, "pretrain-9", {"diverged_step": 3.0, "diverged_loss": math.nan}, status="diverged")
    stages = (
        StageRow("pretrain-9", "pretrain", 10, "pretrain-9", None, {}, flops=1e9),
        StageRow("sft-9", "sft", 10, "pretrain-9", "t", {}, flops=1e6),
        StageRow("pretrain-0", "pretrain", None, None, None, {}, flops=1e9),
    )
    run.add_trial(TrialRow("trial-9", "variant-9", {"pretrain.x": "v9"}, 0, stages))
    ranking = rank(checkpoint_table(run), columns=COLUMNS)
    assert len(ranking.checkpoints) == 5
    assert ranking.num_unscored == 1
    assert len(ranking.diverged) == 1
    assert "v9" in ranking.diverged[0]
    table = stage_table(run)
    statuses = table["status"].value_counts()
    assert statuses["diverged"] == 1
    assert statuses["missing"] == 1
    # What was planned of it is not what it took.
    assert list(table["id"][table["flops"].notna()]) == ["pretrain-0"]


def test_tables_survive_parquet(store):
    run = build(store)
    paths = write_tables(run, stage_table(run), checkpoint_table(run), columns_of(run))
    stages, checkpoints = map(pd.read_parquet, paths)
    assert len(stages) == len(stage_table(run)) == 4 * 8
    assert list(checkpoints["sft/mean_score"]) == list(checkpoint_table(run)["sft/mean_score"])
    assert {"host", "git_commit", "wall_seconds", "peak_memory_bytes", "versions"} <= set(stages.columns)


def test_an_indicator_counts_in_its_declared_direction(store):
    ranking = rank(checkpoint_table(build(store)), columns=COLUMNS)
    trace = next(item for item in ranking.associations if item.indicator == "flatness/hessian_trace")
    assert trace.direction == "min"
    assert trace.accuracy.value == 1.0
    assert trace.spearman.value == pytest.approx(1.0)
    assert ranking.best["trial"] == "trial-3"
    # Constant over all checkpoints, it cannot order them.
    assert "pretrain/loss_nats_per_token" in ranking.skipped
    text = format_terminal(ranking, width=120, color=False)
    assert text.index("v3") < text.index("v2") < text.index("v1")


def test_pairs_within_the_noise_of_seeds_are_set_apart(store):
    table = checkpoint_table(build(store))
    pairs = rank(table, columns=COLUMNS).associations[0].pairs
    assert (pairs.num_pairs, pairs.num_within_noise) == (6, None)  # Without test examples, errors are not known.
    # Seeds differ by 0.01, trials by 0.1: nothing is within noise.
    table["sft/mean_score_stderr"] = 0.005
    pairs = rank(table, columns=COLUMNS).associations[0].pairs
    assert (pairs.num_pairs, pairs.num_within_noise) == (6, 0)


def test_a_trace_is_over_the_parameters_of_the_model_that_it_is_of(store):
    run = build(store, num_trials=2)
    assert list(checkpoint_table(run)["flatness/mean_eigenvalue"]) == [1.0, 0.9]
    stages = []
    for trial in (0, 1):  # One enlarged, and one as it is.
        name = f"enlarge-{trial}"
        put(store, name, {"num_parameters": 40.0} if trial == 0 else {}, status="done" if trial == 0 else "failed")
        stages.append(StageRow(name, "enlarge", 10, f"pretrain-{trial}", None, {}))
    more = [replace(row, stages=(*row.stages, stage)) for row, stage in zip(run.trials(), stages, strict=True)]
    other = Run.create(store, "enlarged", sweep_text="", identity="{}")
    other.note_columns(COLUMNS)
    for row in more:
        other.add_trial(row)
    assert list(checkpoint_table(other)["flatness/mean_eigenvalue"]) == [0.25, 0.9]


def test_nothing_to_rank(store):
    run = Run.create(store, "empty", sweep_text="x", identity="{}")
    ranking = rank(checkpoint_table(run), columns=COLUMNS)
    assert ranking.best is None
    assert "No checkpoint" in format_terminal(ranking)
    assert "nothing to rank" in Results(run).write_report().read_text()


def test_the_report_says_how_far_traces_on_own_samples_are_off(store):
    run = build(store, samples_relative_distance=-0.125, target_reached=1.0)
    page = Results(run).write_report().read_text()
    assert "Hessian trace on own samples, off that on the text" in page
    assert "-12.5% (median; -12.5% to -12.5%)" in page
    assert not any(
        "samples" in name or "target" in name for name in rank(checkpoint_table(run), columns=COLUMNS).skipped
    )


def test_checkpoints_that_nobody_fine_tuned_have_no_rank(store):
    table = checkpoint_table(build(store))
    plain = table.drop(columns=[name for name in table.columns if name.startswith("sft/")])
    ranking = rank(plain, columns=COLUMNS)
    assert ranking.best is None
    assert len(ranking.checkpoints) == len(plain)
    with pytest.raises(ValueError, match="no column 'sft/mean_scor' to rank by; scores: sft/mean_score"):
        rank(table, columns=COLUMNS, target="sft/mean_scor")


@settings(max_examples=8)
@given(data=st.data())
def test_ranking_ignores_row_order_and_monotone_transforms(data):
    num = data.draw(st.integers(4, 8))
    draw = np.random.default_rng(data.draw(st.integers(0, 1000)))
    score, trace = draw.random(num), draw.random(num) + 0.1
    table = pd.DataFrame(
        {
            "trial": [f"t{i}" for i in range(num)],
            "variant": [f"v{i}" for i in range(num)],
            "checkpoint": [f"c{i}" for i in range(num)],
            "step": 1,
            "seed": 0,
            "status": "done",
            "sft/mean_score": score,
            "flatness/hessian_trace": trace,
        }
    )
    moved = table.sample(frac=1, random_state=1)
    bent = table.assign(**{"flatness/hessian_trace": np.exp(3 * trace)})
    results = [rank(each, columns=COLUMNS).associations for each in (table, moved, bent)]
    for one, *others in zip(*results, strict=True):
        assert all(other.accuracy == one.accuracy and other.spearman == one.spearman for other in others)


def test_what_users_wrote_is_escaped_everywhere(store):
    run = build(store, task=EVIL, value=EVIL)
    run.add_failure("sft-x", kind="sft", trial="trial-0", cause=EVIL, log=EVIL)
    first = run.trials()[0]
    row = replace(first, trial="trial-x", stages=(*first.stages, StageRow("sft-x", "sft", 10, "pretrain-0", EVIL, {})))
    run.add_trial(row)
    page = Results(run).write_report().read_text()
    assert EVIL not in page
    assert "<img src=x" not in page
    assert "&lt;img src=x onerror" in page
    body = page[: page.index('<script type="application/json"')]
    assert not re.search(r"""(src|href)\s*=\s*["']?(https?:)?//""", body)
