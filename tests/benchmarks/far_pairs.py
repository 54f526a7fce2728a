"""Are probabilities honest far from what a comparer was learnt from? Pairs by their distance, in Markdown.

    python tests/benchmarks/far_pairs.py study        # of the tables in tests/data, four targets
    python tests/benchmarks/far_pairs.py mixture      # of these, fine-tuned on all tasks at once: the mean alone
    python tests/benchmarks/far_pairs.py simulated    # of the worlds of indicator_truth.py

A pair is as far as the farther one of the two, by `Comparer.distance`. Probabilities are those that `compare` would
state, by a comparer learnt from the part of a table that is not tested on.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from benchmarks.indicator_truth import Factor, bent, every, few, learnt_and_new, stepped, tailed, views
from benchmarks.indicators import MIXED_TARGETS, MIXTURE_SAMPLES, TARGETS, read, read_noise
from scipy.special import expit, stdtrit

from raysweep.analysis.associations import numbers
from raysweep.analysis.comparer import MIN_VARIANTS, Comparer, learn
from raysweep.analysis.derived import is_swept
from raysweep.analysis.learning import MAX_GROUPS, learn_target
from raysweep.analysis.pairwise import Flags, Floats
from raysweep.analysis.ranking import rank
from raysweep.analysis.unseen import random_splits

ENDS = (1.0, 2.0, 3.0, 5.0)
"""Of the bins of distances."""
NUM_SPLITS, NUM_MIXTURE_SPLITS = 20, 5
"""Random ones of a target. Groups are left out for the first target alone."""
WORLDS = (few, every, views, bent, stepped, tailed)
SIZES = ((60, 5, 2), (60, 20, 1))
"""Variants learnt from, indicators, and tables of each world."""
NUM_DRAWN, NUM_EACH = 400, 30
"""New checkpoints drawn, and those of a bin that are compared."""
FACTORS = {"beyond the others' range": Factor(4, moves=False)} | {
    f"moves indicators by {pace:g} a level": Factor(4, moves=True, pace=pace) for pace in (0.5, 1.0, 2.0, 4.0)
}


@dataclass(frozen=True)
class Pairs:
    """Pairs that were not learnt from."""

    chances: Floats
    """Stated for the one that was better."""
    distances: Floats
    sides: tuple[np.ndarray, np.ndarray]
    """The cluster of either, which an interval leaves out at a time."""


def pairs_of(
    comparer: Comparer, values: Floats, scores: Floats, clusters: np.ndarray, *, is_new: Flags | None = None
) -> Pairs:
    """Of checkpoints, those with different scores; with `is_new` those of one that is and one that is not."""
    first, second = np.triu_indices(len(scores), 1)
    own = scores[first] != scores[second]
    if is_new is not None:
        own &= is_new[first] != is_new[second]
    first, second = first[own], second[own]
    better, other = np.where(scores[first] > scores[second], (first, second), (second, first))
    far = np.array([comparer.distance(row) for row in values])
    chances = expit(comparer.logits(values[better], values[other]))
    return Pairs(chances, np.maximum(far[better], far[other]), (clusters[better], clusters[other]))


def rows_of(name: str, found: Sequence[Pairs]) -> Iterator[str]:
    """One for each bin of distances that has pairs."""
    chances = np.concatenate([each.chances for each in found])
    bins = np.digitize(np.concatenate([each.distances for each in found]), ENDS)
    first, second = (np.concatenate([each.sides[side] for each in found]) for side in (0, 1))
    for place, (low, high) in enumerate(zip((0.0, *ENDS), (*ENDS, np.inf), strict=True)):
        own = bins == place
        if own.any():
            right, stated = chances[own] > 0.5, np.maximum(chances[own], 1 - chances[own])
            over, half, num = mean_of_pairs(stated - right, first[own], second[own])
            brier, honest = np.mean((1 - chances[own]) ** 2), np.mean(stated * (1 - stated))
            sure = stated >= 0.9
            of_sure = f"{right[sure].mean():.3f} of {stated[sure].mean():.3f} ({sure.sum()})" if sure.any() else ""
            yield (
                f"| {name} | {low:g} to {high:g} | {own.sum()} ({num}) | {right.mean():.3f} | {stated.mean():.3f} "
                f"| {over:+.3f} ± {half:.3f} | {brier:.3f} ({honest:.3f}) | {of_sure} |"
            )


def mean_of_pairs(values: Floats, first: np.ndarray, second: np.ndarray) -> tuple[float, float, int]:
    """(mean, half of its 95 % interval by the jackknife over clusters, how many there are)."""
    names, index = np.unique(np.concatenate([first, second]), return_inverse=True)
    one, other = np.split(index, 2)
    apart = one != other

    def by_cluster(weights: Floats) -> Floats:
        total: Floats = np.bincount(one, weights, len(names)) + np.bincount(other[apart], weights[apart], len(names))
        return total

    rest = len(values) - by_cluster(np.ones(len(values)))
    if len(names) < 5 or not rest.all():
        return float(values.mean()), float("nan"), len(names)
    left = (values.sum() - by_cluster(values)) / rest
    variance = (len(names) - 1) / len(names) * ((left - left.mean()) ** 2).sum()
    return float(values.mean()), float(stdtrit(len(names) - 1, 0.975) * np.sqrt(variance)), len(names)


@dataclass(frozen=True)
class Study:
    """A target of the study's table, with what a comparer of it is learnt from."""

    target: str
    names: tuple[str, ...]
    values: Floats
    scores: Floats
    is_fine: Flags
    """May be learnt from."""
    variants: np.ndarray
    groups: dict[str, np.ndarray]
    """Axis -> its value in each row."""

    def learnt(self, train: np.ndarray) -> Comparer | None:
        """From some rows; None if these are too few variants."""
        train = train[self.is_fine[train]]
        if len(set(self.variants[train])) < MIN_VARIANTS:
            return None
        return learn(
            self.values[train],
            self.scores[train],
            indicators=self.names,
            variants=list(self.variants[train]),
            target=self.target,
        )

    def pairs(self, comparer: Comparer, test: np.ndarray, *, is_new: Flags | None = None) -> Pairs:
        """Of other rows, see `pairs_of`."""
        return pairs_of(comparer, self.values[test], self.scores[test], self.variants[test], is_new=is_new)


def studies(*, mixture: bool) -> Iterator[Study]:
    """Of all targets."""
    table, columns = read(mixture=mixture)
    noise = read_noise(MIXTURE_SAMPLES) if mixture else read_noise()
    for target in MIXED_TARGETS[:1] if mixture else TARGETS:
        ranking = rank(table, columns=columns, target=target, noise=noise)
        learnt = learn_target(ranking)
        rows = ranking.checkpoints
        rows = rows[rows[target].notna() & ~rows["checkpoint"].isin(learnt.tested.rows_left_out)]
        names = learnt.comparer.indicators
        axes = [name for name in rows if is_swept(name) and 2 < rows[name].astype(str).nunique() <= MAX_GROUPS]
        yield Study(
            target,
            names,
            np.stack([numbers(rows[name]) for name in names], axis=1),
            numbers(rows[target]),
            ~rows["checkpoint"].isin(learnt.tested.rows_not_learnt_from).to_numpy(dtype=bool),
            rows["variant"].to_numpy(dtype=str),
            {axis: rows[axis].astype(str).to_numpy() for axis in axes},
        )


def of_study(*, mixture: bool) -> dict[str, list[Pairs]]:
    """By what was left out, over all targets."""
    found: dict[str, list[Pairs]] = defaultdict(list)
    for study in studies(mixture=mixture):
        variants = list(study.variants)
        for split in random_splits(variants, num=NUM_MIXTURE_SPLITS if mixture else NUM_SPLITS):
            if comparer := study.learnt(split.train):
                found["random variants"].append(study.pairs(comparer, split.test))
        for axis, groups in study.groups.items() if study.target in (TARGETS[0], MIXED_TARGETS[0]) else ():
            short = axis.rpartition(".")[2]
            for group in dict.fromkeys(groups):
                new = np.flatnonzero(groups == group)
                # A variant with a checkpoint elsewhere is not learnt from either.
                is_new = np.isin(study.variants, study.variants[new])
                if len(set(study.variants[new])) < 2:
                    continue
                if comparer := study.learnt(np.flatnonzero(~is_new)):
                    found[f"both of another {short}"].append(study.pairs(comparer, new))
                for split in random_splits(variants, num=1, trained=0.7):
                    if comparer := study.learnt(split.train[~is_new[split.train]]):
                        test = np.concatenate([new, split.test[~is_new[split.test]]])
                        found[f"one of another {short}"].append(study.pairs(comparer, test, is_new=is_new[test]))
    return found


def simulated() -> dict[str, list[Pairs]]:
    """Of new checkpoints as many of each bin of distances; and of a level of a factor that none learnt from has."""
    found: dict[str, list[Pairs]] = defaultdict(list)
    cluster = 0
    for num, num_indicators, num_tables in SIZES:
        for drawn in WORLDS:
            for seed in range(900, 900 + num_tables):
                cluster += 1
                comparer, (values, scores, _) = learnt_and_new(
                    num, num_indicators, seed=seed, drawn=drawn, num_new=NUM_DRAWN
                )
                bins = np.digitize([comparer.distance(row) for row in values], ENDS)
                own = np.concatenate([np.flatnonzero(bins == place)[:NUM_EACH] for place in range(len(ENDS) + 1)])
                found["new"].append(pairs_of(comparer, values[own], scores[own], np.full(len(own), cluster)))
                for name, factor in FACTORS.items():
                    comparer, (values, scores, _) = learnt_and_new(
                        num, num_indicators, seed=seed, drawn=drawn, factor=factor, num_new=30, num_beside=30
                    )
                    clusters, is_new = np.full(len(scores), cluster), np.arange(len(scores)) < 30
                    both = pairs_of(comparer, values[:30], scores[:30], clusters[:30])
                    found[f"both of a level that {name}"].append(both)
                    one = pairs_of(comparer, values, scores, clusters, is_new=is_new)
                    found[f"one of a level that {name}"].append(one)
    return found


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("of", choices=("study", "mixture", "simulated"))
    print(
        "| pairs | times as far | pairs (variants or tables) | right | stated | stated - right | Brier (if honest) "
        "| right where 0.9 or more is stated |"
    )
    print("| --- " * 8 + "|")
    of = parser.parse_args().of
    found = simulated() if of == "simulated" else of_study(mixture=of == "mixture")
    for name, pairs in found.items():
        for line in rows_of(name, pairs):
            print(line, flush=True)


if __name__ == "__main__":
    main()
