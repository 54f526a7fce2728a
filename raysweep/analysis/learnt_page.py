"""What learning to compare came to: on a terminal, as JSON, and in a report."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from typing import Any

from raysweep.analysis.charts import Chart, escaped, numbers
from raysweep.analysis.formatting import count, counted, number, percent, seconds, short_names, with_interval
from raysweep.analysis.learning import Learnt, Tested
from raysweep.analysis.pairwise import IntervalEstimate
from raysweep.analysis.ranking import plain_json
from raysweep.analysis.sections import Heading, Row, Table, cell
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
    for name, estimate, brier in _results(tested):
        lines.append(f"  {name:<44} {with_interval(estimate)}" + ("" if brier is None else f", Brier {brier:.3f}"))
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


def _results(tested: Tested) -> Iterator[tuple[str, IntervalEstimate, float | None]]:
    """(what, pairs right on unseen variants, Brier score where there are probabilities)."""
    learnt = {
        "learnt from indicators": tested.indicators,
        "from the configuration": tested.config,
        "from both": tested.both,
        f"from the other {len(tested.others)} targets": tested.other_targets,
    }
    short = short_names(list(tested.without_group))
    learnt |= {f"from indicators, another {short[axis]}": unseen for axis, unseen in tested.without_group.items()}
    yield from ((name, unseen.accuracy, unseen.brier) for name, unseen in learnt.items() if unseen)
    if tested.gain:
        yield "from both minus from the configuration", tested.gain, None
    yield "mean rank by all indicators", tested.mean_rank, None
    best = sorted(tested.single.items(), key=lambda item: -item[1].value)[:3]
    yield from ((f"{name} as it is", estimate, None) for name, estimate in best)


def learnt_table(tested: Tested) -> Table:
    """A row for each thing learnt from, and beside them what needs no learning."""
    columns = [
        Heading("on unseen variants"),
        Heading("pairs right", numeric=True),
        Heading("Brier score", numeric=True),
    ]
    rows = [
        Row([cell(name), cell(estimate.value, lambda _, e=estimate: with_interval(e)), cell(brier, number)])  # type: ignore[misc]
        for name, estimate, brier in _results(tested)
    ]
    return Table(columns, rows)


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
            costs = (document[unit][reason["indicator"]] for unit in ("seconds", "flops"))
            spent = " and ".join(
                f"{seconds(time)} (about {count(math.nan if flops is None else flops)} FLOPs)"
                for time, flops in zip(*costs, strict=True)
            )
            lines.append(
                f"  {reason['indicator']:<36} for {side} by {abs(reason['logit']):.2f}   "
                f"{number(reason['first'])} against {number(reason['second'])}, measured in {spent}"
            )
    return printable("\n".join(lines))
