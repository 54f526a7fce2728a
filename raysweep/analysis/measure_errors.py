"""How well measures of models of the same loss are known, and which of them a change of scale leaves as they are."""

from __future__ import annotations

import math
from collections.abc import Container, Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from raysweep.analysis.derived import FEATURE_TRACE, HESSIAN_TRACE
from raysweep.analysis.pairwise import Floats, IntervalEstimate
from raysweep.analysis.within_bases import correlation, recipe_spread
from raysweep.flatter import SURVIVING
from raysweep.scores import column_name

UNMOVED = frozenset(column_name("flatness", name) for name in SURVIVING)
"""Scale-free by construction. The head's trace is not: the gain of the norm before it scales what it reads."""
OF_FUNCTION = ("heldout/", "probes/")
"""What is of the function alone, and what a linear classifier reads of states that it standardises."""

MADE_OF = {
    column_name("flatness", "mean_eigenvalue"): (HESSIAN_TRACE,),
    column_name("flatness", "trace_over_features"): (HESSIAN_TRACE, FEATURE_TRACE),
}
"""What is derived from others has their errors, and after a change of scale follows from these: see `derived`."""


@dataclass(frozen=True)
class Known:
    """A measure over all variants that are compared; spreads are shares of its mean size."""

    measure: str
    error: float
    """Median of its standard errors, each as a share of its value; NaN where none is told."""
    spread: float
    """Standard deviation between variants of one base, its error included."""
    recipe_spread: float
    """Between seeds of one variant, beyond what a base does to all of them; its error included."""
    is_unmoved: bool
    """By every change of scale that keeps the function."""
    rescaled: IntervalEstimate | None
    """After a random one, Spearman's correlation within a base with before; None where it was not measured anew."""


def rescaled_name(measure: str) -> str:
    """The column of a trace after a random change of scale.

    >>> rescaled_name("flatness/hessian_trace")
    'flatness/rescaled_hessian_trace'
    """
    return measure.replace("/", "/rescaled_")


def error_column(measure: str, columns: Container[str]) -> str | None:
    """Where a measure's standard error stands, if it has one.

    >>> error_column("heldout/entropy_gap_nats_per_token", {"heldout/entropy_gap_stderr"})
    'heldout/entropy_gap_stderr'
    >>> error_column("flatness/eigenvalue_1", {"flatness/eigenvalue_1_error"}) is None
    True
    """
    # Of an eigenvalue `_error` is how far it has converged, which says nothing of chance.
    names = (f"{measure}_stderr", measure.replace("_nats_per_token", "_stderr"))
    return next((name for name in names if name != measure and name in columns), None)


def known(measures: Mapping[str, Floats], errors: Mapping[str, Floats]) -> Iterator[Known]:
    """Of each measure, but those that are others after a change of scale.

    Args:
        measures: name -> [bases, variants].
        errors: the same of their standard errors, of those that have one.
    """
    for name, values in measures.items():
        if "/rescaled_" in name:
            continue
        size = float(np.abs(values).mean()) or math.nan
        yield Known(
            measure=name,
            error=_relative_error(name, measures, errors),
            spread=math.sqrt(float(values.var(axis=1, ddof=1).mean())) / size,
            recipe_spread=recipe_spread(values) / size,
            is_unmoved=name in UNMOVED or name.startswith(OF_FUNCTION),
            rescaled=_rescaled(name, measures),
        )


def stderr(measure: str, values: Mapping[str, Floats | float], errors: Mapping[str, Floats | float]) -> Floats:
    """Standard error of a measure; NaN where none is known.

    Args:
        measure: recorded, or derived from others, whose relative errors then add up.
        values: name -> its value, or an array of these.
        errors: the same of standard errors, of those that have one.

    >>> float(stderr("heldout/ppl", {"heldout/ppl": 0.0}, {"heldout/ppl": 0.25}))
    0.25
    """
    if measure in errors:  # Of a value of 0, too, which has no relative error.
        return np.asarray(errors[measure], dtype=np.float64)
    parts = MADE_OF.get(measure, (measure,))
    if any(part not in errors for part in parts):
        return np.full(np.shape(values[measure]), math.nan)
    with np.errstate(divide="ignore", invalid="ignore"):
        shares = [np.divide(errors[part], np.abs(values[part])) for part in parts]
        whole: Floats = np.abs(values[measure]) * np.sqrt(np.sum(np.square(shares), axis=0))
    return whole


def _relative_error(name: str, measures: Mapping[str, Floats], errors: Mapping[str, Floats]) -> float:
    """Median over models of the share that it is of the value, where one is known."""
    with np.errstate(divide="ignore", invalid="ignore"):
        shares = stderr(name, measures, errors) / np.abs(measures[name])
    known = shares[~np.isnan(shares)]
    return float(np.median(known)) if known.size else math.nan


def _rescaled(name: str, measures: Mapping[str, Floats]) -> IntervalEstimate | None:
    first, *others = MADE_OF.get(name, (name,))
    after = measures.get(rescaled_name(first))
    if after is None or any(rescaled_name(other) not in measures for other in others):
        return None
    for other in others:
        after = after / measures[rescaled_name(other)]
    return correlation(measures[name], after)
