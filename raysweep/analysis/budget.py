"""What to buy with a budget of worker hours: indicators first, fine-tuning of those that are left, and what that risks.

A strategy is an order of purchases. Each is played on variants that nothing was learnt from, over random halves of a
table whose scores are known: how far the best score found so far is below the best there is, against the hours spent.
Successive elimination by a comparer (`comparer`) buys the cheapest indicators of all, leaves out what is unlikely to
beat the front-runner by calibrated probabilities, and buys the next ones of the rest: a rung at a time, as successive
halving does, of indicators that cost about as much.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from raysweep.analysis.comparer import CompareError, Comparer, learn
from raysweep.analysis.pairwise import SMALL, Flags, Floats, IntervalEstimate, wilson
from raysweep.analysis.unseen import Split, random_splits

UNLIKELY = 0.1
"""Probability of beating the front-runner, below which a checkpoint is left out."""
RUNG = 3.0
"""Times the cost of its cheapest kind of stage, up to which others are bought with it."""
NUM_PAIRS = 5
"""Of halves; in each pair, either half is learnt from and the other tested on."""
REDUCTION = 3
"""Of ASHA: one in so many goes on to fine-tuning."""
NUM_ORDERS = 20
"""In which checkpoints may come to ASHA."""
SFT = "sft"
ALL = "fine-tune all"
"""In any order."""


@dataclass(frozen=True)
class Known:
    """Checkpoints with all that was measured of them, and what each kind of stage takes on one of them."""

    names: tuple[str, ...]
    variants: tuple[str, ...]
    values: Mapping[str, Floats]
    """Indicator -> [n], higher being better; NaN where it is missing."""
    kinds: Mapping[str, str]
    """Indicator -> the kind of stage that is bought to have it."""
    hours: Mapping[str, float]
    """Kind -> worker hours on one checkpoint; `sft` is that of fine-tuning."""
    bought: Mapping[str, Flags]
    """Kind, `sft` too -> [n], whether it has run: it is not bought again, even where no number came out."""
    scores: Floats
    """[n]; NaN where a checkpoint has none."""
    target: str
    """Name of the scores."""

    def at(self, rows: np.ndarray) -> Known:
        """Some of the checkpoints."""
        return Known(
            names=tuple(self.names[row] for row in rows),
            variants=tuple(self.variants[row] for row in rows),
            values={name: values[rows] for name, values in self.values.items()},
            kinds=self.kinds,
            hours=self.hours,
            bought={kind: flags[rows] for kind, flags in self.bought.items()},
            scores=self.scores[rows],
            target=self.target,
        )

    @property
    def rungs(self) -> list[tuple[str, ...]]:
        """Kinds of stages that cost less than fine-tuning, cheapest first, by what is bought together; see `RUNG`."""
        cheaper = {kind for kind in self.kinds.values() if self.hours[kind] < self.hours[SFT]}
        rungs: list[tuple[str, ...]] = []
        for kind in sorted(cheaper, key=lambda kind: (self.hours[kind], kind)):
            if rungs and self.hours[kind] <= RUNG * self.hours[rungs[-1][0]]:
                rungs[-1] = (*rungs[-1], kind)
            else:
                rungs.append((kind,))
        return rungs

    def of_kinds(self, kinds: Sequence[str]) -> list[str]:
        """The indicators that these kinds give."""
        return sorted(name for name, kind in self.kinds.items() if kind in kinds)

    def matrix(self, indicators: Sequence[str]) -> Floats:
        """[n, indicators]."""
        return np.stack([self.values[name] for name in indicators], axis=1)


@dataclass(frozen=True)
class Purchase:
    """A kind of stage, on some checkpoints, in the order in which to buy it."""

    kind: str
    checkpoints: tuple[str, ...]
    hours: float


@dataclass(frozen=True)
class Curve:
    """Mean regret of a strategy on unseen variants, by worker hours spent."""

    strategy: str
    hours: tuple[float, ...]
    regret: tuple[float, ...]
    """In the scores' unit; of the best fine-tuned one, else of what indicators put first, else of one drawn blindly."""
    low: tuple[float, ...]
    high: tuple[float, ...]
    """Its 95 % interval, over variants, for strategies that learn from half of these; see `_estimate`."""
    behind_first: IntervalEstimate
    """Regret at the budget minus that of the first strategy; 0 within it is a tie."""

    def at(self, hours: float) -> float:
        """After so many hours."""
        return float(np.interp(hours, self.hours, self.regret))


def curves(known: Known, *, budget_hours: float, num_points: int = 40) -> list[Curve]:
    """Of each strategy, on the same halves of the variants; the best at the budget first.

    A half has fewer checkpoints than there are: hours are scaled up to all of them.

    Raises:
        CompareError: if there are too few variants with scores to learn from one half of them.
    """
    scored = known.at(np.flatnonzero(np.isfinite(known.scores)))
    halves = random_splits(scored.variants, num=NUM_PAIRS, trained=0.5)
    splits = [*halves, *(Split(train=half.test, test=half.train) for half in halves)]
    totals: dict[str, list[Floats]] = {}
    kinds = [kind for rung in scored.rungs for kind in rung]
    whole = len(scored.names) * (scored.hours[SFT] + sum(scored.hours[kind] for kind in kinds))
    grid = np.linspace(0, max(whole, budget_hours), num_points)
    for split in splits:
        test, train, plan = scored.at(split.test), scored.at(split.train), _learn_half(scored, split)
        for strategy, steps in _played(test, train, plan).items():
            part = len(test.names) / len(scored.names)
            totals.setdefault(strategy, []).append(_on_grid(steps, test.scores, part * grid))
    at_budget = {
        strategy: np.array([np.interp(budget_hours, grid, part) for part in parts])
        for strategy, parts in totals.items()
    }
    first = min(at_budget, key=lambda strategy: (at_budget[strategy].mean(), strategy))
    spread = float(np.ptp(scored.scores))
    found = []
    for strategy, parts in totals.items():
        means = [_estimate(column, low=0.0, high=spread) for column in np.transpose(parts)]
        behind = _estimate(at_budget[strategy] - at_budget[first], low=-spread, high=spread)
        regret, low, high = zip(*((each.value, each.low, each.high) for each in means), strict=True)
        found.append(Curve(strategy, tuple(map(float, grid)), regret, low, high, behind_first=behind))
    return sorted(found, key=lambda curve: (curve.at(budget_hours), curve.strategy))


def _estimate(values: Floats, *, low: float, high: float) -> IntervalEstimate:
    """The mean of values [2 * pairs] between `low` and `high`, with its 95 % interval by what pairs differ by.

    The variance of a mean over halves is at most half that of one half (Hoeffding, 1948), and is taken to be that, as
    in `selection`. An interval by the spread over halves alone is nearly of no length where all of them find the best:
    on simulated tables of 60 it then held the truth in 35 % of them, and this one in 85 to 98 %, of elimination in 92
    to 98.
    """
    first, second = np.split(values, 2)
    variance = float(((first - second) ** 2).mean()) / 4
    return wilson(float(values.mean()), variance, num_clusters=len(values), low=low, high=high)


_Plan = list[tuple[tuple[str, ...], Comparer]]
"""(kinds of a rung, comparer on the indicators of it and of all rungs before it), cheapest first."""


def _learn_half(scored: Known, split: Split) -> _Plan:
    try:
        return learn_rungs(scored.at(split.train))
    except CompareError as error:
        num = len(set(scored.variants))
        raise CompareError(
            f"strategies are learnt from one half of {num} variants and tested on the other; of that half: {error}"
        ) from error


def learn_rungs(known: Known) -> _Plan:
    """A comparer for each rung."""
    plan, kinds = [], list[str]()
    for rung in known.rungs:
        kinds += rung
        indicators = known.of_kinds(kinds)
        comparer = learn(
            known.matrix(indicators), known.scores, indicators=indicators, variants=known.variants, target=known.target
        )
        plan.append((rung, comparer))
    return plan


def eliminate(known: Known, plan: _Plan) -> tuple[list[Purchase], list[int]]:
    """What successive elimination buys before fine-tuning, and all rows in the order in which to fine-tune them.

    A checkpoint that is left out early comes after all that were left out later.
    """
    left, order = list(range(len(known.names))), list(range(len(known.names)))
    out: list[int] = []
    bought = []
    for rung, comparer in plan:
        names = tuple(known.names[row] for row in left)
        bought += [Purchase(kind, names, len(left) * known.hours[kind]) for kind in rung]
        values = known.matrix(comparer.indicators)[left]
        first, second = np.repeat(np.arange(len(left)), len(left)), np.tile(np.arange(len(left)), len(left))
        chances = 1 / (1 + np.exp(-comparer.logits(values[first], values[second]))).reshape(len(left), len(left))
        ranked = np.argsort(-chances.sum(axis=1), kind="stable")
        likely = [row for row in ranked if chances[row, ranked[0]] >= UNLIKELY]
        unlikely = [row for row in ranked if chances[row, ranked[0]] < UNLIKELY]
        out = [left[row] for row in unlikely] + out
        left = [left[row] for row in likely]
        order = left + out
        if len(left) <= 1:
            break
    return bought, order


def elimination(num_rungs: int) -> str:
    """What successive elimination by the first so many rungs is called."""
    return f"elimination, {num_rungs} rung" + "s" * (num_rungs > 1)


def by(indicator: str) -> str:
    """What fine-tuning in the order of an indicator is called."""
    return f"by {indicator}"


def asha(kind: str) -> str:
    """What ASHA with the best indicator of a kind as its rung is called."""
    return f"ASHA on {kind}"


def next_purchases(known: Known, budget_hours: float, *, num_rungs: int) -> list[Purchase]:
    """What to buy next for the checkpoints that are not fine-tuned yet, as far as the budget goes.

    Indicators that are measured already cost nothing. Where a rung is to be bought, that is all: what comes after it
    depends on what it will be.

    Args:
        num_rungs: that elimination goes by, the cheapest ones.

    Raises:
        CompareError: if too few checkpoints are fine-tuned to learn from.
    """
    there = known.at(np.flatnonzero(~np.isfinite(known.scores) & ~known.bought[SFT]))
    if not there.names:
        return []
    plan = learn_rungs(known.at(np.flatnonzero(np.isfinite(known.scores))))[:num_rungs]
    bought, order = eliminate(there, plan)
    has = {
        kind: {name for name, flag in zip(there.names, there.bought[kind], strict=True) if flag}
        for kind in there.bought
    }
    for rung, _ in plan:
        wanted = {
            each.kind: [name for name in each.checkpoints if name not in has[each.kind]]
            for each in bought
            if each.kind in rung
        }
        if any(wanted.values()):
            return _affordable(wanted, known.hours, budget_hours)
    return _affordable({SFT: [there.names[row] for row in order]}, known.hours, budget_hours)


def _affordable(wanted: Mapping[str, Sequence[str]], hours: Mapping[str, float], budget_hours: float) -> list[Purchase]:
    found = []
    for kind, names in wanted.items():
        chosen = tuple(names[: int(budget_hours / hours[kind] + SMALL)])
        if chosen:
            found.append(Purchase(kind, chosen, len(chosen) * hours[kind]))
            budget_hours -= found[-1].hours
    return found


_Steps = list[tuple[float, list[int]]]
"""(hours spent so far, rows fine-tuned so far in order)."""


def _played(test: Known, train: Known, plan: _Plan) -> dict[str, list[_Steps]]:
    """Strategy -> what it does on a test half, of each order in which checkpoints may come."""
    tuning, num = test.hours[SFT], len(test.names)
    played = {}
    for size in range(1, len(plan) + 1):
        bought, order = eliminate(test, plan[:size])
        spent = sum(each.hours for each in bought)
        played[elimination(size)] = [_tuned(order, tuning, before=spent)]
    blind = [list(np.random.default_rng([1, number]).permutation(num)) for number in range(NUM_ORDERS)]
    played[ALL] = [_tuned(order, tuning) for order in blind]
    for name, values in test.values.items():
        best_first = list(np.argsort(-np.nan_to_num(values, nan=-np.inf), kind="stable"))
        played[by(name)] = [_tuned(best_first, tuning, before=num * test.hours[test.kinds[name]])]
    if test.rungs:
        dearest = test.rungs[-1][-1]
        values = test.values[_best_of(train, test.of_kinds([dearest]))]
        played[asha(dearest)] = [_asha(order, values, rung_hours=test.hours[dearest], tuning=tuning) for order in blind]
    return played


def _best_of(train: Known, indicators: Sequence[str]) -> str:
    """The one that orders most pairs of the other half right, a pair without a value half."""
    signs = np.sign(train.scores[:, None] - train.scores)
    return max(
        indicators,
        key=lambda name: float(
            (np.sign(np.nan_to_num(train.values[name][:, None] - train.values[name])) * signs).sum()
        ),
    )


def _tuned(order: Sequence[int], hours: float, *, before: float = 0.0) -> _Steps:
    # Without any fine-tuning, what comes first is taken at its word.
    return [(before + number * hours, list(order[: max(1, number)])) for number in range(len(order) + 1)]


def _asha(order: Sequence[int], values: Floats, *, rung_hours: float, tuning: float) -> _Steps:
    """Asynchronous successive halving (Li et al., 2020) of two rungs: an indicator of each as it comes, then SFT.

    One of `REDUCTION` that came so far goes on, as soon as it may; once all came, the rest goes on best first.
    """
    spent, come, tuned = 0.0, list[int](), list[int]()
    values = np.where(np.isnan(values), -np.inf, values)
    steps: _Steps = [(0.0, [])]
    for row in order:
        spent += rung_hours
        come.append(row)
        best = sorted(come, key=lambda each: -values[each])[: len(come) // REDUCTION]
        for each in best:
            if each not in tuned:
                tuned.append(each)
                spent += tuning
                steps.append((spent, list(tuned)))
    for each in sorted(come, key=lambda each: -values[each]):
        if each not in tuned:
            tuned.append(each)
            spent += tuning
            steps.append((spent, list(tuned)))
    return steps


def _on_grid(runs: Sequence[_Steps], scores: Floats, grid: Floats) -> Floats:
    """Mean regret at each of the hours."""
    blind = float(scores.max() - scores.mean())
    found = []
    for steps in runs:
        hours = np.array([spent for spent, _ in steps])
        regret = np.array([scores.max() - scores[rows].max() if rows else blind for _, rows in steps])
        places = np.searchsorted(hours, grid, side="right") - 1
        found.append(np.where(places < 0, blind, regret[np.maximum(places, 0)]))
    mean: Floats = np.mean(found, axis=0)
    return mean
