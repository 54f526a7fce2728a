"""Which units of work a trace takes next, and when to stop. Pure arithmetic.

Work goes where it lowers the variance of the trace most per gradient. Probes go through the batches from the first,
Fisher draws from the last, so that they see different text while there is enough of it. Rounds depend on earlier
rounds alone: never on time, workers or interruptions.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from raysweep.curvature.averages import Moments, summarize
from raysweep.curvature.cost import COST, first_draws
from raysweep.curvature.settings import TraceSettings
from raysweep.curvature.units import Unit, Values

# The first round's probes are on batches of which some get two, so that the probes' own variance can be told from that
# of the text.
PILOT_PROBES = 8
REPEATED = 2


Reason = Literal["reached", "units", "text"]


def probe_order(index: int, num_batches: int) -> Unit:
    """The `index`-th probe unit: the first batches twice, then each once, then every batch again and again."""
    repeated = min(REPEATED, num_batches)
    if index < 2 * repeated:
        return Unit("probe", index // 2, index % 2)
    index -= repeated
    if index < num_batches:
        return Unit("probe", index, 0)
    index -= num_batches
    # The repeated batches have had their draw 1 already.
    batch, passes = index % num_batches, 1 + index // num_batches
    return Unit("probe", batch, passes + 1 if batch < repeated else passes)


def fisher_order(index: int, num_batches: int) -> Unit:
    """The `index`-th Fisher unit: from the last batch to the first, and again."""
    return Unit("fisher", num_batches - 1 - index % num_batches, index // num_batches)


def next_units(done: Mapping[Unit, Values], num_batches: int, settings: TraceSettings) -> list[Unit]:
    """The units of the next round; none when the target or the end of the budget is reached."""
    num = _num(done)
    repeated = min(REPEATED, num_batches)
    if num["probe"] == 0:
        probes = min(max(PILOT_PROBES, settings.min_units), num_batches) + repeated
        draws = first_draws(settings.products, parts=settings.parts, min_units=min(settings.min_units, num_batches))
        return [probe_order(index, num_batches) for index in range(min(probes, settings.max_units))] + [
            fisher_order(index, num_batches) for index in range(min(draws, settings.max_units))
        ]
    if stop_reason(done, num_batches, settings) is not None:
        return []
    more = _spend(Moments.of(done), num, num_batches, settings, COST[settings.products])
    return [probe_order(num["probe"] + index, num_batches) for index in range(more["probe"])] + [
        fisher_order(num["fisher"] + index, num_batches) for index in range(more["fisher"])
    ]


def stop_reason(done: Mapping[Unit, Values], num_batches: int, settings: TraceSettings) -> Reason | None:
    """Why there is nothing left to do; None while there is.

    "reached": the target. "units": the budget's. "text": all of it is used, and its own variance is above the target.
    """
    traces = summarize(done)
    num = {kind: count for kind, count in _num(done).items() if count}
    passed = {kind: count >= 2 * num_batches for kind, count in num.items()}
    if not traces.hessian.rse <= settings.rse:  # So also where it is not known (NaN).
        if num["probe"] >= settings.max_units:
            return "units"
        return "text" if passed["probe"] and traces.stderr_data > settings.rse * abs(traces.hessian.mean) else None
    if not traces.fisher.rse <= settings.rse:
        if min(num.values()) >= settings.max_units:
            return "units"
        return "text" if all(passed.values()) else None
    return "reached"


def _num(done: Mapping[Unit, Values]) -> dict[str, int]:
    return {kind: sum(unit.kind == kind for unit in done) for kind in ("fisher", "probe")}


def _spend(
    moments: Moments, num: Mapping[str, int], num_batches: int, settings: TraceSettings, probe_cost: float
) -> dict[str, int]:
    """How many more units of each kind: what brings the predicted errors to the target at the lowest cost.

    A round adds half of what is there at most, as the variances are themselves estimates.
    """
    cost = {"probe": probe_cost, "fisher": COST["fisher"]}
    # See `cost.first_draws`.
    left = {kind: settings.max_units - count if count else 0 for kind, count in num.items()}
    more = {"probe": 0, "fisher": 0}

    def variances(extra: Mapping[str, int]) -> tuple[float, float]:
        probe, fisher = (min(num[kind] + extra[kind], num_batches) for kind in ("probe", "fisher"))
        return moments.of_sizes(probe, fisher, num_batches)

    # Where no prediction tells a gain (too few draws, or all text was used), what comes first here is taken.
    aims = (moments.hessian, ("probe", "fisher")), (moments.both_fishers.mean, ("fisher", "probe"))
    for which, (trace, kinds) in enumerate(aims):
        while (variance := variances(more)[which]) > (settings.rse * trace) ** 2:
            gains = {
                kind: (variance - variances({**more, kind: more[kind] + 1})[which]) / cost[kind]
                for kind in kinds
                if more[kind] < left[kind]
            }
            best = max(gains, key=lambda kind: gains[kind], default=None)
            if best is None or more[best] >= max(4, num[best] // 2):
                break
            more[best] += 1
    if not any(more.values()):  # The prediction says enough, the estimate not yet.
        kind = "probe" if left["probe"] else "fisher"
        more[kind] = min(2, left[kind])
    return more
