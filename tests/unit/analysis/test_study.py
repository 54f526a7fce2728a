"""The indicator study's tables, which tests/benchmarks/RESULTS.md tells of, tell the same without the run."""

import json

import pandas as pd
import pytest
from benchmarks.indicators import MIXED_TARGETS, MIXTURE_SAMPLES, ROWS, STAGES, all_rows, over_half, read, read_noise
from benchmarks.rag_shots import TABLE, TASKS

from raysweep.analysis.comparer import learn
from raysweep.analysis.comparer_files import IndicatorFile, load, save
from raysweep.analysis.findings import cautions, headline
from raysweep.analysis.kept import kept_of
from raysweep.analysis.learning import learn_target
from raysweep.analysis.ranking import MEAN_LIKELIHOOD, rank
from raysweep.analysis.terminal import format_indicators
from raysweep.analysis.worth import flops_by_kind, seconds_by_kind

RIGHT = {"other_text/mean_loss": 0.872, "span_loss/loss_nats_per_token": 0.263, "features/effective_rank": 0.622}


def test_the_studys_table_says_what_is_reported():
    table, columns = read()
    shots = {f"indicators/{task}/kshot" for task in ("fairytaleqa", "webquestions")}
    kept = {*RIGHT, *(f"{name}{end}" for name in shots for end in ("_num_cut", "_log_likelihood"))}
    kept |= {"indicators/fairytaleqa/zeroshot_log_likelihood", "pretrain/num_parameters"}
    other = [column.name for column in columns if column.name not in kept and column.kind != "sft"]
    ranking = rank(table.drop(columns=other), columns=columns, target=MEAN_LIKELIHOOD, noise=read_noise())
    assert (len(table), ranking.num_variants, ranking.num_comparisons) == (68, 62, 2278)
    assert (ranking.num_clear, ranking.errors) == (1998, "paired")
    assert ranking.ceiling == pytest.approx(0.9736, abs=5e-4)
    # Of one base each, the second of six variants. Spans are of the own text, which five variants have otherwise.
    pairs = {item.indicator: item.pairs.num_pairs for item in ranking.associations}
    assert ranking.num_bases == 2
    assert pairs["other_text/mean_loss"] == 62 * 61 // 2 + 6 * 5 // 2
    assert pairs["span_loss/loss_nats_per_token"] == 57 * 56 // 2 + 6 * 5 // 2
    assert pairs["features/effective_rank"] == 90  # Rows that one objective makes of one text.
    right = {item.indicator: item.accuracy.value for item in ranking.associations}
    assert {name: right[name] for name in RIGHT} == pytest.approx(RIGHT, abs=1e-3)
    # Of all settings: a half that lacks a level knows it by a number that follows from it, such as that of parameters.
    own = all_rows([ranking]).query("source == 'measured'")
    both = own.merge(pd.read_csv(ROWS), on=["target", "indicator"], suffixes=("", "_written"), validate="one_to_one")
    assert len(both) == len(own) > len(RIGHT)
    for name in ("pairs", "wrong", "wrong_low", "wrong_high", "adds", "adds_low", "adds_high"):
        assert both[name].to_numpy() == pytest.approx(both[f"{name}_written"].to_numpy(), abs=5e-4, nan_ok=True)
    assert "other_text/mean_loss (lower is better)" in headline(ranking)
    assert headline(ranking).partition(" (picked")[0].endswith("alone (0.87), nor to add to the configuration")

    # Where signal ends and noise begins: PPL-CLM by fifths of the true gap, the noise of fine-tuning, that of seeds.
    [ppl] = [each for each in ranking.associations if each.indicator == "other_text/mean_loss"]
    wrong = [1 - each.accuracy.value for each in ppl.by_target_gap]
    assert wrong == pytest.approx([0.353, 0.176, 0.097, 0.013, 0.000], abs=1e-3)
    assert [each.ceiling for each in ranking.target_gaps[:2]] == pytest.approx([0.870, 0.998], abs=1e-3)
    assert ppl.chance_within.high == pytest.approx(0.0126, abs=1e-4)
    assert ppl.chance_within.accuracy.low <= 0.5
    twins = ranking.seed_twins
    assert (twins.num_variants, twins.num_seeds) == (6, 2)
    parts = twins.difference, twins.beside_offset.value, twins.of_finetuning
    assert parts == pytest.approx((0.0998, 0.0225, 0.0169), abs=1e-4)
    # No solved example of this task was in any prompt.
    [cut] = ranking.cut_prompts
    assert (cut.indicator, cut.num_prompts) == ("indicators/fairytaleqa/kshot", 40)
    assert cut.num_cut == cut.num_measured == cut.num_zero_shot == 68
    assert any("Raise max_length of the task" in line for line in cautions(ranking))
    assert "on 68 it is zero-shot" in format_indicators(ranking)
    document = json.loads(json.dumps(ranking.to_dict()))
    assert document["cut_prompts"][0]["num_prompts"] == 40
    assert document["seed_twins"]["beside_offset"]["value"] == pytest.approx(0.0225, abs=1e-4)
    assert len(document["target_gaps"]) == len(document["indicators"][0]["by_target_gap"]) == 5


def test_fine_tuning_on_all_tasks_at_once_says_what_is_reported():
    table, columns = read(mixture=True)
    known = {"other_text/mean_loss": 0.834, "early_sft/mean_loss_nats": 0.859}
    other = [column.name for column in columns if column.name not in known and column.kind != "sft"]
    given = {"columns": columns, "noise": read_noise(MIXTURE_SAMPLES)}
    ranking = rank(table.drop(columns=other), target=MIXED_TARGETS[0], **given)
    assert (len(ranking.target_tasks), ranking.num_comparisons, ranking.num_clear) == (6, 2278, 1874)
    assert (ranking.errors, ranking.edges) == ("paired", ())
    assert set(table["sft/all/arc_easy/lr"]) == {1e-3, 3e-3}
    assert set(table["sft/all/arc_easy/num_seeds"]) == {2}
    right = {item.indicator: item.accuracy.value for item in ranking.associations}
    assert {name: right[name] for name in known} == pytest.approx(known, abs=1e-3)


def test_a_solved_example_that_fits_makes_right_answers_on_rag_less_likely():
    own = pd.read_parquet(TABLE)
    assert set(own["checkpoint"]) == set(read()[0]["checkpoint"])
    assert [int((own[f"{name}, 1 solved"] < own[f"{name}, 0 solved"]).sum()) for name in TASKS] == [65, 66]


def test_the_studys_stages_say_what_they_took():
    stages = pd.read_parquet(STAGES)
    assert (len(stages), (stages["kind"] == "sft").sum()) == (4048, 3154)
    assert (stages["wall_seconds"] * stages["world_size"]).sum() / 3600 == pytest.approx(3.13, abs=0.01)
    flops = flops_by_kind(stages)
    # A forward pass of 256 sequences of 128 tokens; no model reads a curve.
    assert (flops["curve"], flops["features"]) == (0.0, pytest.approx(4.29e10, rel=1e-2))
    assert seconds_by_kind(stages)["curve"] < 0.1


def test_pairs_by_gap_are_of_one_loss():
    table, columns = read()
    shown = {"early_sft/mean_loss_nats", "other_text/mean_loss", "heldout/ppl"}
    table = table.drop(columns=[each.name for each in columns if each.name not in shown and each.kind != "sft"])
    for name, num in (("other_text/mean_loss", 1906), ("heldout/ppl", 90)):  # For all; of one objective and text.
        ranking = rank(table, columns=columns, target=MEAN_LIKELIHOOD)
        [early] = [each for each in ranking.associations if each.indicator == "early_sft/mean_loss_nats"]
        assert (ranking.gaps_of, sum(each.num_pairs for each in early.by_gap)) == (name, num)
        table = table.drop(columns=name)


@pytest.mark.slow
def test_what_is_learnt_from_the_studys_table_is_of_all_its_checkpoints():
    table, columns = read()
    ranking = rank(table, columns=columns, target=MEAN_LIKELIHOOD)
    tested = learn_target(ranking).tested
    assert (tested.num_checkpoints, tested.num_variants) == (68, 62)
    assert (len(tested.rows_not_learnt_from), dict(tested.rows_left_out)) == (4, {})
    assert tested.incomplete == {}
    # Of the rows that each objective makes of each text, so that they would tell what these are.
    assert not {"features/effective_rank", "agreement/mean_cosine"} & tested.single.keys()
    right = tested.indicators, tested.config, tested.both
    assert [1 - each.accuracy.value for each in right] == pytest.approx([0.101, 0.124, 0.087], abs=2e-3)
    # The configuration knows of which base a checkpoint is, and then no gain over it is shown.
    assert tested.gain.value == pytest.approx(0.037, abs=2e-3)
    assert tested.gain.low < 0
    assert 1 - tested.single["other_text/mean_loss"].value == pytest.approx(0.142, abs=1e-3)
    gap = over_half(ranking, tested)
    assert [gap.value, gap.low, gap.high] == pytest.approx([0.030, -0.004, 0.063], abs=2e-3)
    # A rate, and a mix, that was in no training variant.
    beyond = {axis.rpartition(".")[2]: 1 - each.accuracy.value for axis, each in tested.without_group.items()}
    assert [beyond["lr"], beyond["data"]] == pytest.approx([0.117, 0.078], abs=2e-3)


def test_a_comparer_of_the_studys_table_orders_two_variants_that_it_has_not_seen(tmp_path):
    pytest.importorskip("lightgbm", reason="LightGBM, of the extra 'compare', is not installed")
    table, columns = read()
    wanted = {column.name for column in columns if column.kind in ("early_sft", "indicators", "other_text")}
    names = sorted(name for name in wanted if name in table and table[name].notna().all())
    order = table.sort_values(MEAN_LIKELIHOOD)["variant"].drop_duplicates()
    apart = [order.iloc[15], order.iloc[45]]  # Neither of the worst nor of the best.
    others, (worse, better) = (
        table[~table["variant"].isin(apart)],
        (table[table["variant"] == variant][names].to_numpy(dtype=float)[0] for variant in apart),
    )
    comparer = learn(
        others[names].to_numpy(dtype=float),
        others[MEAN_LIKELIHOOD].to_numpy(dtype=float),
        indicators=names,
        variants=list(others["variant"]),
        target=MEAN_LIKELIHOOD,
    )
    _, versions = kept_of(table)
    kinds = {name: versions.get(name, versions.get(name.partition("/")[0], IndicatorFile())) for name in names}
    save(tmp_path, {comparer.target: (comparer, ())}, learnt_from="the study", indicators=kinds)
    contents, [back] = load(tmp_path)
    assert all(each.versions for each in contents.indicators.values())
    assert back.probability(better, worse) == 1 - back.probability(worse, better) > 0.8
    assert max(back.distance(better), back.distance(worse)) < 3
