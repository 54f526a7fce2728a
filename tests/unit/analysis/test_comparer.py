"""Learning to compare: antisymmetric, calibrated, tested on unseen variants, and saved without pickle."""

import dataclasses
import itertools
import json
import math
from functools import partial

import numpy as np
import pandas as pd
import pytest
from columns import COLUMNS

from raysweep.analysis import comparer as module
from raysweep.analysis import learning
from raysweep.analysis.comparer import OF_TREES, CompareError, Comparer, fitted_slope, grow, learn, tree_logits
from raysweep.analysis.comparer_files import FILE, IndicatorFile, check_versions, load, range_of, save
from raysweep.analysis.defects import collapsed_rows, copied_rows
from raysweep.analysis.gaps import GapAccuracy
from raysweep.analysis.kept import version_of, versions_of
from raysweep.analysis.learning import Learnt, indicators_named, learn_target, targets_of
from raysweep.analysis.learnt_page import format_learnt
from raysweep.analysis.line import DOUBT, NORMAL_LOGIT, PENALTIES, POWERS, Line, bulk, fit_line, num_terms, terms
from raysweep.analysis.pair_features import ordered_pairs
from raysweep.analysis.pairwise import IntervalEstimate, interval
from raysweep.analysis.ranking import Ranking, rank
from raysweep.analysis.tables import write_tables
from raysweep.analysis.unseen import (
    Split,
    as_it_is,
    differences_over_splits,
    learner,
    leave_group_out,
    on_unseen,
    over_splits,
    random_splits,
)
from raysweep.cli import main
from raysweep.record import Record
from raysweep.results import Results
from raysweep.run_files import StageRow, TrialRow
from raysweep.runs import Run
from raysweep.scores import Column
from raysweep.spec import Metric

pytest.importorskip("lightgbm", reason="LightGBM, of the extra 'compare', is not installed")
WEIGHTS = np.array([1.0, 0.7, 0.0])
KNOWN = {"started": "2026-01-01T00:00:00+00:00", "wall_seconds": 1.0, "peak_memory_bytes": 2**20, "world_size": 2,
         "device": "cpu", "host": "h", "git_commit": None, "versions": {}}  # fmt: skip
NAMES = ("one", "two", "noise")
TESTED = tuple(
    GapAccuracy(low, high, num, right)
    for low, high, num, right in (
        (0.0, 1.0, 30, IntervalEstimate(0.8, 0.7, 0.9)),
        (1.0, 2.0, 20, IntervalEstimate(0.7, 0.5, 0.8)),
        (5.0, math.inf, 10, IntervalEstimate(0.6)),
    )
)


def draw(num: int, seed: int, *, noise: float = 0.5) -> tuple[np.ndarray, np.ndarray]:
    """Indicators of which the first two decide the score, but for noise."""
    generator = np.random.default_rng(seed)
    values = generator.normal(size=(num, 3))
    return values, values @ WEIGHTS + noise * generator.normal(size=num)


def variants(num: int) -> list[str]:
    return [f"{row:03}" for row in range(num)]


@pytest.fixture(scope="module")
def comparer() -> Comparer:
    values, scores = draw(40, 0)
    return learn(values, scores, indicators=NAMES, variants=variants(40), target="sft/mean_score")


@pytest.fixture
def few_splits(monkeypatch):
    """For what does not hang on how often a comparer was tested."""
    monkeypatch.setattr(learning, "random_splits", partial(random_splits, num=4))


def test_turned_round_a_pair_has_the_other_probability_exactly(comparer):
    values, _ = draw(30, 1)
    values[3, 1] = np.nan
    for first, second in itertools.pairwise(values):
        assert comparer.probability(first, second) == 1 - comparer.probability(second, first)
    assert comparer.probability(values[0], values[0]) == 0.5


def test_new_pairs_are_compared_as_well_as_the_noise_allows(comparer):
    values, scores = draw(60, 2)
    first, second = np.triu_indices(60, 1)
    right = (comparer.logits(values[first], values[second]) > 0) == (scores[first] > scores[second])
    best = ((values @ WEIGHTS)[first] > (values @ WEIGHTS)[second]) == (scores[first] > scores[second])
    assert best.mean() - right.mean() < 0.04


def test_reasons_add_up_and_name_what_decides(comparer):
    first, second = np.array([2.0, 0.0, -1.0]), np.array([-2.0, 0.0, 1.0])
    reasons = comparer.reasons(first, second)
    assert sum(reason.logit for reason in reasons) == pytest.approx(comparer.logits(first[None], second[None])[0])
    assert reasons[0].indicator == "one"
    assert (reasons[0].first, reasons[0].second) == (2.0, -2.0)


def test_a_far_checkpoint_is_told_from_one_more_of_the_same(comparer):
    values, _ = draw(20, 3)
    assert np.median([comparer.distance(row) for row in values]) < 2
    assert comparer.distance(np.array([30.0, 0.0, 0.0])) > 5
    assert np.isnan(comparer.distance(np.full(3, np.nan)))


def test_shuffled_labels_are_a_coin_and_calibrated_as_one():
    shares, slopes = [], []
    for seed in range(6):
        values, scores = draw(30, seed)
        scores = np.random.default_rng(seed).permutation(scores)
        tested = on_unseen(learner(values, scores, variants(30)), scores, random_splits(variants(30), num=5))
        shares.append(tested.accuracy.value)
        slopes.append(tested.brier)
    assert np.mean(shares) == pytest.approx(0.5, abs=4 * np.std(shares) / np.sqrt(6))
    assert np.mean(slopes) < 0.27  # The trees alone would be sure of what is noise.


def test_no_checkpoint_of_a_test_is_trained_on():
    names = [f"{row // 3}" for row in range(30)]
    for split in [*random_splits(names), *leave_group_out(["a", "b", "c"] * 10, names)]:
        assert not {names[row] for row in split.train} & {names[row] for row in split.test}
    by_rate = leave_group_out([1e-3] * 15 + [1e-2] * 15, names)
    assert [(split.name, len(split.train), len(split.test)) for split in by_rate] == [
        ("0.001", 15, 15),
        ("0.01", 15, 15),
    ]


def test_pairs_of_groups_that_are_left_out_have_an_interval_over_variants():
    """By leaving out each variant that is tested, with both its rows, by hand."""
    values, scores = draw(30, 3)
    names = [f"{row // 2}" for row in range(30)]
    groups = ["a"] * 10 + ["b"] * 12 + ["alone"] * 2 + ["c"] * 6
    splits = leave_group_out(groups, names)
    assert [split.name for split in splits] == ["a", "b", "c"]
    predict = learner(values, scores, variants(len(scores)))
    tested = on_unseen(predict, scores, splits, variants=names).accuracy
    right = {}
    for split in splits:
        first, second = ordered_pairs(split.test)
        kept = scores[first] > scores[second]
        logits = predict(split)(first[kept], second[kept])
        right |= dict(zip(zip(first[kept], second[kept], strict=True), logits > 0, strict=True))
    assert tested.value == pytest.approx(np.mean([*right.values()]))
    left = [
        np.mean([each for pair, each in right.items() if name not in {names[row] for row in pair}])
        for name in sorted({names[row] for split in splits for row in split.test})
    ]
    expected = interval(tested.value, np.array(left))
    assert [tested.low, tested.high] == pytest.approx([expected.low, expected.high])
    assert tested.low < tested.value < tested.high


def test_a_slope_calibrates_logits_that_are_too_sure():
    generator = np.random.default_rng(0)
    logits = generator.normal(size=20_000)
    right = generator.random(20_000) < 1 / (1 + np.exp(-logits))
    sure = 3 * np.where(right, logits, -logits)
    assert fitted_slope(sure) == pytest.approx(1 / 3, abs=0.02)
    assert fitted_slope(-np.abs(logits)) == pytest.approx(0, abs=1e-4)


def test_terms_of_the_line_are_bends_and_products():
    values = np.array([[0.5, -4.0], [np.nan, 2.0]])
    bends = [[0.5, -4.0, np.tanh(0.5), np.tanh(-4), 0.25, 16.0], [0.0, 2.0, 0.0, np.tanh(2), 0.0, 4.0]]
    bends = np.array(bends) / np.repeat([1.0, 0.63, np.sqrt(2)], 2)
    ends = np.array([[-1.0, -4.0], [1.0, 4.0]])
    assert terms(values, "straight", ends).tolist() == [[0.5, -4.0], [0.0, 2.0]]
    assert terms(values, "curved", ends) == pytest.approx(bends)
    assert terms(values, "crossed", ends) == pytest.approx(np.concatenate([bends, [[-2.0], [0.0]]], axis=1))
    for form in ("straight", "curved", "crossed"):
        assert terms(values, form, ends).shape == (2, num_terms(form, 2))


def test_terms_go_on_along_their_tangents_outside_the_bulk_of_what_was_learnt_from():
    known = np.random.default_rng(0).normal(size=(200, 2))
    ends = bulk(known)
    assert (known < ends[0]).mean() == pytest.approx(0.15, abs=0.01)
    assert (known > ends[1]).mean() == pytest.approx(0.15, abs=0.01)
    for side, sign in enumerate((-1, 1)):
        steps = ends[side] + sign * np.array([[0.0, 0.0], [1e-6, 1e-6], [1.0, 1.0], [2.0, 2.0]])
        here, near, far, farther = terms(steps, "curved", ends)
        assert farther - far == pytest.approx(far - here)
        assert (near - here) * 1e6 == pytest.approx(far - here, rel=1e-5)
        # A product along each of its two.
        first, second = (terms(steps * [moved, not moved], "crossed", ends)[:, -1] for moved in (True, False))
        assert np.diff(first[[0, 2, 3]], 2) == pytest.approx(0) == np.diff(second[[0, 2, 3]], 2)


def test_the_line_predicts_variants_best_from_the_others():
    """By solving for each form, power, penalty and fold of whole variants, means and correlations made anew in each."""
    values, scores = draw(30, 0, noise=1.0)
    scores = scores + np.square(values[:, 0])
    values[3, 2] = np.nan  # The mean, which is 0.
    names = [f"{row // 2:02}" for row in range(30)]

    def fit(rows, form, power, penalty):
        told = terms(values, form, bulk(values))[rows]
        x, y = told - told.mean(axis=0), scores[rows] - scores[rows].mean()
        related = np.abs([np.corrcoef(column, y)[0, 1] for column in x.T])
        scale = (related / related.max()) ** power
        own = np.linalg.solve((x * scale).T @ (x * scale) + len(y) * penalty * np.eye(len(scale)), (x * scale).T @ y)
        return scale * own

    def error(form, power, penalty):
        found = np.zeros(30)
        fold = np.repeat(np.random.default_rng(0).permutation(15) % 10, 2)
        told = terms(values, form, bulk(values))
        for out in (fold == number for number in range(10)):
            weights = fit(~out, form, power, penalty)
            found[out] = scores[out] - scores[~out].mean() - (told[out] - told[~out].mean(axis=0)) @ weights
        return np.mean(np.square(found))

    doubts = {"straight": 1.0, "curved": 1 + DOUBT / 15, "crossed": (1 + DOUBT / 15) ** 2}
    choices = itertools.product(doubts, POWERS, PENALTIES)
    best = min(choices, key=lambda each: doubts[each[0]] * error(*each))
    line = fit_line(values, scores, names)
    assert line.form == best[0] != "straight"
    assert line.weights == pytest.approx(NORMAL_LOGIT * fit(np.arange(30), *best) / np.sqrt(2 * error(*best)))


def test_many_indicators_of_nothing_do_not_drown_a_few_in_the_line():
    """40 of which 3 tell: a line that shrinks all alike has 7 points more of the pairs wrong than there need be."""
    far = []
    for seed in range(4):
        generator = np.random.default_rng(seed)
        values = generator.normal(size=(120, 40))
        known = values[:, :3] @ np.array([1.0, 0.7, -0.5])
        scores = known + 0.6 * generator.normal(size=120)
        line = fit_line(values[:60], scores[:60], variants(60))
        first, second = np.triu_indices(60, 1)
        order = line.logits(values[60:][first], values[60:][second])
        best, truth = (np.sign(each[60:][first] - each[60:][second]) for each in (known, scores))
        far.append((best == truth).mean() - (np.sign(order) == truth).mean())
    assert np.mean(far) < 0.04


def test_of_a_single_variant_the_line_is_by_its_rows():
    values, scores = draw(20, 0)
    one, each = (fit_line(values, scores, names) for names in (["one"] * 20, [f"{row}" for row in range(20)]))
    assert one.form == each.form
    assert (one.weights == each.weights).all()


def test_an_indicator_that_does_not_vary_has_no_weight_in_the_line():
    values, scores = draw(20, 0)
    line = fit_line(values * [1, 0, 1], scores, variants(20))
    parts = line.by_indicator(np.array([1.0, 1.0, 1.0]), np.array([-1.0, 0.0, 1.0]))
    assert abs(parts[1]) < 1e-12 < abs(parts[0])
    assert np.isfinite(line.weights).all()


def test_the_line_s_parts_of_a_pair_add_up_and_share_products():
    ends = np.array([[-2.0, -2.0], [2.0, 2.0]])
    line = Line("crossed", np.array([1.0, -2.0, 0.5, 0.0, 0.3, 0.7, 4.0]), ends)
    first, second = np.array([0.3, -1.2]), np.array([np.nan, 0.5])
    parts = line.by_indicator(first, second)
    assert parts.sum() == pytest.approx(line.logits(first[None], second[None])[0])
    plain = Line("crossed", line.weights * [1, 1, 1, 1, 1, 1, 0], ends).by_indicator(first, second)
    assert parts - plain == pytest.approx([-0.36 * 4 / 2] * 2)


def test_trees_count_for_more_where_variants_are_enough_to_show_that_they_know_better():
    """Steps within steps, which no line follows; of 90 variants as many trees count as ever."""
    values = np.random.default_rng(0).normal(size=(180, 3))
    signs = np.sign(values)
    scores = signs[:, 0] * signs[:, 1] * (1 + signs[:, 2])
    parts = [
        learn(values[:num], scores[:num], indicators=NAMES, variants=variants(num), target="score").part
        for num in (90, 180)
    ]
    assert parts[0] == OF_TREES
    assert parts[1] > 0.6


def test_trees_are_the_same_every_time():
    values, scores = draw(20, 0)
    first, second = (grow(values, scores, np.arange(20)) for _ in range(2))
    assert first.model_to_string() == second.model_to_string()
    logits = [tree_logits(booster, values[:10], values[10:]) for booster in (first, second)]
    assert (logits[0] == logits[1]).all()


def test_trees_of_many_checkpoints_learn_from_some_of_their_pairs(monkeypatch):
    values, scores = draw(20, 0)
    every = grow(values, scores, np.arange(20)).model_to_string()
    trees = []
    for num in (190, 189, 189):  # 20 checkpoints have 190 pairs.
        monkeypatch.setattr(module, "MAX_PAIRS", num)
        trees.append(grow(values, scores, np.arange(20)).model_to_string())
    assert trees[0] == every
    assert trees[1] == trees[2] != every


def learnt_from(num: int, seed: int) -> Learnt:
    """A table whose score follows the rate; `mirror` is the rate by another name, and `own` knows more."""
    generator = np.random.default_rng(seed)
    rate = np.resize([1.0, 2.0, 3.0], num)
    own = generator.normal(size=num)
    rows = {"variant": variants(num), "trial": variants(num), "checkpoint": variants(num), "status": "done", "seed": 0}
    scores = {"score": rate + own + generator.normal(size=num) / 3, "other": rate + own + generator.normal(size=num)}
    table = pd.DataFrame({**rows, "step": 1, "point.lr": rate, **scores, "mirror": -rate, "own": own})
    columns = [Column("", Metric("mirror", "min")), Column("", Metric("own", "max"))]
    return learn_target(rank(table, columns=columns, target="score"), others=["other"])


def test_what_indicators_add_to_the_configuration_on_unseen_variants():
    tested = learnt_from(36, 0).tested
    assert tested.gain.low > 0
    assert tested.config.accuracy.value < tested.both.accuracy.value
    assert tested.single["mirror"].value < tested.indicators.accuracy.value
    assert 0.5 < tested.rank_averages["all indicators"].accuracy.value <= 1
    # Chosen by the pairs of the training variants alone.
    best = tested.rank_averages["best 1"]
    assert best.accuracy.value == pytest.approx(max(each.value for each in tested.single.values()), abs=0.02)
    assert best.gain.value == pytest.approx(best.accuracy.value - tested.config.accuracy.value)
    assert set(tested.without_group) == {"point.lr"}
    assert [name for name, _, _ in tested.without_group["point.lr"].by_split] == ["1.0", "2.0", "3.0"]
    assert tested.other_targets.accuracy.value > 0.6
    assert set(tested.importances) == {"mirror", "own", "point.lr"}
    assert sum(tested.importances.values()) == pytest.approx(1)


def test_a_family_is_learnt_from_the_others_that_share_no_task_with_it():
    names = [f"{row}" for row in range(6)]
    table = pd.DataFrame(
        {"variant": names, "trial": names, "checkpoint": names, "status": "done", "seed": 0, "step": 1}
    )
    tasks = {task: Column("sft", Metric("score", "max", "share"), task) for task in "abcd"}
    families = {
        name: Column("sft", Metric("mean_score", "max", "share"), name, tuple(of))
        for name, of in {"x": "ab", "y": "cd", "z": "bc", "gone": "ad"}.items()
    }
    columns = [*tasks.values(), *families.values()]
    there = {column.name: np.arange(6.0) for column in columns if column.task != "gone"}
    ranking = rank(table.assign(**there, **{"sft/mean_score": np.arange(6.0)}), columns=columns)
    targets = targets_of(ranking, columns)
    assert next(iter(targets)) == "sft/mean_score"
    assert targets["sft/mean_score"] == ()
    assert {name: targets[f"sft/{name}/mean_score"] for name in "xyz"} == {
        "x": ("sft/y/mean_score",),
        "y": ("sft/x/mean_score",),
        "z": (),
    }
    assert targets["sft/a/score"] == ("sft/b/score", "sft/c/score", "sft/d/score")
    assert len(targets) == 8


def ranked(indicators, *, constant=()) -> Ranking:
    """A table of noise."""
    generator = np.random.default_rng(0)
    table = pd.DataFrame(generator.normal(size=(20, len(indicators))), columns=indicators)
    table = table.assign(**dict.fromkeys(constant, 1.0), score=generator.normal(size=20), status="done", seed=0, step=1)
    table = table.assign(variant=variants(20), trial=variants(20), checkpoint=variants(20))
    table["point.lr"] = np.resize([1.0, 2.0], 20)
    return rank(table, columns=[Column("", Metric(name, "max")) for name in indicators], target="score")


def test_what_is_left_out_goes_by_name_or_by_its_beginning():
    names = ["early_sft/t/score", "early_sft/mean_score", "early_sft", "early"]
    whole = ranked(names)
    assert indicators_named([whole], ["early_sft"]) == {*names[:3]}
    assert indicators_named([whole], ["early_sft/t", "early"]) == {names[0], names[3]}
    with pytest.raises(CompareError, match=r"--without 'early_': no indicator.*names are: early, early_sft"):
        indicators_named([whole], ["early_"])
    with pytest.raises(
        CompareError, match=r"called so, did you mean 'early_sft/mean_score'; .* are: early, early_sft$"
    ):
        indicators_named([whole], ["early_sft/maen_score"])
    with pytest.raises(CompareError, match=r"--without 'point\.lr': no indicator"):  # Nothing is learnt from it anyway.
        indicators_named([whole], ["point.lr"])


@pytest.mark.usefixtures("few_splits")
def test_what_is_left_out_may_be_constant_in_some_rankings_or_in_all():
    rankings = [ranked(["a", "b"]), ranked(["a", "b"], constant=("b",))]
    assert "b" in rankings[1].skipped
    for order in (rankings, rankings[::-1], rankings[1:]):
        assert indicators_named(order, ["b"]) == {"b"}
    for each in rankings:
        tested = learn_target(each, without=indicators_named(rankings, ["b"])).tested
        assert (tested.without, list(tested.single)) == (("b",), ["a"])


def test_a_collapsed_row_is_tested_on_and_not_learnt_from():
    generator = np.random.default_rng(0)
    table = pd.DataFrame(generator.normal(10, 1, size=(30, 2)), columns=["own", "unused"])
    table["score"] = table["own"] + generator.normal(size=30) / 3
    table.loc[4, "own"], table.loc[5, "unused"] = 1000, 1000
    table.loc[6] = table.loc[7]
    names = [f"{row:02}" for row in range(30)]
    table = table.assign(variant=names, trial=names, checkpoint=names, status="done", seed=0, step=1)
    ranking = rank(table, columns=[Column("", Metric(name, "max")) for name in ("own", "unused")], target="score")
    assert set(collapsed_rows(ranking.flags, ["own", "unused"])) == {"04", "05"}
    assert set(copied_rows(ranking.flags)) == {"07"}
    learnt = learn_target(ranking, without=["unused"])
    assert set(learnt.tested.rows_not_learnt_from) == {"04"}
    assert set(learnt.tested.rows_left_out) == {"07"}
    assert (learnt.tested.num_checkpoints, len(learnt.comparer.known)) == (29, 28)
    tests = [pairs for _, _, pairs in learnt.tested.indicators.by_split]
    assert set(tests) == {12 * 11 // 2}  # Of 29 variants 17 are trained on, or 16, and all of the others tested.
    assert learnt.comparer.scales[0].deviation < 2


@pytest.mark.usefixtures("few_splits")
@pytest.mark.parametrize("missing", [np.nan, np.inf])
def test_an_indicator_whose_missing_values_tell_the_configuration_is_not_learnt_from(missing):
    generator = np.random.default_rng(0)
    rate = np.resize([1.0, 2.0], 30)
    table = pd.DataFrame({"own": generator.normal(size=30), "score": rate + generator.normal(size=30) / 3})
    table["of_one"] = np.where(rate == 1, generator.normal(size=30), missing)
    names = variants(30)
    table = table.assign(variant=names, trial=names, checkpoint=names, status="done", seed=0, step=1)
    columns = [Column("", Metric(name, "max")) for name in ("own", "of_one")]
    learnt = learn_target(rank(table, columns=columns, target="score"))
    assert learnt.comparer.indicators == ("own",)
    assert learnt.tested.incomplete == {"of_one": 15}
    assert "left out, as 15 of 30 checkpoints have no value: of_one" in format_learnt(learnt)
    assert "(30 checkpoints of 30 in all" in format_learnt(learnt)


def test_a_comparer_comes_back_from_its_folder(tmp_path, comparer):
    save(tmp_path, {"sft/mean_score": (comparer, TESTED)}, learnt_from="r", indicators={"one": IndicatorFile()})
    contents, [back] = load(tmp_path)
    assert {path.suffix for path in tmp_path.iterdir()} == {".json", ".txt"}
    [file] = contents.comparers
    near, further, beyond = TESTED
    assert [range_of(file, far) for far in (0.5, 1, 1.5, 2)] == [near, further, further, None]
    assert repr(range_of(file, 99)) == repr(beyond)  # Its ends are NaN, which equals nothing.
    values, _ = draw(10, 4)
    assert (back.logits(values[:5], values[5:]) == comparer.logits(values[:5], values[5:])).all()
    assert back.distance(values[0]) == comparer.distance(values[0])
    assert (back.line.form, back.line.weights.tolist()) == (comparer.line.form, comparer.line.weights.tolist())
    alike = {"known": comparer.known, "line": comparer.line}
    assert dataclasses.replace(back, **alike) == dataclasses.replace(comparer, **alike)


def test_what_does_not_match_is_refused(tmp_path, comparer):
    with pytest.raises(CompareError, match="no comparer there; `raysweep rank"):
        load(tmp_path)
    save(
        tmp_path, {"t": (comparer, TESTED)}, learnt_from="r", indicators={"flatness/x": IndicatorFile(versions=("aa",))}
    )
    contents, _ = load(tmp_path)
    with pytest.raises(CompareError, match="needs flatness/x, which was not measured; there: heldout/ppl"):
        check_versions(contents, {"heldout/ppl": "aa"})
    with pytest.raises(CompareError, match=r"flatness/x was measured as version bb, and .* from version aa"):
        check_versions(contents, {"flatness/x": "bb"})
    check_versions(contents, {"flatness/x": "aa"})
    whole = json.loads((tmp_path / FILE).read_text())
    before = [{name: value for name, value in whole["comparers"][0].items() if name not in ("part", "form")}]
    (tmp_path / FILE).write_text(json.dumps(whole | {"format": 3, "comparers": before}))
    with pytest.raises(CompareError, match="format: must be 7, not 3; learn it anew"):
        load(tmp_path)
    num = len(comparer.line.weights)
    for field, value, words in (
        ("weights", [1.0], rf"comparers\.0\.weights: holds 1 number\(s\), where 3 scales have {num}; learn it anew"),
        ("known", [[0.0, None, 1.0], [0.0, 1.0]], r"comparers\.0\.known: holds 2 number\(s\), where 3 scales have 3"),
        ("known", [], r"comparers\.0\.known: is empty; at least 1 belongs there"),
        ("slope", "0.5", r"comparers\.0\.slope: must be a number, not the text \"0\.5\""),
    ):
        file = whole["comparers"][0] | {field: value}
        (tmp_path / FILE).write_text(json.dumps(whole | {"comparers": [file]}))
        with pytest.raises(CompareError, match=words):
            load(tmp_path)
    (tmp_path / FILE).write_text("{")
    with pytest.raises(CompareError, match=r"comparer\.json: no JSON: Expecting property name"):
        load(tmp_path)
    whole["comparers"][0]["trees"] = "../trees-0.txt"
    (tmp_path / FILE).write_text(json.dumps(whole))
    with pytest.raises(CompareError, match="are not beside it"):
        load(tmp_path)
    whole["comparers"][0]["trees"] = "trees-0.txt"
    (tmp_path / FILE).write_text(json.dumps(whole))
    (tmp_path / "trees-0.txt").write_text("tree")
    with pytest.raises(CompareError, match="was changed since it was saved"):
        load(tmp_path)


def test_what_a_stage_took_may_not_be_known():
    stages = pd.DataFrame({"id": ["flatness-1"], "kind": "flatness", "settings": "{}", "flops": 1.0})
    [version] = versions_of(stages.assign(wall_seconds=np.nan, world_size=1), []).values()
    assert version.seconds is None


@pytest.mark.parametrize("num", [8, 19])
def test_too_few_variants_are_named(num):
    values, scores = draw(num, 0)
    with pytest.raises(CompareError, match=f"{num} variants have a score in t; a comparer is learnt from 20 or more"):
        learn(values, scores, indicators=NAMES, variants=variants(num), target="t")


def test_trees_that_never_split_are_given_no_slope():
    assert fitted_slope(np.zeros(20)) == fitted_slope(np.zeros(0)) == 0
    values, _ = draw(20, 0)
    one_best = np.eye(20)[0]  # 38 pairs that differ, and fewer where the best one is set aside.
    learnt = learn(values, one_best, indicators=NAMES, variants=variants(20), target="t")
    assert learnt.probability(values[0], values[1]) == 0.5


def test_the_luck_of_few_pairs_makes_no_comparer_surer_than_its_trees():
    values, scores = draw(30, 1, noise=0.05)  # All pairs of the folds are right.
    assert learn(values, scores, indicators=NAMES, variants=variants(30), target="t").slope == 1.0


def test_a_target_that_does_not_vary_is_named():
    values, _ = draw(20, 0)
    with pytest.raises(CompareError, match=r"t is 0\.25 in all 20 rows: there is nothing to compare"):
        learn(values, np.full(20, 0.25), indicators=NAMES, variants=variants(20), target="t")


def test_rows_with_a_twin_lie_as_far_apart_as_without():
    values, scores = draw(20, 0)
    twice = np.repeat(np.arange(20), 2)
    alone, beside = (
        learn(values[rows], scores[rows], indicators=NAMES, variants=np.array(variants(20))[rows], target="t")
        for rows in (np.arange(20), twice)
    )
    assert beside.distance(values[0] + 1) == pytest.approx(alone.distance(values[0] + 1))


@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan, 0.0])
def test_what_has_no_logarithm_is_missing(value):
    values, scores = draw(30, 0)
    values[:, 0] = np.exp(5 * values[:, 0])
    comparer = learn(values, scores, indicators=NAMES, variants=variants(30), target="t")
    assert comparer.scales[0].is_log
    without, missing = values[0].copy(), values[0].copy()
    without[0], missing[0] = value, np.nan
    chance = comparer.probability(without, values[1])
    assert 0 < chance < 1
    assert chance == comparer.probability(missing, values[1])


def test_an_interval_ends_where_shares_do_and_has_a_width_where_splits_agree():
    splits = random_splits(variants(20), num=3)
    estimate = over_splits([1.0, 0.9, 1.0], splits)
    assert estimate.low < estimate.value < estimate.high <= 1.0
    agreed = over_splits([1.0, 1.0, 1.0], splits)
    assert (agreed.value, agreed.high) == (1.0, 1.0)
    assert agreed.low < 0.9  # Of 20 variants.
    assert differences_over_splits([0.0, -0.9, -1.0], splits).low == -1.0
    alike = differences_over_splits([0.0, 0.0, 0.0], splits)
    assert (alike.low, alike.high) == (0.0, 0.0)


def test_intervals_of_the_farthest_pairs_hold_the_truth():
    """Where nearly all pairs are right, nearly all splits agree."""

    def farthest(seed: int) -> IntervalEstimate:
        draw = np.random.default_rng([1, seed])
        scores = draw.normal(size=24)
        values = scores + 0.5 * draw.normal(size=24)
        found = on_unseen(lambda split: lambda a, b: values[a] - values[b], scores, random_splits(variants(24)))
        return found.by_target_gap[-1].accuracy

    found = [farthest(seed) for seed in range(100)]
    truth = np.mean([each.value for each in found])
    assert truth > 0.99
    assert np.mean([each.low <= truth <= each.high for each in found]) >= 0.93


def test_an_indicator_as_it_is_has_the_pairs_right_that_it_has():
    values, scores = draw(40, 0)
    splits = random_splits(variants(40), num=3)
    shares = []
    for split in splits:
        pairs = [(a, b) for a in split.test for b in split.test if scores[a] > scores[b]]
        shares.append(np.mean([values[a, 0] > values[b, 0] for a, b in pairs]))
    found, expected = as_it_is(values[:, 0], scores, splits), over_splits(shares, splits)
    assert [found.value, found.low, found.high] == pytest.approx([expected.value, expected.low, expected.high])


def test_a_missing_value_orders_no_pair():
    values, scores = np.array([np.nan, 1.0, 2.0]), np.array([3.0, 1.0, 2.0])
    split = Split(np.arange(3), np.arange(3))
    assert as_it_is(values, scores, [split]).value == pytest.approx((0.5 + 0.5 + 1) / 3)
    assert as_it_is(-values, scores, [split]).value == pytest.approx((0.5 + 0.5 + 0) / 3)


@pytest.mark.usefixtures("few_splits")
def test_a_table_is_learnt_from(tmp_path, capsys):
    values, scores = draw(30, 0)
    table = pd.DataFrame(dict(zip(NAMES, values.T, strict=True)) | {"score": scores, "lr": np.resize([1, 2], 30)})
    table["variant"] = variants(30)
    table.loc[7, "two"] = 1e3
    table["two"] += 10
    table.to_csv(tmp_path / "t.csv", index=False)
    command = ["rank", "--table", str(tmp_path / "t.csv"), "--target", "score", "--higher", "one,two,noise"]
    command += ["--config", "lr", "--learn", str(tmp_path / "model")]
    assert main([*command, "--json"]) == 0
    [tested] = json.loads(capsys.readouterr().out)["targets"]
    assert tested["indicators"]["accuracy"]["value"] > 0.7
    assert main(command) == 0
    text = capsys.readouterr().out
    assert "learnt from indicators" in text
    assert "tested on, and not learnt from: 1 of 30 checkpoints" in text
    assert "    row 8 is far from all others: two 1010" in text
    assert "  from indicators, another lr " in text
    assert (tested["num_checkpoints"], list(tested["rows_not_learnt_from"])) == (30, ["row 8"])
    assert load(tmp_path / "model")[0].learnt_from == "t.csv"
    assert main([*command[:-1], str(tmp_path / "t.csv")]) == 2
    assert "t.csv is a file; name a folder" in capsys.readouterr().err
    assert main([*command, "--without", "two", "--json"]) == 0
    [fewer] = json.loads(capsys.readouterr().out)["targets"]
    assert set(fewer["single"]) == {"one", "noise"}
    assert fewer["rows_not_learnt_from"] == {}  # It has collapsed in a column that is not in use.
    assert fewer["without"] == ["two"]
    assert [scale.name for scale in load(tmp_path / "model")[0].comparers[0].scales] == ["noise", "one"]
    assert main([*command, "--without", "tow"]) == 2
    assert "--without 'tow': no indicator is called so, did you mean 'two'" in capsys.readouterr().err
    assert main([*command[:-2], "--without", "two"]) == 2
    assert "--without says what is not learnt from: give --learn DIR too" in capsys.readouterr().err


@pytest.mark.usefixtures("few_splits")
def test_a_run_is_learnt_from_by_task_with_its_indicators_versions(store, tmp_path, capsys):
    run = Run.create(store, "r", sweep_text="x", identity="{}")
    run.note_columns(COLUMNS)
    generator = np.random.default_rng(0)
    for number in range(20):
        checkpoint, trace = f"pretrain-{number}", generator.uniform(1, 9)
        scores = dict(zip("tu", 1 - trace / 12 + generator.normal(size=2) / 5, strict=True))
        numbers = {
            checkpoint: ({}, {"loss_nats_per_token": trace, "num_parameters": 10.0}),
            f"flatness-{number}": ({"num_sequences": 4}, {"hessian_trace": trace}),
        }
        for task, score in scores.items():
            numbers[f"sft-{task}{number}"] = {"lr": 0.1, "seed": 0}, {"score": score, "valid_score": 0.5}
        stages = []
        for stage_id, (spec, metrics) in numbers.items():
            kind, _, rest = stage_id.partition("-")
            task = rest[0] if kind == "sft" else None
            store.commit(Record(stage_id, kind, "done", spec, {}, metrics, KNOWN, {}), store.work_dir(stage_id))
            stages.append(StageRow(stage_id, kind, 1, checkpoint, task, {}))
        run.add_trial(TrialRow(f"t{number}", f"v{number}", {"pretrain.x": number % 3}, 0, tuple(stages)))
    command = ["rank", "r", "--store", store.url, "--learn", str(tmp_path / "model"), "--json"]
    assert main(command) == 0
    tested = json.loads(capsys.readouterr().out)["targets"]
    assert [each["target"] for each in tested] == ["sft/mean_score", "sft/t/score", "sft/u/score"]
    assert [each["other_targets"] is None for each in tested] == [True, False, False]
    contents, _ = load(tmp_path / "model")
    # Not the loss of its own training, which is not known of other checkpoints.
    assert set(contents.indicators) == {"flatness/hessian_trace", "flatness/mean_eigenvalue"}
    assert contents.indicators["flatness/hessian_trace"] == IndicatorFile(
        versions=(version_of({"num_sequences": 4}),), seconds=2.0
    )
    # From the table that the run writes it is the same, without the run.
    results = Results.open("r", store=store.url)
    _, table = write_tables(results.run, results.stages, results.checkpoints, results.columns)
    (tmp_path / "t.parquet").write_bytes(table.read_bytes())
    options = ["rank", "--table", str(tmp_path / "t.parquet"), "--json"]
    assert main([*options, "--learn", str(tmp_path / "other")]) == 0
    assert json.loads(capsys.readouterr().out)["targets"] == tested
    other, _ = load(tmp_path / "other")
    assert (other.learnt_from, other.indicators) == ("t.parquet", contents.indicators)
    assert [each.sha256 for each in other.comparers] == [each.sha256 for each in contents.comparers]
    assert main([*options, "--target", "sft/u/score"]) == 0
    assert json.loads(capsys.readouterr().out)["target"] == "sft/u/score"
    assert main([*options, "--target", "sft/v/score"]) == 2
    assert "--target: no column 'sft/v/score', did you mean" in capsys.readouterr().err
    assert main([*options, "--gaps", "flatness/trace"]) == 2
    assert "--gaps: 'flatness/trace' is no indicator" in capsys.readouterr().err
    # Unless columns are named: then it is any table.
    assert main([*options, "--lower", "flatness/hessian_trace"]) == 2
    assert "which column is the score after fine-tuning? Name it" in capsys.readouterr().err
    # Others may have changed it.
    whole = pd.read_parquet(table)
    for changed, words in (
        (whole.drop(columns="variant"), "t.parquet: no column 'variant', which the run that wrote it gave it"),
        (whole.assign(**{"flatness/hessian_trace": "flat"}), "column 'flatness/hessian_trace' holds no numbers"),
        (whole.drop(columns="sft/mean_score"), "--target: no column 'sft/mean_score'"),
    ):
        changed.to_parquet(tmp_path / "t.parquet")
        assert main(options) == 2
        assert words in capsys.readouterr().err
    whole.drop(columns="flatness/mean_eigenvalue").to_parquet(tmp_path / "t.parquet")
    assert main(options) == 0
    found = [item["indicator"] for item in json.loads(capsys.readouterr().out)["indicators"]]
    assert "flatness/hessian_trace" in found
    assert "flatness/mean_eigenvalue" not in found
    wrong = pd.read_parquet(table)
    wrong.attrs["columns"] = '[{"kind": 1}]'
    wrong.to_parquet(tmp_path / "t.parquet")
    assert main(options) == 2
    assert "t.parquet: what it says of its columns cannot be read: Input should be" in capsys.readouterr().err
