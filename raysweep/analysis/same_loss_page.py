"""The part of a report that asks whether flat is better here: what was equal, what differed, how surely."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from raysweep.analysis import formatting
from raysweep.analysis.derived import HESSIAN_TRACE
from raysweep.analysis.measure_errors import Known, rescaled_name
from raysweep.analysis.pairwise import IntervalEstimate
from raysweep.analysis.same_loss import GAP, Association, Group, Pivot, ProbedLayers, SameLoss
from raysweep.analysis.same_loss_picture import picture
from raysweep.analysis.same_loss_verdict import (
    ALPHA,
    alike,
    holds_within_recipes,
    is_apart,
    nothing_to_predict,
    short_name,
    verdict,
)
from raysweep.analysis.sections import Cell, Heading, Row, Table, cell
from raysweep.analysis.within_bases import MIN_VARIANTS, Spread

if TYPE_CHECKING:
    from markupsafe import Markup

MAX_NAMED = 3
"""Measures that an answer names; the table below it has all."""


@dataclass(frozen=True)
class Page:
    """What the template shows."""

    verdict: str
    """Over all answers."""
    answers: tuple[tuple[str, tuple[str, ...]], ...]
    """Group of variants, and a sentence for each way to measure transfer."""
    equal: str
    differed: Table
    differed_note: str
    variants: Table
    knobs: Table
    """What each variant does to every measure."""
    layers: tuple[tuple[str, Table], ...]
    """Title, and probes by layer."""
    models: tuple[str, ...]
    """A line for each group: its name and its variants."""
    tables: tuple[tuple[str, str, Table], ...]
    """Title, the variants that it is of, and measures, by falling certainty."""
    picture: Markup | str
    """Empty where there is none."""
    picture_note: str
    variants_note: str
    """What each variant is compared with."""
    known: Table
    """How well each measure is known, and what a change of scale makes of it."""
    known_note: str
    edge_note: str
    """Of tuned rates that may not be the best; empty where all are within their grids."""


def same_loss_page(found: SameLoss) -> Page:
    """All of it, from what was compared."""
    return Page(
        verdict=verdict(found),
        answers=tuple(
            (_capital(group.name), tuple(_answer(group, target) for target in group.associations))
            for group in found.groups
        ),
        equal=_equal(found),
        differed=_spread_table(found),
        differed_note=_spread_note(found),
        variants=_variant_table(found),
        knobs=_knob_table(found),
        layers=tuple(
            (f"Probes of {each.num_labels} labels, by layer; each interval by itself", _layer_table(each))
            for each in found.layers
        ),
        models=tuple(_models(group) for group in found.groups),
        tables=tuple(
            (f"{group.name}: {target}", _models(group), _measure_table(associations, found.seconds))
            for group in found.groups
            for target, associations in group.associations.items()
        ),
        picture=picture(found),
        picture_note=_picture_note(found),
        variants_note=_variants_note(found),
        known=_known_table(found.measures),
        known_note=" ".join([*_known_notes(found), _in_it(found)]),
        edge_note=_edge_note(found),
    )


def _answer(group: Group, target: str) -> str:
    """What can be said, in one sentence that says no more than the intervals do."""
    associations = group.associations[target]
    sure = [each for each in associations if each.p < ALPHA]
    trace = next((each for each in associations if each.measure == HESSIAN_TRACE), None)
    opening = f"{_capital(target)}: "
    if nothing_to_predict(group, target):
        return f"{opening}models differ by no more than noise would make them, so there is nothing to predict."
    said = "no trace was measured" if trace is None else _verdict(trace, group)
    others = [short_name(each.measure) for each in sure if each is not trace]
    if len(others) > MAX_NAMED:
        others = [*others[: MAX_NAMED - 1], f"{len(others) - MAX_NAMED + 1} more (below)"]
    how = "in an order beyond chance, of" if group.ordered else "beyond chance of"
    tried = f"{how} {len(associations)} measures tried"
    pivot = _pivot(trace.pivot, trace) if trace and trace.pivot else ""
    scaled = next((each for each in associations if each.measure == rescaled_name(HESSIAN_TRACE)), None)
    after = f" After a random change of scale it is {formatting.with_interval(scaled.rho)}." if scaled else ""
    recipe = _within_recipes(group, target)
    return f"{opening}{said}; {tried}: {', '.join(others) if others else 'no other'}.{pivot}{after}{recipe}"


def _within_recipes(group: Group, target: str) -> str:
    """What survives the configuration's being partialled out; empty where too few bases tell."""
    associations = group.associations[target]
    if all(math.isnan(each.p_same_recipe) for each in associations):
        return ""
    opening = " With the configuration partialled out"
    if alike(group, target):
        return f"{opening} models differ by no more than noise."
    held = [
        f"{short_name(each.measure)} {formatting.with_interval(each.same_recipe)}, p {_p(each.p_same_recipe)}"
        for each in sorted(associations, key=lambda each: each.p_same_recipe)
        if holds_within_recipes(each)
    ]
    more = [f"{len(held) - MAX_NAMED} more (below)"] if len(held) > MAX_NAMED else []
    return f"{opening}, beyond chance: {'; '.join([*held[:MAX_NAMED], *more]) or 'none'}."


def _pivot(pivot: Pivot, trace: Association) -> str:
    if abs(pivot.rho - trace.rho.value) < 0.005:
        return " Without any one variant the trace's correlation is no smaller."
    return f" Without {pivot.variant}, on which it hangs most, the trace's correlation is {pivot.rho:.2f}."


def _verdict(trace: Association, group: Group) -> str:
    """Three steps: told for any variants, for these variants alone, or not at all; of an ordered knob never the first.

    Permutations take variants for exchangeable. Steps of one knob are not: whatever follows their order has a small p.
    """
    better = "better" if trace.rho.value < 0 else "worse"
    if not is_apart(trace):
        return f"whether flatter is better cannot be told (trace {_rho(trace)})"
    if group.ordered:
        return (
            f"among these doses flatter is {better}, but they are steps of one knob: "
            f"the trace may only follow the order of their strengths (trace {_rho(trace)}{_given(trace)})"
        )
    if trace.p < ALPHA:
        return f"flatter is {better} (trace {_rho(trace)}{_given(trace)})"
    return (
        f"among these variants flatter is {better}, with other seeds too; of others it is not shown "
        f"(trace {_rho(trace)}{_given(trace)})"
    )


def _given(trace: Association) -> str:
    """What is left of it when the loss is known."""
    if trace.loss_tells:
        return "; the loss orders the models just so, and tells as much"
    if math.isnan(trace.given_loss.value):
        return "; what is left with the loss given cannot be told"
    p = "no p, as it explains most of both" if math.isnan(trace.p_given_loss) else f"p {_p(trace.p_given_loss)}"
    return f"; with the loss given {formatting.with_interval(trace.given_loss)}, {p}"


def _models(group: Group) -> str:
    return f"{_capital(group.name)}: {', '.join(group.variants)}."


def _capital(text: str) -> str:
    return text[0].upper() + text[1:]


def _rho(association: Association) -> str:
    return f"{formatting.with_interval(association.rho)}, p {_p(association.p)}"


def _equal(found: SameLoss) -> str:
    what = "loss above the lowest possible one" if found.loss == GAP else "held-out loss"
    known = "" if math.isnan(found.error) else f", {_known(found)}"
    bases = max(group.num_bases for group in found.groups)
    left = (
        f" Left out, for want of a checkpoint within it in every base: {', '.join(found.outside)}."
        if found.outside
        else ""
    )
    near = f"{formatting.counted(found.inside, 'checkpoint')} {'is' if found.inside == 1 else 'are'}"
    return (
        f"{near} within {found.band:g} nats per token of the lowest {what}, {found.lowest:.4f} "
        f"({found.loss}{known}); variants that are so in every base (seed; {bases} of them) are "
        f"compared.{left}{''.join(_left_out(found))}"
    )


def _left_out(found: SameLoss) -> Iterator[str]:
    """What is compared with nothing, and why."""
    if found.other_losses:
        names = ", ".join(found.other_losses)
        yield f" Left out, as their loss is of another objective, text or vocabulary and so another quantity: {names}."
    if found.ungrouped:
        why = f"doses whose control is not so near, or of a group of fewer than {MIN_VARIANTS}"
        yield f" So near, but in no group, as they are {why}: {', '.join(found.ungrouped)}."
    if found.other_seeds:
        seeds = ", ".join(map(str, found.other_seeds))
        yield f" No base, as fewer than {MIN_VARIANTS} variants are so near under it: seed {seeds}."
    if found.incomplete:
        names = ", ".join(map(short_name, found.incomplete))
        yield f" Not compared, as a checkpoint here lacks it or its loss is another quantity: {names}."


def _known(found: SameLoss) -> str:
    if found.loss == GAP:
        return f"each known to {found.error:.1g} or better (standard error)"
    unsure = f"; of {found.unsure} that does not tell whether they are so near" if found.unsure else ""
    return (
        f"each one's difference from the lowest, on the same text, known to {found.error:.1g} or better (standard "
        f"error){unsure}"
    )


def _layer_table(probed: ProbedLayers) -> Table:
    """A row for each variant, with its best layer; then one for each group, with the trace's correlations."""
    names = ["all, normed" if layer is None else f"layer {layer}" for layer in probed.layers]
    rows = []
    for variant, scores in probed.scores.items():
        best = max(range(len(scores)), key=lambda at: (scores[at], -at)) if not any(map(math.isnan, scores)) else None
        rows.append(
            Row(
                [
                    cell(variant),
                    *(cell(100 * score, "{:.1f}".format) for score in scores),
                    cell(None if best is None else names[best]),
                ]
            )
        )
    for group, rhos in probed.trace.items():
        cells = [cell(rho.value, lambda _, rho=rho: formatting.with_interval(rho)) for rho in rhos]  # type: ignore[misc]
        rows.append(Row([cell(f"trace, Spearman among {group}"), *cells, cell(None)]))
    title = "accuracy in percent, mean over bases, of states after so many blocks"
    columns = [Heading(name, numeric=True, title=title) for name in names]
    return Table([Heading("variant"), *columns, Heading("best")], rows)


def _edge_note(found: SameLoss) -> str:
    if not found.at_edge:
        return ""
    return (
        f"The tuned rate of {formatting.counted(found.at_edge, 'checkpoint')} stands at an end of its grid, and a "
        "better one may lie beyond: then measures of scale can look predictive; widen sft.lrs."
    )


def _spread_table(found: SameLoss) -> Table:
    """How much there is to predict, before anything is."""
    columns = [Heading("variants"), Heading("transfer")]
    columns += [
        Heading(title, numeric=True, title=more)
        for title, more in (
            (
                "true spread, points",
                "standard deviation between models of one base, noise taken off, and its 95 % interval",
            ),
            (
                "noise, points",
                "standard error of one model's score, over draws of labels and test examples, or seeds of fine-tuning",
            ),
            ("p of none", "how likely noise alone gives as much (F test)"),
            ("within a recipe, points", "the same between seeds of one variant, beyond what a base does to all"),
            ("p of none, within", "how likely noise alone gives as much of that"),
        )
    ]
    rows = []
    for group in found.groups:
        for target, spread in group.spreads.items():
            noise = cell(spread and 100 * spread.noise, "{:.2f}".format)
            between, within = (_spread_cells(each) for each in (spread, group.recipe_spreads[target]))
            shown = [between[0], noise, between[1], *within]
            rows.append(Row([cell(group.name), cell(target), *shown]))
    return Table(columns, rows)


def _spread_cells(spread: Spread | None) -> tuple[Cell, Cell]:
    """In points, and how likely there is none."""
    if spread is None:
        return cell(None), cell(None)
    points = [100 * each for each in (spread.between.value, spread.between.low, spread.between.high)]
    return cell(points[0], lambda _: "{:.1f} [{:.1f}, {:.1f}]".format(*points)), cell(spread.p, _p)


def _variant_table(found: SameLoss) -> Table:
    """By knob: what each variant differs by from the reference."""
    targets = list(found.contrasts[0].transfer)
    by_text = any(not math.isnan(contrast.gap_error) for contrast in found.contrasts)
    columns = [Heading("variant"), Heading("loss, nats", numeric=True)]
    if by_text:
        title = (
            "standard error of the difference over the held-out text, which all bases share: no part of the interval"
        )
        columns.append(Heading("error by text", numeric=True, title=title))
    columns.append(Heading("trace, %", numeric=True))
    columns += [Heading(f"{target}, points", numeric=True) for target in targets]
    rows = []
    for contrast in found.contrasts:
        changes = [
            _change(*_ends(contrast.gap), digits=4),
            *([cell(contrast.gap_error, "{:.4f}".format)] if by_text else []),
            _change(*_in_percent(contrast.trace), digits=0),
            *(_change(*_hundredfold(contrast.transfer[target])) for target in targets),
        ]
        rows.append(Row([cell(contrast.variant), *changes]))
    return Table(columns, rows)


def _knob_table(found: SameLoss) -> Table:
    """A row for each measure, a column for each variant."""
    columns = [Heading("measure"), *(Heading(f"{each.variant}, %", numeric=True) for each in found.contrasts)]
    rows = []
    for measure in found.contrasts[0].measures:
        changes = [_change(*_hundredfold(contrast.measures[measure]), digits=0) for contrast in found.contrasts]
        rows.append(Row([Cell(short_name(measure), measure, title=measure), *changes]))
    return Table(columns, rows)


def _measure_table(associations: Sequence[Association], seconds: Mapping[str, float]) -> Table:
    titles = {
        "within a base": "Spearman's correlation within each base, mean over bases with Student's 95 % interval",
        "without one": "the same without the one variant that leaves least of it",
        "loss given": "the same with the loss partialled out",
        "same recipe": "between seeds of one variant, as within a base: with the configuration partialled out",
        "p": "by permuting variants, corrected for all measures of this table",
        "p, loss given": "the same with the loss partialled out; none where it explains most of both",
        "p, same recipe": "by permuting seeds of each variant, corrected as well; too small where seeds of a base are "
        "alike, so read it beside the interval",
        "seconds": "of the stage that measures it, on one checkpoint: all measures of a kind share them",
    }
    rows = []
    for each in associations:
        estimates = [each.rho, each.given_loss, each.same_recipe]
        cells = [
            cell(estimate.value, lambda _, estimate=estimate: formatting.with_interval(estimate))  # type: ignore[misc]
            for estimate in estimates
        ]
        pivot = each.pivot
        cells.insert(1, cell(pivot and pivot.rho, lambda rho, pivot=pivot: f"{rho:.2f} ({pivot.variant})"))  # type: ignore[misc]
        cells += [cell(p, _p) for p in (each.p, each.p_given_loss, each.p_same_recipe)]
        cells.append(cell(seconds.get(each.measure.partition("/")[0]), "{:.3g}".format))
        rows.append(Row([Cell(short_name(each.measure), each.measure, title=each.measure), *cells]))
    columns = [Heading("measure"), *(Heading(name, numeric=True, title=title) for name, title in titles.items())]
    return Table(columns, rows)


def _picture_note(found: SameLoss) -> str:
    bars = f"; bars are 95 % intervals over {found.groups[0].num_bases} bases" if found.groups[0].num_bases > 1 else ""
    return (
        "Spearman's correlation with transfer within a base, by how that is measured: to the left less of a measure, "
        f"such as a flatter loss, goes with better transfer{bars}. Filled: beyond chance of all measures tried for an "
        f"answer. Faint: models differ by no more than noise. {_in_it(found)}"
    )


def _in_it(found: SameLoss) -> str:
    return f"{' '.join(map(_models, found.groups))} All are within {found.band:g} nats per token of the lowest loss."


def _variants_note(found: SameLoss) -> str:
    what = "the adversary's control" if found.control else "the first of these in the sweep"
    if len(found.apart) == len(found.contrasts):
        return f"Each variant less {found.reference}, {what}, of the same seed; each has bases of its own."
    apart = f"; {', '.join(found.apart)}, with bases of their own, less that of the same seed" if found.apart else ""
    return f"Each variant less {found.reference}, {what}, of its base{apart}."


def _known_table(measures: Sequence[Known]) -> Table:
    titles = {
        "error, %": "median standard error of a value, where one is told: of what flatness.shape measures, over its "
        "random vectors alone",
        "between variants, %": "standard deviation between variants of one base, error included",
        "within a recipe, %": "between seeds of one variant, beyond what a base does to all; error included",
        "after a change of scale": "Spearman's correlation within a base with before, where it was measured anew",
    }
    rows = [
        Row(
            [
                Cell(short_name(each.measure), each.measure, title=each.measure),
                *(cell(100 * share, "{:.3g}".format) for share in (each.error, each.spread, each.recipe_spread)),
                cell("unmoved" if each.is_unmoved else "not measured")
                if each.rescaled is None
                else Cell(formatting.with_interval(each.rescaled), each.rescaled.value),
            ]
        )
        for each in measures
    ]
    return Table(
        [Heading("measure"), *(Heading(name, numeric=True, title=title) for name, title in titles.items())], rows
    )


def _known_notes(found: SameLoss) -> Iterator[str]:
    """What says the same of a function however its weights are scaled; and what the trace's error hides."""
    unmoved = [short_name(each.measure) for each in found.measures if each.is_unmoved]
    unknown = [short_name(each.measure) for each in found.measures if not each.is_unmoved and each.rescaled is None]
    factors = "factors of each model's own" if found.own_factors else "the same factors for all models of a shape"
    yield f"Unmoved by any change of scale that keeps the function, by construction: {', '.join(unmoved) or 'none'}."
    anew = [
        f"{short_name(each.measure)} {formatting.with_interval(each.rescaled)}"
        for each in found.measures
        if each.rescaled
    ]
    if anew:
        yield (
            f"Measured anew after a random one, by {factors}, Spearman's correlation within a base with before: "
            f"{', '.join(anew)}; the errors of both lower it, too. Scaled are norms' gains, an output layer of its "
            "own, attention and feed-forward layers; not the states that blocks add to, and so not the embeddings."
        )
    if unknown:
        yield f"Moved by such changes, and not measured anew: {', '.join(unknown)}."
    trace = next((each for each in found.measures if each.measure == HESSIAN_TRACE), None)
    if trace and 2 * trace.error > trace.recipe_spread:
        yield (
            f"The Hessian's trace is known to {100 * trace.error:.1f} % (standard error, part of which models "
            f"share with their text), where models of one recipe differ by {100 * trace.recipe_spread:.1f} %: "
            "within recipes it can hardly tell."
        )


def _spread_note(found: SameLoss) -> str:
    """What the noise of the table of spreads leaves out."""
    probes = "a probe of as many labels as there are is fitted once"
    if not found.same_examples:
        return f"Each seed of fine-tuning has labelled examples of its own, whose chance is noise; {probes}."
    return (
        "True spread is that given the labelled examples to train on: fine-tuning takes the same ones under every "
        f"seed, and {probes}. Which examples these are is no part of the noise: with others models could differ "
        "otherwise."
    )


def _change(value: float, low: float, high: float, *, digits: int = 1) -> Cell:
    return cell(value, lambda _: _interval(value, low, high, digits=digits))


def _interval(value: float, low: float, high: float, *, digits: int = 1) -> str:
    between = "" if low == high else f" [{low:+.{digits}f}, {high:+.{digits}f}]"
    return f"{value:+.{digits}f}{between}"


def _p(value: float) -> str:
    return "—" if math.isnan(value) else f"{value:.3f}" if value >= 0.001 else "<0.001"


def _ends(estimate: IntervalEstimate) -> tuple[float, float, float]:
    """Value and interval, which is the value where there is none."""
    if math.isnan(estimate.low):
        return (estimate.value,) * 3
    return estimate.value, estimate.low, estimate.high


def _hundredfold(share: IntervalEstimate) -> tuple[float, float, float]:
    """In points, or in percent."""
    value, low, high = (100 * each for each in _ends(share))
    return value, low, high


def _in_percent(log_ratio: IntervalEstimate) -> tuple[float, float, float]:
    """Of the logarithm of a ratio, at most a hundredfold."""
    value, low, high = (100 * math.expm1(min(each, 4.6)) for each in _ends(log_ratio))
    return value, low, high
