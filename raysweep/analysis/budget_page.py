"""A budget's strategies and next purchases: from a ranking, as a document, on a terminal and as a chart."""

from __future__ import annotations

import logging
import math
from collections import defaultdict
from collections.abc import Collection, Mapping
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from raysweep.analysis.associations import numbers
from raysweep.analysis.budget import (
    ALL,
    NUM_PAIRS,
    PARTS,
    SFT,
    Known,
    after,
    asha,
    by,
    curves,
    elimination,
    next_purchases,
)
from raysweep.analysis.charts import Chart, escaped
from raysweep.analysis.comparer import CompareError
from raysweep.analysis.defects import collapsed_rows, copied_rows, leaks
from raysweep.analysis.derived import OTHER_TEXT, PPL
from raysweep.analysis.formatting import is_share, number
from raysweep.analysis.labels import row_key
from raysweep.analysis.ranking import Ranking, check_compares, plain_json
from raysweep.analysis.regrets import NO_REGRET_INTERVAL
from raysweep.analysis.worth import cost_unit, is_bought, own_stages, seconds_by_kind, seconds_spent
from raysweep.printable import printable
from raysweep.scores import column_name

if TYPE_CHECKING:
    import pandas as pd

logger = logging.getLogger(__name__)

MAX_STRATEGIES = 12
"""Of more than these a terminal lists the best and the named ones alone."""
MAX_TIED = 4
"""Of the others that tie with the best, whose names it lists."""
EARLY_SFT = column_name("early_sft", "mean_score")
EARLY_LOSS = column_name("early_sft", "mean_loss_nats")


def known_of(
    ranking: Ranking, hours: Mapping[str, float], *, ran: Mapping[str, Collection[str]] | None = None
) -> Known:
    """What a ranking's table tells, without its leaks, and without rows that are of no use (see `left_out`).

    Args:
        hours: kind of stage -> hours on one checkpoint; `sft` is that of fine-tuning.
        ran: of a run, kind of stage -> checkpoints that it has run on, whatever came out; an indicator is of the kind
            before its slash. None: each is one by itself, and has run where it has a value.

    Raises:
        CompareError: if a cost is not known, nothing costs less than fine-tuning, or the target does not compare all
            checkpoints.
    """
    check_compares(ranking)
    leaked = leaks(ranking.flags)
    used = {
        item.indicator: (item.indicator.partition("/")[0] if ran is not None else item.indicator, item.direction)
        for item in ranking.associations
        if item.source == "measured" and item.selection and item.indicator not in leaked and item.same_order_as is None
    }
    used = {name: each for name, each in used.items() if is_bought(name)}
    if ran is not None and (unknown := sorted({kind for kind, _ in used.values()} - hours.keys())):
        logger.warning("left out, as not all of their stages have run on any checkpoint: %s", ", ".join(unknown))
        used = {name: each for name, each in used.items() if each[0] in hours}
    for kind in (SFT, *(kind for kind, _ in used.values())):
        if kind not in hours:
            there = ", ".join(sorted(hours)) or "none"
            raise CompareError(f"what {kind} costs on one checkpoint is not known, in hours; known: {there}")
    table = ranking.checkpoints.drop_duplicates("checkpoint")
    table = table[~table["checkpoint"].isin(left_out(ranking, used))].sort_values("checkpoint")
    values = {name: numbers(table[name]) * (1 if direction == "max" else -1) for name, (_, direction) in used.items()}
    kinds = {name: kind for name, (kind, _) in used.items()}
    bought = {SFT: np.isfinite(numbers(table[ranking.target]))}
    for name, kind in kinds.items():
        bought[kind] = bought.get(kind, False) | np.isfinite(values[name])
    for kind, done in (ran or {}).items():
        bought[kind] = bought.get(kind, False) | table["checkpoint"].isin(done).to_numpy(dtype=bool)
    known = Known(
        names=tuple(map(str, table["checkpoint"])),
        variants=tuple(map(str, table["variant"])),
        values=values,
        kinds=kinds,
        hours=dict(hours),
        bought=bought,
        scores=ranking.sign * numbers(table[ranking.target]),
        target=ranking.target,
    )
    if not known.rungs:
        raise CompareError(f"no indicator costs less than fine-tuning ({hours[SFT]:.3g} hours a checkpoint)")
    return known


def known_of_run(ranking: Ranking, stages: pd.DataFrame) -> Known:
    """What a run's ranking tells, with costs and what has run by its stage table; see `known_of`."""
    stages = own_stages(ranking, stages)
    ran: dict[str, set[str]] = defaultdict(set)
    for kind, checkpoint in seconds_spent(stages).index:
        ran[str(kind)].add(str(checkpoint))
    hours = {kind: seconds / 3600 for kind, seconds in seconds_by_kind(stages).items()}
    return replace(known_of(ranking, hours, ran=ran), unit=cost_unit(stages, "hours"))


def left_out(ranking: Ranking, used: Collection[str]) -> dict[str, str]:
    """Checkpoint -> why nothing is learnt from it nor bought for it: a copy, or one that has collapsed in what is used.

    A collapsed target alone is an outcome like any other, and to leave it out would flatter what is tested.
    """
    table = ranking.checkpoints
    gone = table[table[ranking.target].isna() & (table["status"] != "done")]
    why = {
        str(name): f"its pretraining: {status}" for name, status in zip(gone["checkpoint"], gone["status"], strict=True)
    }
    return why | collapsed_rows(ranking.flags, used) | copied_rows(ranking.flags)


def budget_document(ranking: Ranking, known: Known, budget_hours: float) -> dict[str, Any]:
    """Strategies, best at the budget first, and what to buy next; as JSON values.

    Raises:
        CompareError: if there are too few variants to learn from.
    """
    found = curves(known, budget_hours=budget_hours)
    names = [elimination(size + 1) for size in range(len(known.rungs))]
    ranks = {curve.strategy: place for place, curve in enumerate(found)}
    best = min(names, key=lambda name: ranks[name])
    buy = next_purchases(known, budget_hours, num_rungs=names.index(best) + 1)
    rows = ranking.checkpoints.to_dict("records")
    return {
        "target": ranking.target,
        "budget_hours": budget_hours,
        "unit": known.unit,
        "hours": {kind: known.hours[kind] for kind in (*(kind for rung in known.rungs for kind in rung), SFT)},
        "rungs": [list(rung) for rung in known.rungs],
        "num_bases": ranking.num_bases,
        "num_checkpoints": len(known.names),
        "num_scored": int(np.isfinite(known.scores).sum()),
        "num_without_score": int((known.bought[SFT] & ~np.isfinite(known.scores)).sum()),
        "rows_left_out": left_out(ranking, known.values),
        "named": _named(ranking, known),
        "strategies": [asdict(curve) | {"regret_at_budget": curve.at(budget_hours)} for curve in found],
        "bought_by": best,
        "next": [asdict(each) for each in buy],
        "labels": {str(row["checkpoint"]): ranking.labels[row_key(row)] for row in rows},
    }


def format_budget(document: Mapping[str, Any]) -> str:
    """For a terminal."""
    budget = document["budget_hours"]
    parts = [part * budget for part in PARTS]
    lines = [
        f"Regret in {document['target']} on variants that nothing was learnt from, after {document['unit']} for "
        f"{document['num_scored']} checkpoints: mean over {2 * NUM_PAIRS} halves of the variants, with its 95 % "
        "interval, by what disjoint halves differ by with gaps between variants' best scores drawn anew, and the "
        "farther up the longer the scores' upper tail, of sweeps in which no few variants score far above all others; "
        "≈: at the budget a tie with the first, which is picked by these numbers",
    ]
    if any(math.isnan(low) for each in document["strategies"] for low in each["low"]):
        lines.append(f"{NO_REGRET_INTERVAL} So none is shown to be behind another")
    if document["num_bases"] > 1:
        lines.append(
            f"over the {document['num_bases']} pretraining seeds at hand: what other seeds would do to all of their "
            "checkpoints is no part of the intervals"
        )
    shown, tied, worse = _parted(document)
    names = [_said(each["strategy"], document) for each in shown]
    width = max(map(len, ["strategy", *names])) + 2
    heads = [f"{number(part)} {document['unit']}" for part in parts]
    table = []
    for each in shown:
        places = [after(each["hours"], part) for part in parts]
        table.append([_cell(*(each[name][place] for name in ("regret", "low", "high"))) for place in places])
    wide = max(len(cell) for cells in [heads, *table] for cell in cells) + 2
    lines.append(f"  {'strategy':<{width}}" + "".join(f"{head:>{wide}}" for head in heads))
    for name, each, cells in zip(names, shown, table, strict=True):
        mark = " ≈" * (each is not document["strategies"][0] and _is_tie(each))
        lines.append(f"  {name:<{width}}" + "".join(f"{cell:>{wide}}" for cell in cells) + mark)
    if tied:
        more = ", ..." * (len(tied) > MAX_TIED)
        first = ", ".join(each["strategy"] for each in tied[:MAX_TIED])
        lines.append(f"  and {len(tied)} more that tie with the first at the budget ≈: {first}{more}")
    if worse:
        lines.append(f"  and {len(worse)} more that are behind it")
    lines += _rung_lines(document)
    lines += _purchase_lines(document)
    lines += [f"left out: {document['labels'][row]}: {why}" for row, why in document["rows_left_out"].items()]
    return printable("\n".join(lines))


def _parted(document: Mapping[str, Any]) -> tuple[list[Any], list[Any], list[Any]]:
    """Strategies that are listed, the others that tie with the first at the budget, and those that do not."""
    first, *others = document["strategies"]
    if len(others) < MAX_STRATEGIES:
        return [first, *others], [], []
    shown = [first, *(each for each in others if each["strategy"] in document["named"])]
    left = [each for each in others if each["strategy"] not in document["named"]]
    return shown, [each for each in left if _is_tie(each)], [each for each in left if not _is_tie(each)]


def _said(strategy: str, document: Mapping[str, Any]) -> str:
    words = document["named"].get(strategy, "")
    return f"{strategy} ({words})" if words else strategy


def _is_tie(strategy: Mapping[str, Any]) -> bool:
    return not strategy["behind_first"]["low"] > 0


def _cell(mean: float, low: float, high: float) -> str:
    between = "" if math.isnan(low) else f" [{number(low, 2)}, {number(high, 2)}]"
    return f"{number(mean, 2)}{between}"


def _rung_lines(document: Mapping[str, Any]) -> list[str]:
    """What each rung of elimination measures, with what that takes on one checkpoint."""
    lines = []
    for place, rung in enumerate(document["rungs"], start=1):
        kinds = ", ".join(f"{kind} ({document['hours'][kind]:.3g} h)" for kind in rung)
        lines.append(f"rung {place}, a checkpoint: {kinds}")
    return [*lines, f"fine-tuning, a checkpoint: {document['hours'][SFT]:.3g} h"]


def _purchase_lines(document: Mapping[str, Any]) -> list[str]:
    lines = []
    if num := document["num_without_score"]:
        lines.append(f"fine-tuning of {num} more checkpoints has run, and gave no score")
    if not document["num_checkpoints"] - document["num_scored"] - num:
        lines.append("every checkpoint is fine-tuned: nothing to buy")
    elif not document["next"]:
        lines.append(f"{number(document['budget_hours'])} {document['unit']} are less than the next purchase takes")
    else:
        lines.append(f"buy next, by {document['bought_by']}:")
    for each in document["next"]:
        names = ", ".join(document["labels"][name] for name in each["checkpoints"])
        lines.append(f"  {each['kind']} ({each['hours']:.3g} h): {names}")
    if any(each["kind"] != SFT for each in document["next"]):
        lines.append("then ask again: what is worth fine-tuning depends on what that measures")
    return lines


def regret_chart(ranking: Ranking, stages: pd.DataFrame) -> Chart | str:
    """Regret against hours: elimination beside fine-tuning all, by perplexity and early fine-tuning, and ASHA.

    In words why not, where there is too little to learn from.
    """
    try:
        known = known_of_run(ranking, stages)
        found = {curve.strategy: curve for curve in curves(known, budget_hours=0.0)}
    except CompareError as error:
        return str(error)
    return {
        "lines": [
            {
                "name": escaped(name),
                **{side: plain_json(getattr(curve, side)) for side in ("hours", "regret", "low", "high")},
                "text": [
                    escaped(f"{name}\n{_cell(*values)} after {number(hours)} {known.unit}")
                    for hours, *values in zip(curve.hours, curve.regret, curve.low, curve.high, strict=True)
                ],
            }
            for name in _named(ranking, known)
            if (curve := found.get(name))
        ],
        "x_title": escaped(f"{known.unit}, on all checkpoints"),
        "y_title": escaped(f"regret in {ranking.target}"),
        "rungs": [", ".join(rung) for rung in known.rungs],
        "num_scored": int(np.isfinite(known.scores).sum()),
        "num_halves": 2 * NUM_PAIRS,
        "no_interval": NO_REGRET_INTERVAL,
    }


def _named(ranking: Ranking, known: Known) -> dict[str, str]:
    """Strategy that is always shown -> what it is, in words, where its name does not tell.

    Elimination, fine-tuning all, by perplexity (or the loss on other text where that does not compare, as of several
    objectives), by early fine-tuning (by its loss where the target is a likelihood), and ASHA. Indicators go by the
    name of the one of the same order that stands for them.
    """
    there = {item.indicator: item.same_order_as or item.indicator for item in ranking.associations if item.selection}
    early = (EARLY_SFT, EARLY_LOSS) if is_share(ranking.target) else (EARLY_LOSS, EARLY_SFT)
    found = dict.fromkeys([elimination(size + 1) for size in range(len(known.rungs))], "") | {ALL: ""}
    for names, words in (((PPL, OTHER_TEXT), "lowest perplexity"), (early, "early fine-tuning")):
        if name := next((there[name] for name in names if there.get(name) in known.values), None):
            found[by(name)] = words
    return found | {asha(known.rungs[-1][-1]): ""}
