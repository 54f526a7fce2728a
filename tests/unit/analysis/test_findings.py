"""What a sweep's ranking says: from predictions in a store to ties, chance, rates at the edge, and the words."""

import json
import math

import numpy as np
import pytest
from columns import COLUMNS

from raysweep.analysis.findings import cautions, headline, how_to_read, score_text
from raysweep.analysis.predictions import read_scores
from raysweep.analysis.ranking import rank
from raysweep.analysis.tables import checkpoints_of
from raysweep.analysis.uncertainty import recorded, task_noise
from raysweep.record import Record
from raysweep.results import Results
from raysweep.run_files import StageRow, TrialRow
from raysweep.runs import Run
from raysweep.store import Store

KNOWN = {"started": "2026-01-01T00:00:00+00:00", "wall_seconds": 1.0, "peak_memory_bytes": 2**20, "world_size": 1,
         "device": "cpu", "host": "h", "git_commit": None, "versions": {}}  # fmt: skip
NUM_EXAMPLES = 200


@pytest.fixture
def run(store: Store) -> Run:
    """A run without trials."""
    run = Run.create(store, "r", sweep_text="x", identity="{}")
    run.note_columns(COLUMNS)
    return run


def put(store: Store, stage_id: str, metrics: dict[str, float], *, rows: list[dict] | None = None, **spec) -> None:
    out = store.work_dir(stage_id)
    if rows is not None:
        (out / "predictions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    store.commit(Record(stage_id, stage_id.split("-")[0], "done", spec, {}, metrics, KNOWN, {}), out)


def add(
    run: Run,
    name: str,
    rights: list[int],
    *,
    named: bool = True,
    lrs: tuple[float, ...] = (0.1,),
    point: dict | None = None,
    probe: float | None = None,
    flatness: dict[str, float] | None = None,
    chance: float = 0.25,
    **metrics: float,
) -> None:
    """A trial of one checkpoint; of each seed, how many of the test examples it has right: always the first of them."""
    checkpoint = f"pretrain-{name}"
    put(run.store, checkpoint, {"num_tokens": 1000.0, **metrics})
    stages = [StageRow(checkpoint, "pretrain", 1, checkpoint, None, {})]
    if probe is not None:
        put(run.store, f"probe-{name}", {"score": probe}, seed=0)
        stages.append(StageRow(f"probe-{name}", "probe", 1, checkpoint, "t", {}))
    if flatness is not None:
        put(run.store, f"flatness-{name}", flatness)
        stages.append(StageRow(f"flatness-{name}", "flatness", 1, checkpoint, None, {}))
    for seed, num in enumerate(rights):
        for place, lr in enumerate(lrs):
            scores = (np.arange(NUM_EXAMPLES) < num).astype(float)
            rows = [{"score": score} | ({"id": f"x{row}"} if named else {}) for row, score in enumerate(scores)]
            stage = StageRow(f"sft-{name}{seed}{place}", "sft", 1, checkpoint, "t", {})
            metric = {"score": float(scores.mean()), "valid_score": 0.5 + place / 10, "chance_score": chance}
            put(run.store, stage.id, metric, rows=rows, lr=lr, seed=seed)
            stages.append(stage)
    run.add_trial(TrialRow(name, f"variant-{name}", point or {"pretrain.x": name}, 0, tuple(stages)))


def test_checkpoints_of_gangs_of_several_sizes_are_said_to_be(run, monkeypatch):
    add(run, "a", [120, 122])
    add(run, "b", [118, 121])
    assert not [line for line in cautions(Results(run).ranking) if "workers" in line]
    monkeypatch.setitem(KNOWN, "world_size", 4)
    add(run, "c", [60, 62])
    assert [
        line for line in cautions(Results(run).ranking) if "pretrained on 1 and 4 workers, by which sums are" in line
    ]


def test_a_tie_with_the_best_is_named_with_what_it_costs(run):
    add(run, "a", [120, 122], num_tokens=2000.0)
    add(run, "b", [118, 121])
    add(run, "c", [60, 62])
    ranking = Results(run).ranking
    (tie,) = ranking.ties
    assert (tie.checkpoint, tie.cost_ratio) == ("pretrain-b", 0.5)
    assert tie.difference.value == pytest.approx(0.0075)
    assert tie.difference.low <= 0 < tie.difference.high
    assert ranking.gap == tie.difference
    assert (ranking.num_comparisons, ranking.num_clear, ranking.errors) == (3, 2, "paired")
    assert "not distinguishable from x b · step 1, at half the tokens" in headline(ranking)
    assert any("hold at once for 3 pairs" in line for line in how_to_read(ranking))


def test_of_many_ties_some_are_listed_and_the_rest_counted(run):
    for number in range(10):
        add(run, f"{number}", [120, 121])
    ranking = Results(run).ranking
    assert len(ranking.ties) == 9
    assert "and 8 more" in headline(ranking)
    assert any("; and 3 more (95 % intervals" in line for line in how_to_read(ranking))


def test_a_clear_winner_is_said_with_its_lead(run):
    add(run, "a", [150, 152])
    add(run, "b", [60, 62])
    ranking = Results(run).ranking
    assert ranking.ties == ()
    assert "45.0 [" in headline(ranking)
    assert "] points above the next" in headline(ranking)


def test_pairing_finds_differences_that_single_errors_hide(run):
    # The better one has right all that the other has, and 12 more of 200: each is 50 % +- 7.
    add(run, "a", [112, 112])
    add(run, "b", [100, 100])
    assert Results(run).ranking.num_clear == 1
    other = Run.create(run.store, "nameless", sweep_text="x", identity="{}")
    add(other, "c", [112, 112], named=False)
    add(other, "d", [100, 100], named=False)
    ranking = Results(other).ranking
    assert (ranking.num_clear, ranking.errors) == (0, "unpaired")
    assert any("not paired" in line for line in how_to_read(ranking))


def test_the_printed_error_is_that_of_the_examples_too(run):
    # Two seeds that agree to the example: their own error is 0, that of 50 of 200 examples is not.
    add(run, "a", [50, 50])
    (row,) = Results(run).checkpoints.to_dict("records")
    expected = 1.972 * math.sqrt(0.25 * 0.75 / 200)
    assert row["sft/t/score_high"] - row["sft/t/score_low"] == pytest.approx(2 * expected, rel=0.02)
    assert score_text(row, "sft/mean_score") == "25.0 ± 6.3"


def test_one_seed_says_that_it_says_nothing_of_seeds(run):
    add(run, "a", [150])
    add(run, "b", [60])
    ranking = Results(run).ranking
    assert ranking.errors == "paired, one seed"
    assert any("with one fine-tuning seed, how far seeds differ is not known" in line for line in how_to_read(ranking))


def test_scores_near_chance_are_counted_and_warned_of(run):
    for name, right in (("a", 55), ("b", 52), ("c", 120)):
        add(run, name, [right, right])
    ranking = Results(run).ranking
    assert ranking.chance == {"t": 0.25}
    assert (ranking.num_near_chance, ranking.num_against_chance) == (2, 3)
    assert "2 of 3 scores are not clearly above chance (t 25.0 %)" in cautions(ranking)[0]


def test_checkpoints_of_several_grammars_have_chance_levels_of_their_own(run):
    add(run, "a", [120, 120], chance=0.25)
    add(run, "b", [110, 110], chance=0.55)
    ranking = Results(run).ranking
    assert ranking.chance == {"t": pytest.approx(0.4)}
    assert (ranking.num_near_chance, ranking.num_against_chance) == (1, 2)


def test_a_score_whose_error_is_not_known_has_no_interval(run):
    add(run, "a", [120])
    stages = Results(run).stages
    noise = task_noise([recorded("pretrain-a", seeds=[0], means=[0.6], errors=[math.nan], num_examples=1)])
    (row,) = checkpoints_of(stages, {"sft/t/score": noise}).to_dict("records")
    assert row["sft/t/score"] == 0.6
    assert all(
        math.isnan(row[f"sft/{name}_{end}"]) for name in ("t/score", "mean_score") for end in ("stderr", "low", "high")
    )
    assert score_text(row, "sft/mean_score") == "60.0"


def test_where_every_run_diverged_nothing_is_said_of_scores(run):
    put(run.store, "pretrain-a", {"num_tokens": 1.0})
    lost = Record("sft-a", "sft", "diverged", {"lr": 0.1, "seed": 0}, {}, {"diverged_step": 1.0}, KNOWN, {})
    run.store.commit(lost, run.store.work_dir("sft-a"))
    stages = [StageRow("pretrain-a", "pretrain", 1, "pretrain-a", None, {}),
              StageRow("sft-a", "sft", 1, "pretrain-a", "t", {})]  # fmt: skip
    run.add_trial(TrialRow("a", "variant-a", {"pretrain.x": "a"}, 0, tuple(stages)))
    ranking = Results(run).ranking
    assert headline(ranking) == "No checkpoint has a fine-tuned score, so there is nothing to rank."
    assert how_to_read(ranking) == ["Not ranked, for want of a score: 1 of 1 checkpoints."]


def test_a_rate_at_the_edge_is_said_and_whether_it_is_a_leaders(run):
    add(run, "a", [120, 121], lrs=(0.1, 0.2))
    add(run, "b", [60, 61])
    ranking = Results(run).ranking
    (edge,) = ranking.edges
    assert (edge.checkpoint, edge.task, edge.lr, edge.side) == ("pretrain-a", "t", 0.2, "highest")
    assert (
        "at an end of its grid in 1 case (1 at the highest, of the best or a tie with it in 1)" in cautions(ranking)[0]
    )
    assert "hold at once for 1 pair," in how_to_read(ranking)[3]


def test_a_probe_above_fine_tuning_is_warned_of_and_has_a_place(run):
    for name, right, probe in (("a", 120, 0.9), ("b", 100, 0.8), ("c", 60, 0.7)):
        add(run, name, [right, right], probe=probe, accuracy=right / 1000)
    ranking = Results(run).ranking
    assert list(ranking.checkpoints["rank/probe/mean_score"]) == [1, 2, 3]
    assert (
        "A linear probe scores above fine-tuning on 3 of 3 checkpoints (80.0 against 46.7 % on average)"
        in (cautions(ranking)[0])
    )
    assert not cautions(rank(ranking.checkpoints, columns=COLUMNS, target="pretrain/accuracy"))


def add_mixture(run: Run, name: str, rights: list[int], *, lrs: tuple[float, ...] = (0.1,), probe: float) -> None:
    """A trial of one checkpoint: a linear probe of t, and the mixture all of t and u, of which as many are right."""
    checkpoint = f"pretrain-{name}"
    put(run.store, checkpoint, {"num_tokens": 1000.0})
    put(run.store, f"probe-{name}", {"score": probe}, seed=0)
    stages = [
        StageRow(checkpoint, "pretrain", 1, checkpoint, None, {}),
        StageRow(f"probe-{name}", "probe", 1, checkpoint, "t", {}),
    ]
    for seed, num in enumerate(rights):
        for place, lr in enumerate(lrs):
            rows = [
                {"score": float(row < num), "id": f"x{row}", "task": task}
                for task in ("t", "u")
                for row in range(NUM_EXAMPLES)
            ]
            stage = StageRow(f"sft-{name}{seed}{place}", "sft", 1, checkpoint, "all/t+u", {})
            scores = {f"{task}/score": num / NUM_EXAMPLES for task in ("t", "u")}
            put(run.store, stage.id, {"valid_score": 0.5 + place / 10, **scores}, rows=rows, lr=lr, seed=seed)
            stages.append(stage)
    run.add_trial(TrialRow(name, f"variant-{name}", {"pretrain.x": name}, 0, tuple(stages)))


def test_a_rate_of_a_mixture_at_the_edge_counts_once_for_all_its_tasks(run):
    add_mixture(run, "a", [120, 121], lrs=(0.1, 0.2), probe=0.1)
    add_mixture(run, "b", [60, 61], lrs=(0.1, 0.2), probe=0.1)
    ranking = Results(run).ranking
    assert ranking.target == "sft/all/mean_score"
    assert len(ranking.edges) == 4
    assert "in 2 cases (2 at the highest, of the best or a tie with it in 1)" in cautions(ranking)[0]


def test_the_mean_of_a_mixture_varies_by_seed_as_its_tasks_do_that_are_trained_together(run):
    add_mixture(run, "a", [100, 140], probe=0.1)
    add_mixture(run, "b", [60, 80], probe=0.1)
    for row in Results(run).checkpoints.to_dict("records"):
        # Nearly all of chance is of seeds, as lucky with t as with u; were they not, the mean would have 0.71 of it.
        assert row["sft/all/mean_score_stderr"] == pytest.approx(row["sft/all/t/score_stderr"], rel=0.05)


def test_a_probe_of_some_tasks_is_not_compared_with_a_mean_over_others(run):
    for name, right in (("a", 120), ("b", 100), ("c", 60)):
        add_mixture(run, name, [right, right], probe=0.9)
    results = Results(run)
    assert results.ranking.target == "sft/all/mean_score"
    assert not cautions(results.ranking)
    assert "A linear probe scores above fine-tuning on 3 of 3" in cautions(results.by("sft/all/t/score").ranking)[0]


def test_flatness_less_sure_than_asked_for_is_warned_of(run):
    for name, right, error in (("a", 120, 20.0), ("b", 100, 50.0), ("c", 60, 4.0)):
        found = {"hessian_trace": -100.0, "hessian_trace_stderr": error, "target_reached": float(error < 5)}
        add(run, name, [right, right], flatness=found)
    (line,) = cautions(Results(run).ranking)
    assert line.startswith("Flatness is less sure than flatness.rse asks for on 2 of 3 checkpoints (standard error")
    assert "of the Hessian trace: 35.0 % of it, in the median)" in line


def test_flatness_as_sure_as_asked_for_is_no_matter(run):
    for name, right in (("a", 120), ("b", 60)):
        found = {"hessian_trace": right * 1.0, "hessian_trace_stderr": 1.0, "target_reached": 1.0}
        add(run, name, [right, right], flatness=found)
    assert cautions(Results(run).ranking) == []


def test_an_indicator_of_nothing_but_noise_is_told_so(run):
    for name, right, ppl in (("a", 101, 1.0), ("b", 100, 2.0), ("c", 99, 3.0)):
        add(run, name, [right, right - 5], loss_nats_per_token=ppl)
    assert "orders the most pairs right: 1.00 of 3, none of which is clear of noise" in headline(Results(run).ranking)


def test_an_indicator_of_few_checkpoints_is_not_the_headlines(run):
    """As the loss of the checkpoint before, which first ones do not have: of a few pairs some one has all right."""
    rights, losses = (150, 130, 110, 90, 70, 50), (2.0, 1.0, 3.0, 4.0, 5.0, 6.0)
    for place, (right, ppl) in enumerate(zip(rights, losses, strict=True)):
        found = {"hessian_trace": float(place)} if place in (0, 2, 4) else None
        add(run, "abcdef"[place], [right, right], loss_nats_per_token=ppl, flatness=found)
    ranking = Results(run).ranking
    assert ranking.associations[0].indicator == "flatness/hessian_trace"
    assert "pretrain/loss_nats_per_token (lower is better) orders the most pairs right: 0.93" in headline(ranking)


def test_an_indicator_no_better_than_the_sweep_file_is_not_praised(run):
    for name, right, ppl in (("a", 150, 3.0), ("b", 120, 1.0), ("c", 90, 2.0), ("d", 60, 4.0)):
        add(run, name, [right, right], point={"pretrain.n": right}, loss_nats_per_token=ppl)
    text = headline(Results(run).ranking)
    assert "orders the most pairs right: 0.67, with too few variants for an interval, and no more than" in text
    assert text.endswith("point.pretrain.n alone (1.00).")


def test_an_optimizer_by_name_is_a_baseline(run):
    for name, right in (("a", 150), ("b", 60), ("c", 140), ("d", 70), ("e", 145), ("f", 65)):
        add(
            run, name, [right], point={"pretrain.optimizer": "sgd" if right < 100 else "adamw", "pretrain.n": right % 3}
        )
    ranking = Results(run).ranking
    item = next(item for item in ranking.associations if item.indicator == "point.pretrain.optimizer")
    assert (item.source, item.direction) == ("config", None)
    # 9 pairs of unlike names are right; 6 of like ones get half.
    assert item.accuracy.value == pytest.approx((9 + 3) / 15)
    assert {"all together", "point.pretrain.n"} <= {item.indicator for item in ranking.associations}


def test_what_a_scheduler_stopped_is_pruned_not_missing(run):
    add(run, "a", [120])
    first = run.trials()[0]
    later = [StageRow("pretrain-late", "pretrain", 2, "pretrain-late", None, {}),
             StageRow("sft-late", "sft", 2, "pretrain-late", "t", {})]  # fmt: skip
    run.add_trial(TrialRow("b", "b", {"pretrain.x": "b"}, 0, (*first.stages, *later)))
    run.add_pruned("b", 1)
    results = Results(run)
    assert set(results.stages["status"][results.stages["step"] == 2]) == {"pruned"}
    assert any("(1 pruned)" in line for line in how_to_read(results.ranking))


def test_predictions_are_paired_by_id_whatever_their_order(tmp_path):
    rows = [{"id": f"{name}", "output": name, "score": score} for name, score in (("b", 1.0), ("a", 0.0), ("c", 0.5))]
    for name, order in (("one", rows), ("two", rows[::-1])):
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in order))
    one, two = read_scores(tmp_path / "one"), read_scores(tmp_path / "two")
    assert one.examples == two.examples != ""
    assert one.by_metric["score"].tolist() == two.by_metric["score"].tolist() == [0.0, 1.0, 0.5]
    assert one.by_metric.keys() == {"score"}


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ('{"score": 1.0}\n{"score": 0}\n', ["", [1.0, 0.0]]),
        ('{"id": "a", "score": 1.0}\n{"id": "a", "score": 0.0}\n', ["", [1.0, 0.0]]),
        ('{"score": 1.0, "log_likelihood": -2}\n{"log_likelihood": -1}\n', ["", [-2.0, -1.0]]),
        ("", None),
        ('{"score": NaN}\n', [""]),
        ('{"id": 3, "score"', None),
        ('{"other": 3}\n', [""]),
    ],
)
def test_predictions_without_names_are_not_paired_and_odd_files_not_read(tmp_path, text, found):
    path = tmp_path / "predictions.jsonl"
    path.write_text(text)
    scores = read_scores(path)
    assert (scores and [scores.examples, *(each.tolist() for each in scores.by_metric.values())]) == found
    assert read_scores(tmp_path / "none") is None


def test_rank_takes_a_task_for_its_target_with_that_tasks_errors(run):
    add(run, "a", [150, 152])
    add(run, "b", [60, 62])
    results = Results(run)
    ranking = rank(results.checkpoints, noise=results.noise, columns=COLUMNS, target="sft/t/score")
    assert ranking.errors == "paired"
    assert ranking.gap == results.ranking.gap
