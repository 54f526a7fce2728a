"""Tables that no run made: what a column may be, and that they are ranked as a run is."""

import json
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from benchmarks.published_table import (
    CONFIG,
    LEARNT,
    PUBLISHED,
    TARGETS,
    between_rates,
    low_rates,
    on_all_rows,
    ranked,
    rows_of,
    share_of_pairs_right,
)
from benchmarks.published_table import TABLE as PAPER

from raysweep.analysis.given_table import Roles, rank_table
from raysweep.analysis.ranking import Ranking
from raysweep.analysis.sections import beyond_tables
from raysweep.cli import main
from raysweep.errors import DataError

ROLES = Roles("score", higher=("shots",), lower=("ppl",), config=("lr", "objective"))


def rows(num: int = 12) -> pd.DataFrame:
    """A score that rises with the rate, and indicators that follow it, or do not."""
    generator = np.random.default_rng(0)
    lr = np.tile([1e-4, 1e-3, 1e-2], num // 3)
    score = np.log10(lr) + generator.normal(size=num) / 10
    named = {"lr": lr, "objective": ["next", "span"] * (num // 2), "score": score, "ppl": -score}
    return pd.DataFrame({**named, "shots": generator.normal(size=num)})


def test_a_sorted_a_filtered_and_an_indexed_table_are_taken_row_by_row(tmp_path):
    path, roles = tmp_path / "t.parquet", Roles("score", lower=("ppl",), config=("lr",))
    draw = np.random.default_rng(0)
    table = pd.DataFrame({"lr": draw.choice([1.0, 2.0, 3.0, 4.0], 40)})
    table["score"] = table["lr"] / 10 + draw.normal(0, 0.01, 40)
    table["ppl"] = draw.normal(0, 0.02, 40) - table["score"]

    def right(table: pd.DataFrame) -> dict[str, float]:
        table.to_parquet(path)
        return {each.indicator: each.accuracy.value for each in rank_table(path, roles).associations}

    want = right(table)
    assert right(table.sort_values("score")) == want
    assert right(table.set_index("lr")) == want
    some = table[table["score"] > 0.15]
    assert right(some) == right(some.reset_index(drop=True))


def test_what_a_table_lacks_is_said(tmp_path, capsys):
    """Scores, values of indicators, and the scores' errors, without which no pair is known to be clear."""
    table = rows()
    table.loc[3, "score"] = np.nan
    table.loc[[4, 5], "shots"] = np.nan
    arguments = ["rank", "--table", str(tmp_path / "t.csv"), "--target", "score", "--higher", "shots", "--lower", "ppl"]
    table.to_csv(tmp_path / "t.csv", index=False)
    assert main(arguments) == 0
    said = capsys.readouterr().out
    assert "Indicators by agreement with score, taken as higher is better" in said
    assert "Not ranked, for want of a score: 1 of 12 checkpoints." in said
    assert "Without a value, of 11 scored checkpoints: shots 2." in said
    assert "errors of the score are not known; give them in a column score_stderr" in said
    row = next(line for line in said.splitlines() if line.startswith("│ shots"))
    assert row.split("│")[4].strip() == "—"
    table.assign(score_stderr=0.01).to_csv(tmp_path / "t.csv", index=False)
    assert main(arguments) == 0
    said = capsys.readouterr().out
    assert "errors of the score are not known" not in said
    row = next(line for line in said.splitlines() if line.startswith("│ shots"))
    assert row.split("│")[4].strip() != "—"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a;score\n1;2\n2;3\n", "its columns are separated by ';'; separate them by commas"),
        ("a;b;score\n1,5;2;3,1\n2,5;3;4,1\n", "its columns are separated by ';'; separate them by commas"),
        ("a\tscore\n1\t2\n2\t3\n", "its columns are separated by tabs; separate them by commas"),
        ("", "the file is empty; give a line of names and a line for each row"),
        ("a,score\n1,30.2%\n2,31%\n", "'30.2%' is no number; leave the % out"),
        ('a,score\n1,"30,2"\n2,"31,2"\n', "'30,2' is no number; decimals take a point, thousands no sign"),
        ("a,score\n1,n/a\n2,3\n", "'n/a' is no number; leave it empty if it is missing"),
        ("a,score\n1,3\n2,3\n", "all 2 scores are equal (3): nothing to rank"),
    ],
)
def test_what_is_wrong_with_a_table_is_said_in_one_line(tmp_path, capsys, text, said):
    (tmp_path / "t.csv").write_text(text)
    assert main(["rank", "--table", str(tmp_path / "t.csv"), "--target", "score", "--higher", "a"]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1


@pytest.mark.parametrize("ending", ["csv", "parquet"])
def test_a_table_gives_the_document_of_a_run(tmp_path, capsys, ending):
    path = tmp_path / f"t.{ending}"
    rows().to_csv(path, index=False) if ending == "csv" else rows().to_parquet(path)
    columns = ["--target", "score", "--higher", "shots", "--lower", "ppl", "--config", "lr,objective"]
    assert main(["rank", "--table", str(path), *columns, "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    found = {item["indicator"]: item for item in document["indicators"]}
    assert next(iter(found)) == "ppl"
    assert found["ppl"]["accuracy"]["value"] == 1.0
    assert found["ppl"]["direction"] == "min"
    assert {"point.lr", "point.objective", "all together"} < set(found)
    assert document["num_variants"] == 6  # Rows of one configuration are of one variant.
    assert document["skipped"] == {}
    # Without errors of the scores no pair is known to be clear of noise, nor within it.
    assert found["ppl"]["clear_accuracy"] == {"value": None, "low": None, "high": None}
    assert (found["ppl"]["pairs"]["num_clear"], found["ppl"]["pairs"]["num_within_noise"]) == (None, None)
    assert (document["errors"], document["num_clear"]) == ("unknown", None)
    assert main(["rank", "--table", str(path), *columns]) == 0
    assert "ppl" in capsys.readouterr().out


def test_a_missing_value_is_counted_and_a_variant_may_be_named(tmp_path):
    table = rows().astype({"shots": object})
    table.loc[3, "shots"] = None
    table["model"] = [f"m{row % 4}" for row in range(12)]
    table.to_csv(tmp_path / "t.csv", index=False)
    ranking = rank_table(tmp_path / "t.csv", Roles("score", higher=("shots",), variant="model"))
    assert ranking.num_variants == 4
    assert [(item.indicator, item.num_missing) for item in ranking.associations] == [("shots", 1)]


def test_losses_of_several_objectives_are_told_apart_as_in_a_run(tmp_path):
    """By the columns that say whose loss they are of, where an indicator is called as in a run."""
    table = rows().rename(columns={"ppl": "heldout/ppl"})
    table["perplexity_of"] = np.where(table["objective"] == "next", "causal_lm", "span_corruption")
    table.to_csv(tmp_path / "t.csv", index=False)
    roles = Roles("score", higher=("shots",), lower=("heldout/ppl",), config=("lr", "objective"))
    found = {item.indicator: item.pairs.num_pairs for item in rank_table(tmp_path / "t.csv", roles).associations}
    assert (found["heldout/ppl"], found["shots"]) == (2 * 15, 66)  # Six rows of either objective.


def test_losses_by_token_of_several_vocabularies_are_told_apart_as_in_a_run(tmp_path):
    table = rows().rename(columns={"ppl": "heldout/ppl", "shots": "indicators/kshot_log_likelihood_mean"})
    table["heldout/bits_per_byte"] = table["heldout/ppl"] + 0.01 * np.arange(12)
    table["vocabulary"] = np.where(table["objective"] == "next", "300 tokens (a)", "400 tokens (b)")
    table["mean_log_likelihood"] = table["score"]
    table.to_csv(tmp_path / "t.csv", index=False)
    roles = Roles(
        "score",
        higher=("indicators/kshot_log_likelihood_mean",),
        lower=("heldout/bits_per_byte", "heldout/ppl"),
    )
    found = {item.indicator: item.pairs.num_pairs for item in rank_table(tmp_path / "t.csv", roles).associations}
    assert found == {
        "heldout/bits_per_byte": 66,
        "heldout/ppl": 2 * 15,
        "indicators/kshot_log_likelihood_mean": 2 * 15,
    }
    with pytest.raises(DataError, match=r"mean_log_likelihood is by token, .* rank by a share, such as of right"):
        rank_table(tmp_path / "t.csv", replace(roles, target="mean_log_likelihood"))


@pytest.mark.parametrize(
    ("change", "roles", "message"),
    [
        ({}, Roles("scor", higher=("ppl",)), r"t.csv: --target: no column 'scor', did you mean 'score'; columns: lr"),
        ({}, Roles("score", higher=("ppl",), lower=("ppl",)), "'ppl' is given by --higher and by --lower"),
        ({}, Roles("score"), "no indicators: name at least one"),
        ({}, Roles(), "t.csv: which column is the score after fine-tuning"),
        ({"ppl": "n/a"}, ROLES, "column 'ppl', row 1: 'n/a' is no number; leave it empty"),
        ({"ppl": "inf"}, ROLES, "column 'ppl', row 1: 'inf' is not finite"),
        (
            {"point.lr": 1},
            Roles("score", config=("lr", "point.lr")),
            "'lr' and 'point.lr' are one setting by two names",
        ),
        ({"sft/a": 1}, Roles("score", higher=("sft/a",)), "--higher: 'sft/a' is a score of fine-tuning by its name"),
        ({"score": ""}, ROLES, "'score' holds fewer than 2 numbers"),
    ],
)
def test_mistakes_name_the_column_the_value_and_the_fix(tmp_path, change, roles, message):
    rows().assign(**change).to_csv(tmp_path / "t.csv", index=False)
    with pytest.raises(DataError, match=message):
        rank_table(tmp_path / "t.csv", roles)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("t.txt", "a", "is a .csv or a .parquet file, not '.txt'"),
        ("t.csv", "a,a\n1,2\n", "two columns are called 'a'"),
        ("t.csv", "", "the file is empty"),
        ("t", "a", "file, not one without an ending"),
        ("t.parquet", "no", "cannot be read"),
    ],
)
def test_files_that_are_no_tables(tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(DataError, match=message):
        rank_table(tmp_path / name, Roles("a", higher=("b",)))
    with pytest.raises(DataError, match="no such file"):
        rank_table(tmp_path / "none.csv", Roles("a", higher=("b",)))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([], "rank takes a run's name, folder or sweep file, or --table FILE"),
        (["r", "--table", "t.csv"], "not both 'r' and --table t.csv"),
        (["r", "--higher", "a"], "--higher tells of a table's columns"),
        (["r", "--learn", "m", "--budget", "3"], "--learn and --budget are answered one at a time"),
        (["--table", "t.csv", "--learn", "m", "--drop-flagged"], "leave --drop-flagged out"),
        (["--table", "t.csv", "--costs", "sft=1"], "give --budget HOURS too"),
        (["--table", "t.csv", "--budget", "3"], "--costs sft=HOURS,INDICATOR=HOURS"),
        (
            ["--table", "t.csv", "--higher", "ppl", "--budget", "3", "--costs", "sft=1,pl=1"],
            "'pl' is no indicator, did",
        ),
    ],
)
def test_commands_that_do_not_go_together(capsys, given, message):
    assert main(["rank", *given]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--budget", "abc", "'abc' is no number of hours; write 20gpuh"),
        ("--costs", "ppl=1h,sft", "'sft' has no hours; write NAME=HOURS"),
    ],
)
def test_hours_say_their_form(capsys, option, value, message):
    with pytest.raises(SystemExit):
        main(["rank", "--table", "t.csv", option, value])
    assert message in capsys.readouterr().err


def test_tables_of_indicators_with_missing_values_have_columns_in_common(tmp_path):
    table = rows(24)
    table["few"] = table["score"].where(np.arange(24) < 6)  # The best one, of too few rows to select 3.
    roles = Roles("score", higher=("few", "shots"), lower=("ppl",), config=("lr", "objective"), gaps="shots")
    table["variant"] = [str(row) for row in range(24)]
    table.to_csv(tmp_path / "t.csv", index=False)
    ranking = rank_table(tmp_path / "t.csv", roles)
    by_target, matched, selected, gaps = (table for _, table in beyond_tables(ranking))
    for each in (by_target, matched, selected, gaps):
        assert {len(row.cells) for row in each.rows} == {len(each.columns)}
    assert [heading.name for heading in selected.columns[1::3]] == ["recall at 1", "recall at 3", "recall at 5"]
    # Four rows in each of six settings: 16 pairs of each two rates of an objective, or two objectives of a rate.
    pairs = {"lr (96 pairs)", "objective (48 pairs)", "no setting (36 pairs)"}
    assert {heading.name for heading in matched.columns[1:]} == pairs
    spans = [{(gap.low, gap.high) for gap in item.by_gap} for item in ranking.associations]
    assert len(set().union(*spans)) == max(map(len, spans)) <= 5


@pytest.mark.skipif(not PAPER.is_file(), reason="RAYSWEEP_DATA names no data pack")
def test_the_pairs_right_of_a_published_table():
    off = []
    for place, target in enumerate(TARGETS):
        ranking = rank_table(PAPER, Roles(target, higher=tuple(PUBLISHED)))
        found = {item.indicator: item for item in ranking.associations}
        assert all(item.pairs.num_pairs == 1225 for item in found.values())
        off += [abs(found[name].accuracy.value - values[place]) for name, values in PUBLISHED.items()]
    assert max(off) <= 0.03
    assert np.mean(off) <= 0.01


@pytest.fixture(scope="module")
def paper() -> list[Ranking]:
    """By each target, of all rows."""
    return ranked(drop_flagged=False)


@pytest.mark.skipif(not PAPER.is_file(), reason="RAYSWEEP_DATA names no data pack")
def test_what_is_learnt_from_a_published_table_is_right_as_often_as_the_paper_says(paper):
    pytest.importorskip("lightgbm", reason="LightGBM, of the extra 'compare', is not installed")
    for ranking, (value, spread) in zip(paper, LEARNT, strict=True):
        assert abs(on_all_rows(ranking).accuracy.value - value) < spread


CLEANED = {"drop_flagged": True}


@pytest.mark.skipif(not PAPER.is_file(), reason="RAYSWEEP_DATA names no data pack")
def test_what_a_published_table_tells_beyond_its_learning_rates(tmp_path):
    """Copies, a collapse and a leak are flagged; no indicator is shown to add to the configuration."""
    kinds, rates = set(), []
    for target in TARGETS:
        roles = Roles(target, higher=tuple(PUBLISHED), config=CONFIG, gaps="ppl_clm")
        ranking = rank_table(PAPER, roles, **CLEANED)
        found = {item.indicator: item for item in ranking.associations}
        kinds |= {(flag.kind, flag.rows, flag.columns if flag.kind == "leaked" else ()) for flag in ranking.flags}
        assert ranking.num_variants == 46
        rates.append(found["all together"].accuracy.value)
        assert all(found[name].added.low < 0 for name in PUBLISHED)
        assert found["ppl_clm"].by_gap[0].num_pairs > 200
    assert {flag[:2] for flag in kinds if flag[0] != "leaked"} == {
        ("copy", ("row 46", "row 49")),
        ("copy", ("row 47", "row 50")),
        ("collapsed", ("row 4",)),
        ("collapsed", ("row 38",)),
    }
    [leak] = [flag for flag in kinds if flag[0] == "leaked"]
    assert (len(leak[1]), leak[2]) == (13, ("k_cbqa",))
    # The learning rate alone is said to rank 0.74, 0.79 and 0.81 of pairs right of 47 cleaned rows.
    assert rates == pytest.approx([0.74, 0.79, 0.81], abs=0.05)


@pytest.mark.skipif(not PAPER.is_file(), reason="RAYSWEEP_DATA names no data pack")
def test_a_published_table_without_its_high_rates(paper):
    """Across two blocks of rates few-shot scores on RAG are nearly all right, within the lower one hardly any more so
    than the rate (papers 2.8, items 4 and 5)."""
    low = low_rates()
    assert [len(each.checkpoints) for each in low] == [34] * 3
    found = [{item.indicator: item.accuracy.value for item in each.associations} for each in low]
    for name, values in {
        "k_rag": (0.59, 0.63, 0.52),
        "ppl_sc": (0.65, 0.57, 0.54),
        "ppl_clm": (0.38, 0.41, 0.33),
    }.items():
        assert [each[name] for each in found] == pytest.approx(values, abs=0.006)
    rates = [rows_of(each, ["point.lr"]) for each in low]
    right = [share_of_pairs_right(values[:, 0], scores) for values, scores, _ in rates]
    assert right == pytest.approx((0.65, 0.67, 0.70), abs=0.006)
    across = [between_rates(each, "k_rag") for each in paper]
    assert across == pytest.approx((0.89, 0.98, 0.98), abs=0.006)


@pytest.mark.skipif(not PAPER.is_file(), reason="RAYSWEEP_DATA names no data pack")
def test_the_pairs_of_a_published_table_that_differ_in_one_setting(tmp_path):
    table = pd.read_csv(PAPER)
    table["rate"] = table["lr"]
    table.to_csv(tmp_path / "t.csv", index=False)
    matched = {}
    for target in TARGETS:
        ranking = rank_table(tmp_path / "t.csv", Roles(target, higher=("ppl_clm", "rate"), config=CONFIG))
        for item in ranking.associations:
            matched[item.indicator, target] = {each.axis: each for each in item.matched}
    loss = [matched["ppl_clm", target] for target in TARGETS]
    rate = [matched["rate", target] for target in TARGETS]
    assert [each["point.lr"].num_pairs for each in loss] == [70] * 3
    assert [each["point.mix"].num_pairs for each in loss] == [30] * 3
    assert [each["point.lr"].accuracy.value for each in loss] == pytest.approx([0.18, 0.19, 0.24], abs=0.006)
    assert [each["point.mix"].accuracy.value for each in loss] == pytest.approx([0.38, 0.45, 0.43], abs=0.006)
    # Five pairs of other mixes among 110.
    assert [each["point.objective"].accuracy.value for each in loss] == pytest.approx([0.28, 0.41, 0.39], abs=0.02)
    assert [each["point.lr"].accuracy.value for each in rate] == pytest.approx([0.89, 0.89, 0.86], abs=0.006)
