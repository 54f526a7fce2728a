"""What learning to compare came to, on a terminal and as JSON."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from raysweep.analysis.formatting import with_interval
from raysweep.analysis.learning import Learnt
from raysweep.analysis.ranking import plain_json
from raysweep.analysis.unseen import Unseen
from raysweep.printable import printable

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
        f"{tested.target}: pairs right on variants that were not learnt from ({tested.num_variants} in all, 20 splits; "
        "95 % by the corrected resampled t)",
        _line("learnt from indicators", tested.indicators),
    ]
    lines += [_line("from the configuration", tested.config)] if tested.config else []
    lines += [_line("from both", tested.both)] if tested.both else []
    if tested.gain:
        lines.append(f"  {'indicators add':<26} {with_interval(tested.gain)}")
    if tested.other_targets:
        lines.append(_line("from the other targets", tested.other_targets))
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
    lines.append(f"  importance, with the configuration beside: {', '.join(shown)}")
    lines += [f"  left out as a leak of the target: {', '.join(tested.left_out)}"] if tested.left_out else []
    return printable("\n".join(lines))


def _line(name: str, unseen: Unseen) -> str:
    return f"  {name:<26} {with_interval(unseen.accuracy)}, Brier {unseen.brier:.3f}"
