"""How sure a fine-tuned score is, and the difference of two: over test examples and fine-tuning seeds at once.

One checkpoint's scores on one task are a table X[s, i] of S seeds x n test examples, every seed having the same
examples. Its mean stands for all seeds and all examples that might have been drawn: X = mean + example + seed + rest,
the rest being of one example under one seed. The variance of that mean is

    (MS_examples + MS_seeds - MS_rest) / (S n)

(Cornfield & Tukey, 1956; the absolute error variance of Brennan, Generalizability Theory, 2001): what is of a single
example under a single seed is in the mean squares of examples and of seeds alike, and counts once. The last two terms
are pooled over the checkpoints of a task, since two or three seeds say little of their own variance. Intervals take
Student's t with Satterthwaite's (1946) degrees of freedom.

A difference of two checkpoints is the same of X - X', so what they share (a hard example, a lucky seed) is not in it.

The errors of a mean over tasks add up in quadrature, as each task has examples and trainings of its own; the tasks of a
mixture have one training for all, whose seeds' part is taken from each seed's mean over them: see `independent`.

Scores are shares of one and often near zero, where an interval of that kind is too narrow. So pseudo-examples are
added, before mean and variance are taken: two at 0 and two at 1 for a score (Agresti & Coull, 1998), one at -1 and one
at 1 for a difference (Bonett & Price, 2012). They stand beside all S seeds of all T tasks that are averaged, so each
weighs 1 / (S T) of an example: with full weight the mean over tasks would be drawn to 1/2 by more than its error.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from raysweep.analysis.pairwise import Flags, Floats

CONFIDENCE = 0.95
LEAST_SHARE = 0.5
"""Of the variance between examples: no estimate of the rest takes away more."""


@dataclass(frozen=True)
class EstimateArrays:
    """Estimates, the variance of each, and the degrees of freedom that this variance has: arrays of one shape."""

    value: Floats
    variance: Floats
    df: Floats

    def half_width(self, confidence: float = CONFIDENCE) -> Floats:
        """Half of each two-sided interval; NaN where the variance is not known."""
        from scipy.special import stdtrit

        widths: Floats = stdtrit(self.df, (1 + confidence) / 2) * np.sqrt(self.variance)
        return widths

    def at(self, rows: Sequence[int]) -> EstimateArrays:
        """Those of the given checkpoints, or of all pairs of them."""
        cells = np.ix_(*[np.asarray(rows, dtype=np.int64)] * self.value.ndim)
        return EstimateArrays(self.value[cells], self.variance[cells], self.df[cells])


def mean_estimates(parts: Sequence[EstimateArrays]) -> EstimateArrays:
    """Of the mean over independent parts, such as the tasks of a sweep."""
    variances = np.array([part.variance for part in parts]) / len(parts) ** 2
    spread = (variances**2 / np.array([part.df for part in parts])).sum(axis=0)
    variance: Floats = variances.sum(axis=0)
    return EstimateArrays(np.mean([part.value for part in parts], axis=0), variance, _over(variance**2, spread))


@dataclass(frozen=True)
class Sample:
    """Test scores of one checkpoint on one task; made by `sample` or `recorded`."""

    checkpoint: str
    seeds: tuple[int, ...]
    means: Floats
    """[seeds]: mean over examples."""
    num_examples: int
    example_variance: float
    """Of the mean over seeds and examples, as to which examples were drawn; NaN where it is not known."""
    rest_variance: float
    """Of one seed's mean, as to what is neither of its examples nor of the seed; 0 where it cannot be told apart."""
    by_example: Floats | None = None
    """[examples]: mean over seeds; None where only sums were recorded."""
    examples: str = ""
    """The same for samples of the same examples in the same order; empty where that is not known."""
    runs: tuple[str, ...] = ()
    """[seeds]: what tells the trainings from others; empty where that is not known."""


def sample(checkpoint: str, *, seeds: Sequence[int], scores: Floats, examples: str, runs: Sequence[str] = ()) -> Sample:
    """From the score of every test example under every seed.

    Args:
        scores: [seeds, examples], shares of one.
        examples: what tells these test examples, in this order, from others; empty if they have no names.
        runs: [seeds], the ids of the trainings; empty: each task has some of its own.
    """
    num_seeds, num_examples = scores.shape
    by_example, means = scores.mean(axis=0), scores.mean(axis=1)
    rest = 0.0
    if num_seeds > 1 and num_examples > 1:
        left = scores - by_example - means[:, None] + scores.mean()
        rest = float((left**2).sum() / ((num_seeds - 1) * (num_examples - 1)) / num_examples)
    return Sample(
        checkpoint=checkpoint,
        seeds=tuple(seeds),
        means=means,
        num_examples=num_examples,
        example_variance=float(by_example.var() / num_examples),
        rest_variance=rest,
        by_example=by_example,
        examples=examples,
        runs=tuple(runs),
    )


def recorded(
    checkpoint: str,
    *,
    seeds: Sequence[int],
    means: Sequence[float],
    errors: Sequence[float],
    num_examples: int,
    runs: Sequence[str] = (),
) -> Sample:
    """From each seed's mean and standard error over examples, where the scores of the examples are gone.

    How far seeds agree on examples is then not known; as if they agreed on all, which errs on the wide side.
    """
    return Sample(
        checkpoint=checkpoint,
        seeds=tuple(seeds),
        means=np.asarray(means, dtype=np.float64),
        num_examples=num_examples,
        example_variance=float(np.mean(np.square(errors))),
        rest_variance=0.0,
        runs=tuple(runs),
    )


@dataclass(frozen=True)
class _OnTask:
    """What is known of checkpoints on one task."""

    samples: tuple[Sample, ...]
    """One of each checkpoint."""
    pseudo: float
    """Weight of a pseudo-example beside one seed."""


@dataclass(frozen=True)
class TaskNoise:
    """Scores of checkpoints on a task, or their mean over tasks of one training, and all their differences.

    What is of all pairs is made where it is asked for and not kept: there are as many of these arrays as columns.
    """

    samples: tuple[Sample, ...]
    """One of each checkpoint; of several tasks, of the mean over them."""
    tasks: tuple[_OnTask, ...]
    """That scores are the mean over."""

    @cached_property
    def places(self) -> Mapping[str, int]:
        """Checkpoint -> its row."""
        return {each.checkpoint: row for row, each in enumerate(self.samples)}

    @property
    def knows_seeds(self) -> bool:
        """Whether any checkpoint has several seeds; if none has, the errors are those of the examples alone."""
        return any(len(each.seeds) > 1 for each in self.samples)

    @cached_property
    def scores(self) -> EstimateArrays:
        """[checkpoints]: each with its error."""
        between, shares = _between_seeds(self.samples), self._shares
        return _with_seeds(
            _mean([_over_examples(each) for each in self.tasks]),
            variance=between.variance * shares,
            rest=between.rest * shares,
            df=np.full_like(shares, between.df),
        )

    @property
    def differences(self) -> EstimateArrays:
        """[checkpoints, checkpoints]: the row's score minus the column's, each with its error."""
        between, together = _between_seeds(self.samples), _between_seeds_paired(self.samples)
        shared = _equal([each.seeds for each in self.samples]) & self.paired
        shares = self._shares[:, None] + self._shares
        return _with_seeds(
            _mean([_pairs_over_examples(each) for each in self.tasks]),
            variance=np.where(shared, together.variance, between.variance) * shares,
            rest=between.rest * shares,
            df=np.where(shared, together.df, between.df),
        )

    @property
    def paired(self) -> Flags:
        """[checkpoints, checkpoints]: whether a difference is over examples that both have."""
        flags: Flags = np.all([_share_examples(each.samples) for each in self.tasks], axis=0)
        return flags

    @property
    def _shares(self) -> Floats:
        """[checkpoints]: of the seeds' variance that is left in a mean over them."""
        return np.array([1 / len(each.seeds) for each in self.samples])


def task_noise(samples: Sequence[Sample], *, num_tasks: int = 1, are_shares: bool = True) -> TaskNoise:
    """The errors of one task's samples, one for each checkpoint.

    Args:
        samples: of all checkpoints that have some.
        num_tasks: tasks that are averaged, of which this is one.
        are_shares: whether scores lie in [0, 1]; others, such as log-likelihoods, get no pseudo-examples.
    """
    return TaskNoise(tuple(samples), (_OnTask(tuple(samples), 1 / num_tasks if are_shares else 0.0),))


def independent(tasks: Sequence[TaskNoise]) -> Sequence[TaskNoise]:
    """What a mean over tasks is the `mean_estimates` of: they themselves, or their mean where they have one training.

    There a seed may do to all tasks what it does to one. Their examples are independent still.
    """
    names = [name for name in tasks[0].places if all(name in each.places for each in tasks)]
    by_task = [tuple(each.samples[each.places[name]] for name in names) for each in tasks]
    by_checkpoint = list(zip(*by_task, strict=True))
    are_one = all(of[0].runs and len({each.runs for each in of}) == 1 for of in by_checkpoint)
    if len(tasks) == 1 or not by_checkpoint or not are_one:
        return tasks
    parts = [_OnTask(samples, each.tasks[0].pseudo) for each, samples in zip(tasks, by_task, strict=True)]
    return [TaskNoise(tuple(map(_together, by_checkpoint)), tuple(parts))]


def _together(tasks: Sequence[Sample]) -> Sample:
    """The mean over tasks of one checkpoint that have the same trainings."""
    num = len(tasks)
    return Sample(
        checkpoint=tasks[0].checkpoint,
        seeds=tasks[0].seeds,
        means=np.mean([each.means for each in tasks], axis=0),
        num_examples=min(each.num_examples for each in tasks),
        example_variance=sum(each.example_variance for each in tasks) / num**2,
        rest_variance=sum(each.rest_variance for each in tasks) / num**2,
        runs=tasks[0].runs,
    )


def _mean(parts: Sequence[EstimateArrays]) -> EstimateArrays:
    """Of one its own, to the bit."""
    return parts[0] if len(parts) == 1 else mean_estimates(parts)


def _over_examples(task: _OnTask) -> EstimateArrays:
    """[checkpoints]: scores, with the errors that are of the examples."""
    alone = [_alone(each, pseudo=2 * task.pseudo / len(each.seeds)) for each in task.samples]
    return EstimateArrays(
        np.array([value for value, _ in alone]),
        np.array([variance for _, variance in alone])
        * [_unbiased(each.num_examples, task.pseudo) for each in task.samples],
        np.array([max(1.0, each.num_examples - 1) for each in task.samples]),
    )


def _pairs_over_examples(task: _OnTask) -> EstimateArrays:
    """[checkpoints, checkpoints]: differences, with the errors that are of the examples."""
    scores = _over_examples(task)
    variance = scores.variance[:, None] + scores.variance
    spread = scores.variance**2 / scores.df
    pairs = EstimateArrays(scores.value[:, None] - scores.value, variance, _over(variance**2, spread[:, None] + spread))
    pseudo = np.array([task.pseudo / len(each.seeds) for each in task.samples])
    examples = [_examples(each) for each in task.samples]
    for name in sorted(set(examples) - {""}):
        rows = [row for row, other in enumerate(examples) if other == name]
        cells = np.ix_(rows, rows)
        scored = np.array([task.samples[row].by_example for row in rows])
        part = _paired(scored, (pseudo[rows][:, None] + pseudo[rows]) / 2)
        pairs.value[cells], pairs.df[cells] = part.value, part.df
        pairs.variance[cells] = part.variance * _unbiased(scored.shape[1], task.pseudo)
    return pairs


def _share_examples(samples: Sequence[Sample]) -> Flags:
    """[checkpoints, checkpoints]: whether both are of the same known examples."""
    examples = [_examples(each) for each in samples]
    flags: Flags = _equal(examples) & np.array([bool(name) for name in examples], dtype=bool)
    return flags


def _examples(of: Sample) -> str:
    """What tells its examples from others; empty where not every one's score is known."""
    return of.examples if of.by_example is not None else ""


def _unbiased(num_examples: int, weight: float) -> float:
    """Times the variance by n, that by n - 1; 1 with pseudo-examples, whose intervals are made for that by n."""
    return num_examples / (num_examples - 1) if num_examples > 1 and not weight else 1.0


def _alone(each: Sample, *, pseudo: float) -> tuple[float, float]:
    """A score and its variance over examples, with `pseudo` examples each at 0 and at 1."""
    mean, num = float(each.means.mean()), each.num_examples
    weight = num + 2 * pseudo
    value = (num * mean + pseudo) / weight
    squares = num * (num * each.example_variance + mean**2)
    return value, ((squares + pseudo) / weight - value**2) / weight


def _paired(scores: Floats, pseudo: Floats) -> EstimateArrays:
    """Differences of every two rows of `scores` [checkpoints, examples], with `pseudo` examples each at -1 and 1."""
    products = scores @ scores.T
    squares = np.maximum(np.diag(products)[:, None] + np.diag(products) - 2 * products, 0.0)
    sums = scores.sum(axis=1)
    weight = scores.shape[1] + 2 * pseudo
    value = (sums[:, None] - sums) / weight
    variance = ((squares + 2 * pseudo) / weight - value**2) / weight
    return EstimateArrays(value, variance, np.full(value.shape, max(1.0, scores.shape[1] - 1)))


def _with_seeds(part: EstimateArrays, *, variance: Floats, rest: Floats, df: Floats) -> EstimateArrays:
    """With the seeds' variance added, but for the rest, which is in the examples' already.

    The sum is unbiased, so a negative difference of the two counts as well, but never takes more than `LEAST_SHARE`
    of the examples' variance away.
    """
    total = np.maximum(part.variance + variance - rest, LEAST_SHARE * part.variance)
    return EstimateArrays(
        part.value, total, np.maximum(_over(total**2, part.variance**2 / part.df + variance**2 / df), 1.0)
    )


@dataclass(frozen=True)
class _Between:
    """Of one seed's mean: its variance between seeds, what of it is the rest's, and the degrees of freedom."""

    variance: float
    rest: float
    df: float


def _between_seeds(samples: Sequence[Sample]) -> _Between:
    """Within checkpoints, pooled over those with several seeds."""
    df = sum(len(each.seeds) - 1 for each in samples)
    if not df:
        return _Between(0.0, 0.0, np.inf)
    squares = sum(float(((each.means - each.means.mean()) ** 2).sum()) for each in samples)
    rest = sum((len(each.seeds) - 1) * each.rest_variance for each in samples)
    return _Between(squares / df, rest / df, df)


def _between_seeds_paired(samples: Sequence[Sample]) -> _Between:
    """The same without what a seed does to all checkpoints alike, over those that have the same seeds."""
    squares, df = 0.0, 0
    for seeds in {each.seeds for each in samples if len(each.seeds) > 1}:
        means = np.array([each.means for each in samples if each.seeds == seeds])
        left = means - means.mean(axis=1, keepdims=True) - means.mean(axis=0) + means.mean()
        squares += float((left**2).sum())
        df += (means.shape[0] - 1) * (means.shape[1] - 1)
    pooled = _between_seeds(samples)
    return _Between(squares / df, pooled.rest, df) if df else pooled


def _equal(values: Sequence[Hashable]) -> Flags:
    """[n, n]: which values are equal."""
    numbers: dict[Hashable, int] = {}
    codes = np.array([numbers.setdefault(value, len(numbers)) for value in values], dtype=np.int64)
    equal: Flags = codes[:, None] == codes
    return equal


def _over(top: Floats, bottom: Floats) -> Floats:
    """Their ratio; infinite where `bottom` is zero."""
    ratio: Floats = np.divide(top, bottom, out=np.full(np.shape(top), np.inf), where=bottom != 0)
    return ratio
