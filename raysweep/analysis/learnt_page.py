"""What learning to compare came to, on a terminal and as JSON."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from raysweep.analysis.formatting import number, seconds, with_interval
from raysweep.analysis.learning import Learnt
from raysweep.analysis.ranking import plain_json
from raysweep.analysis.unseen import Unseen
from raysweep.printable import printable

FAR = 2.0
"""Distances above this are said."""
MAX_REASONS = 5
"""Of a comparison, that are listed."""
MAX_IMPORTANCES = 8
"""Of regressors, that are listed."""


def learnt_document(learnt: Learnt) -> dict[str, Any]:
    """As JSON values, None for what is missing."""
    document = asdict(learnt.tested) | {"slope": learnt.comparer.slope}
    return plain_json(document)  # type: ignore[no-any-return]


def format_learnt(learnt: Learnt) -> str:
    """Pairs right on unseen variants, a line each."""
    tested = learnt.tested
    lines = [
        f"{tested.target}: pairs right on variants that were not learnt from ({tested.num_checkpoints} checkpoints "
        f"of {tested.num_variants} in all, 20 splits; 95 % by the corrected resampled t)",
        _line("learnt from indicators", tested.indicators),
    ]
    lines += [_line("from the configuration", tested.config)] if tested.config else []
    lines += [_line("from both", tested.both)] if tested.both else []
    if tested.gain:
        lines.append(f"  {'indicators add':<26} {with_interval(tested.gain)}")
    if tested.other_targets:
        lines.append(_line("from the other targets", tested.other_targets))
    lines.append(f"  {'mean rank by all indicators':<26} {with_interval(tested.mean_rank)}")
    best = sorted(tested.single.items(), key=lambda item: -item[1].value)[:3]
    lines += [f"  {f'{name} as it is':<26} {with_interval(estimate)}" for name, estimate in best]
    for axis, unseen in tested.without_group.items():
        short = axis.removeprefix("point.")
        lines.append(_line(f"another {short}", unseen))
    bins = ", ".join(
        f"{each.stated:.2f} is {each.right:.2f} ({each.num_pairs})" for each in tested.indicators.reliability
    )
    lines.append(f"  stated probability, and how often it was right (pairs): {bins}")
    shown = [f"{name} {share:.0%}" for name, share in list(tested.importances.items())[:MAX_IMPORTANCES]]
    lines.append(f"  importance in the trees alone, with the configuration beside: {', '.join(shown)}")
    lines += [f"  left out as a leak of the target: {', '.join(tested.left_out)}"] if tested.left_out else []
    lines += [f"  left out as you asked: {', '.join(tested.without)}"] if tested.without else []
    lines += [
        f"  left out, as {num} of {tested.num_checkpoints} checkpoints have no value: {name}"
        for name, num in tested.incomplete.items()
    ]
    lines += [f"  left out: {row}: {why}" for row, why in tested.rows_left_out.items()]
    if odd := tested.rows_not_learnt_from:
        lines.append(f"  tested on, and not learnt from: {len(odd)} of {tested.num_checkpoints} checkpoints")
        lines += [f"    {row}: {why}" for row, why in odd.items()]
    return printable("\n".join(lines))


def _line(name: str, unseen: Unseen) -> str:
    return f"  {name:<26} {with_interval(unseen.accuracy)}, Brier {unseen.brier:.3f}"


def format_comparison(document: Mapping[str, Any]) -> str:
    """What `comparing.compare` found, for a terminal."""
    first, second = document["first"], document["second"]
    lines = [f"A = {first}", f"B = {second}", f"by a comparer learnt from {document['learnt_from']}"]
    for answer in document["answers"]:
        chance = answer["probability"]
        lines.append(
            f"{answer['target']}: A fine-tunes better with probability {chance:.2f} "
            f"(comparisons of unseen variants were right in {answer['pairs_right']:.2f})"
        )
        far = max(answer["distance"], key=lambda distance: (math.isnan(distance), distance))
        if math.isnan(far):
            lines.append("  how far from what was learnt from is not known: no value of an indicator is there")
        elif far > FAR:
            lines.append(f"  {far:.1f} times as far from what was learnt from as that lies apart: believe it less")
        for reason in answer["reasons"][:MAX_REASONS]:
            side = "A" if reason["logit"] > 0 else "B"
            spent = " and ".join(seconds(each) for each in document["seconds"][reason["indicator"]])
            lines.append(
                f"  {reason['indicator']:<36} for {side} by {abs(reason['logit']):.2f}   "
                f"{number(reason['first'])} against {number(reason['second'])}, measured in {spent}"
            )
    return printable("\n".join(lines))
