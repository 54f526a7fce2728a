"""Copies, collapsed rows and leaks of the target are found; a sound table has none."""

import re

import numpy as np
import pandas as pd
import pytest

from raysweep.analysis.defects import Flag, collapsed_rows, find_flags, flagged_rows
from raysweep.analysis.ranking import rank
from raysweep.scores import Column
from raysweep.spec import Metric


def table(seed: int = 0) -> pd.DataFrame:
    generator = np.random.default_rng(seed)
    rows = pd.DataFrame(generator.normal(50, 2, size=(40, 4)), columns=["score", "a", "b", "c"])
    rows["a"] += rows["score"]  # As good an indicator as one may wish for.
    return rows.assign(checkpoint=[f"row {i}" for i in range(40)], **{"point.lr": np.tile([1e-4, 1e-3], 20)})


def flags_of(rows: pd.DataFrame) -> list[Flag]:
    return find_flags(rows, target="score", indicators=["a", "b", "c"], config=["point.lr"])


@pytest.mark.parametrize("seed", range(10))
def test_a_sound_table_has_no_flags(seed):
    assert flags_of(table(seed)) == []


def test_a_copy_of_a_row_leaves_the_first():
    rows = table()
    rows.loc[7, ["score", "a", "b", "c"]] = rows.loc[3, ["score", "a", "b", "c"]]
    [flag] = flags_of(rows)
    assert (flag.kind, flag.rows) == ("copy", ("row 3", "row 7"))
    assert flag.text == "row 3 and row 7 are alike in all 4 numbers: one model, counted 2 times"
    assert flagged_rows([flag]) == ("row 7",)


def test_rows_that_share_coarse_numbers_are_no_copies():
    rows = table()
    rows["score"] = (rows["score"] / 5).round()
    rows["a"] = (rows["a"] / 5).round()
    rows["b"] = rows["b"] > 50
    assert rows.duplicated(["score", "a", "b"]).any()
    assert find_flags(rows, target="score", indicators=["a", "b"], config=[]) == []
    # One number of a row's own, `c`, may be the same by chance; three may not.
    rows.loc[7] = rows.loc[3].where(rows.columns != "checkpoint", rows.loc[7])
    assert flags_of(rows) == []
    fine = rows.assign(d=np.arange(40.0), e=np.arange(40.0) ** 2)
    fine.loc[7, ["d", "e"]] = fine.loc[3, ["d", "e"]]
    [flag] = find_flags(fine, target="score", indicators=["a", "b", "c", "d", "e"], config=[])
    assert (flag.kind, flag.rows) == ("copy", ("row 3", "row 7"))


def test_a_table_of_nothing_but_copies_is_seen():
    rows = pd.concat([table()] * 3, ignore_index=True).assign(checkpoint=[f"row {i}" for i in range(120)])
    assert len(flagged_rows(flags_of(rows))) == 80


def test_a_collapsed_number_is_far_off_by_a_factor():
    rows = table()
    rows.loc[5, "b"] = 0.15
    rows.loc[6, "c"] = 40.0  # Off by many deviations of noise, and no collapse.
    [flag] = flags_of(rows)
    assert (flag.kind, flag.rows, flag.columns) == ("collapsed", ("row 5",), ("b",))
    assert flagged_rows([flag]) == ("row 5",)


def test_a_kind_of_models_that_is_far_from_the_others_is_no_collapse():
    """As of an objective by which nothing is read on, whose causal loss is thrice that of all others."""
    rows = table()
    rows.loc[:5, "b"] *= 3
    rows.loc[[9, 11], "c"] /= 30
    flags = flags_of(rows)
    assert [(flag.kind, flag.rows) for flag in flags] == [("collapsed", ("row 9",)), ("collapsed", ("row 11",))]


@pytest.mark.parametrize("leak", [lambda score: 3 * score + 1, lambda score: 50 + 10 * np.exp((50 - score) / 5)])
def test_a_leak_is_found_in_a_part_of_the_rows(leak):
    rows = table()
    high = rows["point.lr"] == 1e-3
    rows.loc[high, "b"] = leak(rows.loc[high, "score"])
    leaked = [flag for flag in flags_of(rows) if flag.kind == "leaked"]
    [flag] = leaked
    assert flag.columns == ("b",)
    assert set(flag.rows) == set(rows["checkpoint"][high])
    assert "where lr is 0.001" in flag.text
    assert flagged_rows(leaked) == ()


def test_leaks_in_the_same_rows_are_one_flag():
    rows = table()
    high = rows["point.lr"] == 1e-3
    rows.loc[high, "b"] = 3 * rows.loc[high, "score"]
    rows.loc[high, "c"] = rows.loc[high, "score"] + np.tile([0.0, 0.2], 10)
    rows["a"] = -rows["score"]
    everywhere, part = (flag for flag in flags_of(rows) if flag.kind == "leaked")
    assert everywhere.columns == ("a",)
    assert everywhere.text == (
        "a is all but a function of score (correlation 1.000 over 40 rows): see that it was measured before fine-tuning"
    )
    assert part.columns == ("b", "c")
    assert set(part.rows) == set(rows["checkpoint"][high])
    assert re.match(
        r"b and c are each all but a function of score where lr is 0.001 \(correlation 0.99\d to 1", part.text
    )


def test_a_leak_is_looked_for_among_values_that_compare():
    """Of two objectives whose losses lie apart, as the scores do, no loss is a leak; in one of them it may be."""
    rows = table().assign(perplexity_of=["causal", "masked"] * 20, status="done", seed=0, step=1)
    rows["variant"] = rows["trial"] = rows["checkpoint"]
    masked = rows["perplexity_of"] == "masked"
    rows["heldout/ppl"] = np.exp((rows["b"] - 50) / 100 + masked)
    rows["score"] += 200 * masked

    def leaks(rows: pd.DataFrame) -> list[Flag]:
        ranking = rank(rows, columns=[Column("heldout", Metric("ppl", "min"))], target="score")
        return [flag for flag in ranking.flags if flag.kind == "leaked"]

    assert [flag.columns for flag in leaks(rows.drop(columns="perplexity_of"))] == [("heldout/ppl",)]
    assert leaks(rows) == []
    rows.loc[masked, "heldout/ppl"] = rows["score"]
    [flag] = leaks(rows)
    assert set(flag.rows) == set(rows["checkpoint"][masked])
    assert "all but a function of score among values that compare (correlation 1.000 over 20 rows)" in flag.text


def test_texts_call_checkpoints_by_their_labels_and_name_the_first_columns():
    rows = table()
    rows = rows.assign(**{f"d{at}": rows["b"] + at for at in range(6)})
    rows.loc[5, ["b", *(f"d{at}" for at in range(6))]] = 0.15
    names = ["a", "b", "c", *(f"d{at}" for at in range(6))]
    labels = {row: f"model {row.removeprefix('row ')}" for row in rows["checkpoint"]}
    [flag] = find_flags(rows, target="score", indicators=names, config=[], labels=labels)
    assert (flag.rows, len(flag.columns)) == (("row 5",), 7)
    assert re.fullmatch(r"model 5 is far from all others: b 0.15 \(.*\), d0 .*, d1 .* and 4 more", flag.text)


def test_zeros_are_values_unless_one_stands_alone_far_below_the_others():
    rows = table()
    rows.loc[:11, "b"] = 0.0  # As a few-shot score that a third of the models have.
    rows["c"] = np.tile([0.0, 1.0, 2.0, 2.0], 10)
    assert flags_of(rows) == []
    rows = table()
    rows.loc[5, "b"] = 0.0
    rows["c"] = [0.0, *np.tile([1.0, 2.0, 3.0], 13)]
    [flag] = flags_of(rows)
    assert (flag.rows, flag.columns) == (("row 5",), ("b",))


def test_a_row_is_not_left_out_of_a_test_by_its_target():
    rows = table()
    rows.loc[5, "score"] = 0.15
    rows.loc[6, "b"] = 0.15
    flags = flags_of(rows)
    assert flagged_rows(flags) == ("row 5", "row 6")
    assert list(collapsed_rows(flags, ["a", "b"])) == ["row 6"]
    assert "row 6 is far from all others: b 0.15" in collapsed_rows(flags, ["b"])["row 6"]
