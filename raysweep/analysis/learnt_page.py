"""What learning to compare came to: on a terminal, as JSON, and in a report."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from typing import Any

from raysweep.analysis.charts import Chart, escaped, numbers
from raysweep.analysis.derived import is_config
from raysweep.analysis.formatting import count, counted, number, percent, seconds, short_names, with_interval
from raysweep.analysis.learning import Learnt, Tested
from raysweep.analysis.pairwise import IntervalEstimate
from raysweep.analysis.ranking import plain_json
from raysweep.analysis.sections import Cell, Heading, Row, Table, cell
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
    num_splits = len(tested.indicators.by_split)
    lines = [
        f"{tested.target}: pairs right on variants that were not learnt from ({tested.num_checkpoints} checkpoints "
        f"of {tested.num_variants} in all, {num_splits} splits; 95 % by the corrected resampled t; another: all of a "
        "value left out and tested, 95 % over variants)",
    ]
    for name, estimate, brier, gain in _results(tested):
        more = "" if brier is None else f", Brier {brier:.3f}"
        more += f", {with_interval(gain)} over the configuration" if gain else ""
        lines.append(f"  {name:<44} {with_interval(estimate)}{more}")
    bins = ", ".join(
        f"{each.stated:.2f} is {each.right:.2f} ({each.num_pairs})" for each in tested.indicators.reliability
    )
    lines.append(f"  stated probability, and how often it was right (pairs): {bins}")
    by_gap = {"indicators": tested.indicators, "configuration": tested.config, "both": tested.both}
    fifths = [
        f"{name} " + ", ".join(f"{part.accuracy.value:.2f}" for part in each.by_target_gap)
        for name, each in by_gap.items()
        if each
    ]
    lines.append(f"  by fifths of the pairs, from the least difference in the target on: {'; '.join(fifths)}")
    shown = [f"{name} {share:.0%}" for name, share in list(tested.importances.items())[:MAX_IMPORTANCES]]
    lines.append(f"  importance in the trees alone, with the configuration beside: {', '.join(shown)}")
    lines += [f"  left out as a leak of the target: {', '.join(tested.left_out)}"] if tested.left_out else []
    lines += [f"  left out as you asked: {', '.join(tested.without)}"] if tested.without else []
    lines += [
        f"  left out, as {num} of {tested.num_checkpoints} checkpoints have no value: {name}"
        for name, num in tested.incomplete.items()
    ]
    lines += [f"  left out: {why}" for why in tested.rows_left_out.values()]
    if odd := tested.rows_not_learnt_from:
        lines.append(f"  tested on, and not learnt from: {len(odd)} of {tested.num_checkpoints} checkpoints")
        lines += [f"    {why}" for why in odd.values()]
    return printable("\n".join(lines))


def _results(tested: Tested) -> Iterator[tuple[str, IntervalEstimate, float | None, IntervalEstimate | None]]:
    """(what, pairs right on unseen variants, Brier score where there are probabilities, over the configuration)."""
    learnt = {
        "learnt from indicators": tested.indicators,
        "from the configuration": tested.config,
        "from both": tested.both,
        f"from the other {len(tested.others)} targets": tested.other_targets,
    }
    short = short_names(list(tested.without_group))
    learnt |= {f"from indicators, another {short[axis]}": unseen for axis, unseen in tested.without_group.items()}
    for name, unseen in learnt.items():
        if unseen:
            yield name, unseen.accuracy, unseen.brier, tested.gain if unseen is tested.both else None
    for name, average in tested.rank_averages.items():
        yield f"mean rank by {name}", average.accuracy, None, average.gain
    best = sorted(tested.single.items(), key=lambda item: -item[1].value)[:3]
    yield from ((f"{name} as it is", estimate, None, None) for name, estimate in best)


def learnt_table(tested: Tested) -> Table:
    """A row for each thing learnt from, and beside them what needs no learning."""
    columns = [
        Heading("on unseen variants"),
        Heading("pairs right", numeric=True),
        Heading("over the configuration", numeric=True),
        Heading("Brier score", numeric=True),
    ]
    rows = [
        Row([cell(name), _estimate(each), _estimate(gain), cell(brier, number)])
        for name, each, brier, gain in _results(tested)
    ]
    return Table(columns, rows)


def _estimate(estimate: IntervalEstimate | None) -> Cell:
    return cell(estimate.value, lambda _: with_interval(estimate)) if estimate else cell(None)


def importance_table(tested: Tested) -> Table:
    """The regressors of a learner of indicators and configuration: the most important ones, and all settings."""
    first = [*tested.importances][:MAX_IMPORTANCES]
    shown = {name: share for name, share in tested.importances.items() if name in first or is_config(name)}
    rows = [
        Row([cell(name, mark="config" if is_config(name) else ""), cell(share, lambda each: f"{each:.1%}")])
        for name, share in shown.items()
    ]
    return Table([Heading("learnt from"), Heading("share of the trees' gain", numeric=True)], rows)


def reliability_chart(tested: Tested) -> Chart:
    """How often stated probabilities were right, a dot for each range of them, its area by the number of pairs."""
    bins = tested.indicators.reliability
    return {
        "x": numbers(each.stated for each in bins),
        "y": numbers(each.right for each in bins),
        "shares": numbers(each.num_pairs / max(1, sum(other.num_pairs for other in bins)) for each in bins),
        "text": [
            escaped(
                f"stated {percent(each.stated)} %\nright {percent(each.right)} %\n{counted(each.num_pairs, 'pair')}"
            )
            for each in bins
        ],
    }


def format_comparison(document: Mapping[str, Any]) -> str:
    """What `comparing.compare` found, for a terminal."""
    first, second = document["first"], document["second"]
    lines = [f"A = {first}", f"B = {second}", f"by a comparer learnt from {document['learnt_from']}"]
    if unchecked := document["unchecked"]:
        named = ", ".join(unchecked[:MAX_REASONS]) + ", ..." * (len(unchecked) > MAX_REASONS)
        lines.append(
            f"not checked: whether {len(unchecked)} of {len(document['seconds'])} indicators were measured as here, "
            f"which {document['learnt_from']} does not say ({named})"
        )
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
            lines.append(
                f"  {reason['indicator']:<36} for {side} by {abs(reason['logit']):.2f}   {_measured(document, reason)}"
            )
    return printable("\n".join(lines))


def format_side_by_side(document: Mapping[str, Any]) -> str:
    """What `comparing.side_by_side` found, for a terminal."""
    sides = [_side(said["lead"]) for said in document["indicators"]]
    lines = [
        f"A = {document['first']}",
        f"B = {document['second']}",
        "no comparer is given (--with DIR), so no probability: what each indicator says by its declared direction, "
        f"{sides.count('A')} for A and {sides.count('B')} for B, many of them nearly alike",
    ]
    for side, said in zip(sides, document["indicators"], strict=True):
        lines.append(f"  {said['indicator']:<36} for {side or 'neither'}   {_measured(document, said)}")
    if left_out := document["of_other_vocabularies"]:
        lines.append(
            f"left out, as A and B have different vocabularies: {len(left_out)} losses by token, such as {left_out[0]}"
        )
    return printable("\n".join(lines))


def _side(lead: float) -> str:
    return "A" if lead > 0 else "B" if lead < 0 else ""


def _measured(document: Mapping[str, Any], said: Mapping[str, Any]) -> str:
    """Both values of an indicator, and what they took."""
    costs = (document[unit][said["indicator"]] for unit in ("seconds", "flops"))
    spent = " and ".join(
        f"{seconds(time)} (about {count(math.nan if flops is None else flops)} FLOPs)"
        for time, flops in zip(*costs, strict=True)
    )
    return f"{number(said['first'])} against {number(said['second'])}, measured in {spent}"
