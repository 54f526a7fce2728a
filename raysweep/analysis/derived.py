"""What counts as an indicator beside the metrics that stages declare. A new one: a function, and its line in DERIVED.

An indicator's direction is declared before anything is measured, never chosen by how well it then predicts.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from raysweep.scores import Column, column_name
from raysweep.spec import Metric

if TYPE_CHECKING:
    import pandas as pd

HESSIAN_TRACE = column_name("flatness", "hessian_trace")
FEATURE_TRACE = column_name("flatness", "feature_trace")
PPL = column_name("heldout", "ppl")
OTHER_TEXT = column_name("other_text", "mean_loss")
"""On texts that are the same for all variants: of one objective for all, where the sweep names one."""
KSHOT = column_name("indicators", "kshot_mean")
NUM_TOKENS = column_name("pretrain", "num_tokens")
NUM_PARAMETERS = column_name("pretrain", "num_parameters")
NUM_ENLARGED = column_name("enlarge", "num_parameters")

SEED = "seed"
"""Of pretraining: with another one initial weights, or the trunk that variants go on from, may be better for all."""

# Known from the sweep file alone, as what is swept is: what any indicator has to beat.
_CONFIG = ("step", SEED, NUM_TOKENS, NUM_PARAMETERS)


def setting_column(zip_name: str, path: str) -> str:
    """Of what a zip sets at a path: its names alone would not tell that two of them share a learning rate."""
    return f"setting.{zip_name}:{path}"


def is_swept(column: str) -> bool:
    """Whether a column has values of axes, or what their names stand for."""
    return column.startswith(("point.", "setting."))


def is_config(column: str) -> bool:
    """Whether a column is known before any training, from the sweep file."""
    return is_swept(column) or column in _CONFIG


def is_axis(column: str) -> bool:
    """Whether a column of the configuration is varied by itself, and does not follow from others."""
    return is_swept(column) or column in ("step", SEED)


def has_order(column: pd.Series) -> bool:
    """Whether values of a config column are more and less of something: numbers, but not those of seeds."""
    import pandas as pd

    is_number = pd.api.types.is_numeric_dtype(column) and not pd.api.types.is_bool_dtype(column)
    return is_number and column.name != SEED


def moved_together(table: pd.DataFrame) -> dict[str, str]:
    """Column of what is swept -> why it stands for nothing that others do not tell.

    A zip goes by its name where all that it sets moves together, and else by its settings: rates that several of its
    names share.
    """
    settings: dict[str, list[str]] = defaultdict(list)
    for column in map(str, table.columns):
        if column.startswith("setting."):
            settings[f"point.{column.removeprefix('setting.').rsplit(':', 1)[0]}"].append(column)
    why: dict[str, str] = {}
    for name, columns in settings.items():
        kinds = {column: tuple(table[column].factorize()[0]) for column in columns}
        whole = table[name].nunique()
        if all(len(set(kind)) in (1, whole) for kind in kinds.values()):
            why |= dict.fromkeys(columns, f"moves with {name}")
            continue
        why[name] = "what it sets has columns of its own"
        first: dict[tuple[int, ...], str] = {}
        for column, kind in kinds.items():
            if (other := first.setdefault(kind, column)) != column:
                why[column] = f"moves with {other}"
    return why


@dataclass(frozen=True)
class Derived:
    """An indicator from recorded columns: a function of the checkpoint table, where that has the columns it `needs`."""

    column: Column
    needs: tuple[str, ...]
    function: Callable[[pd.DataFrame], pd.Series]


def mean_eigenvalue(table: pd.DataFrame) -> pd.Series:
    """Trace of the Hessian over the number of parameters: traces of models of different size are not comparable.

    Of the enlarged model's, where there is one: the trace is of that.
    """
    measured = table[NUM_PARAMETERS]
    if NUM_ENLARGED in table:
        measured = table[NUM_ENLARGED].fillna(measured)
    return table[HESSIAN_TRACE] / measured


def trace_over_features(table: pd.DataFrame) -> pd.Series:
    """Trace of the Hessian over that of the Fisher matrix of the head: what is not the norm of features."""
    return table[HESSIAN_TRACE] / table[FEATURE_TRACE]


DERIVED = (
    Derived(
        Column("flatness", Metric("mean_eigenvalue", "min", "nats/token")),
        needs=(HESSIAN_TRACE, NUM_PARAMETERS),
        function=mean_eigenvalue,
    ),
    Derived(
        Column("flatness", Metric("trace_over_features", "min")),
        needs=(HESSIAN_TRACE, FEATURE_TRACE),
        function=trace_over_features,
    ),
)


def with_derived(metrics: Mapping[str, float]) -> dict[str, float]:
    """One checkpoint's numbers, with those that are derived from them, by the column that a table has them in."""
    import pandas as pd

    values = dict(metrics)
    if (taken := column_name("fetch", "num_parameters")) in values:  # A checkpoint taken as it is.
        values.setdefault(NUM_PARAMETERS, values[taken])
    for derived in DERIVED:
        if all(name in values for name in derived.needs):
            values[derived.column.name] = float(derived.function(pd.DataFrame([values])).iloc[0])
    return values
