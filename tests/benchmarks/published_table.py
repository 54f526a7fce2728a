"""The 50 rows of Zeng et al. (2025, arXiv 2504.12491), in Markdown: indicators, configuration, and what is learnt.

    RAYSWEEP_DATA=data python tests/benchmarks/published_table.py    # of the data pack, paper2_table6.csv

Shares of pairs in the right order. What is learnt is tested on pairs of variants that were not learnt from: 20 splits,
by the corrected resampled variance, of shares Wilson's, of differences Student's t; of left-out groups all pairs within
them, jackknife over variants.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np

from raysweep.analysis.associations import TOGETHER, numbers
from raysweep.analysis.comparer import lightgbm, tree_logits
from raysweep.analysis.defects import copied_rows, flagged_rows
from raysweep.analysis.formatting import with_interval
from raysweep.analysis.given_table import Roles, rank_table, take
from raysweep.analysis.learning import Tested, learn_target
from raysweep.analysis.pair_features import features, fit_scale, normalised, ordered_pairs
from raysweep.analysis.pairwise import Floats, IntervalEstimate
from raysweep.analysis.ranking import Ranking
from raysweep.analysis.unseen import (
    Predict,
    Split,
    Unseen,
    as_it_is,
    learner,
    leave_group_out,
    on_unseen,
    random_splits,
    shares_as_it_is,
)

TABLE = Path(os.environ.get("RAYSWEEP_DATA", "nowhere")) / "paper2_table6.csv"
INDICATORS = {
    "k_rag": "Kshot-RAG",
    "ppl_sc": "PPL-SC",
    "k_cms": "Kshot-CMS",
    "k_cbqa": "Kshot-CBQA",
    "ppl_clm": "PPL-CLM",
}
CONFIG = ("lr", "objective", "mix", "tag", "length")
TARGETS = ("sft_cms", "sft_rag", "sft_cbqa")
PUBLISHED = {
    "ppl_clm": (0.332, 0.380, 0.354),
    "ppl_sc": (0.703, 0.622, 0.609),
    "k_cms": (0.573, 0.569, 0.525),
    "k_rag": (0.696, 0.766, 0.704),
    "k_cbqa": (0.437, 0.447, 0.467),
}
"""Table 1 of the paper, by target."""
LEARNT = ((0.753, 0.054), (0.727, 0.039), (0.753, 0.060))
"""Table 2 of the paper: pairs right of learning to compare by target, and their standard deviation over 20 splits."""


def ranked(*, drop_flagged: bool) -> list[Ranking]:
    """By each target."""
    roles = [Roles(target, higher=tuple(INDICATORS), config=CONFIG, gaps="ppl_clm") for target in TARGETS]
    return [rank_table(TABLE, each, drop_flagged=drop_flagged) for each in roles]


def rows_of(ranking: Ranking, names: Sequence[str], *, without: Sequence[str] = ()) -> tuple[Floats, Floats, list[str]]:
    """(values [rows, names], scores [rows], variants) in the order in which `learn_target` has them."""
    table = ranking.checkpoints
    table = table[~table["checkpoint"].isin(without)].sort_values("checkpoint")
    values = np.stack([numbers(table[name]) for name in names], axis=1)
    return values, numbers(table[ranking.target]), list(table["variant"])


def on_all_rows(ranking: Ranking) -> Unseen:
    """Learnt from the five indicators, as the paper has them: copies, collapsed rows and leaks among them."""
    values, scores, variants = rows_of(ranking, list(INDICATORS))
    return on_unseen(learner(values, scores, variants), scores, random_splits(variants))


def as_given(values: Floats) -> Predict:
    """In place of a learner: the higher value is better."""
    return lambda _: lambda first, second: values[first] - values[second]


def rate_alone(ranking: Ranking, tested: Tested) -> tuple[IntervalEstimate, IntervalEstimate]:
    """Pairs right of the higher learning rate: on the splits of what is learnt, and within each objective."""
    values, scores, variants = rows_of(ranking, ["point.lr"], without=list(tested.rows_left_out))
    table = ranking.checkpoints[~ranking.checkpoints["checkpoint"].isin(tested.rows_left_out)].sort_values("checkpoint")
    groups = leave_group_out(list(table["point.objective"]), variants)
    within = on_unseen(as_given(values[:, 0]), scores, groups, variants=variants)
    return as_it_is(values[:, 0], scores, random_splits(variants)), within.accuracy


LOW, HIGH = 5e-4, 7.5e-4
"""The rates up to which, and from which on, the table's k-shot numbers look like two different measurements."""


def low_rates() -> list[Ranking]:
    """By each target, of the rows with a rate of `LOW` or less alone, without copies."""
    found = []
    for target in TARGETS:
        given = take(TABLE, Roles(target, higher=tuple(INDICATORS), config=CONFIG))
        high = set(given.rows.loc[given.rows["point.lr"] > LOW, "checkpoint"])
        found.append(given.ranking(without=high | set(copied_rows(given.ranking().flags))))
    return found


def between_rates(ranking: Ranking, name: str) -> float:
    """Pairs right by a column of one row of `LOW` or less and one of `HIGH` or more, without flagged rows."""
    table = ranking.checkpoints[~ranking.checkpoints["checkpoint"].isin(flagged_rows(ranking.flags))]
    low, high = table[table["point.lr"] <= LOW], table[table["point.lr"] >= HIGH]
    ours, theirs = (np.sign(numbers(high[each])[:, None] - numbers(low[each])) for each in (name, ranking.target))
    return float((1 + ours * theirs).mean() / 2)


def of_low_rates(whole: Sequence[Ranking], low: Sequence[Ranking]) -> Iterator[str]:
    """A row for each indicator, the rate, and what is learnt: across the two blocks of rates, and within the lower."""
    num = len(low[0].checkpoints)
    yield f"| pairs right: CMS; RAG; CBQA | {num} rows of rates up to {LOW:g} | one of these, one from {HIGH:g} on |"
    yield "| --- | --- | --- |"
    by_name = [{item.indicator: item.accuracy for item in each.associations} for each in low]
    cells = {title: [with_interval(each[name]) for each in by_name] for name, title in INDICATORS.items()}
    across = {title: [f"{between_rates(each, name):.2f}" for each in whole] for name, title in INDICATORS.items()}
    rates = [rows_of(each, ["point.lr"]) for each in low]
    right = [share_of_pairs_right(values[:, 0], scores) for values, scores, _ in rates]
    cells["the higher learning rate, ties half"] = [f"{each:.2f}" for each in right]
    across["the higher learning rate, ties half"] = [f"{between_rates(each, 'point.lr'):.2f}" for each in whole]
    tested = [learn_target(each).tested for each in low]
    cells["learnt from the indicators, on unseen variants"] = [
        with_interval(each.indicators.accuracy) for each in tested
    ]
    cells["learnt from the configuration"] = [with_interval(each.config.accuracy) for each in tested if each.config]
    cells["both, over the configuration"] = [with_interval(each.gain) for each in tested if each.gain]
    for title, each in cells.items():
        yield f"| {title} | {'; '.join(each)} | {'; '.join(across.get(title, []))} |"


def plain_trees(values: Floats, scores: Floats) -> Predict:
    """100 trees by LightGBM's own settings, and no line: the plainest learner from the same features of a pair."""

    def predict(split: Split) -> Callable[[np.ndarray, np.ndarray], Floats]:
        scales = [fit_scale(str(place), column[split.train]) for place, column in enumerate(values.T)]
        known = normalised(scales, values)
        first, second = ordered_pairs(split.train)
        apart = scores[first] != scores[second]
        first, second = first[apart], second[apart]
        better = (scores[first] > scores[second]).astype(np.float64)
        data = lightgbm().Dataset(features(known[first], known[second]), better)
        booster = lightgbm().train({"objective": "binary", "verbose": -1, "num_threads": 1}, data)
        return lambda one, other: tree_logits(booster, known[one], known[other])

    return predict


def of_crossed_rows(whole: Sequence[Ranking]) -> Iterator[str]:
    """A row for each learner, on the rows that differ in objective and rate alone, without flagged ones.

    A rate left out is then tested on pairs of objectives alone, an objective left out on pairs of rates. In the whole
    table most pairs of one rate are of the 20 rows of 2.5e-4, whose mixes, tags and lengths hardly move the scores.
    """
    rows: dict[str, list[list[str]]] = {}
    for ranking in whole:
        table = ranking.checkpoints
        same = (table["point.mix"] == "DC-0") & (table["point.length"] == "all") & (numbers(table["point.tag"]) == 0)
        out = {*table.loc[~same, "checkpoint"], *flagged_rows(ranking.flags)}
        values, scores, variants = rows_of(ranking, list(INDICATORS), without=list(out))
        rates, _, _ = rows_of(ranking, ["point.lr"], without=list(out))
        own = table[~table["checkpoint"].isin(out)].sort_values("checkpoint")
        learners = {
            "learnt from the five indicators": learner(values, scores, variants),
            "learnt by plain trees": plain_trees(values, scores),
            "nothing learnt: Kshot-RAG": as_given(values[:, 0]),
            "nothing learnt: the higher rate": as_given(rates[:, 0]),
        }
        for name, predict in learners.items():
            found = [
                on_unseen(predict, scores, leave_group_out(list(own[axis]), variants), variants=variants)
                for axis in ("point.lr", "point.objective")
            ]
            rows.setdefault(name, []).append([with_interval(each.accuracy) for each in found])
    yield f"| pairs right of {len(own)} rows: CMS; RAG; CBQA | of a rate left out | of an objective left out |"
    yield "| --- | --- | --- |"
    for name, by_target in rows.items():
        yield f"| {name} | " + " | ".join("; ".join(cells) for cells in zip(*by_target, strict=True)) + " |"


def share_of_pairs_right(values: Floats, scores: Floats) -> float:
    """Ties half."""
    every = np.arange(len(scores))
    return shares_as_it_is(values, scores, [Split(every[:0], every)])[0]


def published(whole: Sequence[Ranking]) -> Iterator[str]:
    """How far the five are from Table 1 of the paper, and what is flagged."""
    found = [{item.indicator: item.accuracy.value for item in each.associations} for each in whole]
    off = [abs(of[name] - values[place]) for name, values in PUBLISHED.items() for place, of in enumerate(found)]
    yield f"off Table 1 of the paper by {max(off):.3f} at most, {np.mean(off):.3f} on average; flagged:"
    yield from dict.fromkeys(f"* {flag.text}" for each in whole for flag in each.flags)


def beside_config(cleaned: Sequence[Ranking]) -> Iterator[str]:
    """A row for each indicator, on rows without copies and collapsed ones."""
    yield (
        f"| pairs right of {len(cleaned[0].checkpoints)} rows: CMS; RAG; CBQA | all pairs | adds to config | of one "
        "configuration but for the rate | but for the objective |\n| --- | --- | --- | --- | --- |"
    )
    by_name = [{item.indicator: item for item in each.associations} for each in cleaned]
    for name, title in ({TOGETHER: "configuration alone"} | INDICATORS).items():
        items = [each[name] for each in by_name]
        alike = [{each.axis: each.accuracy for each in item.matched} for item in items]
        cells = [
            "; ".join(with_interval(item.accuracy) for item in items),
            "" if name == TOGETHER else "; ".join(with_interval(item.added) for item in items),
            *("; ".join(f"{each[axis].value:.2f}" for each in alike) for axis in ("point.lr", "point.objective")),
        ]
        yield f"| {title} | " + " | ".join(cells) + " |"


def learnt(whole: Sequence[Ranking]) -> Iterator[str]:
    """What is learnt from, a row each."""
    tested = [learn_target(each).tested for each in whole]
    rates = [rate_alone(*pair) for pair in zip(whole, tested, strict=True)]
    all_rows = [on_all_rows(each) for each in whole]
    rows = {
        "the five indicators, all 50 rows as they are": [
            f"{own.accuracy.value:.3f} (the paper: {value} +- {spread})"
            for own, (value, spread) in zip(all_rows, LEARNT, strict=True)
        ],
        "rows tested on; of these not learnt from": [
            f"{each.num_checkpoints}; {len(each.rows_not_learnt_from)}" for each in tested
        ],
        "the indicators but leaks": [with_interval(each.indicators.accuracy) for each in tested],
        "the configuration": [with_interval(each.config.accuracy) if each.config else "" for each in tested],
        "both": [with_interval(each.both.accuracy) if each.both else "" for each in tested],
        "both, over the configuration": [with_interval(each.gain) if each.gain else "" for each in tested],
        "nothing: the higher learning rate": [with_interval(split) for split, _ in rates],
        "nothing: Kshot-RAG as it is": [with_interval(each.single["k_rag"]) for each in tested],
        "the indicators, of a rate that none learnt from had": [
            with_interval(each.without_group["point.lr"].accuracy) for each in tested
        ],
        "the indicators, of an objective that none learnt from had": [
            with_interval(each.without_group["point.objective"].accuracy) for each in tested
        ],
        "nothing: the higher learning rate, within an objective": [with_interval(within) for _, within in rates],
    }
    yield "| pairs right on variants that were not learnt from; learnt from | CMS | RAG | CBQA |"
    yield "| --- " * 4 + "|"
    for name, cells in rows.items():
        yield f"| {name} | " + " | ".join(cells) + " |"
    for target, each in zip(TARGETS, tested, strict=True):
        yield f"\n{target}: left out as leaks: {', '.join(each.left_out) or 'none'}"
        yield from (f"left out: {why}" for why in each.rows_left_out.values())
        yield from (f"not learnt from: {why}" for why in each.rows_not_learnt_from.values())


def main() -> None:
    """Print the tables."""
    whole = ranked(drop_flagged=False)
    cleaned = ranked(drop_flagged=True)
    for part in (
        published(whole),
        beside_config(cleaned),
        learnt(whole),
        of_crossed_rows(whole),
        of_low_rates(whole, low_rates()),
    ):
        print(*part, "", sep="\n")


if __name__ == "__main__":
    main()
