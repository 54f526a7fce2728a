"""A budget's strategies on tables whose best checkpoint is known, and what is bought next."""

import dataclasses
import json
import re

import numpy as np
import pandas as pd
import pytest

from raysweep.analysis.budget import (
    Known,
    _asha,
    _drawn,
    _estimate,
    _on_grid,
    curves,
    eliminate,
    learn_rungs,
    next_purchases,
)
from raysweep.analysis.budget_page import format_budget
from raysweep.analysis.comparer import CompareError
from raysweep.analysis.regrets import LONGEST, NO_REGRET_INTERVAL, best_of_variants, upper_tail
from raysweep.cli import main

pytest.importorskip("lightgbm", reason="LightGBM, of the extra 'compare', is not installed")
NUM = 44
HOURS = {"cheap": 0.01, "dear": 0.2, "sft": 1.0, "dearest": 2.0}


def known(seed: int = 0) -> Known:
    """A cheap indicator that tells a little, and a dear one that tells nearly all."""
    generator = np.random.default_rng(seed)
    scores = generator.normal(size=NUM)
    names = tuple(f"c{row:02}" for row in range(NUM))
    values = {"little": scores + 1.5 * generator.normal(size=NUM), "much": scores + 0.2 * generator.normal(size=NUM)}
    values["useless"] = generator.normal(size=NUM)
    kinds = {"little": "cheap", "much": "dear", "useless": "dearest"}
    bought = {kind: np.ones(NUM, dtype=bool) for kind in HOURS}
    return Known(names, names, values, kinds, HOURS, bought, scores, "score")


def test_regret_falls_with_hours_and_ends_at_none():
    found = {curve.strategy: curve for curve in curves(known(), budget_hours=10.0)}
    assert {"fine-tune all", "by much", "by little", "elimination, 1 rung", "elimination, 2 rungs"} <= set(found)
    for curve in found.values():
        assert (np.diff(curve.regret) <= 1e-9).all() or curve.strategy.startswith(("ASHA", "by", "elim"))
        # All are fine-tuned by then, but for what costs more than fine-tuning itself.
        assert curve.regret[-1] == pytest.approx(0, abs=0.01) or curve.strategy == "by useless"
    # What tells nearly all costs a fifth of fine-tuning: 8 hours of all, and then hardly any more.
    assert found["by much"].at(11) < 0.1 < found["fine-tune all"].at(11)
    assert found["fine-tune all"].at(20) == pytest.approx(
        np.mean([_left(known().scores, number) for number in range(300)]), abs=0.15
    )


def _left(scores: np.ndarray, seed: int) -> float:
    """Regret of half of a random half's checkpoints."""
    half = np.random.default_rng(seed).choice(scores, NUM // 2, replace=False)
    return float(half.max() - half[: NUM // 4].max())


def test_what_a_budget_does_not_reach_is_not_counted_on():
    """An indicator of all takes 8.8 hours: with less, what comes first is as good as any."""
    for hours in (4.4, 8.7):
        found = {curve.strategy: curve.at(hours) for curve in curves(known(), budget_hours=hours)}
        assert found["by much"] == pytest.approx(found["by useless"], abs=1e-12)
    assert {curve.strategy: curve.at(8.8) for curve in curves(known(), budget_hours=8.8)}["by much"] < 0.2


def test_elimination_asks_for_dear_indicators_of_the_likely_ones_alone():
    table = known()
    bought, order = eliminate(table.at(np.arange(20, NUM)), learn_rungs(table.at(np.arange(20))))
    assert [each.kind for each in bought] == ["cheap", "dear"]  # Not what costs more than fine-tuning.
    assert len(bought[0].checkpoints) == NUM - 20
    assert set(bought[1].checkpoints) <= set(bought[0].checkpoints)
    assert sorted(order) == list(range(NUM - 20))
    scores = table.scores[20:]
    assert scores[order[:3]].max() >= np.sort(scores)[-2]


def test_what_is_measured_already_is_not_bought_again():
    table = known()
    scores, much = table.scores.copy(), table.values["much"].copy()
    scores[26:] = np.nan
    much[26:] = np.nan
    open_ones = {"sft": np.isfinite(scores), "dear": np.isfinite(much)}
    without = dataclasses.replace(
        table, scores=scores, values={**table.values, "much": much}, bought={**table.bought, **open_ones}
    )
    bought = next_purchases(without, 4.0, num_rungs=2)
    # Which to fine-tune is not known before.
    assert [each.kind for each in bought] == ["dear"]
    assert set(bought[0].checkpoints) <= set(table.names[26:])
    [half] = next_purchases(without, 0.45, num_rungs=2)
    assert (half.kind, half.checkpoints, half.hours) == ("dear", bought[0].checkpoints[:2], 0.4)
    assert next_purchases(without, 0.1, num_rungs=2) == []
    measured = dataclasses.replace(without, values=table.values, bought={**table.bought, "sft": open_ones["sft"]})
    [tuned] = next_purchases(measured, 3.0, num_rungs=2)
    assert (tuned.kind, len(tuned.checkpoints)) == ("sft", 3)
    # What ran and came to no number is not asked for again.
    assert next_purchases(dataclasses.replace(without, bought=table.bought), 3.0, num_rungs=2) == []


def test_kinds_of_about_one_cost_are_bought_together():
    table = known()
    hours = {"cheap": 0.1, "dear": 0.3, "sft": 1.0, "dearest": 2.0}
    assert table.rungs == [("cheap",), ("dear",)]
    assert dataclasses.replace(table, hours=hours).rungs == [("cheap", "dear")]
    scores, none = table.scores.copy(), np.full(NUM, np.nan)
    scores[26:] = np.nan
    open_ones = dict.fromkeys(("sft", "cheap", "dear"), np.arange(NUM) < 26)
    values = {**table.values, "little": np.where(open_ones["cheap"], table.values["little"], none)}
    asked = dataclasses.replace(table, hours=hours, scores=scores, values=values, bought={**table.bought, **open_ones})
    # 18 of them: 1.8 hours, and of what is left 4 of the other kind.
    cheap, dear = next_purchases(asked, 3.0, num_rungs=1)
    assert (cheap.kind, len(cheap.checkpoints), dear.kind, len(dear.checkpoints)) == ("cheap", 18, "dear", 4)


def test_too_few_variants_of_a_half_are_named():
    with pytest.raises(CompareError, match=r"one half of 20 variants and .*: 10 variants have a score in score; a"):
        curves(known().at(np.arange(20)), budget_hours=10.0)


def test_strategies_that_are_alike_are_said_to_tie():
    table = known()
    twin = dataclasses.replace(
        table, values={**table.values, "twin": table.values["much"]}, kinds={**table.kinds, "twin": "dear"}
    )
    found = {curve.strategy: curve for curve in curves(twin, budget_hours=11.0)}
    behind = found["by twin"].behind_first, found["by much"].behind_first
    assert behind[0] == behind[1]
    assert found["by useless"].behind_first.low > 0
    everything = found["fine-tune all"]
    assert everything.low[0] < everything.regret[0] < everything.high[0]


@pytest.mark.parametrize(
    ("num_checkpoints", "shape"), [(1, np.asarray), (5, np.asarray), (1, lambda z: np.exp(0.8 * z))]
)
def test_intervals_of_one_drawn_blindly_hold_the_truth(num_checkpoints, shape):
    # 300 tables: where 95 is true, a share below 91.2 has a chance of one in 400. By the gaps of one table it is 85, by
    # gaps between checkpoints, of which a variant has five that score alike, 90; by Wilson's alone 77 where log-normal.
    generator = np.random.default_rng(0)
    variants = np.repeat([f"{row:02}" for row in range(60)], num_checkpoints)
    found = []
    for _ in range(300):
        scores = shape(generator.normal(size=60).repeat(num_checkpoints) + 0.1 * generator.normal(size=len(variants)))
        drawn = np.stack([scores, *_drawn(scores, variants)])
        orders = [generator.permutation(60) for _ in range(5)]
        halves = [order[:30] for order in orders] + [order[30:] for order in orders]
        halves = [np.flatnonzero(np.isin(variants, np.unique(variants)[half])) for half in halves]
        regrets = np.array([_on_grid([[]], drawn[:, half], np.zeros(1))[:, 0] for half in halves])
        found.append(
            _estimate(
                regrets, 30, low=0.0, high=float(np.ptp(scores)), tail=upper_tail(best_of_variants(scores, variants)[0])
            )
        )
    truth, stated = np.mean([each.value for each in found]), [each for each in found if not np.isnan(each.low)]
    assert np.mean([each.low <= truth <= each.high for each in stated]) >= 0.912
    assert len(stated) > 240


def test_drawn_scores_are_in_order_and_as_far_apart_on_average():
    # The i-th gap from the top is 1 / i, as of exponential scores on average.
    scores = -np.random.default_rng(1).permutation(np.cumsum([0.0, *1 / np.arange(1, 200)]))
    names = [f"{row:03}" for row in range(200)]
    drawn = _drawn(scores, names)
    assert (drawn.argsort(axis=1) == scores.argsort()).all()
    assert drawn == pytest.approx(_drawn(scores + 5.0, names))
    gaps = -np.diff(np.sort(drawn, axis=1)[:, ::-1], axis=1) * np.arange(1, 200)
    # Of an exponential distribution of mean 1 the second moment is 2, and a little less without the last half percent.
    assert gaps.mean(axis=0) == pytest.approx(1.0, abs=0.01)
    assert (gaps**2).mean(axis=0) == pytest.approx(2.0, abs=0.1)
    assert not _drawn(np.zeros(8), names[:8]).any()
    # A variant's other checkpoints stay as far below its best.
    twice = _drawn(np.concatenate([scores, scores - 0.5]), names * 2)
    assert twice == pytest.approx(np.concatenate([drawn, drawn - 0.5], axis=1))


def test_regret_that_all_halves_lack_has_an_interval_by_the_variants_of_a_half():
    # Wilson's of none in 30, by Student's t of 9 degrees of freedom: t^2 / (30 + t^2) with t = 2.262.
    none = _estimate(np.zeros((10, 101)), 30, low=0.0, high=2.0, tail=LONGEST)
    assert (none.low, none.high) == pytest.approx((0.0, 2 * 5.117 / 35.117), abs=1e-3)


def test_asha_takes_a_missing_value_for_the_worst():
    values = np.array([np.nan, 3.0, np.nan, 2.0, 1.0, np.nan])
    steps = _asha(range(6), values, rung_hours=0.1, tuning=1.0)
    assert [row for _, row in steps][:3] == [1, 3, 4]


def test_a_table_with_costs_has_strategies(tmp_path, capsys):
    table = known()
    rows = pd.DataFrame({**table.values, "score": table.scores})
    rows.loc[40:, "score"] = np.nan
    rows.to_csv(tmp_path / "t.csv", index=False)
    command = ["rank", "--table", str(tmp_path / "t.csv"), "--target", "score", "--higher", "little,much"]
    assert main([*command, "--budget", "3gpuh", "--costs", "little=0.01,much=0.2,sft=1h", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert (document["num_checkpoints"], document["num_scored"], document["budget_hours"]) == (44, 40, 3.0)
    regrets = [each["regret_at_budget"] for each in document["strategies"]]
    assert regrets == sorted(regrets)
    assert document["next"][-1]["kind"] == "sft"
    text = format_budget(document)
    assert document["bought_by"].startswith("elimination")
    assert text.count(f"by {document['bought_by']}:\n") == 1
    assert f"buy next, by {document['bought_by']}:\n  " in text
    assert "\n  sft (3 h): row" in text
    assert " ≈" in format_budget(document)
    assert re.search(r"\n  strategy +0\.750 \S.* +1\.50 \S.* +3 \S.*\n", text)
    assert "So none is shown to be behind" not in text
    # Long numbers do not run into the next column.
    for each in document["strategies"]:
        each |= {name: [value / 1e4 for value in each[name]] for name in ("regret", "low", "high")}
    assert not re.search(r"\]\d", format_budget(document))
    assert main([*command, "--budget", "3", "--costs", "little=1,sft=2"]) == 2
    assert "what much costs on one checkpoint is not known" in capsys.readouterr().err
    assert main([*command, "--budget", "3", "--costs", "little=3,much=3,sft=2"]) == 2
    assert "no indicator costs less than fine-tuning" in capsys.readouterr().err


def test_where_a_score_stands_apart_no_regret_has_an_interval(tmp_path, capsys):
    table = known()
    rows = pd.DataFrame({**table.values, "score": table.scores})
    rows.loc[3, "score"] += 100
    rows.to_csv(tmp_path / "t.csv", index=False)
    command = ["rank", "--table", str(tmp_path / "t.csv"), "--target", "score", "--higher", "little,much"]
    command += ["--budget", "3gpuh", "--costs", "little=0.01,much=0.2,sft=1h"]
    assert main([*command, "--json"]) == 0
    strategies = json.loads(capsys.readouterr().out)["strategies"]
    assert {end for each in strategies for end in (*each["low"], each["behind_first"]["low"])} == {None}
    assert main(command) == 0
    text = capsys.readouterr().out
    assert f"\n{NO_REGRET_INTERVAL} So none is shown to be behind another\n" in text
    assert "[" not in next(line for line in text.splitlines() if line.startswith("  fine-tune all "))


def test_rows_of_one_configuration_are_said_to_be_of_one_variant(tmp_path, capsys):
    table = known()
    rows = pd.DataFrame({**table.values, "score": table.scores, "lr": np.arange(NUM) % 6})
    rows.to_csv(tmp_path / "t.csv", index=False)
    command = ["rank", "--table", str(tmp_path / "t.csv"), "--target", "score", "--higher", "little", "--config", "lr"]
    command += ["--budget", "3gpuh", "--costs", "little=0.01,sft=1h"]
    assert main(command) == 2
    assert f"one half of 6 variants ({NUM} checkpoints: those of one variant count as one" in capsys.readouterr().err


def test_named_strategies_are_always_listed_and_ties_are_one_line(tmp_path, capsys):
    table, generator = known(), np.random.default_rng(0)
    rows = pd.DataFrame({"other_text/mean_loss": -table.values["little"], "score": table.scores})
    names = [f"early_sft/{place:02}" for place in range(20)]
    for name in names:
        rows[name] = table.values["much"] + generator.normal(size=NUM) / 100
    rows["early_sft/mean_score"], rows["useless"] = table.scores + generator.normal(size=NUM), table.values["useless"]
    rows.to_csv(tmp_path / "t.csv", index=False)
    higher = [*names, "early_sft/mean_score", "useless"]
    command = ["rank", "--table", str(tmp_path / "t.csv"), "--target", "score", "--lower", "other_text/mean_loss"]
    command += ["--higher", ",".join(higher), "--budget", "11"]
    costs = ",".join(["other_text/mean_loss=0.01", "sft=1h", *(f"{name}=0.2" for name in higher)])
    assert main([*command, "--costs", costs, "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    first, *others = (each["strategy"] for each in document["strategies"])
    assert "by other_text/mean_loss" not in [first, *others][:12]
    text = format_budget(document)
    for line in (
        "fine-tune all",
        "by other_text/mean_loss (lowest perplexity)",
        "by early_sft/mean_score (early fine-tuning)",
        "elimination, 1 rung",
        "elimination, 2 rungs",
        "ASHA on ",
        first,
    ):
        assert f"\n  {line}" in text
    [tied] = [line for line in text.splitlines() if "more that tie with the first at the budget" in line]
    assert int(tied.split()[1]) >= 18
    assert tied.endswith(", ...")
    assert "\n  and 1 more that are behind it\n" in text  # By the useless one.
