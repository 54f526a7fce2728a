"""What a ranking says, in words: the headline, how to read the numbers, and a score with its error."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from raysweep.analysis import formats
from raysweep.analysis.ranking import FEW_VARIANTS, Ranking, is_missing


def headline(ranking: Ranking) -> str:
    """What was found, in one sentence that claims no more than the interval holds."""
    if ranking.best is None:
        return "No checkpoint has been fine-tuned yet, so there is nothing to rank."
    best = ranking.best
    score = score_text(best.to_dict(), ranking.target)
    text = f"Best after fine-tuning is {ranking.labels[best['checkpoint']]} ({score} %)"
    measured = [
        item
        for item in ranking.associations
        if item.source == "measured" and item.accuracy.value == item.accuracy.value
    ]
    if not measured:
        return f"{text}; no indicator was measured on enough checkpoints to say what predicts it."
    top = measured[0]
    text += (
        f"; of {len([item for item in measured if item.same_order_as is None])} distinct indicators, {top.indicator} "
        f"({top.direction} is better) orders the most pairs right: {formats.estimate(top.accuracy)}"
    )
    if math.isnan(top.accuracy.low):
        return f"{text}, with too few variants for an interval."
    verdict = "" if top.accuracy.low > 0.5 else ", which is not shown to be better than chance"
    config = next((item for item in ranking.associations if item.source == "config"), None)
    if config and not math.isnan(top.gain.low) and top.gain.low <= 0:
        joined = " nor" if verdict else ", though not shown to be better"
        verdict += f"{joined} than {config.indicator} alone ({config.accuracy.value:.2f})"
    return f"{text}{verdict} (picked as the best, for which the interval does not correct)."


def how_to_read(ranking: Ranking) -> list[str]:
    """What the numbers mean and what is missing from them, a sentence each."""
    lines = [
        "Checkpoints are by falling mean score over fine-tuning tasks, on test examples, at the learning rate picked "
        "by validation score; ± is the standard error by SFT seeds. #n is a checkpoint's place by that indicator.",
        "Pairs right: share of checkpoint pairs an indicator orders as fine-tuning does (0.50 is chance; ties half). "
        f"95 % intervals draw whole variants ({ranking.num_variants}), {ranking.num_bootstrap} times.",
    ]
    if any(item.source == "config" for item in ranking.associations):
        lines.append("Config rows need no measurement, and have their better direction chosen in hindsight.")
    if 0 < ranking.num_variants < FEW_VARIANTS:
        lines.append(f"Only {ranking.num_variants} variants: the intervals are too narrow to be trusted.")
    if ranking.associations:
        counts = max((item.pairs for item in ranking.associations), key=lambda pairs: pairs.num_pairs)
        noise = f"{ranking.target}_stderr"
        if noise in ranking.checkpoints and ranking.checkpoints[noise].notna().any():
            lines.append(
                f"Of {counts.num_pairs} pairs, {counts.num_within_noise} are within the noise of SFT seeds and "
                f"{counts.num_target_ties} tied; “clear” leaves them out ({counts.num_clear} pairs)."
            )
        else:
            lines.append("One SFT seed only: the noise of scores is not known, and no pair was set apart for it.")
    if ranking.num_unscored:
        lines.append(
            f"{ranking.num_unscored} of {len(ranking.checkpoints)} checkpoints have no score and are not ranked"
            f" ({len(ranking.diverged)} diverged)."
        )
    return lines


def score_text(row: Mapping[Any, Any], target: str) -> str:
    """`61.2 ± 0.4`, in percent."""
    error = row.get(f"{target}_stderr", math.nan)
    text = formats.percent(row[target])
    return text if is_missing(error) else f"{text} ± {formats.percent(error)}"
