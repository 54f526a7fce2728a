"""What to buy with a budget of hours: indicators first, fine-tuning of those that are left, and what that risks.

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
from raysweep.analysis.pairwise import SMALL, Flags, Floats, IntervalEstimate
from raysweep.analysis.regrets import best_of_variants, regret_interval, upper_tail
from raysweep.analysis.unseen import Split, random_splits

UNLIKELY = 0.1
"""Probability of beating the front-runner, below which a checkpoint is left out."""
RUNG = 3.0
"""Times the cost of its cheapest kind of stage, up to which others are bought with it."""
NUM_PAIRS = 5
"""Of halves; in each pair, either half is learnt from and the other tested on."""
OF_ONE_HALF = 0.45
"""Variance of a mean over all halves of `NUM_PAIRS` pairs, over that of one half. At most 1/2 (Hoeffding, 1948): of a
mean over all halves that there are it is 0.13 to 0.44 on simulated tables, and of one over 5 pairs a fifth nearer to
1/2."""
NUM_DRAWS = 100
"""Of scores, for intervals."""
WINDOW = 6
"""Gaps between scores that the size of one is estimated from. Of 4, intervals of "fine-tune all" hold the truth 1 to 2
points less often; of 8 they are wider, as gaps further down count, which may be of another size."""
REDUCTION = 3
"""Of ASHA: one in so many goes on to fine-tuning."""
PARTS = (0.25, 0.5, 1.0)
"""Of the budget, at which regrets are told."""
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
    """Kind -> hours of `unit` on one checkpoint; `sft` is that of fine-tuning."""
    bought: Mapping[str, Flags]
    """Kind, `sft` too -> [n], whether it has run: it is not bought again, even where no number came out."""
    scores: Floats
    """[n]; NaN where a checkpoint has none."""
    target: str
    """Name of the scores."""
    unit: str = "hours"
    """What hours are of."""

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
            unit=self.unit,
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
    """Mean regret of a strategy on unseen variants, by hours spent."""

    strategy: str
    hours: tuple[float, ...]
    regret: tuple[float, ...]
    """In the scores' unit; of the best fine-tuned one, else of what indicators put first, else of one drawn blindly."""
    low: tuple[float, ...]
    high: tuple[float, ...]
    """Its 95 % interval, over variants and their scores, for a sweep of half as many that learns from another such;
    see `_estimate`."""
    behind_first: IntervalEstimate
    """Regret at the budget minus that of the first strategy; 0 within it is a tie, as is no interval."""

    def at(self, hours: float) -> float:
        """After so many hours, of those that it is known at: what the purchases that fit into them have brought."""
        return self.regret[after(self.hours, hours)]


def after(known: Sequence[float] | Floats, hours: float) -> int:
    """Place of the last of `known` hours, ascending from 0, that is within so many."""
    return int(np.searchsorted(known, hours, side="right")) - 1


def curves(known: Known, *, budget_hours: float, num_points: int = 40) -> list[Curve]:
    """Of each strategy, on the same halves of the variants; the best at the budget first.

    A half has fewer checkpoints than there are: hours are scaled up to all of them. Known at `num_points` even hours,
    and at `PARTS` of the budget.

    Raises:
        CompareError: if there are too few variants with scores to learn from one half of them.
    """
    scored = known.at(np.flatnonzero(np.isfinite(known.scores)))
    halves = random_splits(scored.variants, num=NUM_PAIRS, trained=0.5)
    splits = [*halves, *(Split(train=half.test, test=half.train) for half in halves)]
    scores = np.stack([scored.scores, *_drawn(scored.scores, scored.variants)])
    totals: dict[str, list[Floats]] = {}
    kinds = [kind for rung in scored.rungs for kind in rung]
    whole = len(scored.names) * (scored.hours[SFT] + sum(scored.hours[kind] for kind in kinds))
    # Regret falls in steps: between two points it is not known how far.
    even = np.linspace(0, max(whole, budget_hours), num_points)
    grid = np.unique([*even, *(part * budget_hours for part in PARTS)])
    for split in splits:
        test, train, plan = scored.at(split.test), scored.at(split.train), _learn_half(scored, split)
        for strategy, runs in _played(test, train, plan).items():
            part = len(test.names) / len(scored.names)
            totals.setdefault(strategy, []).append(_on_grid(runs, scores[:, split.test], part * grid))
    regrets = {strategy: np.array(parts) for strategy, parts in totals.items()}
    spent = after(grid, budget_hours)
    at_budget = {strategy: parts[:, :, spent] for strategy, parts in regrets.items()}
    first = min(at_budget, key=lambda strategy: (at_budget[strategy][:, 0].mean(), strategy))
    spread, num = float(np.ptp(scored.scores)), len(set(scored.variants)) // 2
    tail = upper_tail(best_of_variants(scored.scores, scored.variants)[0])
    found = []
    for strategy, parts in regrets.items():
        means = [_estimate(column, num, low=0.0, high=spread, tail=tail) for column in np.moveaxis(parts, 2, 0)]
        behind = _estimate(at_budget[strategy] - at_budget[first], num, low=-spread, high=spread, tail=tail)
        regret, low, high = zip(*((each.value, each.low, each.high) for each in means), strict=True)
        found.append(Curve(strategy, tuple(map(float, grid)), regret, low, high, behind_first=behind))
    return sorted(found, key=lambda curve: (curve.at(budget_hours), curve.strategy))


def _estimate(values: Floats, num_variants: int, *, low: float, high: float, tail: float) -> IntervalEstimate:
    """The mean of values [2 * pairs, 1 + draws] between `low` and `high` in this table, with its 95 % interval.

    The first column is of the scores that there are, and has the mean. The others are of drawn ones (see `_drawn`), and
    have the variance: by what the two of a pair differ by, that of one half, times `OF_ONE_HALF`. Where it is zero, as
    where all halves find the best, there are as many observations as a half has variants.

    Of the scores that there are, what pairs differ by hangs on the gap between the best two, a single observation:
    for "fine-tune all" such intervals held the truth in 83 to 92 % of simulated tables, with 200 pairs as with 5. By
    the spread over halves, nearly zero where all find the best, it was 35 %.

    These hold it in 91 to 100 % of tables, see benchmarks/regret_coverage.py: of those that have one, as there is none
    where few scores stand apart, see `regret_interval`.
    """
    first, second = np.split(values[:, 1:], 2)
    variance = float(((first - second) ** 2).mean()) / 2 * OF_ONE_HALF
    mean, freedom = float(values[:, 0].mean()), len(values) - 1
    return regret_interval(mean, variance, num_clusters=num_variants, freedom=freedom, low=low, high=high, tail=tail)


def _drawn(scores: Floats, variants: Sequence[str]) -> Floats:
    """[draws, n]: of scores [n], each variant's best in the same order, with gaps drawn anew; its others as far below.

    A table has one gap between its best variant and its second, one between these and the third, and so on. They are
    about independent and exponential, and i times the i-th from the top has nearly the same mean as its neighbours
    (Rényi, 1953): that mean is taken over `WINDOW` of them. Of checkpoints of one variant that score alike they are
    not: with gaps between checkpoints intervals held the truth in 87 to 93 %.
    """
    best, index = best_of_variants(scores, variants)
    order = np.argsort(-best, kind="stable")
    number = np.arange(1, len(best))
    totals = np.concatenate([[0.0], np.cumsum(-np.diff(best[order]) * number)])
    window = min(WINDOW, len(number))
    start = np.clip(number - 1 - window // 2, 0, len(number) - window)
    means = (totals[start + window] - totals[start]) / (window * number)
    # A Latin hypercube: squares of independent draws are so uneven that all variances would be a third off.
    quantiles = -np.log((np.arange(NUM_DRAWS) + 0.5) / NUM_DRAWS)
    gaps = means * np.random.default_rng(2).permuted(np.tile(quantiles, (len(number), 1)), axis=1).T
    drawn = np.zeros((NUM_DRAWS, len(best)))
    drawn[:, order[1:]] = -np.cumsum(gaps, axis=1)
    found: Floats = drawn[:, index] + (scores - best[index])
    return found


_Plan = list[tuple[tuple[str, ...], Comparer]]
"""(kinds of a rung, comparer on the indicators of it and of all rungs before it), cheapest first."""


def _learn_half(scored: Known, split: Split) -> _Plan:
    try:
        return learn_rungs(scored.at(split.train))
    except CompareError as error:
        num, rows = len(set(scored.variants)), len(scored.names)
        joined = (
            f" ({rows} checkpoints: those of one variant count as one, and rows of one configuration of a table are of "
            "one, unless --variant names a column that tells them apart)"
        )
        raise CompareError(
            f"strategies are learnt from one half of {num} variants{joined * (num < rows)} and tested on the other; of "
            f"that half: {error}"
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


_Steps = list[tuple[float, int]]
"""(hours spent so far, row that is known from then on), in order."""


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
    return [(before, order[0]), *((before + number * hours, row) for number, row in enumerate(order, start=1))]


def _asha(order: Sequence[int], values: Floats, *, rung_hours: float, tuning: float) -> _Steps:
    """Asynchronous successive halving (Li et al., 2020) of two rungs: an indicator of each as it comes, then SFT.

    One of `REDUCTION` that came so far goes on, as soon as it may; once all came, the rest goes on best first.
    """
    spent, come, tuned = 0.0, list[int](), set[int]()
    values = np.where(np.isnan(values), -np.inf, values)
    steps: _Steps = []

    def tune(rows: Sequence[int]) -> None:
        nonlocal spent
        for row in rows:
            if row not in tuned:
                tuned.add(row)
                spent += tuning
                steps.append((spent, row))

    for row in order:
        spent += rung_hours
        come.append(row)
        tune(sorted(come, key=lambda each: -values[each])[: len(come) // REDUCTION])
    tune(sorted(come, key=lambda each: -values[each]))
    return steps


def _on_grid(runs: Sequence[_Steps], scores: Floats, grid: Floats) -> Floats:
    """[draws, grid]: mean regret of runs at each of the hours, for scores [draws, n]."""
    best = scores.max(axis=1, keepdims=True)
    blind = best - scores.mean(axis=1, keepdims=True)
    found = []
    for steps in runs:
        hours, rows = np.array([spent for spent, _ in steps]), [row for _, row in steps]
        regret = np.concatenate([blind, best - np.maximum.accumulate(scores[:, rows], axis=1)], axis=1)
        # What costs all that there is fits, however sums of hours round.
        found.append(regret[:, np.searchsorted(hours, grid * (1 + SMALL), side="right")])
    mean: Floats = np.mean(found, axis=0)
    return mean
