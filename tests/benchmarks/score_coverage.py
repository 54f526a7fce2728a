"""How often the stated 95 % intervals of scores, differences and pair shares hold, on sweeps whose truth is known.

A sweep's scores are drawn from a logistic model: each checkpoint has a level, each test example a difficulty and each
fine-tuning run (checkpoint x seed) a luck of its own. The truth is the mean over all examples and runs that might have
been drawn. Zeros and ones stand for accuracy, a beta distribution about the same mean for F1.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product

import numpy as np
from scipy.special import expit, logit
from scipy.stats import norm

from raysweep.analysis.pairwise import clusters_of, compare, credit_left, interval, kendall, spearman
from raysweep.analysis.score_differences import between
from raysweep.analysis.uncertainty import mean_estimates, sample, task_noise

Floats = np.ndarray
SWEEPS = 100
# The middle of each of 2,000 equal parts of a normal distribution: expectations are means over it.
NORMAL = norm.ppf((np.arange(2000) + 0.5) / 2000)
DIFFICULTY = 1.0
CHECKPOINT_SPREAD = 0.3


@dataclass(frozen=True)
class Sweep:
    """What a sweep is like. `level` is the score of a middling checkpoint; `luck` the spread of runs, in logits."""

    level: float
    kind: str
    num_seeds: int
    num_examples: int
    num_tasks: int
    num_checkpoints: int
    luck: float


@dataclass(frozen=True)
class Coverage:
    """Shares, over simulated sweeps."""

    scores: float
    """Of mean scores over tasks whose interval holds the truth."""
    task_scores: float
    """Of scores on one task."""
    differences: float
    """Of pairs whose own interval holds the true difference."""
    all_pairs: float
    """Of sweeps in which the simultaneous intervals hold all true differences at once."""
    best_named: float
    """Of sweeps in which the truly best checkpoint is the winner or among its ties."""
    wrong_clear: float
    """Of the pairs called clear, those in the wrong order; mean over sweeps, 0 where none is clear."""


def draw(sweep: Sweep, generator: np.random.Generator) -> tuple[Floats, list[Floats]]:
    """(true scores [tasks, checkpoints], of each task [checkpoints, seeds, examples])."""
    truths, tasks = [], []
    for _ in range(sweep.num_tasks):
        levels = logit(sweep.level) + CHECKPOINT_SPREAD * generator.normal(size=sweep.num_checkpoints)
        spread = np.hypot(DIFFICULTY, sweep.luck)
        truths.append(expit(levels[:, None] + spread * NORMAL).mean(axis=1))
        runs = levels[:, None] + sweep.luck * generator.normal(size=(sweep.num_checkpoints, sweep.num_seeds))
        chance = expit(runs[:, :, None] + DIFFICULTY * generator.normal(size=sweep.num_examples))
        if sweep.kind == "F1":
            tasks.append(generator.beta(chance, 1 - chance))
        else:
            tasks.append((generator.random(chance.shape) < chance).astype(float))
    return np.array(truths), tasks


def score_coverage(sweep: Sweep, *, num_sweeps: int = SWEEPS, seed: int = 0) -> Coverage:
    """Over `num_sweeps` sweeps of one kind."""
    names = [f"{row}" for row in range(sweep.num_checkpoints)]
    pairs = np.triu_indices(sweep.num_checkpoints, k=1)
    found = []
    for number in range(num_sweeps):
        truths, tasks = draw(sweep, np.random.default_rng([seed, number]))
        noise = [
            task_noise(
                [
                    sample(name, seeds=range(sweep.num_seeds), scores=scores, examples="the same")
                    for name, scores in zip(names, task, strict=True)
                ],
                num_tasks=sweep.num_tasks,
            )
            for task in tasks
        ]
        observed = np.mean([task.mean(axis=(1, 2)) for task in tasks], axis=0)
        order = np.argsort(-observed)
        observed, truth = observed[order], truths.mean(axis=0)[order]
        scores = mean_estimates([each.scores for each in noise]).at(order)
        differences = between(observed, errors=None, noise=noise, checkpoints=[names[row] for row in order])
        gaps = truth[:, None] - truth
        off = np.abs(differences.moments.value - gaps)
        clear = differences.clear()[pairs]
        lows = [estimate.low for estimate in differences.from_first()]
        found.append(
            (
                (np.abs(scores.value - truth) <= scores.half_width()).mean(),
                np.mean(
                    [np.abs(e.scores.value - t) <= e.scores.half_width() for e, t in zip(noise, truths, strict=True)]
                ),
                (off <= differences.moments.half_width())[pairs].mean(),
                (off <= differences.simultaneous())[pairs].all(),
                lows[int(np.argmax(truth))] <= 0,
                (gaps[pairs] < 0)[clear].mean() if clear.any() else 0.0,
            )
        )
    return Coverage(*np.mean(found, axis=0))


def pair_coverage(
    num_variants: int, num_checkpoints: int, slope: float, *, num_sweeps: int = SWEEPS, seed: int = 0
) -> dict[str, float]:
    """Of an indicator's pair share, its clear one, its correlations, and its gain over another's, over sweeps.

    Indicator, baseline and target are normal, of correlation `slope` (the baseline's half of it), four fifths of their
    variance between variants. The truth is the mean over 5 times as many sweeps.
    """
    variants = np.repeat([f"{variant}" for variant in range(num_variants)], num_checkpoints)
    clusters = clusters_of(list(variants))

    def statistics(number: int) -> list[tuple[float, Floats, float]]:
        generator = np.random.default_rng([seed, number])
        shared = np.repeat(generator.normal(size=(3, num_variants)), num_checkpoints, axis=1)
        target, own, other = np.sqrt(0.8) * shared + np.sqrt(0.2) * generator.normal(size=(3, len(variants)))
        indicator = slope * target + np.sqrt(1 - slope**2) * own
        baseline = slope / 2 * target + np.sqrt(1 - slope**2 / 4) * other
        clear = np.abs(target[:, None] - target) > 0.5
        first, second = compare(indicator, target, clear=clear), compare(baseline, target)
        rows = [(*credit_left(first.credit, among, clusters), 0.0) for among in (first.every, first.clear)]
        rows += [(*function(indicator, target, clusters), -1.0) for function in (spearman, kendall)]
        gain = credit_left(first.credit - second.credit, first.every, clusters)
        return [*rows, (*gain, -1.0)]

    truth = np.nanmean(
        [[value for value, _, _ in statistics(number)] for number in range(num_sweeps, 6 * num_sweeps)], axis=0
    )
    hits, stated = np.zeros(5), np.zeros(5)
    for number in range(num_sweeps):
        estimates = [interval(value, left, low=low) for value, left, low in statistics(number)]
        hits += [each.low <= true <= each.high for each, true in zip(estimates, truth, strict=True)]
        stated += [not np.isnan(each.low) for each in estimates]  # None where a variant holds all clear pairs.
    return dict(zip(("share", "clear share", "Spearman", "Kendall", "gain"), hits / stated, strict=True))


def main() -> list[tuple[str, str]]:
    """Rows of a table: of each statistic the mean over all settings of a kind, and the range over them."""
    rows = []
    for kind, level in product(("0/1", "F1"), (0.03, 0.25, 0.6)):
        sweeps = [
            Sweep(level, kind, num_seeds, num_examples, num_tasks, num_checkpoints, luck)
            for num_seeds, num_examples, (num_tasks, num_checkpoints), luck in product(
                (1, 2, 3, 5), (100, 1000), ((1, 4), (3, 12)), (0.0, 0.15)
            )
            if num_seeds > 1 or luck == 0  # One seed says nothing of luck, and the report says that.
        ]
        found = [score_coverage(sweep) for sweep in sweeps]
        texts = [_range([getattr(each, name) for each in found]) for name in Coverage.__dataclass_fields__]
        rows.append((f"(e) {kind}, level {level:.0%}; {len(sweeps)} settings", " / ".join(texts)))
    for num_variants in (5, 8, 16, 40):
        num_sweeps = 5 * SWEEPS // (1 + num_variants // 16)
        settings = list(product((1, 3), (0.0, 0.5, 0.9)))
        pairs = [pair_coverage(num_variants, *each, num_sweeps=num_sweeps) for each in settings]
        texts = [_range([each[name] for each in pairs]) for name in pairs[0]]
        rows.append((f"(f) {num_variants} variants; {len(settings)} settings", " / ".join(texts)))
    return rows


def _range(shares: list[float]) -> str:
    """Mean, and least to most, in percent."""
    low, high = 100 * min(shares), 100 * max(shares)
    return f"{100 * np.mean(shares):.1f} ({low:.1f} to {high:.1f})"


if __name__ == "__main__":
    for row in main():
        print(*row, sep=": ")
