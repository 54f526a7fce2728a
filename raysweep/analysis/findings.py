"""What a ranking says, in words: the headline, what to be wary of, how to read the numbers, a score with its error."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from raysweep.analysis import formatting
from raysweep.analysis.associations import TOGETHER, Association
from raysweep.analysis.cut_prompts import cut_lines
from raysweep.analysis.derived import HESSIAN_TRACE
from raysweep.analysis.labels import is_missing, row_key
from raysweep.analysis.objectives import objective_cautions, objective_lines, vocabulary_cautions
from raysweep.analysis.pairwise import MIN_CLUSTERS, IntervalEstimate
from raysweep.analysis.ranking import PROBE_MEAN, Ranking, Tie, score
from raysweep.analysis.regrets import NO_REGRET_INTERVAL
from raysweep.scores import MEAN_LIKELIHOOD, MEAN_SCORE, column_name, of_methods, task_of

if TYPE_CHECKING:
    import pandas as pd

TARGET_REACHED = column_name("flatness", "target_reached")
TRACE_ERROR = column_name("flatness", "hessian_trace_stderr")
MAX_NAMED = 6
"""Ties that one sentence lists."""
MIN_PAIRS = 0.25
"""Part of the pairs that the headline's indicator orders at least: of a few pairs some one orders all by chance."""


def headline(ranking: Ranking) -> str:
    """What was found, in one sentence that claims no more than the intervals hold."""
    if not ranking.has_scores:
        return "No checkpoint has a fine-tuned score, so there is nothing to rank."
    text = _best_text(ranking)
    measured = [
        item
        for item in ranking.associations
        if item.source == "measured" and item.accuracy.value == item.accuracy.value
    ]
    if not measured:
        return f"{text}; no indicator was measured on enough checkpoints to say what predicts it."
    most = max(item.pairs.num_pairs for item in measured)
    top = next(item for item in measured if item.pairs.num_pairs >= MIN_PAIRS * most)
    text += (
        f"; of {len([item for item in measured if item.same_order_as is None])} distinct indicators, {top.indicator} "
        f"({direction_text(top)} is better) orders the most pairs right: {formatting.with_interval(top.accuracy)}"
    )
    # Its interval is over variants: noise of the test examples, which all checkpoints share, may agree with it.
    if top.pairs.num_pairs and top.pairs.num_clear == 0:
        text += f" of {top.pairs.num_pairs}, none of which is clear of noise"
    if math.isnan(top.accuracy.low):
        text += ", with too few variants for an interval"
        if top.gain.value <= 0:
            text += f", and no more than {_known_before(top)}"
        return f"{text}."
    verdict = "" if top.accuracy.low > 0.5 else ", which is not shown to be better than chance"
    if top.gain.low <= 0:
        joined = " nor" if verdict else ", though not shown to be better"
        verdict += f"{joined} than {_known_before(top)}"
    if top.added.low <= 0:
        verdict += f"{', nor' if verdict else ', though not shown'} to add to the configuration"
    return f"{text}{verdict} (picked as the best, for which the interval does not correct)."


def _best_text(ranking: Ranking) -> str:
    best = ranking.best
    if best is None:
        return f"No checkpoint is best: by {ranking.target} they compare within one objective and text alone"
    score = f"{score_text(best.to_dict(), ranking.target)}{formatting.unit(ranking.target)}"
    return f"Best after fine-tuning is {ranking.labels[row_key(best)]} ({score}){_beside(ranking)}"


def cautions(ranking: Ranking) -> list[str]:
    """What a reader must know before believing the ranking, a sentence each; none in a good sweep."""
    lines = []
    if formatting.is_share(ranking.target) and 2 * ranking.num_near_chance > ranking.num_against_chance:
        levels = ", ".join(f"{task} {formatting.percent(level)} %" for task, level in sorted(ranking.chance.items()))
        lines.append(
            f"{ranking.num_near_chance} of {ranking.num_against_chance} scores are not clearly above chance ({levels}),"
            " so the ranking is mostly of noise. Fine-tune on more examples or longer, take easier tasks, or rank by "
            "the likelihood of right answers (sft.likelihood), which tells more."
        )
    lines += _edge_lines(ranking)
    table = ranking.checkpoints
    if ranking.num_groups > 1:
        pairs = formatting.counted(ranking.num_comparisons, "pair")
        lines.append(
            f"{ranking.target} is a rise of each checkpoint's own loss, which does not compare over the "
            f"{ranking.num_groups} objectives and texts there are: {pairs} within one are counted, # is a place within "
            "one, and none is best of all."
        )
    lines += vocabulary_cautions(table)
    lines += objective_cautions(table)
    lines += cut_lines(ranking.cut_prompts)
    lines += _flatness_lines(table)
    lines += _workers_lines(table)
    # Of the same task, or the mean over the same; there is none for a target that is no score of fine-tuning.
    probes = {score(task): score(task_of(task), "probe") for task in ranking.tasks}
    with_probe = {task_of(task) for task in ranking.tasks if score(task_of(task), "probe") in table}
    if with_probe == {*map(task_of, ranking.target_tasks)}:
        probes |= dict.fromkeys(of_methods(MEAN_SCORE, ranking.tasks), PROBE_MEAN)
    probe = probes.get(ranking.target)
    if probe in table:
        both = table[[probe, ranking.target]].dropna()
        above = int((both[probe] > both[ranking.target]).sum())
        if 2 * above > len(both):
            probed, tuned = (formatting.percent(both[name].mean()) for name in (probe, ranking.target))
            lines.append(
                f"A linear probe scores above fine-tuning on {above} of {len(both)} checkpoints "
                f"({probed} against {tuned} % on average): fine-tuning is too short, or its rates too small."
            )
    return lines + [f"{flag.text[0].upper()}{flag.text[1:]}." for flag in ranking.flags]


def how_to_read(ranking: Ranking) -> list[str]:
    """What the numbers mean and what is missing from them, a sentence each."""
    lines = []
    if ranking.has_scores:
        lines = [
            f"Checkpoints are by {_target_text(ranking.target)}, on test examples, at the learning rate picked on "
            "validation examples. #n is a checkpoint's place by that indicator.",
            _error_line(ranking),
        ]
    if ranking.num_comparisons and ranking.num_clear is not None:
        lines.append(
            f"Clear pairs of checkpoints: {ranking.num_clear} of {ranking.num_comparisons}. Their difference is "
            "beyond noise, with one in twenty of them at most expected to be none (Benjamini-Hochberg)."
        )
        lines += [_tie_line(ranking)] if ranking.gap else []
    lines += agreement_lines(ranking)
    lines += objective_lines(ranking.checkpoints)
    lines += unscored_lines(ranking)
    return lines


def unscored_lines(ranking: Ranking) -> list[str]:
    """How many checkpoints have no score."""
    if not ranking.num_unscored:
        return []
    statuses = Counter(ranking.checkpoints["status"])
    known = [f"{statuses[status]} {status}" for status in ("diverged", "failed", "pruned") if statuses[status]]
    return [
        f"Not ranked, for want of a score: {ranking.num_unscored} of {len(ranking.checkpoints)} checkpoints"
        + (f" ({', '.join(known)})." if known else ".")
    ]


def gap_lines(ranking: Ranking) -> list[str]:
    """What is missing from a table: errors of its scores, scores, and values of indicators."""
    lines = []
    if ranking.errors == "unknown":
        lines.append(
            "Clear pairs right: errors of the score are not known; give them in a column "
            f"{ranking.target}_stderr, or it is not told."
        )
    lines += unscored_lines(ranking)
    scored = ranking.checkpoints[ranking.checkpoints[ranking.target].notna()]
    gaps = {
        item.indicator: int(scored[item.indicator].isna().sum())
        for item in ranking.associations
        if item.source == "measured" and item.indicator in scored
    }
    if found := [f"{name} {num}" for name, num in gaps.items() if num]:
        lines.append(f"Without a value, of {len(scored)} scored checkpoints: {', '.join(found)}.")
    return lines


def agreement_lines(ranking: Ranking) -> list[str]:
    """What the numbers of the indicators mean, a sentence each."""
    lines = []
    if ranking.associations:
        lines.append(
            "Pairs right: share of checkpoint pairs an indicator orders as fine-tuning does (0.50 is chance; ties "
            f"half). {_interval_text(ranking)}"
        )
    if ranking.associations and ranking.num_bases > 1:
        lines.append(
            f"Pairs are of one pretraining seed each ({ranking.num_bases} seeds), fits know the seed, and choices are "
            "among checkpoints of one: a seed may move the scores and indicators of all its checkpoints, and of few "
            "seeds no interval tells how another would. How far seeds order variants in different ways is in the "
            "intervals of pairs right by an indicator and of rank correlations, of three seeds or more that nearly all "
            "variants have; it is not in the others."
        )
    if any(item.source == "config" for item in ranking.associations):
        lines.append(
            "Config rows need no measurement: a pair is ordered by what a setting did to the scores of other variants, "
            "the others held equal (a regression on all). The best of these rows is what an indicator has to beat."
        )
        lines.append(
            "Adds to config: what an indicator adds to the pairs right of a regression on the whole configuration, "
            "each pair predicted without both its variants; 0 for what only follows a setting. Of those that add "
            "nothing one in forty has its interval above 0 by chance."
        )
    if any(item.selection for item in ranking.associations):
        lines.append(
            "Recall, regret and NDCG at k are of fine-tuning only the k that an indicator puts first, in sweeps of "
            "half of these variants. On simulated tables of 24 to 100 variants their 95 % intervals held 89 to 100 % "
            "of the time. Those of regret are of sweeps in which no few variants score far above all others: such as "
            f"this one has not seen may come. {NO_REGRET_INTERVAL}"
        )
    if not math.isnan(ranking.ceiling):
        lines.append(
            f"Noise of fine-tuning alone leaves {ranking.ceiling:.2f} of pairs right to an indicator that knows the "
            "true scores."
        )
    return lines + _noise_floor_lines(ranking)


def _noise_floor_lines(ranking: Ranking) -> list[str]:
    """Below which difference the best indicator tells nothing, and how far seeds of one recipe end apart."""
    lines = []
    # Of those that compare all checkpoints: others are best of a few pairs.
    best = next((item for item in ranking.associations if item.source == "measured" and item.selection), None)
    if best and (within := best.chance_within):
        lines.append(
            f"Where signal ends: of pairs that differ by at most {formatting.number(within.high)} in {ranking.target} "
            f"({within.num_pairs} of {best.pairs.num_pairs}), {best.indicator}, the best indicator of all checkpoints, "
            f"has {formatting.with_interval(within.accuracy)} right, not shown to be better than chance."
        )
    if twins := ranking.seed_twins:
        inner = twins.beside_offset
        both, value, low, high, tuned = (
            formatting.number(each)
            for each in (twins.difference, inner.value, inner.low, inner.high, twins.of_finetuning)
        )
        recipes = formatting.counted(twins.num_variants, "recipe")
        text = (
            f"Pretraining seeds: two of a recipe differ by {both} in {ranking.target} (root mean square, {recipes} of "
            f"{twins.num_seeds} seeds)"
        )
        if not math.isnan(inner.value):
            text += f", without what a seed adds to all of them, as another base does, by {value} [{low}, {high}]"
        if not math.isnan(twins.of_finetuning):
            text += f"; noise of fine-tuning alone makes {tuned} of it"
        lines.append(f"{text}.")
    return lines


def _target_text(target: str) -> str:
    known = {
        MEAN_SCORE: "falling mean score over fine-tuning tasks",
        MEAN_LIKELIHOOD: "falling mean log-likelihood of right answers over fine-tuning tasks",
    }
    return known.get(target, target)


def score_text(row: Mapping[Any, Any], target: str) -> str:
    """`61.2 ± 1.4`, a score in percent: the half width of the 95 % interval, on its longer side where it ends at 0 or
    100."""
    half = half_width(row, target)
    text = formatting.amount(row[target], target)
    return text if math.isnan(half) else f"{text} ± {formatting.amount(half, target)}"


def half_width(row: Mapping[Any, Any], target: str) -> float:
    """Of a score's 95 % interval, on its longer side; NaN where there is none."""
    low, high = row.get(f"{target}_low"), row.get(f"{target}_high")
    return math.nan if is_missing(low) or is_missing(high) else float(max(high - row[target], row[target] - low))


def points_text(difference: IntervalEstimate, target: str) -> str:
    """`1.3 [-0.4, 3.0] points`: a difference of scores in hundredths, or in nats, with its interval if there is one."""
    value, low, high = (formatting.amount(each, target) for each in (difference.value, difference.low, difference.high))
    unit = " points" if formatting.is_share(target) else formatting.unit(target)
    return f"{value}{unit}" if math.isnan(difference.low) else f"{value} [{low}, {high}]{unit}"


def direction_text(item: Association) -> str:
    """Which values of an indicator are better, in words."""
    return {"max": "higher", "min": "lower", None: "by level"}[item.direction]


def cost_text(tie: Tie) -> str:
    """`at half the tokens`; empty where the cost is the same or not known."""
    if math.isnan(tie.cost_ratio) or tie.cost_ratio == 1:
        return ""
    return "at half the tokens" if tie.cost_ratio == 0.5 else f"at {formatting.number(tie.cost_ratio)} times the tokens"


def tie_text(tie: Tie, ranking: Ranking) -> str:
    """`lr 0.01 · step 300 (1.3 [-0.4, 3.0] points below, at half the tokens)`; above where a lower target is better."""
    behind = f"{points_text(tie.difference, ranking.target)} {worse_side(ranking)}"
    return f"{tie.label} ({', '.join(filter(None, (behind, cost_text(tie))))})"


def worse_side(ranking: Ranking) -> str:
    """Where a worse checkpoint's target lies: below, or above where a lower one is better."""
    return "below" if ranking.sign > 0 else "above"


def gap_text(ranking: Ranking) -> str:
    """`1.3 [0.4, 3.0] points above the next`, below where a lower target is better; empty without a next."""
    if ranking.gap is None:
        return ""
    return f"{points_text(ranking.gap, ranking.target)} {'above' if ranking.sign > 0 else 'below'} the next"


def _known_before(indicator: Association) -> str:
    """`the sweep file alone (0.88)`: what needs no measurement, and the share of the same pairs that it has right."""
    name = "the sweep file" if indicator.baseline == TOGETHER else indicator.baseline
    return f"{name} alone ({indicator.accuracy.value - indicator.gain.value:.2f})"


def _beside(ranking: Ranking) -> str:
    """After the best one's name: the ties, the cheapest first, or else how far it is ahead."""
    if ranking.ties:
        cheapest = min(ranking.ties, key=lambda tie: math.inf if math.isnan(tie.cost_ratio) else tie.cost_ratio)
        tie = cheapest if cheapest.cost_ratio < 1 else ranking.ties[0]
        cost = f", {cost_text(tie)}" if cost_text(tie) else ""
        more = len(ranking.ties) - 1
        return f", not distinguishable from {tie.label}{cost}{f', and {more} more' if more else ''}"
    if ranking.gap is None or math.isnan(ranking.gap.low):
        return ""
    return f", {gap_text(ranking)}"


def _tie_line(ranking: Ranking) -> str:
    method = f"95 % intervals that hold at once for {formatting.counted(ranking.num_comparisons, 'pair')}, Tukey-Kramer"
    if not ranking.ties:
        return f"The best is better than every other ({method})."
    named = [tie_text(tie, ranking) for tie in ranking.ties[:MAX_NAMED]]
    if more := len(ranking.ties) - len(named):
        named.append(f"and {more} more")
    return f"Not distinguishable from the best: {'; '.join(named)} ({method})."


def _error_line(ranking: Ranking) -> str:
    text = "± is the half width of a 95 % interval, over test examples and fine-tuning seeds"
    if ranking.errors == "paired":
        return f"{text}; differences are paired by test example and seed."
    if ranking.errors == "paired, one seed":
        return (
            "± is the half width of a 95 % interval over test examples alone: with one fine-tuning seed, how far seeds "
            "differ is not known. Differences are paired by test example."
        )
    if ranking.errors == "unpaired":
        return f"{text}; differences are not paired, as the checkpoints' test examples are not known to be the same."
    return "The errors of the scores are not known: no difference is shown to be more than noise."


def _interval_text(ranking: Ranking) -> str:
    if ranking.num_variants < MIN_CLUSTERS:
        return f"Of fewer than {MIN_CLUSTERS} variants (here {ranking.num_variants}) there are no intervals."
    return (
        f"95 % intervals leave out each variant in turn ({ranking.num_variants}; jackknife), those of fits on the "
        "configuration fit anew on halves of them, where these are large enough: over variants, on these test "
        "examples, whose own luck all checkpoints share, and with these seeds, whose effect on all variants is no part "
        "of them."
    )


def _flatness_lines(checkpoints: pd.DataFrame) -> list[str]:
    """Whether most Hessian traces are less sure than was asked for."""
    if TARGET_REACHED not in checkpoints:
        return []
    measured = checkpoints.dropna(subset=[TARGET_REACHED])
    missed = measured[measured[TARGET_REACHED] == 0]
    if 2 * len(missed) <= len(measured):
        return []
    errors = (missed[TRACE_ERROR] / missed[HESSIAN_TRACE]).abs()
    return [
        f"Flatness is less sure than flatness.rse asks for on {len(missed)} of {len(measured)} checkpoints (standard "
        f"error of the Hessian trace: {formatting.percent(errors.median())} % of it, in the median), so an order by it "
        "may be noise. Raise flatness.num_sequences or max_units."
    ]


def _workers_lines(checkpoints: pd.DataFrame) -> list[str]:
    """Gangs of several sizes."""
    nums = sorted(checkpoints["workers"].dropna().astype(int).unique()) if "workers" in checkpoints else []
    if len(nums) < 2:
        return []
    return [
        f"Checkpoints were pretrained on {', '.join(map(str, nums[:-1]))} and {nums[-1]} workers, by which sums are "
        "rounded and dropout is drawn in different ways: as another seed would, this moves scores a little."
    ]


def _edge_lines(ranking: Ranking) -> list[str]:
    """How many rates were picked at an end of their grid, and whether that concerns the best and its ties.

    Of the tasks of a mixture one was picked for all.
    """
    of_target = (edge for edge in ranking.edges if edge.task in ranking.target_tasks)
    edges = list({(edge.trial, edge.checkpoint, edge.runs or edge.task): edge for edge in of_target}.values())
    if not edges or not ranking.has_scores:
        return []
    best = [] if ranking.best is None else [ranking.best["checkpoint"]]
    leaders = {*best, *(tie.checkpoint for tie in ranking.ties)}
    sides = Counter(edge.side for edge in edges)
    counts = " and ".join(f"{number} at the {side}" for side, number in sorted(sides.items()))
    leading = [edge for edge in edges if edge.checkpoint in leaders]
    cases = formatting.counted(len(edges), "case")
    concerned = ", of none of the leaders" if best else ""
    if leading:
        concerned = f", of the best or a tie with it in {len(leading)}"
    return [
        f"The fine-tuning rate picked is at an end of its grid in {cases} ({counts}{concerned}): a "
        "better one may lie beyond, as it may where all rates score alike. Widen sft.lrs, or let `lrs: auto` do it."
    ]
