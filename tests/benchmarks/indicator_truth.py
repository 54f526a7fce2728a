"""Statistics of indicators on simulated tables of known answers: coverage, Bayes accuracy, leaks, mirrors, speed.

A table has a grid of rates and names as its configuration. The score is the rate's effect, what no setting tells, and
noise of fine-tuning; an indicator is a mixture of these. The truth of a statistic is its mean over many other tables of
the same kind and size.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd

from raysweep.analysis.associations import Association, associate
from raysweep.analysis.comparer import Comparer, learn
from raysweep.analysis.defects import find_flags
from raysweep.analysis.learning import mean_ranks
from raysweep.analysis.pair_features import ordered_pairs
from raysweep.analysis.pairwise import IntervalEstimate, clusters_of, compare, credit_left, interval
from raysweep.analysis.ranking import rank
from raysweep.analysis.selection import halves, select
from raysweep.analysis.unseen import as_it_is, gain_over, learner, leave_group_out, on_unseen, random_splits
from raysweep.scores import Column
from raysweep.spec import Metric

RATES, NAMES = 4, 3
TABLES, TRUTH = 150, 200


@dataclass(frozen=True)
class World:
    """What a table is like: what the rate and what no setting tells do to the score, and what the indicator sees."""

    num: int
    rate: float = 1.0
    own: float = 1.0
    seen_rate: float = 1.0
    """Weight of the rate in the indicator."""
    seen_own: float = 1.0
    """Weight of what no setting tells."""
    grid: bool = False
    """Whether all tables have the same rates and names; else each variant's are drawn, as the variants are."""


def table(world: World, generator: np.random.Generator) -> pd.DataFrame:
    """A checkpoint table with the columns score and x; one checkpoint a variant."""
    rows, score, x = without_noise(world, generator)
    noise = generator.normal(size=(2, world.num)) / 2
    return rows.assign(score=score + noise[0], x=x + noise[1])


def without_noise(world: World, generator: np.random.Generator) -> tuple[pd.DataFrame, np.ndarray, np.ndarray]:
    """(variants and their settings, what their scores are but for noise, what the indicator is)."""
    variants = [f"{number:04}" for number in generator.permutation(10_000)[: world.num]]
    rate, name = np.resize(np.arange(RATES), world.num), np.resize(np.arange(NAMES), world.num)
    if not world.grid:
        rate, name = (generator.integers(0, most, size=world.num) for most in (RATES, NAMES))
    effect = world.rate * (rate - (RATES - 1) / 2)
    own = generator.normal(size=world.num)
    rows = {"variant": variants, "trial": variants, "checkpoint": variants, "status": "done", "seed": 0, "step": 1}
    rows |= {"point.lr": rate * 1.0, "point.name": np.array(list("xyz"))[name]}
    x = world.seen_rate * effect + world.seen_own * own
    return pd.DataFrame(rows), effect + world.own * own, x


@dataclass(frozen=True)
class Bases:
    """Models trained once, which all variants go on from: each a seed. Effects are in the variants' spread of score."""

    num: int
    on_score: float = 0.0
    on_indicator: float = 0.0
    alike: bool = True
    """Whether a base moves the indicator as it moves the score; else each by itself."""
    on_rate: float = 0.0
    """How far what a rate does to the score differs from base to base, as a part of it."""
    num_twins: int | None = None
    """Variants that later bases have; None: all."""


def table_of_bases(world: World, bases: Bases, generator: np.random.Generator) -> pd.DataFrame:
    """A checkpoint table as `table` gives it, of several bases."""
    rows, score, x = without_noise(world, generator)
    effect = world.rate * (rows["point.lr"].to_numpy() - (RATES - 1) / 2)
    spread = np.hypot(world.rate * np.sqrt((RATES**2 - 1) / 12), world.own)
    parts = []
    for seed in range(bases.num):
        one, other, steeper = generator.normal(size=3)
        moved = spread * np.array([bases.on_score * one, bases.on_indicator * (one if bases.alike else other)])
        noise = generator.normal(size=(2, world.num)) / 2 + moved[:, None]
        own = rows.assign(seed=seed, score=score + bases.on_rate * steeper * effect + noise[0], x=x + noise[1])
        parts.append(own.assign(trial=own["trial"] + f"-{seed}", checkpoint=own["checkpoint"] + f"-{seed}"))
    return pd.concat([parts[0], *(part[: bases.num_twins] for part in parts[1:])], ignore_index=True)


def associations(rows: pd.DataFrame, *names: str) -> dict[str, Association]:
    """By indicator, for columns of which higher is better."""
    columns = {name: Column("", Metric(name, "max")) for name in names}
    clear = np.ones((len(rows), len(rows)), dtype=bool)
    found, _ = associate(rows, target="score", clear=clear, columns=columns, gaps_of="x")
    return {item.indicator: item for item in found}


def estimates(world: World, generator: np.random.Generator) -> dict[str, IntervalEstimate]:
    """The statistics of one table."""
    return statistics_of(associations(table(world, generator), "x"))


def statistics_of(found: Mapping[str, Association]) -> dict[str, IntervalEstimate]:
    """All that is said of x but its first few."""
    item = found["x"]
    axes = {each.axis: each.accuracy for each in item.matched}
    return {
        "pairs right": item.accuracy,
        "config alone": found["all together"].accuracy,
        "adds to config": item.added,
        "rate alone differs": axes["point.lr"],
        "name alone differs": axes["point.name"],
        "farthest quarter": item.by_gap[-1].accuracy,
        "Spearman": item.spearman,
        "Kendall": item.kendall,
        "over the best setting": item.gain,
    }


def first_few(world: World, generator: np.random.Generator) -> dict[str, IntervalEstimate]:
    """Of fine-tuning only what the indicator of one table puts first."""
    rows = table(world, generator)
    [first] = select(rows["x"].to_numpy(), rows["score"].to_numpy(), halves(list(rows["variant"])), places=[3])
    return {"recall at 3": first.recall, "regret at 3": first.regret, "NDCG at 3": first.ndcg}


def learnt(world: World, generator: np.random.Generator) -> dict[str, IntervalEstimate]:
    """Of a learner on unseen variants of one table: pairs right, and its gain over the configuration."""
    rows = table(world, generator)
    scores = rows["score"].to_numpy()
    config = pd.get_dummies(rows[["point.lr", "point.name"]].astype(str)).to_numpy(dtype=np.float64)
    both = np.concatenate([config, rows[["x"]].to_numpy()], axis=1)
    splits = random_splits(list(rows["variant"]), num=8)
    ours, alone = (
        on_unseen(learner(values, scores, list(rows["variant"])), scores, splits) for values in (both, config)
    )
    return {"learnt, on unseen": ours.accuracy, "learnt, over config": gain_over(ours, alone, splits)}


def averaged(world: World, generator: np.random.Generator) -> dict[str, IntervalEstimate]:
    """Of the mean rank by the indicator, one that sees the score badly and one of noise, on splits of one table."""
    rows = table(world, generator)
    scores = rows["score"].to_numpy()
    noise = generator.normal(size=(2, world.num))
    values = np.stack([rows["x"].to_numpy(), scores + 2 * noise[0], noise[1]], axis=1)
    splits = random_splits(list(rows["variant"]))
    return {"mean rank": as_it_is(mean_ranks(values).mean(axis=1), scores, splits)}


def brier_scores(world: World, *, seed: int) -> tuple[float, float]:
    """(that said of splits of one table, that of as many variants as a split learns from, on 200 new ones)."""
    rows = table(replace(world, num=world.num + 200), np.random.default_rng([3, seed]))
    values, scores = rows[["x"]].to_numpy(), rows["score"].to_numpy()
    variants = list(rows["variant"][: world.num])
    splits = random_splits(variants, num=8)
    said = on_unseen(learner(values[: world.num], scores[: world.num], variants), scores[: world.num], splits).brier
    own = splits[0].train
    comparer = learn(
        values[own], scores[own], indicators=["x"], variants=[variants[row] for row in own], target="score"
    )
    first, second = ordered_pairs(np.arange(world.num, len(scores)))
    better = scores[first] > scores[second]
    chances = 1 / (1 + np.exp(-comparer.logits(values[first[better]], values[second[better]])))
    return said, float(np.mean((1 - chances) ** 2))


def learnt_from_others(world: World, generator: np.random.Generator) -> dict[str, IntervalEstimate]:
    """Of the indicator, one that sees the score badly and four of noise: pairs right in groups not learnt from."""
    rows = table(world, generator)
    scores, variants = rows["score"].to_numpy(), list(rows["variant"])
    noise = generator.normal(size=(5, world.num))
    values = np.stack([rows["x"].to_numpy(), scores + noise[0], *noise[1:]], axis=1)
    return {
        f"another {axis}": on_unseen(
            learner(values, scores, variants), scores, leave_group_out(list(rows[axis]), variants), variants=variants
        ).accuracy
        for axis in ("point.lr", "point.name")
    }


def pairs_right_of(bases: Bases) -> Statistics:
    """Of tables of several bases: pairs right among all pairs, and among those of one base, as they are counted."""

    def found(world: World, generator: np.random.Generator) -> dict[str, IntervalEstimate]:
        rows = table_of_bases(world, bases, generator)
        x, scores, seeds = (rows[name].to_numpy() for name in ("x", "score", "seed"))
        variants, seed = clusters_of(list(rows["variant"])), clusters_of(list(map(str, seeds)))
        every, within = compare(x, scores), compare(x, scores, comparable=seeds[:, None] == seeds)
        value, left = credit_left(within.credit, within.every, variants)
        return {
            "all pairs": interval(*credit_left(every.credit, every.every, variants)),
            "within, over variants": interval(value, left),
            "within": interval(value, left, crossed=credit_left(within.credit, within.every, seed)[1]),
        }

    return found


Statistics = Callable[[World, np.random.Generator], dict[str, IntervalEstimate]]


def coverage(
    world: World, statistics: Statistics = estimates, *, num: int = TABLES, num_truth: int = TRUTH, seed: int = 0
) -> dict[str, tuple[float, float]]:
    """Statistic -> (its truth, share of the first `num` tables whose 95 % interval holds it)."""
    found = [statistics(world, np.random.default_rng([seed, number])) for number in range(num_truth)]
    truth = {name: float(np.nanmean([each[name].value for each in found])) for name in found[0]}
    held = {
        name: [each[name].low <= value <= each[name].high for each in found[:num] if not np.isnan(each[name].low)]
        for name, value in truth.items()
    }
    return {name: (truth[name], float(np.mean(each))) for name, each in held.items()}


Drawn = tuple[np.ndarray, np.ndarray, np.ndarray]
"""Indicators [n, k], the scores [n] but for noise, and what these are expected to be by the indicators alone."""
THREE = np.array([1.0, 0.7, -0.5])


def few(num: int, num_indicators: int, generator: np.random.Generator) -> Drawn:
    """Three indicators decide, the others are noise."""
    values = generator.normal(size=(num, num_indicators))
    return _told(values, values[:, :3] @ THREE)


def every(num: int, num_indicators: int, generator: np.random.Generator) -> Drawn:
    """All decide, with weights of all sizes."""
    values, weights = generator.normal(size=(num, num_indicators)), generator.normal(size=num_indicators)
    return _told(values, values @ weights * 1.32 / np.linalg.norm(weights))


def views(num: int, num_indicators: int, generator: np.random.Generator) -> Drawn:
    """Indicators are noisy views of three things that decide; a third of more than five is noise alone."""
    mixes = generator.normal(size=(3, num_indicators))
    if num_indicators > 5:
        mixes[:, generator.random(num_indicators) < 1 / 3] = 0
    values = generator.normal(size=(num, 3)) @ mixes + generator.normal(size=(num, num_indicators))
    return _told(values, values @ np.linalg.solve(mixes.T @ mixes + np.eye(num_indicators), mixes.T @ THREE))


def bent(num: int, num_indicators: int, generator: np.random.Generator) -> Drawn:
    """One saturates, one is in proportion and moves the first, one has a peak; the others are noise."""
    values = generator.normal(size=(num, num_indicators))
    one, two, three = values[:, :3].T
    return _told(values, 1.3 * np.tanh(1.5 * one) + 0.7 * two - 0.35 * three**2 + 0.4 * one * two)


def stepped(num: int, num_indicators: int, generator: np.random.Generator) -> Drawn:
    """One counts beyond a threshold alone, of two the lesser counts, one is best in a band; the others are noise.

    No learner here has such parts, unlike those of `bent`.
    """
    values = generator.normal(size=(num, num_indicators))
    one, two, three, four = values[:, :4].T
    return _told(values, 1.2 * (one > 0.3) + 1.3 * np.minimum(two, three) + 0.8 * (np.abs(four) < 0.7))


def tailed(num: int, num_indicators: int, generator: np.random.Generator) -> Drawn:
    """Views of two things of seven groups, half of them exponentials; a few checkpoints are far below all others."""
    groups = 1.2 * generator.normal(size=(7, 2))
    things = _things(num, groups, generator)
    mixes = generator.normal(size=(2, num_indicators))
    mixes[:, generator.random(num_indicators) < 1 / 3] = 0
    mixes[0, :2], mixes[1, 1:3] = (1, -1), (0.7, 1)
    values = things @ mixes + 0.5 * generator.normal(size=(num, num_indicators))
    # Views do not tell the two things exactly: the mean over things drawn anew, by how likely each has these views.
    others = _things(20_000, groups, generator)
    logits = -2 * (np.square(values).sum(axis=1)[:, None] - 2 * values @ (others @ mixes).T)
    logits -= 2 * np.square(others @ mixes).sum(axis=1)
    weights = np.exp(logits - logits.max(axis=1, keepdims=True))
    best = weights @ _of_things(others) / weights.sum(axis=1)
    bends = generator.random(num_indicators) < 0.5
    values[:, bends] = np.exp(0.7 * values[:, bends])
    return values, _of_things(things), best


def _things(num: int, groups: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """[num, 2], about the centers of groups; a few are far below."""
    things: np.ndarray = groups[generator.integers(0, len(groups), size=num)] + 0.6 * generator.normal(size=(num, 2))
    things[generator.random(num) < 0.06, 0] -= 5
    return things


def _of_things(things: np.ndarray) -> np.ndarray:
    known = things @ np.array([1.0, 0.7])
    return np.where(known > 0, known, 2.5 * known)


def _told(values: np.ndarray, known: np.ndarray) -> Drawn:
    """Where the indicators say all but the noise."""
    return values, known, known


@dataclass(frozen=True)
class Factor:
    """A design factor of five levels, one of which no checkpoint that is learnt from has and all that are tested do."""

    left_out: int
    """The level, from 0 to 4."""
    moves: bool
    """Whether it moves indicators, each at its own pace, and not the score; else its levels are fifths of checkpoints
    along a direction of their indicators, so that the ends are out of the others' range."""
    pace: float = 0.5
    """Of indicators that it moves, in standard deviations a level, root mean square."""

    def drawn(self, values: np.ndarray, generator: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """(indicators, level) of each row."""
        num, num_indicators = values.shape
        spread = values.std(axis=0)
        if self.moves:
            level = generator.integers(0, 5, size=num)
            return values + np.outer(level - 2, generator.normal(size=num_indicators) * spread * self.pace), level
        along = (values / spread) @ generator.normal(size=num_indicators)
        along = along / along.std() + 0.3 * generator.normal(size=num)
        return values, along.argsort().argsort() * 5 // num


FACTORS = {
    f"{level}, {how}": Factor(place, moves)
    for how, moves in (("out of the others' range", False), ("which moves indicators", True))
    for level, place in (("the last level", 4), ("the middle level", 2))
}


def learnt_and_new(
    num: int,
    num_indicators: int,
    *,
    seed: int,
    num_new: int = 60,
    shuffled: bool = False,
    drawn: Callable[[int, int, np.random.Generator], Drawn] = few,
    factor: Factor | None = None,
    num_beside: int = 0,
) -> tuple[Comparer, Drawn]:
    """A comparer of `num` checkpoints, and others: their indicators, scores, and what these are expected to be.

    Of a factor they are `num_new` of the level left out, and then `num_beside` of those that were learnt from.
    """
    generator = np.random.default_rng(seed)
    values, known, best = drawn(num + num_new if factor is None else max(400, 2 * num), num_indicators, generator)
    train, test = np.arange(num), np.arange(num, num + num_new)
    if factor:
        values, level = factor.drawn(values, generator)
        there = np.flatnonzero(level != factor.left_out)
        train, beside = there[:num], there[num : num + num_beside]
        test = np.concatenate([np.flatnonzero(level == factor.left_out)[:num_new], beside])
    scores = known + 0.6 * generator.normal(size=len(known))
    if shuffled:  # Each part by itself: what is in one would not be in the other, and tell of it.
        scores = np.concatenate([generator.permutation(scores[:num]), generator.permutation(scores[num:])])
    names = [f"x{place}" for place in range(num_indicators)]
    variants = [f"{row}" for row in range(num)]
    comparer = learn(values[train], scores[train], indicators=names, variants=variants, target="score")
    return comparer, (values[test], scores[test], best[test])


def below_bayes(
    num: int,
    num_indicators: int,
    *,
    seed: int,
    shuffled: bool = False,
    drawn: Callable[[int, int, np.random.Generator], Drawn] = few,
    factor: Factor | None = None,
) -> tuple[float, float]:
    """(pairs right of a comparer on 60 new checkpoints, those of one who knows how the scores came about).

    Of a factor that moves indicators the latter knows by how much, too, and may have more right than can be learnt.
    """
    comparer, (values, scores, best) = learnt_and_new(
        num, num_indicators, seed=seed, shuffled=shuffled, drawn=drawn, factor=factor
    )
    first, second = ordered_pairs(np.arange(len(scores)))
    better = scores[first] > scores[second]
    right = (comparer.logits(values[first], values[second]) > 0) == better
    return float(right.mean()), float(((best[first] > best[second]) == better).mean())


def mirror_gain(num: int, *, seed: int, noise: float = 0.0) -> IntervalEstimate:
    """What an indicator adds that only mirrors the rate, but for noise."""
    generator = np.random.default_rng(seed)
    rows = table(World(num), generator)
    rows["x"] = np.exp(rows["point.lr"]) + noise * generator.normal(size=num)
    return associations(rows, "x")["x"].added


def two_bases(num: int, *, seed: int, num_twins: int = 20) -> pd.DataFrame:
    """A table some of whose variants are there once more, from a better base; x only tells which base a row is of."""
    generator = np.random.default_rng(seed)
    rows = table(World(num), generator)
    twins = rows.iloc[:num_twins].copy()
    twins[["trial", "checkpoint"]] += "-1"
    twins["score"] += 4 + generator.normal(size=num_twins) / 2
    rows = pd.concat([rows, twins.assign(seed=1)], ignore_index=True)
    rows["x"] = rows["seed"] + generator.normal(size=len(rows)) / 100
    return rows


def flagged(num: int, *, seed: int, leaked: bool) -> bool:
    """Whether a table's indicator is said to be a leak; a leak has it in the upper half of the rates alone."""
    generator = np.random.default_rng(seed)
    rows = table(World(num), generator)
    if leaked:
        high = rows["point.lr"] >= RATES / 2
        rows.loc[high, "x"] = 2 * rows.loc[high, "score"] + generator.normal(size=int(high.sum())) / 100
    flags = find_flags(rows, target="score", indicators=["x"], config=["point.lr", "point.name"])
    return any(flag.kind == "leaked" for flag in flags)


def seconds_of(num: int, num_indicators: int, num_tasks: int, *, num_steps: int = 1) -> float:
    """CPU time of ranking so many indicators by each task, with all that a ranking says of them.

    Each of `num` variants has a checkpoint at each of so many steps.
    """
    generator = np.random.default_rng(0)
    rows = table(World(num), generator)
    rows = rows.loc[rows.index.repeat(num_steps)].reset_index(drop=True)
    rows["step"] = np.tile(np.arange(num_steps), num)
    rows["checkpoint"] += "-" + rows["step"].astype(str)
    names = [f"i{place}" for place in range(num_indicators)]
    tasks = [f"t{place}" for place in range(num_tasks)]
    more = {name: rows["score"] + generator.normal(size=len(rows)) for name in names + tasks}
    rows = pd.concat([rows, pd.DataFrame(more)], axis=1)
    columns = [Column("", Metric(name, "max")) for name in names]
    start = time.process_time()
    for task in tasks:
        rank(rows, columns=columns, target=task, gaps_of=names[0])
    return time.process_time() - start


LEARNT = (
    *((36, 5, 12), (60, 5, 12), (120, 5, 8), (240, 5, 4), (480, 5, 2)),
    *((36, 20, 8), (60, 20, 8), (120, 20, 4), (240, 20, 2)),
)
"""Variants learnt from, indicators, and tables of each kind."""
BEYOND = ((36, 5, 12), (60, 5, 12), (60, 20, 6))
"""The same, where they are tested on a level of a factor that none learnt from has."""
WORLDS = {
    "knows more": World(48),
    "sees the rate alone": World(48, seen_own=0.0),
    "tells nothing": World(48, seen_rate=0.0, seen_own=0.0),
    "24 variants": World(24),
    "one grid": World(48, grid=True),
    "settings tell nothing": World(48, rate=0.0),
    "100 variants": World(100),
}


def main() -> Iterator[tuple[str, str]]:
    """Rows of a table, as they come."""
    yield "(j) 60 variants x 40 indicators x 12 tasks, 2,000 halves", f"{seconds_of(60, 40, 12):.1f} s of CPU time"
    yield (
        "(j) 100 variants of 3 checkpoints x 40 indicators",
        f"{seconds_of(100, 40, 1, num_steps=3):.1f} s of CPU time",
    )
    yield "(j) 1,000 variants x 12 indicators", f"{seconds_of(1000, 12, 1):.1f} s of CPU time"
    for leaked in (True, False):
        share = np.mean([flagged(48, seed=seed, leaked=leaked) for seed in range(200)])
        yield f"(i) {'leaked' if leaked else 'sound'} indicators flagged", f"{share:.1%} of 200"
    gains = [mirror_gain(48, seed=seed) for seed in range(50)]
    yield "(h) an exact mirror of the rate adds", f"{max(abs(each.value) for each in gains):.4f} at most"
    noisy = [mirror_gain(48, seed=seed, noise=0.5) for seed in range(100)]
    above = np.mean([each.low > 0 for each in noisy])
    yield "(h) a noisy mirror adds", f"{np.mean([each.value for each in noisy]):.4f}; said to add in {above:.0%}"
    bases = [associations(two_bases(62, seed=seed), "x")["x"].added for seed in range(100)]
    mean, above = (np.mean(each) for each in zip(*((gain.value, gain.low > 0) for gain in bases), strict=True))
    yield "(h) which of two bases it is adds", f"{mean:.4f}; said to add in {above:.0%}"
    for num, num_indicators in ((120, 5), (60, 5), (36, 5), (36, 40), (62, 40)):
        found = [below_bayes(num, num_indicators, seed=seed) for seed in range(12)]
        yield f"(g) learnt from {num} variants, {num_indicators} indicators", _two(found)
    for num, num_indicators, num_tables in LEARNT:
        for drawn in (few, every, views, bent, stepped, tailed):
            seeds = range(300, 300 + num_tables)
            found = [below_bayes(num, num_indicators, seed=seed, drawn=drawn) for seed in seeds]
            yield f"(l) learnt from {num} variants, {drawn.__name__} of {num_indicators} indicators", _two(found)
    for num, num_indicators, num_tables in BEYOND:
        for name, factor in FACTORS.items():
            for drawn in (few, every, views, bent, stepped, tailed):
                seeds = range(500, 500 + num_tables)
                found = [below_bayes(num, num_indicators, seed=seed, drawn=drawn, factor=factor) for seed in seeds]
                yield f"(n) {name}, from {num} variants, {drawn.__name__} of {num_indicators} indicators", _two(found)
    shares = [below_bayes(60, 5, seed=seed, shuffled=True)[0] for seed in range(24)]
    error = np.std(shares) / np.sqrt(24)
    yield "(g) shuffled scores", f"{np.mean(shares):.3f}, standard error {error:.3f}"
    for name, world in WORLDS.items():
        for what, each in coverage(world).items():
            yield f"(e) {name}: {what}", _held(*each)
    for num in (24, 48, 100):
        for name in ("knows more", "sees the rate alone", "tells nothing"):
            for what, each in coverage(replace(WORLDS[name], num=num), averaged, num=400, num_truth=400).items():
                yield f"(m) {num} variants, {name}: {what}", _held(*each)
    for name in ("knows more", "sees the rate alone", "tells nothing"):
        said, true = np.mean([brier_scores(WORLDS[name], seed=seed) for seed in range(40)], axis=0)
        yield f"(m) {name}: Brier score", f"{said:.3f} said, {true:.3f} on new variants"
    for num in (24, 60, 100):
        for name in ("knows more", "sees the rate alone", "tells nothing"):
            for what, each in coverage(replace(WORLDS[name], num=num), first_few, num=600, num_truth=600).items():
                yield f"(k) {num} variants, {name}: {what}", _held(*each)
    for name in ("knows more", "sees the rate alone"):
        for what, each in coverage(WORLDS[name], learnt, num=60, num_truth=60).items():
            yield f"(f) {name}: {what}", _held(*each)
    for name in ("knows more", "sees the rate alone", "tells nothing"):
        for num in (48, 62):
            found = coverage(replace(WORLDS[name], num=num), learnt_from_others, num=120, num_truth=120)
            for what, each in found.items():
                yield f"(f) {num} variants, {name}: {what}", _held(*each)


def _held(truth: float, share: float) -> str:
    return f"truth {truth:.3f}, held in {100 * share:.1f} %"


def _two(found: Sequence[tuple[float, float]]) -> str:
    ours, best = np.mean(found, axis=0)
    return f"{ours:.3f} of {best:.3f}, {100 * (best - ours):.1f} points below"


if __name__ == "__main__":
    for row in main():
        print(*row, sep=": ", flush=True)
