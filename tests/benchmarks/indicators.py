"""The indicator study's tables, in Markdown: which indicator tells which checkpoint fine-tunes better.

    python tests/benchmarks/indicators.py                            # from the table in tests/data
    python tests/benchmarks/indicators.py --run RUN --store STORE    # from a run, whose table is written there

Errors are shares of pairs in the wrong order. Of single indicators and of the configuration they are over all pairs of
checkpoints, with 95 % intervals over variants (jackknife); of what is learnt on pairs of variants that it has not seen
(20 splits, corrected resampled t).
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import pandas as pd

from raysweep.analysis.associations import numbers
from raysweep.analysis.learning import Tested, indicators_named, learn_target
from raysweep.analysis.pairwise import IntervalEstimate
from raysweep.analysis.ranking import MEAN_LIKELIHOOD, Ranking, rank
from raysweep.analysis.unseen import over_splits, random_splits, shares_as_it_is
from raysweep.results import Results
from raysweep.scores import Column
from raysweep.spec import Metric

TABLE = Path(__file__).parents[1] / "data" / "indicators_cpu.parquet"
FAMILIES = ("cms", "rag", "cbq")
TARGETS = (MEAN_LIKELIHOOD, *(f"sft/{family}/mean_log_likelihood" for family in FAMILIES))
PPL_CLM = "other_text/mean_loss"
KNOWN = {
    PPL_CLM: "PPL-CLM",
    "span_loss/loss_nats_per_token": "PPL-SC",
    "indicators/kshot_log_likelihood_mean": "k-shot likelihood",
    "early_sft/mean_loss_nats": "early SFT",
}
EARLY_SFT = "early_sft"
"""The indicators that are fine-tuning themselves."""
NO_PART_OF_A_STUDY = ("location",)
"""Where checkpoints lie on one machine."""


def write(results: Results) -> None:
    """A run's checkpoint table, with what its columns are."""
    table = results.checkpoints.drop(columns=list(NO_PART_OF_A_STUDY))
    data = str(Path(os.environ["RAYSWEEP_DATA"]).absolute())
    for name in table.select_dtypes("string"):
        table[name] = table[name].str.replace(data, "${RAYSWEEP_DATA}", regex=False)
    columns = [column for column in results.columns if column.name in table]
    table.attrs = {"columns": json.dumps([asdict(column) for column in columns])}
    TABLE.parent.mkdir(exist_ok=True)
    table.to_parquet(TABLE, index=False, compression="zstd")


def read() -> tuple[pd.DataFrame, list[Column]]:
    """What `write` has written."""
    table = pd.read_parquet(TABLE)
    rows = json.loads(table.attrs["columns"])
    return table, [Column(row["kind"], Metric(**row["metric"]), row["task"], tuple(row["tasks"])) for row in rows]


def wrong(right: IntervalEstimate) -> str:
    """`0.26 [0.18, 0.35]`, of pairs right."""
    return f"{1 - right.value:.3f} [{1 - right.high:.2f}, {1 - right.low:.2f}]"


def signed(gain: IntervalEstimate, digits: int = 2) -> str:
    """`+0.04 [-0.01, 0.09]`."""
    return f"{gain.value:+.3f} [{gain.low:+.{digits}f}, {gain.high:+.{digits}f}]"


def singles(rankings: list[Ranking]) -> Iterator[str]:
    """A row for each indicator that compares all checkpoints, best first by the mean over tasks."""
    yield "| error of | " + " | ".join(each.target for each in rankings) + " | adds to config |"
    yield "| --- " * (len(rankings) + 2) + "|"
    by_name = [{item.indicator: item for item in each.associations} for each in rankings]
    for item in rankings[0].associations:
        name = KNOWN.get(item.indicator, item.indicator)
        name = f"**{name}**" if item.indicator in KNOWN or item.source == "config" else name
        of_targets = [wrong(each[item.indicator].accuracy) if item.indicator in each else "" for each in by_name]
        added = "" if item.source == "config" else signed(item.added)
        few = "" if item.selection or item.source == "config" else f" ({item.pairs.num_pairs} pairs)"
        yield f"| {name}{few} | " + " | ".join(of_targets) + f" | {added} |"


def over_half(ranking: Ranking, tested: Tested) -> IntervalEstimate:
    """The learnt error minus half of PPL-CLM's on the same splits: 0 or less is what was asked for."""
    table = ranking.checkpoints
    table = table[table[ranking.target].notna() & ~table["checkpoint"].isin(tested.rows_left_out)]
    splits = random_splits(list(table["variant"]))
    alone = shares_as_it_is(-numbers(table[PPL_CLM]), numbers(table[ranking.target]), splits)
    own = [right for _, right, _ in tested.indicators.by_split]
    return over_splits([(1 - a) - (1 - b) / 2 for a, b in zip(own, alone, strict=True)], splits, low=-1.0)


def learnt(rankings: list[Ranking]) -> Iterator[str]:
    """What is learnt from, a row each, for each target."""
    yield "| pairs wrong on unseen variants | " + " | ".join(each.target for each in rankings) + " |"
    yield "| --- " * (len(rankings) + 1) + "|"
    start = time.process_time()
    tested = [learn_target(each).tested for each in rankings]
    spent = time.process_time() - start
    early = indicators_named(rankings, [EARLY_SFT])
    before = [learn_target(each, without=early).tested for each in rankings]
    rows = {
        "checkpoints (variants) tested on": [f"{each.num_checkpoints} ({each.num_variants})" for each in tested],
        "of these not learnt from": [str(len(each.rows_not_learnt_from)) for each in tested],
        "the same without early SFT": [str(len(each.rows_not_learnt_from)) for each in before],
        "indicators, learnt": [wrong(each.indicators.accuracy) for each in tested],
        "indicators but early SFT, learnt": [wrong(each.indicators.accuracy) for each in before],
        "configuration, learnt": [wrong(each.config.accuracy) if each.config else "" for each in tested],
        "both, learnt": [wrong(each.both.accuracy) if each.both else "" for each in tested],
        "indicators add to the configuration": [signed(each.gain) if each.gain else "" for each in tested],
        "indicators but early SFT add to it": [signed(each.gain) if each.gain else "" for each in before],
        "mean rank by all indicators": [wrong(each.mean_rank) for each in tested],
    } | {
        name: [wrong(each.single[column]) for each in tested]
        for column, name in KNOWN.items()
        if all(column in each.single for each in tested)
    }
    for name, cells in rows.items():
        yield f"| {name} | " + " | ".join(cells) + " |"
    for name, group in (("indicators, learnt", tested), ("indicators but early SFT, learnt", before)):
        cells = [signed(over_half(*pair), 3) for pair in zip(rankings, group, strict=True)]
        yield f"| {name}, minus half of PPL-CLM's | " + " | ".join(cells) + " |"
    for axis in tested[0].without_group:
        cells = [f"{1 - each.without_group[axis].accuracy.value:.3f}" for each in tested]
        yield f"| indicators, another {axis} | " + " | ".join(cells) + " |"
    yield f"\nleft out, with the checkpoints that have no value: {dict(tested[0].incomplete)}"
    for row, why in tested[0].rows_not_learnt_from.items():
        yield f"not learnt from: {rankings[0].checkpoints.set_index('checkpoint').loc[row, 'point.variant']}: {why}"
    yield f"\nlearnt in {spent / len(rankings):.1f} s of CPU time a target"


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run")
    parser.add_argument("--store")
    args = parser.parse_args()
    noise = None
    if args.run:
        results = Results.open(args.run, store=args.store)
        write(results)
        noise = results.noise
    table, columns = read()
    start = time.process_time()
    rankings = [rank(table, columns=columns, target=target, noise=noise) for target in TARGETS]
    print(f"ranked in {(time.process_time() - start) / len(rankings):.1f} s of CPU time a target")
    first = rankings[0]
    scored = len(table) - first.num_unscored
    print(f"{scored} checkpoints of {first.num_variants} variants; {first.num_comparisons} pairs, ", end="")
    print(f"{first.num_clear} clear; noise of fine-tuning leaves {first.ceiling:.3f} right; errors {first.errors}")
    print(f"rates at an end of their grid: {len(first.edges)} of {scored * len(first.tasks)}\n")
    for line in singles(rankings):
        print(line)
    print()
    for line in learnt(rankings):
        print(line)


if __name__ == "__main__":
    main()
