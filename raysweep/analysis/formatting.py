"""Numbers and names as a reader wants them: sensible digits, units, the part of a point that varies."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from raysweep.analysis.pairwise import IntervalEstimate


def number(value: Any, digits: int = 3) -> str:
    """`digits` significant ones, plain between 0.001 and a million; a dash where there is none."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        return "—" if value is None else str(value)
    if math.isnan(value):
        return "—"
    if value and not 1e-3 <= abs(value) < 1e6:
        return f"{value:.{digits - 1}e}".replace("e-0", "e-").replace("e+0", "e")
    if float(value).is_integer():
        return f"{int(value):,}".replace(",", " ")
    decimals = max(0, digits - 1 - math.floor(math.log10(abs(value))))
    return f"{value:.{decimals}f}"


def percent(share: float) -> str:
    """A share of one, in percent, with one decimal."""
    return "—" if math.isnan(share) else f"{100 * share:.1f}"


def is_share(column: str) -> bool:
    """Whether a target is a share of one, as scores are, and shown in percent; others are in nats.

    >>> is_share("sft/arc/accuracy"), is_share("sft/arc/loss_nats_per_token"), is_share("sft/mean_forgetting")
    (True, False, False)
    >>> is_share("quantization/rise_4_bits")
    False
    """
    return not column.endswith(("log_likelihood", "_nats_per_token", "mean_forgetting", "_bits"))


def unit(column: str) -> str:
    """Of a target as it is shown, behind a blank.

    >>> unit("sft/mean_score"), unit("sft/arc/log_likelihood")
    (' %', ' nats/token')
    """
    return " %" if is_share(column) else " nats/token"


def amount(value: float, column: str) -> str:
    """A target, or a part of it, in its unit.

    >>> amount(0.25, "sft/mean_score"), amount(-4.5, "sft/mean_log_likelihood")
    ('25.0', '-4.500')
    """
    if is_share(column):
        return percent(value)
    return "—" if math.isnan(value) else f"{value:.3f}"


def with_interval(estimate: IntervalEstimate) -> str:
    """`0.74 [0.65, 0.82]`; the value alone where there is no interval, a dash where there is no value."""
    if math.isnan(estimate.value):
        return "—"
    between = "" if math.isnan(estimate.low) else f" [{estimate.low:.2f}, {estimate.high:.2f}]"
    return f"{estimate.value:.2f}{between}"


def seconds(value: float) -> str:
    """`41 s`, `12.5 min`, `3.2 h`: the larger unit from two of it on; a dash for NaN."""
    if math.isnan(value):
        return "—"
    for unit, size in (("h", 3600), ("min", 60)):
        if value >= 2 * size:
            return f"{value / size:.1f} {unit}"
    return f"{value:.1f} s" if value < 10 else f"{value:.0f} s"


def count(value: float) -> str:
    """`1.31 M`: three digits and a decimal prefix; a dash for NaN."""
    if math.isnan(value):
        return "—"
    for unit, size in (("E", 1e18), ("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value:.0f}"


def counted(num: int, noun: str) -> str:
    """A number with its noun, which takes an s for more than one.

    >>> counted(1, "case"), counted(1_250, "pair")
    ('1 case', '1,250 pairs')
    """
    return f"{num:,} {noun}{'' if num == 1 else 's'}"


def memory(value: float) -> str:
    """Bytes as `1.5 GiB`: three digits and a binary unit; a dash for NaN."""
    if math.isnan(value):
        return "—"
    for unit, size in (("GiB", 2**30), ("MiB", 2**20)):
        if value >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value / 1024:.3g} KiB"


def short_names(names: Sequence[str]) -> dict[str, str]:
    """Dotted path, or column `kind/metric`, -> its shortest ending, of whole words, that no other of them has."""
    endings = {name: _endings(name) for name in names}
    taken = Counter(ending for candidates in endings.values() for ending in set(candidates))
    return {name: next((end for end in candidates if taken[end] == 1), name) for name, candidates in endings.items()}


def _endings(name: str) -> list[str]:
    # A metric's own name may hold dots, those of its task.
    words = name.split("/", 1) if "/" in name else name.split(".")
    mark = "/" if "/" in name else "."
    return [mark.join(words[-size:]) for size in range(1, len(words) + 1)]


def point_text(point: Mapping[str, Any]) -> str:
    """`lr 0.001 · hidden_size 64`; what is no whole number in four significant digits."""
    names = short_names(list(point))
    return " · ".join(f"{names[path]} {_value(value)}" for path, value in point.items())


def _value(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}".replace("e-0", "e-").replace("e+0", "e")
    return value if isinstance(value, str) else json.dumps(value)
