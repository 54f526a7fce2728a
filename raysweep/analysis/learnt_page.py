"""What learning to compare came to: on a terminal, as JSON, and in a report."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from typing import Any

from raysweep.analysis.charts import Chart, escaped, numbers
from raysweep.analysis.comparer import FAR, TOO_FAR
from raysweep.analysis.cut_prompts import CutPrompts, cut_lines
from raysweep.analysis.derived import is_config
from raysweep.analysis.formatting import count, counted, number, percent, seconds, short_names, with_interval
from raysweep.analysis.learning import Learnt, Tested
from raysweep.analysis.pairwise import IntervalEstimate
from raysweep.analysis.ranking import plain_json
from raysweep.analysis.sections import Cell, Heading, Row, Table, cell
from raysweep.printable import printable

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
        f"of {tested.num_variants} in all, {num_splits} splits; 95 % by the corrected resampled variance, Wilson's of "
        "shares, Student's t of what is over the configuration; another: all of a value left out and tested, 95 % over "
        "variants)",
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
    where = [
        f"{'to' if each.high < math.inf else 'beyond'} {each.high if each.high < math.inf else each.low:g} "
        f"{each.accuracy.value:.2f} ({each.num_pairs})"
        for each in tested.indicators.by_distance
    ]
    lines.append(f"  by how many times as far as usual a pair lies from what was learnt from: {', '.join(where)}")
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
        lines += _answer_lines(document, answer)
    if any(answer["reasons"] for answer in document["answers"]):
        lines.append(
            "reasons are in log-odds, and add up to that of the probability; (!): it was learnt to speak for the one "
            "that is worse by the indicator's declared direction"
        )
    lines += cut_lines([CutPrompts(**each) for each in document["cut_prompts"]])
    return printable("\n".join(lines))


def _answer_lines(document: Mapping[str, Any], answer: Mapping[str, Any]) -> list[str]:
    """Of one target: the probability, or why there is none; how far the two lie from what was learnt from; reasons."""
    first, second = answer["distance"]
    if math.isnan(first) or math.isnan(second):
        return [f"{answer['target']}: no probability: no indicator of A, or of B, has a value"]
    said = f"no probability: beyond {TOO_FAR:g} times as far none is to go by"
    if answer["probability"] is not None:
        said = f"A fine-tunes better with probability {answer['probability']:.2f} ({_tested(answer['tested'])})"
    lines = [
        f"{answer['target']}: {said}",
        f"  {'far: ' if max(first, second) > FAR else ''}A {number(first, 2)} and B {number(second, 2)} times as far "
        "from what was learnt from as that lies apart",
    ]
    for reason in answer["reasons"][:MAX_REASONS]:
        side = "A" if reason["logit"] > 0 else "B"
        mark = "(!)" if reason["against_direction"] else "   "
        lines.append(
            f"  {reason['indicator']:<36} for {side} by {abs(reason['logit']):.2f} {mark} {_measured(document, reason)}"
        )
    return lines


def _tested(tested: Mapping[str, Any] | None) -> str:
    """How often comparisons of pairs as far away were right, on variants like those that were learnt from."""
    if tested is None:
        return "no comparison of unseen variants was of any so far away: how often one is right is not known"
    low, high = tested["low"], tested["high"]
    where = f"beyond {low:g}" if math.isinf(high) else f"{low:g} to {high:g}"
    right, pairs = with_interval(IntervalEstimate(**tested["accuracy"])), counted(tested["num_pairs"], "comparison")
    return f"of {pairs} of unseen variants of the same sweep {where} times as far {right} were right"


def format_side_by_side(document: Mapping[str, Any]) -> str:
    """What `comparing.side_by_side` found, for a terminal."""
    lines = [
        f"A = {document['first']}",
        f"B = {document['second']}",
        "no comparer is given (--with DIR), so no probability: what each indicator says by its declared direction. "
        "Several are of one quantity, and are no votes. ±: recorded standard error; neither: within 95 % of the error "
        "of the difference, taken as of two that are independent; ?: no error is recorded, and by chance it may be the "
        "other",
    ]
    width = max((len(said["indicator"]) for said in document["indicators"]), default=0)
    for said in document["indicators"]:
        doubt = "?" if said["for"] != "neither" and math.isnan(math.hypot(*_errors(said))) else " "
        lines.append(f"  {said['indicator']:<{width}} for {said['for'] + doubt:<8} {_measured(document, said)}")
    if left_out := document["of_other_vocabularies"]:
        lines.append(
            f"left out, as A and B have different vocabularies: {len(left_out)} losses by token, such as {left_out[0]}"
        )
    lines += cut_lines([CutPrompts(**each) for each in document["cut_prompts"]])
    return printable("\n".join(lines))


def _errors(said: Mapping[str, Any]) -> tuple[float, float]:
    return said.get("first_stderr", math.nan), said.get("second_stderr", math.nan)


def _measured(document: Mapping[str, Any], said: Mapping[str, Any]) -> str:
    """Both values of an indicator, and what they took."""
    costs = (document[unit][said["indicator"]] for unit in ("seconds", "flops"))
    spent = " and ".join(
        f"{seconds(time)} (about {count(math.nan if flops is None else flops)} FLOPs)"
        for time, flops in zip(*costs, strict=True)
    )
    first, second = (
        number(said[name]) + ("" if math.isnan(error) else f" ± {number(error, 2)}")
        for name, error in zip(("first", "second"), _errors(said), strict=True)
    )
    return f"{first} against {second}, measured in {spent}"
