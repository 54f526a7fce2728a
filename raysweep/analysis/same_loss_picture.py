"""The picture of "Is flat better here?": by how transfer is measured, what goes with it, as SVG without script."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from raysweep.analysis.derived import HESSIAN_TRACE
from raysweep.analysis.measure_errors import rescaled_name
from raysweep.analysis.same_loss import Association, Group, SameLoss
from raysweep.analysis.same_loss_verdict import ALPHA, nothing_to_predict
from raysweep.scores import column_name

if TYPE_CHECKING:
    from markupsafe import Markup

# A phone shows it at about its own size, so that its letters can be read.
WIDTH, MARGIN = 360, 14
LINE, TITLE, GAP = 13, 16, 8
"""Heights: of a measure's line, of the words above a way to measure transfer, and the room below it."""


@dataclass(frozen=True)
class _Mark:
    """How a measure is shown."""

    measure: str
    name: str
    shape: str
    """SVG path around 0, 0."""
    stroke: str


def picture(found: SameLoss) -> Markup | str:
    """A panel for each group of variants: rows of ways to measure transfer, in each a line for each chosen measure.

    Where a measure is beyond chance its mark is filled; where there is nothing to predict all of a row is faint. Empty
    where none of the chosen ones was measured.
    """
    from markupsafe import Markup, escape

    marks = [mark for mark in _marks(found.loss) if any(mark.measure in _by_name(group) for group in found.groups)]
    if not marks:
        return ""
    panels = []
    for group in found.groups:
        parts, height = _panel(group, marks)
        label = escape(f"{group.name}: Spearman's correlation of chosen measures with transfer, by how it is measured")
        panels.append(_svg(parts, height, label))
    height = LINE * len(marks) + 6
    legend = _svg(
        [*_legend(marks)], height, "what the marks stand for", f' height="{height}" preserveAspectRatio="xMinYMin"'
    )
    return Markup(legend + "".join(panels))


def _marks(loss: str) -> tuple[_Mark, ...]:
    trace = column_name("flatness", "adaptive_trace")
    return (
        _Mark(HESSIAN_TRACE, "Hessian trace", "M-4,0A4,4 0 1 0 4,0A4,4 0 1 0 -4,0Z", "var(--accent)"),
        _Mark(
            rescaled_name(HESSIAN_TRACE),
            "the same after a change of scale",
            "M-3.6,-3.6H3.6V3.6H-3.6Z",
            "var(--accent)",
        ),
        _Mark(trace, "adaptive trace (scale-free)", "M0,-4.6L4.6,0L0,4.6L-4.6,0Z", "var(--accent)"),
        _Mark(loss, "loss", "M0,-4.6L4.4,3.4H-4.4Z", "var(--soft)"),
        _Mark(column_name("early_sft", "mean_score"), "early fine-tuning", "M0,4.6L4.4,-3.4H-4.4Z", "var(--soft)"),
    )


def _by_name(group: Group) -> dict[str, Association]:
    return {each.measure: each for associations in group.associations.values() for each in associations}


def _svg(parts: Sequence[str], height: float, label: str, more: str = "") -> str:
    """Numbers of ours, and escaped words."""
    return f'<svg viewBox="0 0 {WIDTH} {height:g}" role="img" aria-label="{label}"{more}>{"".join(parts)}</svg>'


def _legend(marks: Sequence[_Mark]) -> Iterator[str]:
    for at, mark in enumerate(marks):
        y = LINE * at + 9
        yield _path(mark, MARGIN, y, filled=False) + _text(mark.name, MARGIN + 12, y + 4)


def _panel(group: Group, marks: Sequence[_Mark]) -> tuple[list[str], float]:
    """Its parts, and how high it is."""
    parts = [_text(group.name[0].upper() + group.name[1:], MARGIN - 6, 14, weight=600)]
    top = y = 38.0
    for target, associations in group.associations.items():
        is_noise = nothing_to_predict(group, target)
        parts.append(f'<g opacity="{0.4 if is_noise else 1}">')
        note = " – nothing to predict" if is_noise else ""
        parts.append(_text(f"{target}{note}", MARGIN - 6, y + 11, color="var(--ink)"))
        y += TITLE
        known = {each.measure: each for each in associations}
        for mark in marks:
            if mark.measure in known:  # A probe says nothing of itself.
                parts += _row(mark, known[mark.measure], y + LINE / 2)
            y += LINE
        parts.append("</g>")
        y += GAP
    axis = [_line(_x(value), top, _x(value), y, dashed=value != 0) for value in (-1, 0, 1)]
    axis += [
        _text(f"{value:+d}".replace("+0", "0"), _x(value), at, anchor="middle")
        for value in (-1, 0, 1)
        for at in (top - 5, y + 12)
    ]
    ends = ((-1, "start", "← less of it is better"), (1, "end", "more of it is better →"))
    axis += [_text(words, _x(value), y + 28, anchor=anchor) for value, anchor, words in ends]
    return [*axis, *parts], y + 36


def _row(mark: _Mark, association: Association, y: float) -> Iterator[str]:
    from markupsafe import escape

    rho = association.rho
    if math.isnan(rho.value):
        return
    told = "" if math.isnan(association.p) else f", p {association.p:.3f}"
    between = "" if math.isnan(rho.low) else f" [{rho.low:.2f}, {rho.high:.2f}]"
    yield f"<g><title>{escape(f'{mark.name}: {rho.value:.2f}{between}{told}')}</title>"
    if not math.isnan(rho.low):
        yield _line(_x(rho.low), y, _x(rho.high), y, stroke=mark.stroke)
    yield _path(mark, _x(rho.value), y, filled=association.p < ALPHA) + "</g>"


def _x(rho: float) -> float:
    return WIDTH / 2 + rho * (WIDTH / 2 - MARGIN)


def _path(mark: _Mark, x: float, y: float, *, filled: bool) -> str:
    fill = mark.stroke if filled else "var(--card)"
    place = f'transform="translate({x:.1f} {y:.1f})"'
    return f'<path d="{mark.shape}" {place} fill="{fill}" stroke="{mark.stroke}" stroke-width="1.6"/>'


def _line(x1: float, y1: float, x2: float, y2: float, *, stroke: str = "var(--line)", dashed: bool = False) -> str:
    dash = ' stroke-dasharray="3 4"' if dashed else ""
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="{stroke}"{dash}/>'


def _text(
    words: str, x: float, y: float, *, anchor: str = "start", color: str = "var(--soft)", weight: int = 400
) -> str:
    from markupsafe import escape

    style = f'text-anchor="{anchor}" fill="{color}" font-size="12" font-weight="{weight}"'
    return f'<text x="{x:.1f}" y="{y:.1f}" {style}>{escape(words)}</text>'
