"""The indicator study's tables, in Markdown: which indicator tells which checkpoint fine-tunes better.

    python tests/benchmarks/indicators.py                            # from the tables in tests/data
    python tests/benchmarks/indicators.py --run RUN --store STORE    # from a run, whose tables are written there
    python tests/benchmarks/indicators.py --mixture RUN --store STORE    # from one that fine-tuned on a mixture, too
    python tests/benchmarks/indicators.py --worth                    # only which is worth its cost, nothing learnt

Each also writes all rows of all targets into tests/data/indicators_cpu_rows.csv.

Errors are shares of pairs in the wrong order. Of single indicators and of the configuration they are over all pairs of
checkpoints, with 95 % intervals over variants (jackknife); of what is learnt on pairs of variants that it has not seen
(20 splits, by the corrected resampled variance: of shares Wilson's, of differences Student's t; where a group is left
out, all pairs within the groups, jackknife).
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pandas as pd

from raysweep.analysis.associations import TOGETHER, numbers
from raysweep.analysis.bases import bases_of
from raysweep.analysis.budget_page import budget_document, format_budget, known_of_run
from raysweep.analysis.derived import is_config
from raysweep.analysis.fixed_rates import fixed_rates
from raysweep.analysis.formatting import with_interval
from raysweep.analysis.kept import keep, kept_of, versions_of
from raysweep.analysis.learning import Tested, indicators_named, learn_target, targets_of
from raysweep.analysis.pairwise import IntervalEstimate
from raysweep.analysis.ranking import MEAN_LIKELIHOOD, Ranking, rank
from raysweep.analysis.uncertainty import Sample, TaskNoise, task_noise
from raysweep.analysis.unseen import differences_over_splits, random_splits, shares_as_it_is
from raysweep.analysis.worth import Worth, flops_by_kind, own_stages, seconds_by_kind, worths, worthwhile
from raysweep.results import Results
from raysweep.scores import Column

DATA = Path(__file__).parents[1] / "data"
TABLE, STAGES, SAMPLES = (DATA / f"indicators_cpu{part}.parquet" for part in ("", "_stages", "_scores"))
MIXTURE, MIXTURE_SAMPLES = (DATA / f"indicators_cpu_mixture{part}.parquet" for part in ("", "_scores"))
"""Of the same checkpoints, fine-tuned on all six tasks at once."""
ROWS = DATA / "indicators_cpu_rows.csv"
FAMILIES = ("cms", "rag", "cbq")
TARGETS = (MEAN_LIKELIHOOD, *(f"sft/{family}/mean_log_likelihood" for family in FAMILIES))
OF_MIXTURE = "sft/all/"
MIXED_TARGETS = tuple(name.replace("sft/", OF_MIXTURE) for name in TARGETS)
PPL_CLM = "other_text/mean_loss"
KNOWN = {
    PPL_CLM: "PPL-CLM",
    "span_loss/loss_nats_per_token": "PPL-SC",
    "indicators/kshot_log_likelihood_mean": "few-shot likelihood (rag: zero-shot)",
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


OF_TASKS_TRAINED_ON = (
    "/score",
    "/log_likelihood",
    "/mean_score",
    "/mean_log_likelihood",
    "/lr",
    "/lr_edge",
    "/num_seeds",
)
"""Ends of the columns that are kept of a training on all tasks."""


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
    _write_samples(results.noise, SAMPLES)


def write_mixture(results: Results) -> None:
    """What a run that fine-tuned the same checkpoints on the mixture `all`, too, tells of that alone."""
    table = results.checkpoints
    there = [name for name in table if name.startswith(OF_MIXTURE) and name.endswith(OF_TASKS_TRAINED_ON)]
    own = table[["checkpoint", *there]]
    keep(own, results.columns, {}).to_parquet(MIXTURE, index=False, compression="zstd")
    _write_samples({name: of for name, of in results.noise.items() if name.startswith(OF_MIXTURE)}, MIXTURE_SAMPLES)


def _write_samples(noise: Mapping[str, TaskNoise], path: Path) -> None:
    rows = [asdict(each) | {"column": column} for column, of_column in noise.items() for each in of_column.samples]
    for row in rows:
        row["by_example"] = row["by_example"].astype(np.float32)
    pd.DataFrame(rows).to_parquet(path, index=False, compression="zstd")


def read(*, mixture: bool = False) -> tuple[pd.DataFrame, tuple[Column, ...]]:
    """The checkpoints that `write` has written, and what their columns are; those of `write_mixture` beside."""
    table = pd.read_parquet(TABLE)
    columns, _ = kept_of(table)
    if mixture:
        more = pd.read_parquet(MIXTURE)
        columns += kept_of(more)[0]
        table = table.merge(more, on="checkpoint", validate="one_to_one")
    return table, columns


def read_noise(*paths: Path) -> dict[str, TaskNoise]:
    """The errors of the scores, and of their differences."""
    rows = pd.concat([pd.read_parquet(path) for path in paths or (SAMPLES,)])
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


def all_rows(rankings: Sequence[Ranking]) -> pd.DataFrame:
    """Of each target and indicator, or part of the configuration: pairs wrong and what it adds, with 95 % intervals."""
    rows = []
    for ranking in rankings:
        for item in ranking.associations:
            right, added = item.accuracy, item.added
            values = {"wrong": 1 - right.value, "wrong_low": 1 - right.high, "wrong_high": 1 - right.low}
            values |= {"adds": added.value, "adds_low": added.low, "adds_high": added.high}
            names = {"target": ranking.target, "indicator": item.indicator, "source": item.source}
            # Adding 0.0 takes the sign of -0.0 away.
            rows.append(names | {"pairs": item.pairs.num_pairs} | {key: round(x, 4) + 0.0 for key, x in values.items()})
    return pd.DataFrame(rows)


def worth(rankings: Sequence[Ranking], mixed: Ranking, stages: pd.DataFrame) -> Iterator[str]:
    """Of each kind of stage the indicator that orders most pairs right, beside its cost, by rising seconds.

    Those that compare fewer pairs than another of their kind are not asked. In bold are those that order more right
    than the configuration and all that compare all pairs and cost no more.
    """
    found = worths(rankings[0], stages)
    best = worthwhile([each for each in found if each.item.selection])
    first: dict[str, Worth] = {}
    for each in sorted(found, key=lambda each: -each.item.pairs.num_pairs):
        first.setdefault(each.item.indicator.partition("/")[0], each)
    shown = [*first.values(), *(each for each in found if each.item.indicator in best and each not in first.values())]
    of_targets = [own_stages(each, stages) for each in rankings]
    seconds, *of_families = (seconds_by_kind(own)["sft"] for own in of_targets)
    flops, *planned = (flops_by_kind(own)["sft"] for own in of_targets)
    each_family = zip(FAMILIES, of_families, planned, strict=True)
    told = [f"{name} {spent:.1f} s and {num:.2e} FLOPs" for name, spent, num in each_family]
    yield f"fine-tuning a checkpoint: {', '.join(told)}; on all six tasks {seconds:.1f} s and {flops:.2e}\n"
    at_once = {item.indicator: item.accuracy for item in mixed.associations}
    [config] = [item for item in rankings[0].associations if item.indicator == TOGETHER]
    yield (
        "| indicator | seconds a checkpoint | of fine-tuning on all | FLOPs | of fine-tuning on all "
        "| pairs right, each task | all at once | adds to config |"
    )
    yield "| --- " * 8 + "|"
    yield f"| the configuration | 0 | 0 | 0 | 0 | {right(config.accuracy)} | {right(at_once[TOGETHER])} | |"
    for each in sorted(shown, key=lambda each: each.seconds):
        item = each.item
        name = KNOWN.get(item.indicator, item.indicator)
        if item.indicator in best and item.accuracy.value > config.accuracy.value:
            name = f"**{name}**"
        few = "" if item.selection else f" ({item.pairs.num_pairs} pairs)"
        cost = f"{each.seconds:.2f} | {each.seconds / seconds:.1%} | {each.flops:.2e} | {each.flops / flops:.1%}"
        told = f"{right(item.accuracy)} | {right(at_once[item.indicator])} | {signed(item.added)}"
        yield f"| {name}{few} | {cost.replace('%', ' %')} | {told} |"


def right(share: IntervalEstimate) -> str:
    """`0.74 [0.65, 0.82]`, of pairs right."""
    return f"{share.value:.3f} [{share.low:.2f}, {share.high:.2f}]"


def over_half(ranking: Ranking, tested: Tested) -> IntervalEstimate:
    """The learnt error minus half of PPL-CLM's on the same splits: 0 or less is what was asked for."""
    table = ranking.checkpoints
    table = table[table[ranking.target].notna() & ~table["checkpoint"].isin(tested.rows_left_out)]
    splits = random_splits(list(table["variant"]))
    alone = shares_as_it_is(-numbers(table[PPL_CLM]), numbers(table[ranking.target]), splits, bases_of(table))
    own = [right for _, right, _ in tested.indicators.by_split]
    return differences_over_splits([(1 - a) - (1 - b) / 2 for a, b in zip(own, alone, strict=True)], splits)


def learnt(rankings: list[Ranking], tested: Sequence[Tested]) -> Iterator[str]:
    """What is learnt from, a row each, for each target."""
    yield "| pairs wrong on unseen variants | " + " | ".join(each.target for each in rankings) + " |"
    yield "| --- " * (len(rankings) + 1) + "|"
    early = indicators_named(rankings, [EARLY_SFT])
    before = [learn_target(each, without=early).tested for each in rankings]
    rows = (
        {
            "checkpoints (variants) tested on": [f"{each.num_checkpoints} ({each.num_variants})" for each in tested],
            "of these not learnt from": [str(len(each.rows_not_learnt_from)) for each in tested],
            "the same without early SFT": [str(len(each.rows_not_learnt_from)) for each in before],
            "indicators, learnt": [wrong(each.indicators.accuracy) for each in tested],
            "indicators but early SFT, learnt": [wrong(each.indicators.accuracy) for each in before],
            "configuration, learnt": [wrong(each.config.accuracy) if each.config else "" for each in tested],
            "both, learnt": [wrong(each.both.accuracy) if each.both else "" for each in tested],
            "indicators add to the configuration": [signed(each.gain) if each.gain else "" for each in tested],
            "indicators but early SFT add to it": [signed(each.gain) if each.gain else "" for each in before],
        }
        | {
            f"mean rank by {name}": [
                f"{wrong(each.rank_averages[name].accuracy)} ({signed(gain)})"
                if (gain := each.rank_averages[name].gain)
                else ""
                for each in tested
            ]
            for name in tested[0].rank_averages
        }
        | {
            name: [wrong(each.single[column]) for each in tested]
            for column, name in KNOWN.items()
            if all(column in each.single for each in tested)
        }
    )
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


def seed_zero(table: pd.DataFrame, columns: Sequence[Column]) -> Iterator[str]:
    """The same of the checkpoints from the first base alone."""
    ranking = rank(table[table["seed"] == 0].reset_index(drop=True), columns=columns, target=MEAN_LIKELIHOOD)
    for name in ((), (EARLY_SFT,)):
        each = learn_target(ranking, without=indicators_named([ranking], name)).tested
        right = each.indicators, each.config, each.both
        cells = [wrong(one.accuracy) for one in right if one]
        yield (
            f"seed 0 alone, {each.num_checkpoints} checkpoints, without {name}: indicators; configuration; both: "
            f"{'; '.join(cells)}; gain {signed(each.gain) if each.gain else ''}; "
            f"PPL-CLM {wrong(each.single[PPL_CLM])}"
        )


def signal(ranking: Ranking, tested: Tested) -> Iterator[str]:
    """Pairs wrong by fifths of the true gap, and what seeds of one recipe differ by."""
    spans = [f"{gap.low:.3f} to {gap.high:.3f} ({gap.num_pairs})" for gap in ranking.target_gaps]
    yield f"| pairs wrong that differ by, in {ranking.target} (pairs) | " + " | ".join(spans) + " | chance up to |"
    yield "| --- " * (len(spans) + 2) + "|"
    yield "| noise of fine-tuning | " + " | ".join(f"{1 - gap.ceiling:.3f}" for gap in ranking.target_gaps) + " | |"
    found = {item.indicator: item for item in ranking.associations}
    best = [item.indicator for item in ranking.associations if item.source == "measured" and item.selection][:3]
    rows = {KNOWN.get(name, name): found[name] for name in dict.fromkeys([PPL_CLM, *best, *KNOWN]) if name in found}
    shown = rows | {"configuration": found[TOGETHER], "indicators, learnt": tested.indicators}
    shown |= {"configuration, learnt": tested.config, "both, learnt": tested.both}
    for name, each in shown.items():
        within = each.chance_within
        end = f"{within.high:.4f} ({within.num_pairs}: {wrong(within.accuracy)})" if within else "none"
        yield f"| {name} | " + " | ".join(wrong(part.accuracy) for part in each.by_target_gap) + f" | {end} |"
    yield f"\n{ranking.seed_twins}"


def first_few(ranking: Ranking) -> Iterator[str]:
    """Pairs wrong by their difference in the perplexity, and what fine-tuning the first few is worth."""
    found = {item.indicator: item for item in ranking.associations if item.selection or item.indicator == TOGETHER}
    measured = [name for name in found if name != TOGETHER]
    names = [*dict.fromkeys([*measured[:3], *(name for name in KNOWN if name in found)])]
    gaps = found[names[0]].by_gap
    spans = " | ".join(f"{gap.low:.3f} to {gap.high:.3f} ({gap.num_pairs})" for gap in gaps)
    yield f"| pairs wrong that differ by, in {ranking.gaps_of} (pairs) | {spans} |"
    yield "| --- " * (len(gaps) + 1) + "|"
    for name in names:
        yield f"| {KNOWN.get(name, name)} | " + " | ".join(wrong(part.accuracy) for part in found[name].by_gap) + " |"
    yield "\n| recall; regret; NDCG at | 1 | 3 | 5 |\n| --- | --- | --- | --- |"
    for name in names:
        cells = [
            "; ".join(with_interval(each) for each in (part.recall, part.regret, part.ndcg))
            for part in found[name].selection
        ]
        yield f"| {KNOWN.get(name, name)} | " + " | ".join(cells) + " |"


def left_tasks(table: pd.DataFrame, columns: Sequence[Column], others: Mapping[str, Sequence[str]]) -> Iterator[str]:
    """Pairs wrong on each task by what is learnt from it, and from the other tasks."""
    yield "| pairs wrong on unseen variants | learnt from the task | from the other tasks | PPL-CLM |"
    yield "| --- | --- | --- | --- |"
    for target in (name for name in others if name not in TARGETS):
        each = learn_target(rank(table, columns=columns, target=target), others=others[target]).tested
        left = wrong(each.other_targets.accuracy) if each.other_targets else ""
        yield f"| {target} | {wrong(each.indicators.accuracy)} | {left} | {wrong(each.single[PPL_CLM])} |"


def bought(ranking: Ranking, stages: pd.DataFrame) -> Iterator[str]:
    """What a fifth of the hours of fine-tuning all is best spent on, and parts of it, as `rank --budget` has it."""
    known = known_of_run(ranking, stages)
    yield format_budget(budget_document(ranking, known, known.hours["sft"] * len(known.names) / 5))


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
    parser.add_argument("--mixture", metavar="RUN")
    parser.add_argument("--store")
    parser.add_argument("--worth", action="store_true")
    args = parser.parse_args()
    if args.run:
        write(Results.open(args.run, store=args.store))
    if args.mixture:
        write_mixture(Results.open(args.mixture, store=args.store))
    stages = pd.read_parquet(STAGES)
    table, columns = read()
    more, of_both = read(mixture=True)
    rankings = _ranked(table, columns, read_noise(), TARGETS)
    mixed = _ranked(more, of_both, read_noise(MIXTURE_SAMPLES), MIXED_TARGETS)
    all_rows([*rankings, *mixed]).to_csv(ROWS, index=False)
    _print("Which indicator is worth its cost?", worth(rankings, mixed[0], stages))
    if args.worth:
        return
    tested = _learnt(rankings, columns)
    _print("Fine-tuned on each task", _summary(rankings[0], tested[0]), singles(rankings), learnt(rankings, tested))
    _print("Where signal ends", signal(rankings[0], tested[0]), first_few(rankings[0]))
    _print("Costs", costs(rankings, stages), bought(rankings[0], stages))
    _print("Less of it", seed_zero(table, columns), left_tasks(table, columns, targets_of(rankings[0], columns)))
    tested = _learnt(mixed, of_both)
    _print("Fine-tuned on all tasks at once", _summary(mixed[0], tested[0]), singles(mixed), learnt(mixed, tested))
    _print("Where signal ends", signal(mixed[0], tested[0]))


def _print(title: str, *parts: Iterator[str]) -> None:
    print(f"## {title}\n")
    for part in parts:
        for line in part:
            print(line, flush=True)
        print()


def _ranked(
    table: pd.DataFrame, columns: Sequence[Column], noise: Mapping[str, TaskNoise], targets: Sequence[str]
) -> list[Ranking]:
    start = time.process_time()
    rankings = [rank(table, columns=columns, target=target, noise=noise) for target in targets]
    print(f"ranked in {(time.process_time() - start) / len(rankings):.1f} s of CPU time a target", flush=True)
    return rankings


def _learnt(rankings: Sequence[Ranking], columns: Sequence[Column]) -> list[Tested]:
    others, start = targets_of(rankings[0], columns), time.process_time()
    tested = [learn_target(each, others=others[each.target]).tested for each in rankings]
    print(f"learnt in {(time.process_time() - start) / len(rankings):.1f} s of CPU time a target", flush=True)
    return tested


def _summary(ranking: Ranking, tested: Tested) -> Iterator[str]:
    scored = len(ranking.checkpoints) - ranking.num_unscored
    yield f"{scored} checkpoints of {ranking.num_variants} variants; {ranking.num_comparisons} pairs, "
    yield f"{ranking.num_clear} clear; noise of fine-tuning leaves {ranking.ceiling:.3f} right; errors {ranking.errors}"
    yield f"rates at an end of their grid: {len(ranking.edges)} of {scored * len(ranking.tasks)}"
    yield importances(tested)


def importances(tested: Tested) -> str:
    """The most important regressors of both, and all of the configuration."""
    first = [*tested.importances][:8]
    parts = [f"{name} {share:.1%}" for name, share in tested.importances.items() if name in first or is_config(name)]
    return f"importances, with the configuration beside: {', '.join(parts)}"


if __name__ == "__main__":
    main()
