"""What counts as an indicator, and which way of it is better. A new one: one function here, and its line in DERIVED.

An indicator's direction is declared before anything is measured, never chosen by how well it then predicts.
"""

from __future__ import annotations

from collections.abc import Callable
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    import pandas as pd

Direction = Literal["lower", "higher"]
"""Which values are better."""

# The first pattern that matches a column of the checkpoint table decides.
_DIRECTIONS: tuple[tuple[str, Direction], ...] = (
    ("*/*loss_nats_per_token", "lower"),
    ("*/ppl*", "lower"),
    ("*/bits_per_byte*", "lower"),
    ("*/entropy_gap_nats_per_token", "lower"),
    ("flatness/*trace", "lower"),
    ("flatness/mean_eigenvalue", "lower"),
    ("flatness/eigenvalue_[0-9]", "lower"),
    ("flatness/frobenius_norm", "lower"),
    ("flatness/*sharpness", "lower"),
    ("flatness/*sharpness_adaptive", "lower"),
    ("flatness/relative_flatness", "lower"),
    ("indicators/kshot_*", "higher"),
    ("indicators/zeroshot_*", "higher"),
    ("probe/*score", "higher"),
)
# Numbers about the measurement, not about the checkpoint.
_BOOKKEEPING = (
    "*_stderr",
    "*_stderr_*",
    "*_error",
    "flatness/gradient_equivalents",
    "flatness/target_reached",
    "flatness/samples_relative_distance",
    "*/num_*",
    "*_per_second",
    "*/resumed_from_step",
    "*/diverged_*",
    "probe/*train_loss_nats",
)
# Known from the sweep file alone: what any indicator has to beat.
_CONFIG = ("point.*", "step", "pretrain/num_tokens", "pretrain/num_parameters")


def direction_of(column: str) -> Direction | None:
    """The declared direction of a column of the checkpoint table; None if it is no declared indicator."""
    return next((direction for pattern, direction in _DIRECTIONS if fnmatchcase(column, pattern)), None)


def is_config(column: str) -> bool:
    """Whether a column is known before any training, from the sweep file."""
    return any(fnmatchcase(column, pattern) for pattern in _CONFIG)


def is_bookkeeping(column: str) -> bool:
    """Whether a metric says something of the measurement only: counts, speeds, standard errors."""
    return any(fnmatchcase(column, pattern) for pattern in _BOOKKEEPING)


def mean_eigenvalue(table: pd.DataFrame) -> pd.Series:
    """Trace of the Hessian over the number of parameters: traces of models of different size are not comparable."""
    return table["flatness/hessian_trace"] / table["pretrain/num_parameters"]


DERIVED: dict[str, tuple[tuple[str, ...], Callable[[pd.DataFrame], pd.Series]]] = {
    "flatness/mean_eigenvalue": (("flatness/hessian_trace", "pretrain/num_parameters"), mean_eigenvalue),
}
"""Indicators from recorded columns: name -> (columns it needs, function of the checkpoint table)."""
