"""Statistics of models that finish independent bases in the same ways: what goes together within a base, how surely.

A base is a seed of pretraining; the same ways of finishing it, the variants, make [bases, variants] cells. Models of
one base are no independent draws, so all that is said is over bases: a correlation is taken within each, and its
interval is Student's over their correlations. A bootstrap of bases has too few to draw from: of three it covers 61 to
77 % in place of 95 % in the simulation of the tests, where Student's covers 93 to 97 %, or more with few variants.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

from raysweep.analysis.pairwise import Floats, IntervalEstimate

MIN_BASES = 3
"""Of fewer no interval is told."""
MIN_VARIANTS = 4
"""Of fewer no correlation is told."""
NUM_PERMUTATIONS = 5_000
"""Of variants, unless all of them are fewer."""
MOST_EXPLAINED = 0.6
"""Of the variance of ranks, by what is given, of a measure and of the target both: of more no p is told."""

# Of permuted ranks that are held at once.
_NUMBERS = 10**6


def residual_ranks(values: Floats, given: Sequence[Floats] = ()) -> Floats:
    """Ranks within each base, less what the ranks of `given` explain by least squares, with mean 0 and norm 1.

    Args:
        values: [..., bases, variants].
        given: what is partialled out, each [bases, variants].

    Returns:
        As `values`; 0 throughout in a base where nothing is left.

    >>> residual_ranks(np.array([[3.0, 1.0, 2.0]])).round(3) + 0
    array([[ 0.707, -0.707,  0.   ]])
    """
    return _left(_ranks(values), _residual_maker(values.shape[-2:], given))


def correlation(measure: Floats, target: Floats, given: Sequence[Floats] = ()) -> IntervalEstimate:
    """Mean over bases of Spearman's correlation within each, partial where something is given, and its 95 % interval.

    The interval is Student's over the bases' correlations: for other seeds and these variants. Bases differ at least by
    what two neighbours in rank make that change places: with four or five variants three bases often agree by chance,
    and intervals of no width would hold the truth in as few as half of all studies, where these do in 92 % at least.
    NaN where there are too few variants or bases for what is asked, or all of a base are equal.

    Args:
        measure, target: [bases, variants], all numbers.
        given: what is partialled out, each [bases, variants].
    """
    num_bases, num_variants = measure.shape
    if num_variants < MIN_VARIANTS + len(given):
        return IntervalEstimate(math.nan)
    ours, theirs = residual_ranks(measure, given), residual_ranks(target, given)
    if not (ours.any(axis=1) & theirs.any(axis=1)).all():
        return IntervalEstimate(math.nan)
    each = (ours * theirs).sum(axis=1)
    if num_bases < MIN_BASES:
        return IntervalEstimate(float(each.mean()))
    # rho = 1 - 6 sum d^2 / (V^3 - V), and such a change makes 2 of sum d^2.
    step = 12 / (num_variants**3 - num_variants)
    return student(each, low=-1.0, high=1.0, least=step)


def student(
    values: Floats, *, low: float = -math.inf, high: float = math.inf, least: float = 0.0, widened: float = 1.0
) -> IntervalEstimate:
    """Mean of independent values [n], and its 95 % interval by Student's t.

    Args:
        values: [n].
        low, high: what the mean can be; the interval is cut there.
        least: standard deviation that values have at least, whatever these say.
        widened: by what the interval is longer, where values are not independent.
    """
    mean, num = float(values.mean()), len(values)
    if num < 2:
        return IntervalEstimate(mean)
    half = widened * float(stats.t.ppf(0.975, num - 1) * max(values.std(ddof=1), least) / math.sqrt(num))
    return IntervalEstimate(mean, max(low, mean - half), min(high, mean + half))


def within_recipes(measure: Floats, target: Floats) -> IntervalEstimate:
    """Correlation with the configuration partialled out: of what models differ by from their variant's mean over bases.

    Spearman's within each base of these differences, mean over bases, which takes out what a base does to all variants,
    too. They add up to 0 over B bases, so that the bases' correlations are alike and their mean is less sure than its
    scatter says: Student's interval is widened by sqrt((B - 1) / (B - 2)). Simulated with 3 and 5 bases of 5 to 10
    variants it holds 93 to 95 % where there is nothing, 89 to 95 % where there is much.

    Args:
        measure, target: [bases, variants], all numbers.
    """
    num_bases, num_variants = measure.shape
    if num_bases < MIN_BASES or num_variants < MIN_VARIANTS:
        return IntervalEstimate(math.nan)
    ours, theirs = residual_ranks(_beyond_recipe(measure)), residual_ranks(_beyond_recipe(target))
    if not (ours.any(axis=1) & theirs.any(axis=1)).all():
        return IntervalEstimate(math.nan)
    widened = math.sqrt((num_bases - 1) / (num_bases - 2))
    step = 12 / (num_variants**3 - num_variants)
    return student((ours * theirs).sum(axis=1), low=-1.0, high=1.0, least=step, widened=widened)


def within_recipes_p(measures: Floats, target: Floats, *, seed: int = 0) -> tuple[Floats, Floats]:
    """How often as large a correlation within recipes comes by chance, by itself and corrected, as `permutation_p`.

    What is left of the target is permuted over bases, for each variant by itself: models of one recipe, which differ by
    their seed alone, are exchangeable once what their base has in common is out. That takes seeds to be as independent
    within a base as they are between bases. Simulated without an effect p is at most 0.05 in 3 to 6 %; in up to 10 %
    where half of a base's variants have half of what is left of their variance in common. So read it beside the
    interval of `within_recipes`, which is over bases: both leave chance out in 1 to 5 %.

    Args:
        measures: [measures, bases, variants].
        target: [bases, variants].
        seed: of the permutations.

    Returns:
        (p, corrected p), [measures] each; NaN where nothing is left, or bases or variants are too few.
    """
    num_bases, num_variants = target.shape
    ours, left = residual_ranks(_beyond_recipe(measures)), _beyond_recipe(target)
    told = (ours.any(axis=-1) & residual_ranks(left).any(axis=-1)).all(axis=-1)
    p = np.full((2, len(measures)), math.nan)
    if not told.any() or num_bases < MIN_BASES or num_variants < MIN_VARIANTS:
        return p[0], p[1]
    in_place = np.broadcast_to(np.arange(num_bases)[:, None], (NUM_PERMUTATIONS, *target.shape))
    orders = np.random.default_rng(seed).permuted(in_place, axis=1)
    orders[0] = in_place[0]
    theirs = residual_ranks(np.take_along_axis(np.broadcast_to(left, orders.shape), orders, axis=1))
    sizes = np.abs(np.einsum("pbv,mbv->pm", theirs, ours[told]))
    reached = sizes[0] - 1e-9
    p[0, told] = (sizes >= reached).mean(axis=0)
    p[1, told] = (sizes.max(axis=1, keepdims=True) >= reached).mean(axis=0)
    return p[0], p[1]


def permutation_p(
    measures: Floats, target: Floats, given: Sequence[Floats] = (), *, seed: int = 0
) -> tuple[Floats, Floats]:
    """How often as large a mean correlation comes by chance, for each measure by itself and for the largest of all.

    Variants are permuted, each with its values in all bases: seeds of one variant are alike, and permuted by themselves
    would count for more than they are. The second is corrected for the number of measures by the largest absolute
    statistic of each permutation (Westfall and Young, 1993), which holds the chance of any false finding at p.

    Where something is given, ranks are permuted before it is partialled out: residuals are no longer free of it in
    another order, and what is left of them, taken for the whole, makes p too small. That is done to the target's ranks
    and to the measures', and the larger p is told: one is exact where the target has nothing to do with what is given,
    the other where the measures have not. Where both are nearly all explained, what is left is of the few variants that
    what is given has next to each other, the same in both, which no permutation knows: of such measures no p is told.

    Args:
        measures: [measures, bases, variants].
        target: [bases, variants].
        given: what is partialled out, each [bases, variants].
        seed: of the permutations, where there are too many to take all.

    Returns:
        (p, corrected p), [measures] each; at least one over the number of permutations. NaN where too little is left,
        or nothing in a base; such measures do not count in the correction.
    """
    maker = _residual_maker(target.shape, given)
    ranks, target_ranks = _ranks(measures), _ranks(target)
    explained = np.minimum(_explained(ranks, maker), _explained(target_ranks, maker))
    ours, theirs = _left(ranks, maker), _left(target_ranks, maker)
    told = (ours.any(axis=-1) & theirs.any(axis=-1)).all(axis=-1) & (explained < MOST_EXPLAINED)
    p = np.full((2, len(measures)), math.nan)
    if not told.any():
        return p[0], p[1]
    ranks, ours = ranks[told], ours[told]
    orders = _orders(target.shape[1], seed)
    at_once = max(1, _NUMBERS // ranks.size)
    chunks = [orders[start : start + at_once] for start in range(0, len(orders), at_once)]
    sides = [[np.einsum("bpv,mbv->pm", _left_of_orders(target_ranks, each, maker), ours) for each in chunks]]
    if given:  # Else the same numbers, by the inverse permutations.
        sides.append([np.einsum("mbpv,bv->pm", _left_of_orders(ranks, each, maker), theirs) for each in chunks])
    # Sums of the same numbers in another order are no other statistic.
    reached = np.abs(np.einsum("mbv,bv->m", ours, theirs)) - 1e-9
    sizes = [np.abs(np.concatenate(side)) for side in sides]
    p[0, told] = np.max([(each >= reached).mean(axis=0) for each in sizes], axis=0)
    p[1, told] = np.max([(each.max(axis=1, keepdims=True) >= reached).mean(axis=0) for each in sizes], axis=0)
    return p[0], p[1]


@dataclass(frozen=True)
class Spread:
    """How far models of one base really differ in a score: standard deviations, and what noise would make of none."""

    between: IntervalEstimate
    """Of true scores; its 95 % interval may begin at 0."""
    noise: float
    """Of the error of a model's mean score."""
    p: float
    """How likely noise alone gives as much: F test."""


def true_spread(scores: Floats, *, of_recipe: bool = False) -> Spread | None:
    """Standard deviation over variants of true scores, within bases: the variance of means less that of their noise.

    With S bases, V variants and K draws that all models share, A = K sum (mean over draws - base's mean)^2 / S (V - 1)
    and E the mean square of what is left of variants and draws within bases, the variance between is (A - E) / K, with
    the interval of Williams and Tukey (Williams, 1962) for a normal one. What all draws have in common, such as the
    examples that models are trained on, is no part of the noise: the spread is that given these.

    Args:
        scores: [bases, variants, draws].
        of_recipe: of models of one variant, of what differs from the means of variants and of bases: (S - 1)(V - 1) in
            place of S (V - 1).

    Returns:
        None for fewer than two variants or draws, or bases where it is that of a recipe; or where a score is NaN.
    """
    bases, variants, draws = scores.shape
    if variants < 2 or draws < 2 or (of_recipe and bases < 2):
        return None
    df, df_noise = (bases - of_recipe) * (variants - 1), bases * (variants - 1) * (draws - 1)
    means = scores.mean(axis=2)
    apart = _twice_centred(means) if of_recipe else means - means.mean(axis=1, keepdims=True)
    between = draws * float((apart**2).sum()) / df
    left = scores - means[:, :, None] - scores.mean(axis=1, keepdims=True) + scores.mean(axis=(1, 2), keepdims=True)
    noise = float((left**2).sum()) / df_noise
    if not noise > 0:  # Of scores that are NaN, too.
        return None
    ratio = max(between / noise, 1e-12)  # Of none at all, too, there is an interval.
    low, high = (
        max(0.0, df * between * (1 - stats.f.ppf(end, df, df_noise) / ratio) / (draws * stats.chi2.ppf(end, df)))
        for end in (0.975, 0.025)
    )
    value = max(0.0, (between - noise) / draws)
    return Spread(
        IntervalEstimate(*map(math.sqrt, (value, low, high))),
        noise=math.sqrt(noise / draws),
        p=float(stats.f.sf(ratio, df, df_noise)),
    )


def _orders(num: int, seed: int) -> np.ndarray:
    """Permutations [permutations, num], the first of which leaves all in place."""
    if math.factorial(num) <= NUM_PERMUTATIONS:
        return np.array(list(itertools.permutations(range(num))))
    draw = np.random.default_rng(seed)
    return np.stack([np.arange(num), *(draw.permutation(num) for _ in range(NUM_PERMUTATIONS - 1))])


def _ranks(values: Floats) -> Floats:
    return np.asarray(stats.rankdata(values, axis=-1))


def _residual_maker(shape: tuple[int, ...], given: Sequence[Floats]) -> Floats:
    """[bases, variants, variants]: what it multiplies loses its mean and what the ranks of `given` explain of it."""
    known = np.stack([np.ones(shape), *map(_ranks, given)], axis=-1)
    return np.asarray(np.eye(shape[1]) - known @ np.linalg.pinv(known))


def _explained(ranks: Floats, maker: Floats) -> Floats:
    """[...], from [..., bases, variants]: share of the variance within bases, mean over them, that is taken out."""
    left, whole = (
        (np.einsum("...bv,bvw->...bw", ranks, each) ** 2).sum(axis=-1)
        for each in (maker, _residual_maker(ranks.shape[-2:], ()))
    )
    return np.asarray((1 - left / np.maximum(whole, 1e-12)).mean(axis=-1))


def _left(ranks: Floats, maker: Floats) -> Floats:
    """[..., bases, variants]: what is left, with norm 1; 0 throughout in a base where nothing is."""
    return _normed(np.einsum("...bv,bvw->...bw", ranks, maker))


def _left_of_orders(ranks: Floats, orders: np.ndarray, maker: Floats) -> Floats:
    """[..., bases, permutations, variants]: the same of permuted ranks."""
    return _normed(ranks[..., orders] @ maker)


def _normed(left: Floats) -> Floats:
    norms = np.linalg.norm(left, axis=-1, keepdims=True)
    # Ranks are at least 1/2 apart: what is left below that by far is rounding.
    return np.where(norms > 1e-6, left / np.maximum(norms, 1e-6), 0.0)


def recipe_spread(values: Floats) -> float:
    """Standard deviation of models of one variant, beyond what a base does to all; of [bases, variants]."""
    freedom = (values.shape[0] - 1) * (values.shape[1] - 1)
    return math.sqrt(float((_twice_centred(values) ** 2).sum()) / freedom) if freedom else math.nan


def _twice_centred(values: Floats) -> Floats:
    """[..., bases, variants]: less the means of bases and of variants."""
    rows, columns = values.mean(axis=-1, keepdims=True), values.mean(axis=-2, keepdims=True)
    return np.asarray(values - rows - columns + values.mean(axis=(-1, -2), keepdims=True))


def _beyond_recipe(values: Floats) -> Floats:
    """The same, such that what is equal but for rounding is."""
    size = np.maximum(np.abs(values).max(axis=(-1, -2), keepdims=True), 1e-300)
    return np.asarray(np.round(_twice_centred(values) / size, 9))
