"""What a checkpoint's perplexity and flatness are of, in words: losses of different objectives do not compare."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from pydantic import TypeAdapter, ValidationError

from raysweep.objectives.causal_lm import CausalLM
from raysweep.objectives.families import Objective

if TYPE_CHECKING:
    import pandas as pd

PERPLEXITY_OF, FLATNESS_OF = "perplexity_of", "flatness_of"
"""Columns of the checkpoint table."""
_WHAT = {PERPLEXITY_OF: "Held-out loss and perplexity", FLATNESS_OF: "Traces and other numbers of flatness"}

_OBJECTIVE: TypeAdapter[Any] = TypeAdapter(Objective)


def losses_of(kind: str, spec: Mapping[str, Any]) -> dict[str, str]:
    """The columns that a stage tells of its checkpoint, from its recorded spec; none for a stage without a loss.

    A field that a spec leaves out had its neutral value: causal_lm.
    """
    if kind == "heldout":
        return {PERPLEXITY_OF: _words(spec.get("objective"))}
    return {FLATNESS_OF: _words(spec.get("loss"))} if kind == "flatness" else {}


def _words(objective: Mapping[str, Any] | None) -> str:
    fields = {name: value for name, value in (objective or CausalLM().model_dump()).items() if name != "VERSION"}
    try:
        made = _OBJECTIVE.validate_json(json.dumps(fields))
    except ValidationError:  # As another version declared it: named, if not described.
        return str(fields.get("name"))
    return f"{made.name} ({made.predicts()})"


def objective_lines(checkpoints: pd.DataFrame) -> list[str]:
    """What the losses in a checkpoint table are of, a sentence each."""
    lines = []
    for column, what in _WHAT.items():
        counts = _counts(checkpoints, column)
        total = sum(counts.values())
        named = [f"{words}, on {number} of {total} checkpoints" for words, number in counts.items()]
        if counts:
            lines.append(f"{what} are those of {'; of '.join(named if len(named) > 1 else counts)}.")
    return lines


def objective_cautions(checkpoints: pd.DataFrame) -> list[str]:
    """Which losses must not be compared, where checkpoints were trained by several objectives."""
    lines = []
    for column, what in _WHAT.items():
        if len(counts := _counts(checkpoints, column)) > 1:
            names = sorted({words.split(" ")[0] for words in counts})
            lines.append(
                f"{what} are of {len(counts)} objectives ({', '.join(names)}), whose losses do not compare: an order "
                "of all checkpoints by them is also one of objectives."
            )
    return lines


def _counts(checkpoints: pd.DataFrame, column: str) -> dict[str, int]:
    """Objective in words -> number of checkpoints measured by it."""
    if column not in checkpoints:
        return {}
    return {str(words): int(number) for words, number in sorted(checkpoints[column].value_counts().items())}
