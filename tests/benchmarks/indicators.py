"""The indicator study's tables, in Markdown: which indicator tells which checkpoint fine-tunes better.

    python tests/benchmarks/indicators.py                            # from the tables in tests/data
    python tests/benchmarks/indicators.py --run RUN --store STORE    # from a run, whose tables are written there

Errors are shares of pairs in the wrong order. Of single indicators and of the configuration they are over all pairs of
checkpoints, with 95 % intervals over variants (jackknife); of what is learnt on pairs of variants that it has not seen
(20 splits, corrected resampled t; where a group is left out, all pairs within the groups, jackknife).
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pandas as pd

from raysweep.analysis.associations import numbers
from raysweep.analysis.fixed_rates import fixed_rates
from raysweep.analysis.kept import keep, kept_of, versions_of
from raysweep.analysis.learning import Tested, indicators_named, learn_target, targets_of
from raysweep.analysis.pairwise import IntervalEstimate
from raysweep.analysis.ranking import MEAN_LIKELIHOOD, Ranking, rank
from raysweep.analysis.uncertainty import Sample, TaskNoise, task_noise
from raysweep.analysis.unseen import over_splits, random_splits, shares_as_it_is
from raysweep.analysis.worth import flops_by_kind, seconds_by_kind
from raysweep.results import Results
from raysweep.scores import Column

DATA = Path(__file__).parents[1] / "data"
TABLE, STAGES, SAMPLES = (DATA / f"indicators_cpu{part}.parquet" for part in ("", "_stages", "_scores"))
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
OF_STAGES = (
    *("kind", "id", "checkpoint", "task", "status", "lr", "stage_seed", "wall_seconds", "world_size"),
    *("device", "gpus_per_worker", "flops"),
    *("sft/score", "sft/valid_score", "sft/log_likelihood", "sft/valid_log_likelihood"),
)
"""Columns of the stage table by which costs, and what one rate for all would have chosen, are known."""


def write(results: Results) -> None:
    """A run's checkpoints with what their columns are, its stages, and its test examples' scores, mean over seeds."""
    table = results.checkpoints.drop(columns=list(NO_PART_OF_A_STUDY))
    data = str(Path(os.environ["RAYSWEEP_DATA"]).absolute())
    for name in table.select_dtypes("string"):
        table[name] = table[name].str.replace(data, "${RAYSWEEP_DATA}", regex=False)
    DATA.mkdir(exist_ok=True)
    kept = keep(table, results.columns, versions_of(results.stages, results.columns))
    kept.to_parquet(TABLE, index=False, compression="zstd")
    results.stages[list(OF_STAGES)].drop_duplicates("id").to_parquet(STAGES, index=False, compression="zstd")
    rows = [asdict(each) | {"column": column} for column, noise in results.noise.items() for each in noise.samples]
    for row in rows:
        row["by_example"] = row["by_example"].astype(np.float32)
    pd.DataFrame(rows).to_parquet(SAMPLES, index=False, compression="zstd")


def read() -> tuple[pd.DataFrame, tuple[Column, ...]]:
    """The checkpoints that `write` has written, and what their columns are."""
    table = pd.read_parquet(TABLE)
    columns, _ = kept_of(table)
    return table, columns


def read_noise() -> dict[str, TaskNoise]:
    """The errors of the scores, and of their differences."""
    rows = pd.read_parquet(SAMPLES)
    columns: dict[str, list[Sample]] = {}
    for row in rows.to_dict("records"):
        own = {name: value for name, value in row.items() if name != "column"}
        own |= {"seeds": tuple(own["seeds"]), "runs": tuple(own["runs"]), "by_example": np.float64(own["by_example"])}
        columns.setdefault(row["column"], []).append(Sample(**own))
    num_tasks = len({name.rpartition("/")[0] for name in columns})
    return {
        name: task_noise(samples, num_tasks=num_tasks, are_shares=name.endswith("/score"))
        for name, samples in columns.items()
    }


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


def learnt(rankings: list[Ranking], columns: Sequence[Column]) -> Iterator[str]:
    """What is learnt from, a row each, for each target."""
    yield "| pairs wrong on unseen variants | " + " | ".join(each.target for each in rankings) + " |"
    yield "| --- " * (len(rankings) + 1) + "|"
    others = targets_of(rankings[0], columns)
    start = time.process_time()
    tested = [learn_target(each, others=others[each.target]).tested for each in rankings]
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
        for name, group in (("indicators", tested), ("indicators but early SFT", before)):
            cells = [wrong(each.without_group[axis].accuracy) for each in group]
            yield f"| {name}, another {axis} | " + " | ".join(cells) + " |"
    cells = [wrong(each.other_targets.accuracy) if each.other_targets else "" for each in tested]
    yield "| indicators, learnt from the other families | " + " | ".join(cells) + " |"
    cells = [f"{each.indicators.brier:.3f}; {each.config.brier if each.config else np.nan:.3f}" for each in tested]
    yield "| Brier score: indicators; configuration | " + " | ".join(cells) + " |"
    first = tested[0].indicators.reliability
    bins = ", ".join(f"{each.stated:.2f} is {each.right:.2f} ({each.num_pairs})" for each in first)
    yield f"\nstated probability by indicators, and how often it was right (pairs of the splits): {bins}"
    yield f"\nleft out, with the checkpoints that have no value: {dict(tested[0].incomplete)}"
    for why in tested[0].rows_not_learnt_from.values():
        yield f"not learnt from: {why}"
    yield f"\nlearnt in {spent / len(rankings):.1f} s of CPU time a target"


def costs(rankings: Sequence[Ranking], stages: pd.DataFrame) -> Iterator[str]:
    """What the stages took, and what one fine-tuning rate for all would have chosen."""
    spent = (stages["wall_seconds"] * stages["world_size"].astype("float64")).groupby(stages["kind"])
    yield f"{len(stages)} stages, {spent.sum().sum() / 3600:.2f} worker hours"
    yield "| stage | stages | worker seconds a checkpoint | FLOPs a checkpoint | worker seconds in all |"
    yield "| --- | --- | --- | --- | --- |"
    of_one, flops = seconds_by_kind(stages), flops_by_kind(stages)
    for kind, total in spent.sum().sort_values(ascending=False).items():
        each = f"{of_one.get(kind, np.nan):.1f} | {flops.get(kind, np.nan):.2e}"
        yield f"| {kind} | {spent.size()[kind]} | {each} | {total:.0f} |"
    for each in fixed_rates(rankings[0], stages):
        yield f"\nat {each.lr:g} for all: {each.accuracy.value:.2f} [{each.accuracy.low:.2f}, {each.accuracy.high:.2f}]"


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run")
    parser.add_argument("--store")
    args = parser.parse_args()
    if args.run:
        write(Results.open(args.run, store=args.store))
    (table, columns), noise, stages = read(), read_noise(), pd.read_parquet(STAGES)
    start = time.process_time()
    rankings = [rank(table, columns=columns, target=target, noise=noise) for target in TARGETS]
    print(f"ranked in {(time.process_time() - start) / len(rankings):.1f} s of CPU time a target")
    first = rankings[0]
    scored = len(table) - first.num_unscored
    print(f"{scored} checkpoints of {first.num_variants} variants; {first.num_comparisons} pairs, ", end="")
    print(f"{first.num_clear} clear; noise of fine-tuning leaves {first.ceiling:.3f} right; errors {first.errors}")
    print(f"rates at an end of their grid: {len(first.edges)} of {scored * len(first.tasks)}\n")
    for part in (costs(rankings, stages), singles(rankings), learnt(rankings, columns)):
        print(*part, "", sep="\n")


if __name__ == "__main__":
    main()
