"""How often intervals of the regret of buying in an order hold, on simulated tables, by `curves` of `rank --budget`.

Scores and indicators are normal, of a stated correlation. The truth of a curve is its mean over the tables: the regret
of a sweep of half as many variants, by a strategy that is learnt from another such. Elimination goes by a comparer of
few trees here: it decides less well, and its regret is estimated the same way.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from raysweep.analysis import comparer
from raysweep.analysis.budget import SFT, Curve, Known, after, curves

TABLES = 300
PARTS = (0.0, 0.07, 0.17, 0.33, 0.55)
"""Of the hours that fine-tuning all takes."""

Indicators = Mapping[str, tuple[float, float]]
"""Name -> (correlation with the score, cost on a checkpoint as a part of fine-tuning's)."""
WORLDS: dict[str, Indicators] = {
    "0.5 at 1/100, 0.8 at 1/10": {"cheap": (0.5, 0.01), "dear": (0.8, 0.1)},
    "0.7 at 1/20": {"x": (0.7, 0.05)},
    "0 at 1/20": {"x": (0.0, 0.05)},
}
SHAPES: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "steps of 0.2": lambda scores: np.round(5 * scores) / 5,
    "few low": lambda scores: -np.exp(-0.8 * scores),
    "few high": lambda scores: np.exp(0.8 * scores),
}
"""What becomes of normal scores."""
Checkpoints = tuple[int, float]
"""Of a variant, and the standard deviation of their scores over that of the variants'."""
SEVERAL: tuple[tuple[int, Checkpoints], ...] = ((60, (3, 0.3)), (60, (3, 0.1)), (40, (5, 0.3)), (40, (5, 0.1)))
"""Variants, and checkpoints of each."""


def table(
    num: int,
    indicators: Indicators,
    generator: np.random.Generator,
    *,
    shape: Callable[[np.ndarray], np.ndarray] = np.asarray,
    checkpoints: Checkpoints = (1, 0.0),
) -> Known:
    """Of `num` variants, all measured; hours are those of one fine-tuning."""
    of_each, apart = checkpoints
    score = generator.normal(size=num).repeat(of_each)
    if of_each > 1:
        score = score + apart * generator.normal(size=len(score))
    values = {
        name: slope * score + np.sqrt(1 - slope**2) * generator.normal(size=len(score))
        for name, (slope, _) in indicators.items()
    }
    hours = {name: cost for name, (_, cost) in indicators.items()} | {SFT: 1.0}
    names = tuple(f"{row:03}" for row in range(len(score)))
    variants = tuple(f"{row // of_each:03}" for row in range(len(score)))
    bought = {kind: np.ones(len(score), dtype=bool) for kind in hours}
    return Known(names, variants, values, {name: name for name in values}, hours, bought, shape(score), "score")


def coverage(
    num: int,
    indicators: Indicators,
    *,
    num_tables: int = TABLES,
    seed: int = 0,
    shape: Callable[[np.ndarray], np.ndarray] = np.asarray,
    checkpoints: Checkpoints = (1, 0.0),
) -> dict[str, np.ndarray]:
    """Strategy -> [2, parts]: regret of the tables with a 95 % interval, and the share of these that hold it."""
    found: dict[str, list[np.ndarray]] = {}
    for number in range(num_tables):
        generator = np.random.default_rng([seed, number])
        known = table(num, indicators, generator, shape=shape, checkpoints=checkpoints)
        for curve in curves(known, budget_hours=0.0):
            found.setdefault(curve.strategy, []).append(_at_parts(curve, len(known.names)))
    held = {}
    for strategy, tables in found.items():
        value, low, high = np.moveaxis(tables, 1, 0)
        # Of such tables as have an interval, which are all but those in which few stand apart.
        truth = np.nanmean(np.where(np.isfinite(low), value, np.nan), axis=0)
        held[strategy] = np.array(
            [truth, ((low <= truth) & (truth <= high)).sum(axis=0) / np.isfinite(low).sum(axis=0)]
        )
    return held


def _at_parts(curve: Curve, num: int) -> np.ndarray:
    """[3, parts]: regret, low and high after so much of fine-tuning all."""
    places = [after(curve.hours, part * num) for part in PARTS]
    return np.array([curve.regret, curve.low, curve.high])[:, places]


def main(num_tables: int, *, first: int = 0) -> None:
    """Prints rows of a table, as they come, of the settings from the `first` on."""
    settings: list[tuple[str, int, Indicators, dict[str, Any]]] = [
        (f"{num} variants, {name}", num, world, {}) for name, world in WORLDS.items() for num in (60, 40, 100)
    ]
    both, one, _ = WORLDS.values()
    settings += [(f"60 variants, {name}", 60, both, {"shape": shape}) for name, shape in SHAPES.items()]
    settings += [
        (f"{num} variants of {each[0]} checkpoints, {each[1]} apart", num, one, {"checkpoints": each})
        for num, each in SEVERAL
    ]
    for name, num, world, given in settings[first:]:
        for strategy, (truth, held) in coverage(num, world, num_tables=num_tables, **given).items():
            shares = "; ".join(f"{100 * share:.1f}" for share in held)
            print(f"{name} | {strategy} | {'; '.join(f'{value:.3f}' for value in truth)} | {shares}", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tables", type=int, default=TABLES, help="of each setting")
    parser.add_argument(
        "--trees", type=int, default=20, help="of a comparer; with 80, its default, it takes twice as long"
    )
    parser.add_argument("--first", type=int, default=0, help="setting to begin with; 12: several checkpoints a variant")
    args = parser.parse_args()
    comparer.NUM_TREES = args.trees
    main(args.tables, first=args.first)
