"""A budget's strategies and next purchases: from a ranking, as a document, and on a terminal."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import numpy as np

from raysweep.analysis.associations import numbers
from raysweep.analysis.budget import NUM_SPLITS, SFT, Known, curves, elimination, next_purchases
from raysweep.analysis.comparer import CompareError
from raysweep.analysis.defects import leaks, unusable_rows
from raysweep.analysis.formatting import number
from raysweep.analysis.ranking import Ranking
from raysweep.printable import printable

MAX_STRATEGIES = 12
"""That a terminal lists."""
PARTS = (0.25, 0.5, 1.0)
"""Of the budget, at which a terminal says the regret."""


def known_of(ranking: Ranking, hours: Mapping[str, float], *, by_kind: bool) -> Known:
    """What a ranking's table tells, without its leaks, copies of rows and collapsed ones.

    Args:
        hours: kind of stage -> worker hours on one checkpoint; `sft` is that of fine-tuning.
        by_kind: whether an indicator is of the kind before its slash; else it is one by itself.

    Raises:
        CompareError: if a cost is not known, or nothing costs less than fine-tuning.
    """
    leaked = leaks(ranking.flags)
    used = {
        item.indicator: (item.indicator.partition("/")[0] if by_kind else item.indicator, item.direction)
        for item in ranking.associations
        if item.source == "measured" and item.selection and item.indicator not in leaked
    }
    # What comes with pretraining is no purchase.
    used = {name: each for name, each in used.items() if each[0] != "pretrain"}
    for kind in (SFT, *(kind for kind, _ in used.values())):
        if kind not in hours:
            there = ", ".join(sorted(hours)) or "none"
            raise CompareError(f"what {kind} costs on one checkpoint is not known, in worker hours; known: {there}")
    table = ranking.checkpoints
    table = table[~table["checkpoint"].isin(unusable_rows(ranking.flags, ranking.target))].sort_values("checkpoint")
    known = Known(
        names=tuple(map(str, table["checkpoint"])),
        variants=tuple(map(str, table["variant"])),
        values={
            name: numbers(table[name]) * (1 if direction == "max" else -1) for name, (_, direction) in used.items()
        },
        kinds={name: kind for name, (kind, _) in used.items()},
        hours=dict(hours),
        scores=numbers(table[ranking.target]),
        target=ranking.target,
    )
    if not known.purchases:
        raise CompareError(f"no indicator costs less than fine-tuning ({hours[SFT]:.3g} worker hours a checkpoint)")
    return known


def budget_document(ranking: Ranking, known: Known, budget_hours: float) -> dict[str, Any]:
    """Strategies, best at the budget first, and what to buy next; as JSON values.

    Raises:
        CompareError: if there are too few variants to learn from.
    """
    found = curves(known, budget_hours=budget_hours)
    names = [elimination(known.purchases[: size + 1]) for size in range(len(known.purchases))]
    ranks = {curve.strategy: place for place, curve in enumerate(found)}
    best = min(names, key=lambda name: ranks[name])
    buy = next_purchases(known, budget_hours, num_kinds=names.index(best) + 1)
    return {
        "target": ranking.target,
        "budget_hours": budget_hours,
        "hours": {kind: known.hours[kind] for kind in (*known.purchases, SFT)},
        "num_checkpoints": len(known.names),
        "num_scored": int(np.isfinite(known.scores).sum()),
        "rows_left_out": unusable_rows(ranking.flags, ranking.target),
        "strategies": [asdict(curve) | {"regret_at_budget": curve.at(budget_hours)} for curve in found],
        "bought_by": best,
        "next": [asdict(each) for each in buy],
    }


def format_budget(document: Mapping[str, Any]) -> str:
    """For a terminal."""
    budget = document["budget_hours"]
    parts = [part * budget for part in PARTS]
    lines = [
        f"Regret in {document['target']} on variants that nothing was learnt from, after worker hours for "
        f"{document['num_scored']} checkpoints: mean over {NUM_SPLITS} halves of the variants, and in brackets the "
        "standard deviation of one half's; ≈: at the budget a tie with the first (95 % by the corrected resampled t)",
        f"  {'strategy':<44}" + "".join(f"{number(part):>18}" for part in parts),
    ]
    for place, each in enumerate(document["strategies"][:MAX_STRATEGIES]):
        columns = (np.interp(parts, each["hours"], each[name]) for name in ("regret", "deviation"))
        cells = [
            f"{number(float(mean), 2)} ({number(float(spread), 2)})" for mean, spread in zip(*columns, strict=True)
        ]
        is_tie = place > 0 and not each["behind_first"]["low"] > 0
        lines.append(f"  {each['strategy']:<44}" + "".join(f"{cell:>18}" for cell in cells) + " ≈" * is_tie)
    open_ones = document["num_checkpoints"] - document["num_scored"]
    if not open_ones:
        lines.append("every checkpoint is fine-tuned: nothing to buy")
    for each in document["next"]:
        lines.append(f"buy {each['kind']} ({each['hours']:.3g} h): {', '.join(each['checkpoints'])}")
    if any(each["kind"] != SFT for each in document["next"]):
        lines.append("then ask again: what is worth fine-tuning depends on what that measures")
    lines += [f"left out: {row}: {why}" for row, why in document["rows_left_out"].items()]
    return printable("\n".join(lines))
