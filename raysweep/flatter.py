"""Which of two measured models is flatter, by each measure of `raysweep trace`, and how surely."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

T95 = 2.36
"""Of Student's distribution of 7 degrees of freedom: a measure has 8 draws or more of random vectors."""

SURVIVING = (
    "adaptive_trace",
    "average_sharpness_adaptive",
    "worst_sharpness_adaptive",
    "worst_sharpness_geodesic",
)
"""Measures of `curvature.shape` that every change of scale of `curvature.rescaling` leaves as they are."""
OTHERS = ("average_sharpness", "worst_sharpness", "relative_flatness")


@dataclass(frozen=True)
class Change:
    """A measure of two models; below 0, `difference` says that the first is flatter."""

    measure: str
    value: float
    of_other: float
    difference: float
    """Of the traces by the units that both have taken, so not quite that of the values."""
    low: float | None
    """Of the difference's 95 % interval; None where no error is known."""
    high: float | None
    survives_rescaling: bool
    """Whether a change of scale that keeps the function keeps the measure."""

    @property
    def is_sure(self) -> bool:
        """Whether its interval leaves 0 out."""
        return self.low is not None and self.high is not None and (self.low > 0 or self.high < 0)

    def to_dict(self) -> dict[str, Any]:
        """As JSON values."""
        return asdict(self) | {"is_sure": self.is_sure}


def changes(document: Mapping[str, Any], less: Mapping[str, Any], difference: Mapping[str, Any]) -> list[Change]:
    """All that both models have been measured by.

    Args:
        document: of one model, as `trace.ModelTraces.to_dict` gives it.
        less: of the model that it is compared with.
        difference: of their traces, paired by text and probe vectors; as `trace.Difference.to_dict` gives it.

    Returns:
        The traces' changes have the error of their paired difference. Those of other measures add both models' errors
        up, which hold the chance of probe vectors alone, on the same few sequences: if anything too wide.
    """
    return [*_of_traces(document, less, difference), *_of_shape(document.get("shape", {}), less.get("shape", {}))]


def _of_traces(one: Mapping[str, Any], other: Mapping[str, Any], difference: Mapping[str, Any]) -> Iterator[Change]:
    for name in ("hessian_trace", "fisher_trace"):
        low, high = difference[f"{name}_difference_interval"]
        change = difference[f"{name}_difference"]
        yield Change(name, one[name], other[name], change, low, high, survives_rescaling=False)


def _of_shape(one: Mapping[str, float], other: Mapping[str, float]) -> Iterator[Change]:
    for name in (*OTHERS, *SURVIVING):
        if name in one and name in other:
            change = one[name] - other[name]
            half = T95 * math.hypot(*(each.get(f"{name}_stderr", math.nan) for each in (one, other)))
            low, high = (None, None) if math.isnan(half) else (change - half, change + half)
            yield Change(name, one[name], other[name], change, low, high, survives_rescaling=name in SURVIVING)


def verdict(found: list[Change], model: str, less: str, *, num_sequences: int | None = None) -> str:
    """One sentence: by which of the measures that survive a change of scale which model is flatter, and how surely.

    Args:
        found: see `changes`.
        model: the first's name.
        less: the other's.
        num_sequences: that the measures beyond traces are of; None: not known.
    """
    surviving = [each for each in found if each.survives_rescaling]
    if not surviving:
        return (
            "None of these survives a change of scale that keeps the function: add --shape for some that do, before "
            "saying which model is flatter."
        )
    # Related measures of one text are no independent votes: all that can be said is whether they agree.
    where = "On the few sequences measured" if num_sequences is None else f"On these {num_sequences} sequences"
    of_model = [each for each in surviving if each.difference < 0]
    of_less = [each for each in surviving if each.difference > 0]
    if len(of_model) == len(of_less):
        return f"{where}, {len(surviving)} related measures that survive a change of scale disagree which is flatter."
    flatter, own = (model, of_model) if len(of_model) > len(of_less) else (less, of_less)
    sure = [each.measure.replace("_", " ") for each in own if each.is_sure]
    agree = "all" if len(own) == len(surviving) else f"{len(own)} of"
    return (
        f"{where}, {flatter} is flatter by {agree} {len(surviving)} related measures that survive a change of scale "
        f"(beyond the chance of probe vectors: {', '.join(sure) or 'none'}); of other text this says nothing."
    )
