"""Checkpoints of the same loss: who is compared, and what a study with known answers comes to."""

import json
import math
import re

import numpy as np
import pandas as pd
import pytest

from raysweep.analysis.formatting import with_interval
from raysweep.analysis.same_loss import GAP, SameLoss, _index, _pivot, compare_same_loss
from raysweep.analysis.same_loss_page import same_loss_page
from raysweep.analysis.within_bases import correlation
from raysweep.scores import Column
from raysweep.spec import Metric
from raysweep.train.evaluate import HeldoutLosses

SEEDS = (0, 1, 2)
STRENGTHS = {"control": 0.0, "harm": 0.1, "worse": 0.2, "help": -0.1}
NATURAL = ("sgd", "longer", "hot", "<wide>")
COLUMNS = [
    Column("flatness", Metric(name, "min")) for name in ("hessian_trace", "fisher_trace_blocks", "feature_trace")
] + [Column("heldout", Metric("entropy_gap_nats_per_token", "min"))]
LRS = (1e-3, 1e-2)
MEASURES = ("flatness/hessian_trace", GAP, "early_sft/mean_score")


def study(*, link: float, far: str = ""):
    """Tables of variants in three bases; probes with 64 labels fall with the trace by `link`, all else is chance."""
    draw = np.random.default_rng(0)
    rows, runs = [], []
    for seed in SEEDS:
        for variant in (*NATURAL, *STRENGTHS):
            strength = STRENGTHS.get(variant, 0.0)
            trace = 30 + 100 * strength + draw.normal()
            checkpoint = f"pretrain-{variant}-{seed}"
            probes = 0.7 - link * strength + 0.01 * draw.normal(size=4)
            rows.append(
                {
                    "trial": f"t-{variant}-{seed}",
                    "variant": variant,
                    "seed": seed,
                    "checkpoint": checkpoint,
                    "step": 10,
                    "status": "done",
                    "point.finish": variant,
                    GAP: 0.006 + 0.001 * draw.random() + (0.02 if variant == far and seed == 1 else 0),
                    "heldout/loss_nats_per_token": 2.5,
                    "flatness/hessian_trace": trace,
                    "flatness/fisher_trace_blocks": 5 + draw.normal(),
                    "flatness/feature_trace": 20 + draw.normal(),
                    "probes/labels_64": probes.mean(),
                    **{f"probes/labels_64_draw_{index + 1}": value for index, value in enumerate(probes)},
                    "sft/mean_score": 0.8,
                    "sft/a/lr": LRS[1],
                    "sft/a/lr_edge": 1.0,
                }
            )
            # Natural ones have the control's strength, and another recipe.
            recipe = {"objective": {"name": "adversary", "strength": strength}, "steps": 5}
            recipe |= {} if variant in STRENGTHS else {"steps": NATURAL.index(variant)}
            settings = json.dumps({"recipe": recipe})
            trunk = {"id": f"{'wide' if variant == '<wide>' else 'trunk'}-{seed}", "kind": "pretrain", "status": "done"}
            runs.append(trunk | {"settings": "{}", "inputs": json.dumps({"tokens": trunk["id"][:4]})})
            inputs = json.dumps({"start": trunk["id"], "tokens": "t"})
            runs.append(
                {"id": checkpoint, "kind": "pretrain", "status": "done", "settings": settings, "inputs": inputs}
            )
            runs += [
                {
                    "id": f"sft-{variant}-{seed}-{lr}-{of}",
                    "kind": "sft",
                    "status": "done",
                    "checkpoint": checkpoint,
                    "task": "a",
                    "lr": lr,
                    "stage_seed": of,
                    "sft/score": 0.8 + 0.01 * draw.normal(),
                    "settings": "{}",
                }
                for lr in LRS
                for of in (0, 1)
            ]
    return pd.DataFrame(rows), pd.DataFrame(runs).assign(wall_seconds=[2.0 + (run["kind"] == "sft") for run in runs])


def read(stage):
    return np.random.default_rng(1).random(10)


def compared(**given):
    return compare_same_loss(*study(**given), COLUMNS, read)


def natural():
    """The study without its doses, in no order."""
    checkpoints, stages = study(link=0.4)
    doses = "harm|worse|help"
    kept = checkpoints[~checkpoints["variant"].str.contains(doses)].sample(frac=1, random_state=0)
    return kept.reset_index(drop=True), stages[~stages["id"].str.contains(doses)]


def test_doses_that_move_the_trace_and_the_probe_are_found_and_nothing_else():
    found = compared(link=0.4)
    assert found.control == "control"
    doses, natural = found.groups
    assert set(doses.variants) == set(STRENGTHS)
    assert set(natural.variants) == {"control", *NATURAL}
    first, *_ = doses.associations["probe, 64 labels"]
    assert first.measure == "flatness/hessian_trace"
    assert first.rho.value == pytest.approx(-1, abs=0.1)
    # Of four variants 24 orders; the one that came and its reverse are as good.
    assert first.p == pytest.approx(2 / 24)
    assert all(each.p > 0.05 for each in natural.associations["probe, 64 labels"])
    spread = doses.spreads["probe, 64 labels"]
    assert spread.between.low > 0.02
    # Strengths of 0, 0.1, 0.2 and -0.1, by 0.4.
    assert spread.between.low < np.std([0, 0.04, 0.08, -0.04], ddof=1) < spread.between.high
    worse = next(each for each in found.contrasts if each.variant == "worse")
    assert worse.transfer["probe, 64 labels"].value == pytest.approx(-0.08, abs=0.02)
    assert np.exp(worse.trace.value) == pytest.approx(50 / 30, abs=0.1)
    assert "control" not in {each.variant for each in found.contrasts}


def test_what_is_forgotten_is_a_target_whose_better_side_is_up():
    checkpoints, stages = study(link=0.4)
    draw = np.random.default_rng(3)
    trace = checkpoints.set_index("checkpoint")["flatness/hessian_trace"]
    # As the trace says, but for the chance of a seed.
    rises = [
        trace[run["checkpoint"]] / 100 + 0.002 * draw.normal() if run["kind"] == "sft" else np.nan
        for run in stages.to_dict("records")
    ]
    stages["sft/forgetting_nats_per_token"] = rises
    tuned = stages[stages["lr"] == LRS[1]].groupby("checkpoint")["sft/forgetting_nats_per_token"].mean()
    checkpoints["sft/mean_forgetting"] = checkpoints["checkpoint"].map(tuned)
    found = compare_same_loss(checkpoints, stages, COLUMNS, read)
    target = "pretraining loss kept (a point: 0.01 nats)"
    for group in found.groups:
        (trace,) = (each for each in group.associations[target] if each.measure == "flatness/hessian_trace")
        assert trace.rho.value < -0.8
        assert group.spreads[target].noise == pytest.approx(0.002 / 2**0.5, rel=0.5)


def test_what_is_forgotten_of_different_losses_is_not_compared():
    """Where gaps to the lowest loss are the same, the losses may be of two objectives all the same."""
    checkpoints, stages = study(link=0.4)
    rises = np.random.default_rng(3).normal(0.1, 0.01, size=len(stages))
    stages["sft/forgetting_nats_per_token"] = np.where(stages["kind"] == "sft", rises, np.nan)
    checkpoints["sft/mean_forgetting"] = 0.1
    target = "pretraining loss kept (a point: 0.01 nats)"
    for words, is_compared in ((["next"], True), (["next", "hidden"], False)):
        told = (words * len(checkpoints))[: len(checkpoints)]
        found = compare_same_loss(checkpoints.assign(perplexity_of=told), stages, COLUMNS, read)
        assert (target in found.groups[0].associations) == is_compared
        assert (target in found.incomplete) != is_compared


def test_every_measure_of_a_checkpoint_is_tried_and_counted():
    """Of the mean over tasks, not of each; and whoever tries more has to be surer."""
    checkpoints, stages = study(link=0.1)
    draw = np.random.default_rng(2)
    more = [Column("noise", Metric(f"rise_absolute_{size}", "min")) for size in range(12)]
    more += [Column("early_sft", Metric("a/score", "max")), Column("noise", Metric("rise_absolute_0_stderr"))]
    for column in more:
        checkpoints[column.name] = draw.normal(size=len(checkpoints))
    few, many = (compare_same_loss(checkpoints, stages, columns, read) for columns in (COLUMNS, [*COLUMNS, *more]))
    target = "probe, 64 labels"
    p = [{each.measure: each.p for each in found.groups[1].associations[target]} for found in (few, many)]
    assert set(p[1]) - set(p[0]) == {f"noise/rise_absolute_{size}" for size in range(12)}
    assert all(p[0][name] <= p[1][name] for name in p[0])
    assert any(p[0][name] < p[1][name] for name in p[0])


def test_what_a_measure_costs_stands_beside_it():
    checkpoints, stages = study(link=0.4)
    more = [
        {"id": f"flatness-{index}", "kind": "flatness", "status": "done", "wall_seconds": 8.0 + index}
        for index in range(3)
    ]
    failed = [{"id": "flatness-x", "kind": "flatness", "status": "failed", "wall_seconds": 100.0}]
    stages = pd.concat([stages, pd.DataFrame(more + failed + more)], ignore_index=True)
    found = compare_same_loss(checkpoints, stages, COLUMNS, read)
    assert found.seconds == {"pretrain": 2.0, "sft": 3.0, "flatness": 9.0}
    _, _, table = same_loss_page(found).tables[0]
    assert [row.cells[-1].sort for row in table.rows if row.cells[0].sort.startswith("flatness/")] == [9.0] * 3


def answers(found: SameLoss, group: str) -> tuple[str, ...]:
    return dict(same_loss_page(found).answers)[group]


def test_an_answer_names_the_first_measures_and_counts_the_others():
    checkpoints, stages = study(link=0.4)
    order = checkpoints["variant"].map({name: place for place, name in enumerate(("control", *NATURAL))}).fillna(0)
    probes = {name: 0.7 - 0.1 * order for name in checkpoints if str(name).startswith("probes/labels_64")}
    copies = {f"flatness/copy_{at}": 40 + order for at in range(6)}
    columns = (*COLUMNS, *(Column("flatness", Metric(f"copy_{at}", "min")) for at in range(6)))
    found = compare_same_loss(checkpoints.assign(**probes, **copies), stages, columns, read)
    line = next(each for each in answers(found, "Natural knobs") if each.startswith("Probe, 64 labels: "))
    assert re.search(r" measures tried: copy_\d, copy_\d, 4 more \(below\)\.", line)


def test_the_picture_shows_each_chosen_measure_by_how_transfer_is_measured():
    checkpoints, stages = study(link=0.4)
    checkpoints["early_sft/mean_score"] = np.random.default_rng(4).normal(size=len(checkpoints))
    columns = [*COLUMNS, Column("early_sft", Metric("mean_score", "max"))]
    found = compare_same_loss(checkpoints, stages, columns, read)
    legend, *panels = re.findall(r"<svg.*?</svg>", str(same_loss_page(found).picture))
    assert re.findall(r">([^<]+)</text>", legend) == ["Hessian trace", "loss", "early fine-tuning"]
    for group, panel in zip(found.groups, panels, strict=True):
        rows = re.findall(r"<title>(.*?)</title>.*?translate\(([\d.]+) ([\d.]+)\)\" fill=\"(.*?)\"", panel)
        told = [
            (name, each)
            for target in group.associations.values()
            for name, measure in zip(("Hessian trace", "loss", "early fine-tuning"), MEASURES, strict=True)
            for each in target
            if each.measure == measure and not math.isnan(each.rho.value)  # All are tuned to one score.
        ]
        assert len(rows) == len(told) == 9
        for (title, x, _, fill), (name, each) in zip(rows, told, strict=True):
            assert title == f"{name}: {with_interval(each.rho)}, p {each.p:.3f}"
            assert float(x) == pytest.approx(180 + 166 * each.rho.value, abs=0.06)
            assert (fill == "var(--card)") == (each.p >= 0.05)
        assert len({y for _, _, y, _ in rows}) == 9  # None covers another.
        is_noise = group.spreads["probe, 64 labels"].p > 0.05
        assert ("probe, 64 labels – nothing to predict" in panel) == is_noise == (group is found.groups[1])
        assert panel.count('opacity="0.4"') == is_noise
    # A measure that was not taken has no mark, and of none there is no picture.
    assert "early" not in str(same_loss_page(compared(link=0.4)).picture)


def test_one_verdict_counts_all_that_was_tried():
    page = same_loss_page(compared(link=0.4))
    assert page.verdict.startswith(
        "Not shown. By the Hessian's trace, in so many ways to measure transfer, flatter is: "
    )
    # Of doses, which are steps of one knob, nothing counts as found.
    assert "control, better in 1, worse in 0, not told in 3; natural knobs, better in 0, worse in 0" in page.verdict
    assert "not told in 3, with nothing to predict in 1." in page.verdict
    assert "all 8 answers: nothing." in page.verdict
    assert page.verdict.endswith("nothing; in 2 of 8 models of one recipe differ by no more than noise.")
    checkpoints, stages = natural()
    more = checkpoints.assign(**{"point.finish": checkpoints["point.finish"] + "-2"})
    both = pd.concat([checkpoints, more], ignore_index=True)
    place = both["point.finish"].map({name: at for at, name in enumerate(both["point.finish"].unique())})
    both["flatness/hessian_trace"] = 40.0 + place
    for name in [name for name in both if name.startswith("probes/")]:
        both[name] = both[name] - 0.1 * place
    told = same_loss_page(compare_same_loss(both, stages, COLUMNS, read, values=VALUES)).verdict
    assert told.startswith("Flatter is better here. ")
    assert "all 4 answers: probe, 64 labels (hessian_trace -1.00)." in told
    for name in [name for name in both if name.startswith("probes/")]:
        both[name] = -both[name]
    told = same_loss_page(compare_same_loss(both, stages, COLUMNS, read, values=VALUES)).verdict
    assert told.startswith("Flatter is worse here. ")


def test_what_survives_the_configuration_is_answered():
    """Seeds of a recipe whose probes fall with what their block's trace has beyond the recipe's and the base's."""
    checkpoints, stages = study(link=0.4)
    table = compare_same_loss(checkpoints, stages, COLUMNS, read)
    (association,) = (
        each
        for each in table.groups[1].associations["probe, 64 labels"]
        if each.measure == "flatness/fisher_trace_blocks"
    )
    assert association.p_same_recipe > 0.05
    doses = answers(table, "Doses of the adversary and their control")[0]
    assert doses.endswith("With the configuration partialled out models differ by no more than noise.")
    for name in [name for name in checkpoints if name.startswith("probes/")]:
        checkpoints[name] -= 0.1 * checkpoints["flatness/fisher_trace_blocks"]
    found = compare_same_loss(checkpoints, stages, COLUMNS, read)
    for group in found.groups:
        (block,) = (
            each for each in group.associations["probe, 64 labels"] if each.measure.endswith("fisher_trace_blocks")
        )
        assert block.same_recipe.value < -0.9
        assert group.recipe_spreads["probe, 64 labels"].between.low > 0.02
    first = answers(found, "Natural knobs")[0]
    assert (
        f"With the configuration partialled out, beyond chance: fisher_trace_blocks {with_interval(block.same_recipe)}"
        in first
    )
    page = same_loss_page(found)
    # Seeds of one dose are no steps of a knob.
    within = [group.associations["probe, 64 labels"] for group in found.groups]
    of_doses, of_natural = (
        next(each.same_recipe.value for each in measures if each.measure.endswith("trace_blocks"))
        for measures in within
    )
    assert (
        "for one answer: probe, 64 labels, doses of the adversary and their control "
        f"(fisher_trace_blocks {of_doses:+.2f}); probe, 64 labels (fisher_trace_blocks {of_natural:+.2f})"
    ) in page.verdict
    _, _, table = next(each for each in page.tables if each[0] == "natural knobs: probe, 64 labels")
    names = [each.name for each in table.columns]
    cells = next(row.cells for row in table.rows if row.cells[0].sort == "flatness/fisher_trace_blocks")
    assert cells[names.index("same recipe")].text == with_interval(block.same_recipe)
    assert cells[names.index("p, same recipe")].sort == block.p_same_recipe < 0.05
    assert [each.name for each in page.differed.columns[-2:]] == ["within a recipe, points", "p of none, within"]


def test_doses_are_said_to_be_one_ordered_knob():
    first = answers(compared(link=0.4), "Doses of the adversary and their control")[0]
    assert "among these doses flatter is better, but they are steps of one knob" in first
    assert "the trace may only follow the order of their strengths" in first
    assert "what is left with the loss given cannot be told" in first


def test_where_the_loss_orders_the_models_just_so_it_tells_as_much():
    checkpoints, stages = study(link=0.4)
    is_dose = checkpoints["variant"].isin(STRENGTHS)
    checkpoints.loc[is_dose, GAP] = checkpoints["flatness/hessian_trace"] / 1e4
    found = compare_same_loss(checkpoints, stages, COLUMNS, read)
    doses = answers(found, "Doses of the adversary and their control")
    assert "; the loss orders the models just so, and tells as much)" in doses[0]
    assert not any("just so" in line for line in answers(found, "Natural knobs"))


def test_what_holds_for_these_variants_alone_is_said_so_with_what_the_loss_leaves():
    checkpoints, stages = study(link=0.4)
    natural = checkpoints["variant"].isin(NATURAL)
    probes = [name for name in checkpoints if str(name).startswith("probes/labels_64")]
    order = checkpoints["variant"].map({name: place for place, name in enumerate(NATURAL)})
    checkpoints.loc[natural, "flatness/hessian_trace"] = 40 + order
    for name in probes:
        checkpoints.loc[natural, name] += 0.05 * (checkpoints["seed"] % 2) * (order == 0) - 0.05 * order
    found = compare_same_loss(checkpoints, stages, COLUMNS, read)
    line = next(each for each in answers(found, "Natural knobs") if each.startswith("Probe, 64 labels: "))
    assert re.search(r"flatter is better.*\(trace -.*, p 0\.\d+; with the loss given -[^ ]+ \[.*\], p ", line)


def test_the_page_says_which_models_are_in_a_table_and_how_well_their_loss_is_known():
    checkpoints, stages = study(link=0.4)
    checkpoints["heldout/entropy_gap_stderr"] = 1.6e-4
    found = compare_same_loss(checkpoints, stages, COLUMNS, read)
    page = same_loss_page(found)
    assert "(heldout/entropy_gap_nats_per_token, each known to 0.0002 or better (standard error))" in page.equal
    doses, natural = page.models
    assert doses == "Doses of the adversary and their control: control, harm, worse, help."
    assert natural == "Natural knobs: sgd, longer, hot, <wide>, control."
    assert {models for _, models, _ in page.tables} == {doses, natural}
    in_it = f"{doses} {natural} All are within 0.01 nats per token of the lowest loss."
    assert page.picture_note.endswith(in_it)
    assert page.known_note.endswith(in_it)
    assert "known to" not in same_loss_page(compared(link=0.4)).equal


def test_where_no_lowest_loss_is_known_differences_are_paired_over_the_text():
    """Texts differ by a hundred times what models differ by on them; bases share the text, and so its chance."""
    checkpoints, stages = natural()
    draw = np.random.default_rng(7)
    num, texts = np.full(16, 100), draw.normal(250, 50, 16)
    held = {}
    for row in checkpoints.to_dict("records"):
        of_variant = NATURAL.index(row["variant"]) if row["variant"] in NATURAL else 4
        shared = np.random.default_rng(of_variant).normal(0, 0.04, 16)
        held[f"h-{row['checkpoint']}"] = HeldoutLosses(texts + 0.2 * of_variant + shared + 0.01 * row["seed"], num)
    checkpoints["heldout/loss_nats_per_token"] = [held[f"h-{name}"].mean for name in checkpoints["checkpoint"]]
    more = [
        {"id": f"h-{name}", "kind": "heldout", "status": "done", "checkpoint": name}
        for name in checkpoints["checkpoint"]
    ]
    stages = pd.concat([stages, pd.DataFrame(more)], ignore_index=True)
    given = checkpoints.drop(columns=[GAP]), stages, COLUMNS, read
    found = compare_same_loss(*given, values=VALUES, read_losses=lambda stage: {"a": (1.0, held[stage])})
    assert found.loss == "heldout/loss_nats_per_token"
    assert found.error == pytest.approx(0.04 * 2**0.5 / 4 / 100, rel=0.5)
    sgd = next(each for each in found.contrasts if each.variant == "sgd")
    by_hand = np.random.default_rng(0).normal(0, 0.04, 16) - np.random.default_rng(2).normal(0, 0.04, 16)
    assert sgd.gap_error == pytest.approx(by_hand.std(ddof=1) / 4 / 100)
    assert sgd.gap.value == pytest.approx((by_hand.mean() - 0.4) / 100)
    page = same_loss_page(found)
    assert "each one's difference from the lowest, on the same text, known to 0.0002 or better" in page.equal
    assert [each.name for each in page.variants.columns[:3]] == ["variant", "loss, nats", "error by text"]
    # A band that ends where some models are.
    unsure = compare_same_loss(*given, band=0.0064, read_losses=lambda stage: {"a": (1.0, held[stage])})
    assert "(standard error); of 2 that does not tell whether they are so near" in same_loss_page(unsure).equal
    assert found.unsure == 0
    without = compare_same_loss(*given, values=VALUES)
    assert math.isnan(without.error)
    assert "error by text" not in {each.name for each in same_loss_page(without).variants.columns}


def test_probes_are_shown_by_layer():
    checkpoints, stages = natural()
    checkpoints["probes/labels_64"] = 0.6
    checkpoints["probes/labels_64_layer_0"] = 0.5 + checkpoints["seed"] / 100
    checkpoints["probes/labels_64_layer_1"] = 0.7 - (checkpoints["variant"] == "hot") * 0.3
    checkpoints["probes/labels_64_layer_1"] -= checkpoints["flatness/hessian_trace"] / 1e4
    assert compared(link=0.4).layers == ()
    found = compare_same_loss(checkpoints, stages, COLUMNS, read)
    ((title, table),) = same_loss_page(found).layers
    assert title == "Probes of 64 labels, by layer; each interval by itself"
    assert [each.name for each in table.columns] == ["variant", "layer 0", "layer 1", "all, normed", "best"]
    rows = {row.cells[0].text: [each.text for each in row.cells[1:]] for row in table.rows}
    trace = checkpoints.groupby("variant")["flatness/hessian_trace"].mean()
    assert rows["sgd"] == ["51.0", f"{70 - trace['sgd'] / 100:.1f}", "60.0", "layer 1"]
    assert rows["hot"][-1] == "all, normed"
    assert len(rows) == 6
    assert float(rows["trace, Spearman among natural knobs"][1].split()[0]) < -0.5
    assert rows["trace, Spearman among natural knobs"][2] == "—"  # All are alike.


def test_fixed_and_tuned_rates_stand_side_by_side():
    found = compared(link=0.4)
    targets = list(found.groups[0].associations)
    assert targets == ["probe, 64 labels", "fine-tuned, rate tuned", "fine-tuned at 0.001", "fine-tuned at 0.01"]
    assert found.at_edge == 24


def test_a_variant_out_of_the_band_in_one_base_is_left_out_and_named():
    found = compared(link=0.4, far="sgd")
    assert found.outside == ("sgd",)
    assert "sgd" not in found.groups[1].variants
    assert found.inside == 23
    assert "Left out, for want of a checkpoint within it in every base: sgd." in same_loss_page(found).equal


def test_what_a_checkpoint_out_of_the_band_lacks_is_compared_all_the_same():
    checkpoints, stages = study(link=0.4, far="sgd")
    far = (checkpoints["variant"] == "sgd") & (checkpoints["seed"] == 1)
    lacking = [
        "flatness/hessian_trace",
        "sft/mean_score",
        "sft/a/lr",
        *(name for name in checkpoints if name.startswith("probes/")),
    ]
    checkpoints.loc[far, lacking] = np.nan
    stages = stages[~stages["id"].str.contains("sft-sgd-1")]
    found = compare_same_loss(checkpoints, stages, COLUMNS, read)
    whole = compared(link=0.4, far="sgd")
    assert found.incomplete == ()
    assert repr(found.groups) == repr(whole.groups)  # NaN is not itself.
    assert "Not compared" not in same_loss_page(found).equal


def test_what_a_compared_checkpoint_lacks_is_named_and_no_target():
    checkpoints, stages = study(link=0.4)
    checkpoints.loc[3, [name for name in checkpoints if name.startswith("probes/")]] = np.nan
    checkpoints.loc[4, "flatness/feature_trace"] = np.nan
    stages = stages[stages["id"] != f"sft-sgd-0-{LRS[0]}-0"]
    found = compare_same_loss(checkpoints, stages, COLUMNS, read)
    lost = ("probe, 64 labels", "fine-tuned at 0.001", "flatness/feature_trace", "probes/labels_64")
    assert found.incomplete == lost
    for group in found.groups:
        assert list(group.associations) == ["fine-tuned, rate tuned", "fine-tuned at 0.01"]
        assert "flatness/feature_trace" not in {each.measure for each in group.associations["fine-tuned at 0.01"]}
    told = "Not compared, as a checkpoint here lacks it or its loss is another quantity: probe, 64 labels, fine-tuned "
    assert f"{told}at 0.001, feature_trace, probes/" in same_loss_page(found).equal


def test_more_seeds_of_one_variant_leave_out_no_other():
    checkpoints, stages = study(link=0.4)
    one = checkpoints[(checkpoints["variant"] == "sgd") & (checkpoints["seed"] == 0)]
    more = [one.assign(seed=seed, trial=f"t-sgd-{seed}", checkpoint=f"pretrain-sgd-{seed}") for seed in (3, 4)]
    found = compare_same_loss(pd.concat([checkpoints, *more], ignore_index=True), stages, COLUMNS, read)
    assert [group.variants for group in found.groups] == [group.variants for group in compared(link=0.4).groups]
    assert found.other_seeds == (3, 4)
    told = "No base, as fewer than 4 variants are so near under it: seed 3, 4."
    assert told in same_loss_page(found).equal


def test_losses_of_another_objective_are_not_the_same():
    checkpoints, stages = study(link=0.4)
    checkpoints = checkpoints.drop(columns=GAP)
    hidden = checkpoints["variant"].isin(["sgd", "help"])
    checkpoints["perplexity_of"] = np.where(hidden, "masked_lm", "causal_lm")
    # However near or low.
    checkpoints.loc[hidden, "heldout/loss_nats_per_token"] -= 0.001
    found = compare_same_loss(checkpoints, stages, COLUMNS, read)
    assert found.other_losses == ("help", "sgd")
    assert found.lowest == 2.5
    assert all({"sgd", "help"}.isdisjoint(group.variants) for group in found.groups)
    told = "Left out, as their loss is of another objective, text or vocabulary and so another quantity: help, sgd."
    assert told in same_loss_page(found).equal


def test_variants_that_agree_in_the_digits_shown_are_two():
    checkpoints, stages = study(link=0.4)
    near = {"sgd": 0.123412, "longer": 0.123418}
    checkpoints["point.lr"] = checkpoints["variant"].map(near).fillna(0.1)
    checkpoints.loc[checkpoints["variant"].isin(near), "point.finish"] = "same"
    names = compare_same_loss(checkpoints, stages, COLUMNS, read).groups[1].variants
    assert names[:3] == ("finish same · lr 0.123412", "finish same · lr 0.123418", "finish hot · lr 0.1")
    assert len(names) == 5


def test_doses_whose_control_is_out_of_the_band_are_named():
    found = compared(link=0.4, far="control")
    assert [group.name for group in found.groups] == ["natural knobs"]
    assert found.ungrouped == ("harm", "help", "worse")
    assert "fewer than 4: harm, help, worse." in same_loss_page(found).equal


def test_the_page_says_no_more_than_is_known_and_runs_nothing():
    page = same_loss_page(compared(link=0.0))
    lines = [line for _, each in page.answers for line in each]
    assert all("cannot be told" in line or "nothing to predict" in line for line in lines)
    assert any("nothing to predict" in line for line in lines)
    assert str(page.picture).startswith("<svg")
    assert not re.search(r"<script|\bon\w+=|href", str(page.picture))
    assert [row.cells[0].text for row in page.variants.rows] == [*NATURAL, "harm", "worse", "help"]


def test_too_few_variants_make_no_page():
    checkpoints, stages = study(link=0.4)
    few = checkpoints[checkpoints["variant"].isin(["control", "sgd", "harm"])]
    assert compare_same_loss(few, stages, COLUMNS, lambda stage: None) == (
        f"within 0.01 nats per token (same_loss_nats) of the lowest {GAP}, {few[GAP].min():.4f}, in each of 3 bases "
        "(seeds) are 3 of 3 variants, 2 of doses of the adversary and their control and 2 of natural knobs, and of one "
        "kind 4 are needed"
    )
    without = checkpoints.drop(columns=[GAP, "heldout/loss_nats_per_token"])
    assert compare_same_loss(without, stages, [], len) == "of no checkpoint that is done a held-out loss is known"
    unprobed = checkpoints.drop(columns=[name for name in checkpoints if name.startswith("probes/")])
    assert compare_same_loss(unprobed, stages[stages["kind"] != "sft"], COLUMNS, read) == (
        "no score of transfer is known of all variants within the band"
    )


VALUES = {"other": (1, 2), "finish": ("lost", "hot", "sgd", "longer", "control", "<wide>")}


def test_without_an_adversary_variants_are_compared_with_the_first_of_the_sweep_file():
    checkpoints, stages = natural()
    found = compare_same_loss(checkpoints, stages, COLUMNS, read, values=VALUES)
    assert found.control is None
    assert found.reference == "hot"
    assert {each.variant for each in found.contrasts} == {"control", "sgd", "longer", "<wide>"}
    traces = checkpoints.pivot(index="seed", columns="variant", values="flatness/hessian_trace")
    sgd = next(each for each in found.contrasts if each.variant == "sgd")
    assert sgd.trace.value == pytest.approx(np.log(traces["sgd"] / traces["hot"]).mean())
    share = (traces["sgd"] - traces["hot"]).mean() / traces["hot"].mean()
    assert sgd.measures["flatness/hessian_trace"].value == pytest.approx(share)
    page = same_loss_page(found)
    assert len(page.variants.rows) == 4
    assert [heading.name for heading in page.knobs.columns] == [
        "measure",
        *(f"{each.variant}, %" for each in found.contrasts),
    ]
    of_sgd = [heading.name for heading in page.knobs.columns].index("sgd, %")
    (row,) = (row for row in page.knobs.rows if row.cells[0].sort == "flatness/hessian_trace")
    assert row.cells[of_sgd].text.startswith(f"{100 * share:+.0f} [")
    # Of a range, the first that was begun, whatever came of it.
    assert compare_same_loss(checkpoints, stages, COLUMNS, read).reference == "sgd"
    assert "bars are 95 % intervals over 3 bases" in page.picture_note


def test_what_variants_are_compared_with_is_said_and_of_which_base():
    opening = "Each variant less hot, the first of these in the sweep, of "
    checkpoints, stages = natural()
    shared = same_loss_page(compare_same_loss(checkpoints, stages, COLUMNS, read, values=VALUES)).variants_note
    assert shared == f"{opening}its base; <wide>, with bases of their own, less that of the same seed."
    alone = stages.assign(inputs="{}")
    apart = same_loss_page(compare_same_loss(checkpoints, alone, COLUMNS, read, values=VALUES)).variants_note
    assert apart == f"{opening}the same seed; each has bases of its own."
    control = same_loss_page(compared(link=0.4)).variants_note
    assert control.startswith("Each variant less control, the adversary's control, of its base; <wide>, with bases")


def test_of_several_steps_the_last_is_compared_with_and_all_are_of_one_base():
    checkpoints, stages = natural()
    late = checkpoints.assign(checkpoint=checkpoints["checkpoint"] + "-late", step=20)
    ends = stages[stages["kind"] == "pretrain"]
    ends = ends[ends["id"].isin(checkpoints["checkpoint"])]
    # Each is trained from its beginning, and left at two steps.
    both = [
        ends.assign(
            id=ends["id"] + suffix,
            inputs="{}",
            settings=[json.dumps(json.loads(each) | {"step": step}) for each in ends["settings"]],
        )
        for suffix, step in (("", 10), ("-late", 20))
    ]
    found = compare_same_loss(pd.concat([checkpoints, late]), pd.concat(both), COLUMNS, read, values=VALUES)
    assert found.reference == "hot · step 20"
    assert set(found.apart) == {each.variant for each in found.contrasts} - {"hot · step 10"}


def test_the_variant_that_a_correlation_hangs_on_is_named():
    checkpoints, stages = natural()
    # Sharper is better, but for one that is by far the flattest, and best.
    order = {"sgd": 0, "hot": 1, "longer": 2, "control": 3, "<wide>": 4}
    place = checkpoints["variant"].map(order)
    checkpoints["flatness/hessian_trace"] = 10.0 + place
    for name in [name for name in checkpoints if name.startswith("probes/")]:
        checkpoints[name] += 0.1 * place.where(place > 0, 9)
    found = compare_same_loss(checkpoints, stages, COLUMNS, read, values=VALUES)
    (group,) = found.groups
    (trace,) = (each for each in group.associations["probe, 64 labels"] if each.measure.endswith("hessian_trace"))
    assert trace.rho.value == pytest.approx(0, abs=1e-9)
    assert trace.pivot.variant == "sgd"
    assert trace.pivot.rho == pytest.approx(1)
    ((_, lines),) = same_loss_page(found).answers
    assert " Without sgd, on which it hangs most, the trace's correlation is 1.00." in lines[0]
    # Of four, three are too few to tell.
    assert all(each.pivot is None for each in compared(link=0.4).groups[0].associations["probe, 64 labels"])


def test_each_measure_is_told_without_the_variant_that_it_hangs_on():
    """Of equals but for one, which is the best and has the most of it, nothing is left."""
    checkpoints, stages = natural()
    draw = np.random.default_rng(5)
    for name in [name for name in checkpoints if name.startswith("probes/")]:
        checkpoints[name] += checkpoints["variant"] == "hot"
    checkpoints["flatness/feature_trace"] = draw.permutation(len(checkpoints)) + 100 * (checkpoints["variant"] == "hot")
    found = compare_same_loss(checkpoints, stages, COLUMNS, read)
    first = found.groups[0].associations["probe, 64 labels"]
    by_name = {each.measure: each for each in first}
    assert by_name["flatness/feature_trace"].pivot.variant == "hot"
    assert all(abs(each.pivot.rho) <= abs(each.rho.value) for each in first if abs(each.rho.value) > 0.2)
    _, _, table = same_loss_page(found).tables[0]
    assert table.columns[2].name == "without one"
    texts = {row.cells[0].sort: row.cells[2].text for row in table.rows}
    pivot = by_name["flatness/feature_trace"].pivot
    assert texts["flatness/feature_trace"] == f"{pivot.rho:.2f} (hot)"


def test_what_a_correlation_hangs_on_makes_it_smaller():
    """Leaving out another makes it larger by more."""
    measure = np.arange(8.0)[None]
    target = np.array([[7.0, 0.5, 1.5, 2.5, 3.5, 4.5, 5.5, 60.0]])
    pivot = _pivot(tuple("abcdefgh"), measure, target)
    assert pivot.variant == "h"
    assert pivot.rho < correlation(measure, target).value < correlation(measure[:, 1:], target[:, 1:]).value


@pytest.mark.parametrize(
    ("cell", "listed", "place"),
    [
        ('{"lr": 0.1, "name": "sgd"}', [{"name": "adamw"}, {"name": "sgd", "lr": 0.1}], 1),
        ('"auto"', [0.1, "auto"], 1),
        ("auto", ["other", "auto"], 1),
        (None, [None, 0.1], 0),
        (math.nan, [0.1, None], 1),
        (0.1, [None, 0.1], 1),
        ("unknown", [None, 0.1], math.inf),
    ],
)
def test_a_value_of_the_table_is_found_in_the_sweep_file(cell, listed, place):
    assert _index(cell, listed) == place


def test_what_a_change_of_scale_does_to_each_measure_is_said():
    checkpoints, stages = natural()
    note = same_loss_page(compare_same_loss(checkpoints, stages, COLUMNS, read)).known_note
    assert note == (
        "Unmoved by any change of scale that keeps the function, by construction: "
        "heldout/entropy_gap_nats_per_token, probes/labels_64. Moved by such changes, and not measured anew: "
        "hessian_trace, fisher_trace_blocks, feature_trace. Natural knobs: longer, <wide>, control, hot, sgd. All are "
        "within 0.01 nats per token of the lowest loss."
    )
    checkpoints["flatness/rescaled_hessian_trace"] = 2 * checkpoints["flatness/hessian_trace"]
    checkpoints["flatness/trace_over_features"] = (
        checkpoints["flatness/hessian_trace"] / checkpoints["flatness/feature_trace"]
    )
    checkpoints["flatness/rescaled_feature_trace"] = 3 * checkpoints["flatness/feature_trace"]
    names = ("rescaled_hessian_trace", "trace_over_features", "rescaled_feature_trace")
    columns = [*COLUMNS, *(Column("flatness", Metric(name, "min")) for name in names)]
    found = compare_same_loss(checkpoints, stages, columns, read)
    told = {each.measure.partition("/")[2]: each.rescaled and each.rescaled.value for each in found.measures}
    assert told == {
        "hessian_trace": pytest.approx(1),
        "trace_over_features": pytest.approx(1),
        "fisher_trace_blocks": None,
        "feature_trace": pytest.approx(1),
        "entropy_gap_nats_per_token": None,
        "labels_64": None,
    }
    assert "by the same factors for all models of a shape" in same_loss_page(found).known_note
    own = {"id": "f", "kind": "flatness", "status": "done", "settings": json.dumps({"rescaled": "own"})}
    found = compare_same_loss(checkpoints, pd.concat([stages, pd.DataFrame([own])]), columns, read)
    assert "by factors of each model's own" in same_loss_page(found).known_note


def test_the_error_of_each_measure_stands_beside_what_models_differ_by():
    checkpoints, stages = natural()
    checkpoints["flatness/hessian_trace_stderr"] = checkpoints["flatness/hessian_trace"] * 0.05
    checkpoints["heldout/entropy_gap_stderr"] = 1.6e-4
    page = same_loss_page(compare_same_loss(checkpoints, stages, COLUMNS, read))
    rows = {row.cells[0].text: [each.text for each in row.cells[1:]] for row in page.known.rows}
    cells = checkpoints.pivot(index="seed", columns="variant", values="flatness/hessian_trace")
    left = cells.sub(cells.mean(axis=1), axis=0) - cells.mean() + cells.to_numpy().mean()
    between = cells.var(axis=1).mean() ** 0.5 / cells.to_numpy().mean()
    within = ((left**2).to_numpy().sum() / 8) ** 0.5 / cells.to_numpy().mean()
    assert rows["hessian_trace"] == ["5", f"{100 * between:.3g}", f"{100 * within:.3g}", "not measured"]
    assert float(rows["heldout/entropy_gap_nats_per_token"][0]) == pytest.approx(100 * 1.6e-4 / 0.0065, rel=0.1)
    assert rows["feature_trace"][0] == "—"
    assert "known to 5.0 % (standard error, part of which models share with their text), where" in page.known_note
    assert f"differ by {100 * within:.1f} %: within recipes it can hardly tell." in page.known_note


def test_ranks_of_the_spectrum_are_tried_though_no_side_of_them_is_flatter():
    checkpoints, stages = natural()
    for name in ("effective_rank", "num_probes"):
        checkpoints[f"flatness/{name}"] = np.random.default_rng(6).normal(size=len(checkpoints))
    columns = [*COLUMNS, *(Column("flatness", Metric(name)) for name in ("effective_rank", "num_probes"))]
    found = compare_same_loss(checkpoints, stages, columns, read)
    assert {"effective_rank"} == {each.measure.partition("/")[2] for each in found.measures} - {
        "hessian_trace", "fisher_trace_blocks", "feature_trace", "entropy_gap_nats_per_token", "labels_64"
    }  # fmt: skip


def test_each_answer_says_what_is_left_after_a_change_of_scale():
    checkpoints, stages = natural()
    checkpoints["flatness/rescaled_hessian_trace"] = -checkpoints["flatness/hessian_trace"]
    columns = [*COLUMNS, Column("flatness", Metric("rescaled_hessian_trace", "min"))]
    page = same_loss_page(compare_same_loss(checkpoints, stages, columns, read))
    ((_, answers),) = page.answers
    (told,) = (answer for answer in answers if answer.startswith("Fine-tuned at 0.001"))
    assert "(trace -0.27 [-1.00, 0.67]" in told
    assert "After a random change of scale it is 0.27 [-0.67, 1.00]." in told


def test_where_seeds_have_examples_of_their_own_the_noise_holds_their_chance():
    checkpoints, stages = study(link=0.4)
    drawn = json.dumps({"hyperparameters": {"examples": "by_seed"}})
    stages.loc[stages["kind"] == "sft", "settings"] = drawn
    notes = [
        same_loss_page(compare_same_loss(checkpoints, each, COLUMNS, read)).differed_note
        for each in (stages, stages.assign(settings="{}"))
    ]
    assert notes[0].startswith("Each seed of fine-tuning has labelled examples of its own")
    assert "the same ones under every seed" in notes[1]


def test_of_one_base_there_are_no_intervals():
    checkpoints, stages = natural()
    one = checkpoints[checkpoints["seed"] == 0]
    page = same_loss_page(compare_same_loss(one, stages, COLUMNS, read, values=VALUES))
    assert not any("[" in each.text or "nan" in each.text for row in page.variants.rows for each in row.cells)
    assert "bars" not in page.picture_note
