"""The picture of "Is flat better here?": change of the trace against change of transfer, as SVG without script."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from raysweep.analysis.pairwise import IntervalEstimate
from raysweep.analysis.same_loss import Contrast

if TYPE_CHECKING:
    from markupsafe import Markup

WIDTH, HEIGHT, LEFT, BOTTOM = 760, 420, 70, 48
RADIUS = 5.0
LETTER = 6.8
"""Width of one of a name's letters, about."""


def picture(contrasts: Sequence[Contrast], target: str, *, doses: Collection[str]) -> Markup | str:
    """A dot for each variant whose trace is known, those among `doses` filled; empty if there is none."""
    from markupsafe import Markup, escape

    dots = [each for each in contrasts if not math.isnan(each.trace.value)]
    if not dots:
        return ""
    xs = [in_percent(each.trace) for each in dots]
    ys = [tuple(100 * value for value in ends(each.transfer[target])) for each in dots]
    x_scale, y_scale = _scale(xs, LEFT, WIDTH - 20, least=-100.0), _scale(ys, HEIGHT - BOTTOM, 20)
    places = [(x_scale(x[0]), y_scale(y[0])) for x, y in zip(xs, ys, strict=True)]
    parts = [*_axes(x_scale, y_scale, f"change of {target}, points")]
    for (at_x, at_y), x, y in zip(places, xs, ys, strict=True):
        parts.append(_line(x_scale(x[1]), at_y, x_scale(x[2]), at_y, "var(--line)"))
        parts.append(_line(at_x, y_scale(y[1]), at_x, y_scale(y[2]), "var(--line)"))
    names = [each.variant for each in dots]
    for name, (at_x, at_y), (name_x, name_y) in zip(names, places, _name_places(names, places), strict=True):
        fill = "var(--accent)" if name in doses else "var(--card)"
        parts.append(
            f'<circle cx="{at_x:.1f}" cy="{at_y:.1f}" r="{RADIUS:g}" fill="{fill}" stroke="var(--accent)" '
            f'stroke-width="2"/><text x="{name_x:.1f}" y="{name_y:.1f}" fill="var(--ink)" font-size="12">'
            f"{escape(name)}</text>"
        )
    label = escape(f"change of the Hessian's trace against change of transfer, {target}")
    opening = f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{label}" width="100%">'
    return Markup(opening + "".join(parts) + "</svg>")  # Numbers of ours, and escaped names.


def _name_places(names: Sequence[str], dots: Sequence[tuple[float, float]]) -> Iterator[tuple[float, float]]:
    """Where each name begins: beside its dot, and where there is room covering no dot and no name before it."""
    taken = [(x - RADIUS, x + RADIUS, y - RADIUS, y + RADIUS) for x, y in dots]
    for name, (x, y) in zip(names, dots, strict=True):
        width = LETTER * len(name)
        right, left = x + 2 * RADIUS, x - 2 * RADIUS - width
        choices = [(right, y - 7), (right, y + 14), (left, y - 7), (left, y + 14), (right, y + 4), (left, y + 4)]
        boxes = [(start, start + width, base - 10, base + 2) for start, base in choices]
        covered = [
            sum(box[0] < other[1] and other[0] < box[1] and box[2] < other[3] and other[2] < box[3] for other in taken)
            + (box[0] < LEFT or box[1] > WIDTH)
            for box in boxes
        ]
        chosen = covered.index(min(covered))
        taken.append(boxes[chosen])
        yield choices[chosen]


@dataclass(frozen=True)
class _Scale:
    """A line from values to places in the picture; ends outside are cut."""

    low: float
    high: float
    start: float
    stop: float

    def __call__(self, value: float) -> float:
        inside = min(max(value, self.low), self.high)
        return self.start + (inside - self.low) / (self.high - self.low) * (self.stop - self.start)

    def ticks(self) -> list[float]:
        """Round values, three to seven of them."""
        width = self.high - self.low
        power = 10.0 ** math.floor(math.log10(width / 3))
        step = next(factor * power for factor in (5, 2, 1) if width / (factor * power) >= 3)
        return [step * at for at in range(math.ceil(self.low / step), math.floor(self.high / step) + 1)]


def _scale(
    middles_and_ends: Sequence[tuple[float, ...]], start: float, stop: float, *, least: float = -math.inf
) -> _Scale:
    """By the dots, with room around them; wide intervals run out of the picture."""
    middles = [value for value, *_ in middles_and_ends] + [0.0]
    room = 0.35 * (max(middles) - min(middles)) or 1.0
    return _Scale(max(least, min(middles) - room), max(middles) + room, start, stop)


def _axes(x: _Scale, y: _Scale, y_title: str) -> Iterator[str]:
    from markupsafe import escape

    yield _line(x.start, y(0), x.stop, y(0), "var(--soft)", dashed=True)
    yield _line(x(0), y.start, x(0), y.stop, "var(--soft)", dashed=True)
    yield _line(x.start, y.start, x.stop, y.start, "var(--soft)")
    yield _line(x.start, y.start, x.start, y.stop, "var(--soft)")
    text = 'fill="var(--soft)" font-size="12"'
    for value in x.ticks():
        yield f'<text x="{x(value):.1f}" y="{y.start + 18:.1f}" text-anchor="middle" {text}>{value:+.4g}</text>'
    for value in y.ticks():
        yield f'<text x="{x.start - 8:.1f}" y="{y(value) + 4:.1f}" text-anchor="end" {text}>{value:+.4g}</text>'
    middle = (x.start + x.stop) / 2
    title = "change of the Hessian's trace, %"
    yield f'<text x="{middle:.1f}" y="{HEIGHT - 8}" text-anchor="middle" {text}>{title}</text>'
    middle = (y.start + y.stop) / 2
    yield (
        f'<text x="16" y="{middle:.1f}" text-anchor="middle" transform="rotate(-90 16 {middle:.1f})" {text}>'
        f"{escape(y_title)}</text>"
    )


def _line(x1: float, y1: float, x2: float, y2: float, stroke: str, *, dashed: bool = False) -> str:
    dash = ' stroke-dasharray="4 4"' if dashed else ""
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="{stroke}"{dash}/>'


def ends(estimate: IntervalEstimate) -> tuple[float, float, float]:
    """Value and interval, which is the value where there is none."""
    if math.isnan(estimate.low):
        return (estimate.value,) * 3
    return estimate.value, estimate.low, estimate.high


def in_percent(log_ratio: IntervalEstimate) -> tuple[float, float, float]:
    """Of the logarithm of a ratio, at most a hundredfold."""
    value, low, high = (100 * math.expm1(min(each, 4.6)) for each in ends(log_ratio))
    return value, low, high
