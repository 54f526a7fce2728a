"""Which of two measured models is flatter, by each measure of `raysweep trace`, and how surely."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from raysweep.scores import SAME_LOSS_NATS

Z95 = 1.96
"""Of the normal distribution: an estimate is within so many of its standard errors 95 % of the time."""
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

    @property
    def is_equal(self) -> bool:
        """Whether both have the same value, as one model measured twice has."""
        return self.difference == 0 or self.low == self.high == 0

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


def verdict(
    found: list[Change],
    model: str,
    less: str,
    *,
    num_sequences: int | None = None,
    loss_difference: tuple[float, float] | None = None,
) -> str:
    """By which of the measures that survive a change of scale which model is flatter, and how surely.

    Measures whose interval holds 0, or that have none, are of neither side.

    Args:
        found: see `changes`.
        model: the first's name.
        less: the other's.
        num_sequences: that the measures beyond traces are of; None: not known.
        loss_difference: the first's loss less the other's in nats per token, and its standard error; None: not known.
    """
    surviving = [each for each in found if each.survives_rescaling]
    if not surviving:
        return (
            "None of these survives a change of scale that keeps the function: add --shape for some that do, before "
            "saying which model is flatter."
        )
    # Related measures of one text are no independent votes: all that can be said is whether they agree.
    where = "On the few sequences measured" if num_sequences is None else f"On these {num_sequences} sequences"
    related = f"{len(surviving)} related measures that survive a change of scale"
    sides = {
        name: [each.measure.replace("_", " ") for each in surviving if each.is_sure and (each.difference < 0) == below]
        for name, below in ((model, True), (less, False))
    }
    said = [f"{name} is flatter by {len(names)} ({', '.join(names)})" for name, names in sides.items() if names]
    if all(each.is_equal for each in surviving):
        told = f"{model} and {less} are equal by all {related}"
    elif len(said) == 2:
        told = f"{related} disagree beyond the chance of probe vectors: {' and '.join(said)}"
    else:
        told = f"of {related}, beyond the chance of probe vectors {said[0] if said else 'none says which is flatter'}"
    return f"{where}, {told}; of other text this says nothing.{_losses(loss_difference)}"


def _losses(difference: tuple[float, float] | None) -> str:
    """What a comparison of models of another loss leaves open, as flatness is compared between models of one loss;
    empty where losses are the same."""
    if difference is None or not abs(difference[0]) > SAME_LOSS_NATS:
        return ""
    value, half = difference[0], Z95 * difference[1]
    return (
        f" Their losses differ by {value:+.4f} nats per token (95 %: {value - half:+.4f} to {value + half:+.4f}), so "
        "this may go with the loss."
    )
