"""What a reader of the report sees: the winner, its ties, chance, goals, failures with their logs."""

import json
import re
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from columns import COLUMNS
from hypothesis import given
from hypothesis import strategies as st

from raysweep.analysis import formatting
from raysweep.analysis.colors import HUES, variant_colors
from raysweep.analysis.earlier import EARLIER_LOSS
from raysweep.analysis.pairwise import IntervalEstimate
from raysweep.analysis.pareto import front_of, undominated
from raysweep.analysis.ranking import Edge, Tie, rank
from raysweep.analysis.report import render
from raysweep.analysis.sections import agreement_table, failure_table, indicator_names, ranking_table
from raysweep.analysis.terminal import format_terminal
from raysweep.analysis.worth import worth_chart, worth_table
from raysweep.runs import Run
from raysweep.scores import Column
from raysweep.search import Goal
from raysweep.spec import Metric
from raysweep.store import Store


def table_of(scores: list[float], **columns: list[float]) -> pd.DataFrame:
    """A checkpoint table of one checkpoint a variant, with one task."""
    names = [f"c{index}" for index in range(len(scores))]
    table = pd.DataFrame(
        {"trial": names, "variant": names, "checkpoint": names, "status": "done", "step": 1, "seed": 0}
    )
    points = {"point.pretrain.x": names, "sft/t/score": scores, "sft/t/lr": 0.1, "sft/mean_score": scores}
    return table.assign(location=[f"/store/{name}" for name in names], **points, **columns)


def stages_of(*rows: dict) -> pd.DataFrame:
    missing = dict.fromkeys(
        (
            *("started", "peak_memory_bytes", "world_size", "host", "device", "gpus_per_worker", "git_commit", "flops"),
            *("versions", "checkpoint", "task"),
        )
    )
    numbers = {"seed": 0, "step": 1, "wall_seconds": np.nan, "num_tokens": np.nan}
    known = {"trial": "t", "variant": "c0", **numbers, **missing}
    return pd.DataFrame([known | row for row in rows])


@pytest.mark.parametrize(
    ("asked", "is_said"),
    [
        ("same_loss_nats: 0.01\nseeds: [0, 1]", True),
        ("same_loss_nats: 0.01", False),
        ("seeds: [0, 1]", False),
        ("# \u202etext", False),
    ],
)
def test_a_sweep_that_asks_whether_flat_is_better_is_told_why_it_has_no_answer(store, asked, is_said):
    run = Run.create(store, "asks", sweep_text=asked, identity="{}")
    stages = stages_of({"id": "a", "kind": "sft", "status": "done"})
    page = render(run, stages, rank(table_of([0.5, 0.6]), columns=COLUMNS))
    assert ("<h2>Is flat better here?</h2>" in page) == is_said
    assert ("Not told: of no checkpoint that is done a held-out loss is known." in page) == is_said


@pytest.fixture
def run(store: Store) -> Run:
    """A run without trials."""
    return Run.create(store, "r", sweep_text="# \u202etext", identity="{}")


def words(page: str) -> str:
    return re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", page.split("<main>")[0].split("<body>")[1]))


def test_the_winner_comes_with_its_path_the_gap_and_its_ties(run):
    ranking = rank(table_of([0.9, 0.8, 0.5]), columns=COLUMNS)
    tie = Tie("c1", "c1", ranking.labels["c1", "c1"], IntervalEstimate(0.1, -0.02, 0.22), 0.5)
    ranking = replace(ranking, gap=IntervalEstimate(0.1, -0.02, 0.22), ties=(tie,))
    shown = words(render(run, stages_of({"id": "a", "kind": "sft", "status": "done"}), ranking))
    assert "10.0 [-2.0, 22.0] points above the next, x c1 · step 1" in shown
    assert "x c1 · step 1 (10.0 [-2.0, 22.0] points below, at half the tokens)" in shown
    # Of a target that is better lower, the next is above.
    turned = words(render(run, stages_of({"id": "a", "kind": "sft", "status": "done"}), replace(ranking, sign=-1.0)))
    assert "10.0 [-2.0, 22.0] points below the next, x c1 · step 1" in turned
    assert "x c1 · step 1 (10.0 [-2.0, 22.0] points above, at half the tokens)" in turned
    assert "/store/c0" in shown
    assert f"raysweep export r --store {run.store.url} --to DIR" in shown
    rows = ranking_table(ranking, {}).rows
    assert [row.cells[1].mark for row in rows] == ["", "≈", ""]


def test_chance_the_probe_and_edges_stand_in_the_ranking():
    table = table_of([0.9, 0.8], **{"probe/mean_score": [0.5, 0.6], "sft/t/chance_score": [0.25, 0.25]})
    edge = Edge("c1", "c1", "x c1", "t", 0.1, "highest")
    ranking = replace(rank(table, columns=COLUMNS), chance={"t": 0.25}, edges=(edge,))
    shown = ranking_table(ranking, {})
    assert [column.name for column in shown.columns][:5] == [
        "#",
        "checkpoint",
        "mean score, %",
        "t, %",
        "linear probe, %",
    ]
    assert [cell.text for cell in shown.foot][1:5] == ["chance", "25.0", "25.0", ""]
    marked = shown.rows[1].cells[3]
    assert (marked.mark, marked.title) == ("†", "picked learning rate 0.1, the highest of its grid")


def test_ranked_by_one_task_the_row_of_chance_has_that_tasks_level():
    table = table_of([0.9, 0.8]).assign(**{"sft/u/score": [0.6, 0.7]})
    columns = [*COLUMNS, Column("sft", Metric("score", "max", "share"), "u")]
    ranking = replace(rank(table, columns=columns, target="sft/t/score"), chance={"t": 0.25, "u": 0.5})
    assert [cell.text for cell in ranking_table(ranking, {}).foot][1:4] == ["chance", "25.0", "50.0"]


def test_the_terminal_shows_the_same_table_without_tasks():
    table = table_of([0.9, 0.8], **{"probe/mean_score": [0.5, 0.6], "sft/t/chance_score": [0.25, 0.25]})
    text = format_terminal(rank(table, columns=COLUMNS), color=False)
    heads, first, *_ = [line for line in text.splitlines() if "┃ " in line or "│ " in line]
    assert [word.strip() for word in heads.strip("┃").split("┃")] == [
        "#",
        "checkpoint",
        "mean score, %",
        "linear probe, %",
    ]
    assert "x c0 · step 1" in first
    assert "chance" in text
    assert text.endswith("best checkpoint: /store/c0")


def test_a_label_does_not_steer_the_terminal():
    table = table_of([0.9, 0.8]).assign(**{"point.pretrain.x": ["[/] :smile:", "\x1b]0;title\x07\u202e"]})
    text = format_terminal(rank(table, columns=COLUMNS), color=False)
    assert "x [/] :smile: · step 1" in text
    assert r"x \x1b]0;title\x07\u202e · step 1" in text
    assert "\x1b" not in text


def test_indicators_of_one_order_are_one_row_by_the_name_one_knows():
    falling = {"heldout/ppl": [2.0, 3.0], "heldout/loss_nats_per_token": [1.0, 2.0]}
    ranking = rank(table_of([0.9, 0.8], **falling, **{"flatness/hessian_trace": [5.0, 4.0]}), columns=COLUMNS)
    assert {"ppl", "hessian_trace"} <= set(indicator_names(ranking).values())
    row = next(row for row in agreement_table(ranking).rows if row.cells[0].text == "ppl")
    assert row.cells[0].mark == "1 more of the same order"
    assert "heldout/ppl" in row.cells[0].title
    assert "heldout/loss_nats_per_token" in row.cells[0].title


def test_a_log_keeps_its_line_breaks_and_pruned_is_no_failure(run):
    run.add_failure("sft-1", kind="sft", trial="t", cause="ValueError: x", log="Traceback:\n  line <1>\nValueError: x")
    stages = stages_of(
        {"id": "sft-1", "kind": "sft", "status": "failed"},
        {"id": "sft-2", "kind": "sft", "status": "pruned"},
        {"id": "sft-3", "kind": "sft", "status": "pruned"},
        {"id": "sft-4", "kind": "sft", "status": "missing"},
    )
    rows = failure_table(run, stages).rows
    assert [[cell.text for cell in row.cells][:2] for row in rows] == [
        ["failed", "sft-1"],
        ["pruned", "2 × sft"],
        ["missing", "1 × sft"],
    ]
    page = render(run, stages, rank(table_of([0.9, 0.8]), columns=COLUMNS))
    assert "<pre>Traceback:\n  line &lt;1&gt;\nValueError: x</pre>" in page
    assert re.search(r"<dt>pruned</dt><dd>2</dd>", page)


def test_empty_sections_are_hidden_and_bidi_is_shown_as_a_code(run):
    page = render(run, stages_of({"id": "a", "kind": "sft", "status": "done"}), rank(table_of([0.9]), columns=COLUMNS))
    assert not set(re.findall(r'<section id="(\w+)"', page)) & {"front", "scatter", "agreement", "loss", "failures"}
    assert 'href="#loss"' not in page
    assert r"# \u202etext" in page
    assert "\u202e" not in page


def test_the_scatter_opens_on_the_best_indicator(run):
    table = table_of([0.9, 0.8, 0.7], **{"flatness/hessian_trace": [9.0, 1.0, 5.0], "heldout/ppl": [1.0, 2.0, 3.0]})
    page = render(run, stages_of({"id": "a", "kind": "sft", "status": "done"}), rank(table, columns=COLUMNS))
    charts = json.loads(re.search(r'<script type="application/json" id="charts">(.*?)</script>', page, re.S).group(1))
    assert charts["scatter"]["indicators"][0] == "ppl"


def test_several_goals_give_a_front(store):
    goals = [{"metric": "sft/mean_score", "mode": "max"}, {"metric": "flatness/hessian_trace", "mode": "min"}]
    choose = {"metric": "flatness/hessian_trace", "mode": "min", "within": {"metric": "a", "mode": "min", "part": 0.1}}
    search = {"name": "optuna", "num_trials": 3, "objectives": goals, "choose": choose}
    run = Run.create(store, "r", sweep_text="x", identity=json.dumps({"search": search}))
    table = table_of([0.9, 0.8, 0.7], **{"flatness/hessian_trace": [9.0, 1.0, 5.0]}, a=[4.0, 4.5, 4.2])
    page = render(run, stages_of({"id": "a", "kind": "sft", "status": "done"}), rank(table, columns=COLUMNS))
    front = re.search(r'<table id="front-table".*?</table>', page, re.S).group()
    assert re.findall(r">(x c\d)", front) == ["x c0", "x c1"]
    # Of the box from (0.7, 9) to (0.9, 1), c0 has nothing and c1 the half below it.
    assert re.search(r"hypervolume of the front.*?50\.0%", page, re.S)
    assert re.search(r"within 10 % of the best a.*?x c2", page, re.S)


def test_the_front_is_of_last_checkpoints():
    table = table_of([0.9, 0.8], a=[2.0, 1.0], b=[2.0, 1.0]).assign(trial="t", step=[1, 2])
    front = front_of(table, [Goal(metric="a", mode="max"), Goal(metric="b", mode="max")])
    assert [row["checkpoint"] for row in front.rows] == ["c1"]
    assert front_of(table, [Goal(metric="a", mode="max")]) is None
    assert front_of(table, [Goal(metric="a", mode="max"), Goal(metric="unknown", mode="max")]) is None


@given(st.lists(st.tuples(*[st.integers(0, 3)] * 2), min_size=1, max_size=12))
def test_the_front_is_what_its_definition_says(points):
    found = undominated(np.array(points, dtype=float))
    naive = [not any(all(map(int.__ge__, other, one)) and other != one for other in points) for one in points]
    assert list(found) == naive


def test_short_names_are_the_shortest_that_are_unique():
    assert formatting.short_names(
        ["a/ppl", "b/ppl", "a/x", "pretrain.model.lr", "pretrain.optimizer.lr", "c/v.w_s"]
    ) == {
        "a/ppl": "a/ppl",
        "b/ppl": "b/ppl",
        "a/x": "x",
        "pretrain.model.lr": "model.lr",
        "pretrain.optimizer.lr": "optimizer.lr",
        "c/v.w_s": "v.w_s",
    }


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.00123456, "x 0.001235"), (3e-3, "x 0.003"), (1e-5, "x 1e-5"), (12, "x 12"), ("[/]", "x [/]"), ([1], "x [1]")],
)
def test_a_point_has_four_digits(value, text):
    assert formatting.point_text({"a.x": value}) == text


def test_variants_have_colours_of_their_own():
    colors = variant_colors(rank(table_of([0.01 * index for index in range(25)]), columns=COLUMNS))
    assert len({(color.hue, color.shape) for color in colors.values()}) == 25
    assert colors["c24"].hue == HUES[0]  # The best one's is the first.


def test_an_indicator_stands_beside_its_cost_and_the_configuration():
    """Worker time of its stage on one checkpoint; a stage that two trials share counts once."""
    scores = [0.9, 0.8, 0.7, 0.6, 0.5, 0.45]
    columns = {"flatness/hessian_trace": [1.0, 2.0, 4.0, 3.0, 5.0, 6.0], "pretrain/loss_nats_per_token": scores}
    columns[EARLIER_LOSS.name] = scores  # Of the checkpoint before, by a stage of its own.
    ranking = rank(table_of(scores, **columns), columns=[*COLUMNS, EARLIER_LOSS])
    rows = [
        {
            "id": f"{kind}-{number}",
            "kind": kind,
            "checkpoint": f"c{number}",
            "wall_seconds": spent,
            "world_size": 2,
            "device": "cpu",
        }
        | {"flops": 1e12 * spent}
        for kind, spent in (("flatness", 3.0), ("sft", 30.0), ("pretrain", 100.0), ("heldout", 1.0))
        for number in range(6)
    ]
    stages = stages_of(*rows, rows[0])
    [row] = worth_table(ranking, stages).rows
    assert [cell.text for cell in row.cells][:5] == ["hessian_trace", "flatness", "6.0 s", "10.0", "3 T"]
    assert row.cells[6].text == "15"  # An accuracy over few pairs is not taken for one over all.
    assert worth_table(ranking, stages).columns[2].name == "CPU worker time a checkpoint"
    chart = worth_chart(ranking, stages)
    assert (chart["x"], chart["x_title"]) == ([6.0], "CPU worker seconds a checkpoint")
    assert chart["y"] == [pytest.approx(14 / 15)]
    assert "of 15 pairs right" in chart["text"][0]
    assert [line["name"] for line in chart["lines"]] == ["configuration alone"]
    # Only where errors of the scores are known is there a line for what their noise leaves.
    noisy = rank(table_of(scores, **columns, **{"sft/mean_score_stderr": [0.1] * 6}), columns=[*COLUMNS, EARLIER_LOSS])
    config, ceiling = worth_chart(noisy, stages)["lines"]
    assert config == chart["lines"][0]
    assert ceiling == {"y": noisy.ceiling, "name": "ceiling: noise of fine-tuning"}
    assert 0.5 < ceiling["y"] < 1
    assert worth_chart(ranking, stages[stages["kind"] == "sft"]) is None


def test_what_is_learnt_together_is_drawn_with_how_sure_it_was(run):
    pytest.importorskip("lightgbm", reason="LightGBM, of the extra 'compare', is not installed")
    generator = np.random.default_rng(0)
    scores = generator.uniform(size=24)
    trace = 4 - scores + generator.normal(size=24) / 5
    ranking = rank(table_of(list(scores), **{"flatness/hessian_trace": trace}), columns=COLUMNS)
    page = render(run, stages_of({"id": "sft-1", "kind": "sft", "status": "done"}), ranking)
    [chart] = re.findall(r'<script type="application/json" id="charts">(.*?)</script>', page, re.S)
    reliability = json.loads(chart)["reliability"]
    assert len(reliability["x"]) == len(reliability["y"]) > 0
    assert sum(reliability["shares"]) == pytest.approx(1)
    text = re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", page))
    assert (
        "learnt from 60 % of the 24 variants (24 checkpoints) and tested on pairs of the others: mean over 20" in text
    )
    assert "900 pairs, which are of 24 variants in 20 overlapping splits" in text  # 10 variants a split, 45 pairs.
    [table] = re.findall(r'<table id="learnt-table".*?</table>', page, re.S)
    assert "learnt from indicators" in table
    assert "mean rank by all indicators" in table
    [importances] = re.findall(r'<table id="importance-table".*?</table>', page, re.S)
    assert "hessian_trace" in importances
    # Of pairs that differ little and much after fine-tuning, what is learnt beside the indicator itself.
    [gaps] = re.findall(
        r"<summary>Pairs right by their difference in sft/mean_score</summary>(.*?)</details>", page, re.S
    )
    assert "learnt from indicators" in gaps
    assert "no better than chance up to" in gaps


def test_too_few_variants_to_learn_from_are_said(run):
    ranking = rank(table_of([0.9, 0.8, 0.5], **{"flatness/hessian_trace": [1.0, 2.0, 3.0]}), columns=COLUMNS)
    page = render(run, stages_of({"id": "sft-1", "kind": "sft", "status": "done"}), ranking)
    assert "Not learnt together: 3 variants have a score in sft/mean_score; a comparer is learnt from 20" in page
    assert 'id="reliability-chart"' not in page
