"""Prompts of few-shot scores that did not fit into a task's `max_length`, and lost their beginning.

Solved examples come first, and go first: a score with shots may be one without.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from raysweep.analysis.formatting import counted, number
from raysweep.stages.indicators import LIKELIHOOD, NUM_CUT

if TYPE_CHECKING:
    import pandas as pd

_KIND, _SHOTS, _NONE = "indicators/", "/kshot", "/zeroshot"


@dataclass(frozen=True)
class CutPrompts:
    """Of a task's score with or without solved examples, over the checkpoints of a table."""

    indicator: str
    num_prompts: float
    """That did not fit, of a checkpoint: mean over those that have some."""
    num_cut: int
    """Checkpoints that have some."""
    num_measured: int
    num_zero_shot: int
    """Checkpoints whose likelihood is to the last bit that without solved examples, of which none can be left."""


def cut_prompts(table: pd.DataFrame) -> tuple[CutPrompts, ...]:
    """Of a checkpoint table: scores some of whose prompts did not fit."""
    found = []
    for column in map(str, table.columns):
        if column.startswith(_KIND) and column.endswith(NUM_CUT):
            counts, name = table[column].dropna(), column.removesuffix(NUM_CUT)
            if (counts > 0).any():
                same = _num_equal(table, name) if name.endswith(_SHOTS) else 0
                some = counts[counts > 0]
                found.append(CutPrompts(name, float(some.mean()), len(some), len(counts), same))
    return tuple(found)


def _num_equal(table: pd.DataFrame, name: str) -> int:
    """Checkpoints whose likelihood with solved examples is that without."""
    both = [f"{each}{LIKELIHOOD}" for each in (name, name.removesuffix(_SHOTS) + _NONE)]
    return int((table[both[0]] == table[both[1]]).sum()) if {*both} <= {*table.columns} else 0


def cut_lines(found: Sequence[CutPrompts]) -> list[str]:
    """A sentence of all of them, and what to do; none where all prompts fit."""
    if not found:
        return []
    parts = []
    for each in found:
        part = f"{each.indicator} ({counted(round(each.num_prompts), 'prompt')} on {each.num_cut} of "
        part += f"{counted(each.num_measured, 'checkpoint')}"
        if each.num_zero_shot:
            part += f"; on {number(each.num_zero_shot)} it is zero-shot, its likelihood the same to the last bit"
        parts.append(f"{part})")
    return [
        "Prompts of few-shot indicators did not fit, and lost their beginning, solved examples first: "
        f"{', '.join(parts)}; means over these tasks have them, too. Raise max_length of the task, or take fewer "
        "solved examples (kshot_by_task)."
    ]
