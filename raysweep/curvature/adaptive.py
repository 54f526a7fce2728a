"""Which units of work a trace takes next, what they amount to, and when to stop. Pure arithmetic.

Tr H = Tr G + Tr(H - G). Every probe vector gives both parts at once, v'Gv and v'(H - G)v. The first has a second,
cheaper estimator, the Fisher norms F, so with weight w

    T = mean(v'(H - G)v) + (1 - w) mean(v'Gv) + w mean(F)

is unbiased for any w; the one of least variance is taken, and work goes where it lowers that variance most per
gradient. Probes go through the batches from the first, Fisher draws from the last, so that they see different text
while there is enough of it. Rounds depend on earlier rounds alone: never on time, workers or interruptions.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from scipy import stats

from raysweep.curvature.cost import COST, Products
from raysweep.curvature.units import Unit, Values

# Of the first round: Fisher draws, from which the step is chosen; then probes, on batches of which some get two, so
# that the probes' own variance can be told from that of the text.
PILOT_FISHER = 6
PILOT_PROBES = 8
REPEATED = 4


@dataclass(frozen=True)
class Budget:
    """When to stop: at a relative standard error `rse` of both traces, within these numbers of units of each kind."""

    rse: float = 0.05
    min_units: int = 16
    max_units: int = 1024


@dataclass(frozen=True)
class Estimate:
    """A mean per predicted token, its standard error (NaN if unknown) and the degrees of freedom of that error."""

    mean: float
    stderr: float
    df: int

    def interval(self, level: float = 0.95) -> tuple[float, float]:
        """Confidence interval, by Student's t."""
        half = float(stats.t.ppf((1 + level) / 2, max(self.df, 1))) * self.stderr
        return self.mean - half, self.mean + half

    @property
    def rse(self) -> float:
        """Relative standard error; infinite for a mean of nought."""
        return self.stderr / abs(self.mean) if self.mean else math.inf


@dataclass(frozen=True)
class Traces:
    """Traces of curvature matrices of the mean token loss (nats per predicted token), over the chosen parameters."""

    hessian: Estimate
    fisher: Estimate
    gauss_newton: Estimate
    residual: Estimate
    stderr_probe: float
    """The part of `hessian.stderr` that comes from probe vectors: more of them on the same text would lower it."""
    stderr_data: float
    """The rest: only more text lowers it."""
    weight: float
    """Of the Fisher draws in the Gauss-Newton part."""
    num_probes: int
    num_fisher_draws: int
    num_tokens: int
    """Predicted tokens of all batches that were used, each counted once."""
    difference_error: float
    """Relative error of the trace from finite steps, estimated; 0 for exact products."""
    by_parameter: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    """Name -> (trace of its block of the Hessian, NaN for logit differences; of the Fisher)."""


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


def next_units(done: Mapping[Unit, Values], num_batches: int, budget: Budget, products: Products) -> list[Unit]:
    """The units of the next round; none when the target or the end of the budget is reached."""
    num = {kind: sum(unit.kind == kind for unit in done) for kind in ("fisher", "probe")}
    repeated = min(REPEATED, num_batches)
    if num["fisher"] == 0:
        return [fisher_order(index, num_batches) for index in range(min(PILOT_FISHER, budget.max_units))]
    if num["probe"] == 0:
        first = min(max(PILOT_PROBES, budget.min_units), num_batches) + repeated
        return [probe_order(index, num_batches) for index in range(min(first, budget.max_units))]
    if stop_reason(done, num_batches, budget) is not None:
        return []
    more = _spend(_Moments.of(done), num, num_batches, budget, COST[products])
    return [probe_order(num["probe"] + index, num_batches) for index in range(more["probe"])] + [
        fisher_order(num["fisher"] + index, num_batches) for index in range(more["fisher"])
    ]


def stop_reason(done: Mapping[Unit, Values], num_batches: int, budget: Budget) -> Reason | None:
    """Why there is nothing left to do; None while there is.

    "reached": the target. "units": the budget's. "text": all of it is used, and its own variance is above the target.
    """
    traces = summarize(done)
    if traces.hessian.rse <= budget.rse and traces.fisher.rse <= budget.rse:
        return "reached"
    for kind, estimate, floor in (
        ("probe", traces.hessian, traces.stderr_data),
        ("fisher", traces.fisher, 0.0),
    ):
        if estimate.rse <= budget.rse:
            continue
        units = [unit for unit in done if unit.kind == kind]
        if len(units) >= budget.max_units:
            return "units"
        passed = len(units) >= 2 * num_batches
        if passed and (floor > budget.rse * abs(estimate.mean) or kind == "fisher"):
            return "text"
    return None


def _spend(
    moments: _Moments, num: Mapping[str, int], num_batches: int, budget: Budget, probe_cost: float
) -> dict[str, int]:
    """How many more units of each kind: what brings the predicted errors to the target at the lowest cost.

    A round adds half of what is there at most, as the variances are themselves estimates.
    """
    cost = {"probe": probe_cost, "fisher": COST["fisher"]}
    most = {kind: min(max(4, num[kind] // 2), budget.max_units - num[kind]) for kind in num}
    needed = moments.ff / max((budget.rse * moments.fisher) ** 2, 1e-300)
    more = {"probe": 0, "fisher": max(0, min(math.ceil(needed) - num["fisher"], most["fisher"]))}
    goal = (budget.rse * moments.hessian) ** 2

    def variance(extra: Mapping[str, int]) -> float:
        used = {kind: min(num[kind] + extra[kind], num_batches) for kind in num}
        return moments.of_sizes(used["probe"], used["fisher"], num_batches)[0]

    while variance(more) > goal:
        gains = {
            kind: (variance(more) - variance({**more, kind: more[kind] + 1})) / cost[kind]
            for kind in more
            if more[kind] < most[kind]
        }
        if not gains:
            break
        more[max(gains, key=lambda kind: gains[kind])] += 1
    if not any(more.values()):  # The prediction says enough, the estimate not yet.
        more = {kind: min(2, most[kind]) for kind in more}
    return more


def summarize(done: Mapping[Unit, Values]) -> Traces:
    """What units amount to, summed in a fixed order. Needs units of both kinds."""
    probes = {unit: done[unit] for unit in sorted(done) if unit.kind == "probe"}
    fishers = {unit: done[unit] for unit in sorted(done) if unit.kind == "fisher"}
    moments = _Moments.of(done)
    variance, weight = moments.now
    spread = _probe_variance(probes, weight, moments.tokens_of_batch)
    tokens = {unit.batch: values["num_tokens"] for unit, values in sorted(done.items())}
    df = moments.num_probe - 1
    trace = moments.hessian + weight * (moments.fisher - moments.gauss_newton)
    return Traces(
        hessian=Estimate(trace, math.sqrt(variance), df),
        fisher=Estimate(moments.fisher, math.sqrt(moments.ff / moments.num_fisher), moments.num_fisher - 1),
        gauss_newton=Estimate(moments.gauss_newton, math.sqrt(moments.gg / moments.num_probe), df),
        residual=Estimate(moments.hessian - moments.gauss_newton, math.sqrt(moments.rr / moments.num_probe), df),
        stderr_probe=math.sqrt(min(spread, variance)),
        stderr_data=math.sqrt(max(0.0, variance - spread)),
        weight=weight,
        num_probes=len(probes),
        num_fisher_draws=len(fishers),
        num_tokens=int(sum(tokens.values())),
        difference_error=_difference_error(probes, trace),
        by_parameter=_by_parameter(probes, fishers),
    )


@dataclass(frozen=True)
class _Moments:
    """Means per token of h = v'Hv, g = v'Gv and f, the Fisher draws, and (co)variances between batches."""

    hessian: float
    gauss_newton: float
    fisher: float
    hh: float
    gg: float
    rr: float
    hg: float
    ff: float
    hf: float
    gf: float
    num_probe: int
    num_fisher: int
    num_both: int
    tokens_of_batch: float

    @staticmethod
    def of(done: Mapping[Unit, Values]) -> _Moments:
        """Draws of one batch are averaged first: batches are what is independent."""
        tokens, h = _by_batch(done, "probe", ("gauss_newton", "residual"))
        _, g = _by_batch(done, "probe", ("gauss_newton",))
        f_tokens, f = _by_batch(done, "fisher", ("fisher",))
        hessian, off_h = _ratio(h, tokens)
        gauss_newton, off_g = _ratio(g, tokens)
        fisher, off_f = _ratio(f, f_tokens)
        off_r = {batch: off_h[batch] - off_g[batch] for batch in off_h}
        return _Moments(
            hessian=hessian,
            gauss_newton=gauss_newton,
            fisher=fisher,
            hh=_covariance(off_h, off_h),
            gg=_covariance(off_g, off_g),
            rr=_covariance(off_r, off_r),
            hg=_covariance(off_h, off_g),
            ff=_covariance(off_f, off_f),
            hf=_covariance(off_h, off_f),
            gf=_covariance(off_g, off_f),
            num_probe=len(h),
            num_fisher=len(f),
            num_both=len(h.keys() & f.keys()),
            tokens_of_batch=math.fsum(tokens.values()) / len(tokens),
        )

    @property
    def now(self) -> tuple[float, float]:
        """Variance of the trace of the Hessian with the units that were taken, and the weight that gives it."""
        return self._with(self.num_probe, self.num_fisher, self.num_both)

    def of_sizes(self, num_probe: int, num_fisher: int, num_batches: int) -> tuple[float, float]:
        """The same for other numbers of batches."""
        return self._with(num_probe, num_fisher, max(0, num_probe + num_fisher - num_batches))

    def _with(self, num_probe: int, num_fisher: int, num_both: int) -> tuple[float, float]:
        # Only batches that both streams have seen make their means covary.
        share = num_both / (num_probe * num_fisher)
        hh, gg, hg = (each / num_probe for each in (self.hh, self.gg, self.hg))
        ff, hf, gf = self.ff / num_fisher, self.hf * share, self.gf * share
        # Var(h + w (f - g)) = hh + 2 w (hf - hg) + w^2 (ff + gg - 2 gf)
        square, slope = ff + gg - 2 * gf, hf - hg
        weight = min(max(-slope / square, 0.0), 1.0) if square > 0 else 0.0
        return max(0.0, hh + 2 * weight * slope + weight**2 * square), weight


def _by_batch(
    done: Mapping[Unit, Values], kind: str, names: Sequence[str]
) -> tuple[dict[int, float], dict[int, float]]:
    """Tokens of each batch, and its sum of `names`, averaged over draws; by batch in ascending order."""
    draws: dict[int, list[float]] = {}
    tokens: dict[int, float] = {}
    for unit in sorted(done):
        if unit.kind == kind:
            draws.setdefault(unit.batch, []).append(math.fsum(done[unit][name] for name in names))
            tokens[unit.batch] = done[unit]["num_tokens"]
    return tokens, {batch: math.fsum(values) / len(values) for batch, values in draws.items()}


def _ratio(sums: Mapping[int, float], tokens: Mapping[int, float]) -> tuple[float, dict[int, float]]:
    """Sum over tokens, and what each batch differs by, such that its variance over batches is that of the ratio."""
    mean = math.fsum(sums.values()) / math.fsum(tokens.values())
    size = math.fsum(tokens.values()) / len(tokens)
    return mean, {batch: (value - mean * tokens[batch]) / size for batch, value in sums.items()}


def _covariance(left: Mapping[int, float], right: Mapping[int, float]) -> float:
    both = [batch for batch in left if batch in right]
    if len(both) < 2:
        # One batch says nothing of how batches differ; two streams that share none do not covary.
        return math.inf if left is right else 0.0
    return math.fsum(left[batch] * right[batch] for batch in both) / (len(both) - 1)


def _probe_variance(probes: Mapping[Unit, Values], weight: float, tokens_of_batch: float) -> float:
    """The part of the variance of the mean that comes from probe vectors, told by batches with several; NaN if none."""
    draws: dict[int, list[float]] = {}
    for unit, values in probes.items():
        value = values["residual"] + (1 - weight) * values["gauss_newton"]
        draws.setdefault(unit.batch, []).append(value / tokens_of_batch)
    squares = math.fsum((x - math.fsum(xs) / len(xs)) ** 2 for xs in draws.values() for x in xs)
    freedom = sum(len(xs) - 1 for xs in draws.values())
    if freedom == 0:
        return math.nan
    return squares / freedom * math.fsum(1 / len(xs) for xs in draws.values()) / len(draws) ** 2


def _difference_error(probes: Mapping[Unit, Values], trace: float) -> float:
    """Relative: the error grows as the square of the step, so it is a third of what twice the step changes."""
    checked = [values for values in probes.values() if "residual_2h" in values]
    if not checked or not trace:
        return 0.0
    changes = (values[f"{name}_2h"] - values[name] for values in checked for name in ("gauss_newton", "residual"))
    tokens = math.fsum(values["num_tokens"] for values in checked)
    return abs(math.fsum(changes) / tokens / 3 / trace)


def _by_parameter(probes: Mapping[Unit, Values], fishers: Mapping[Unit, Values]) -> dict[str, tuple[float, float]]:
    names = [name for name in next(iter(fishers.values())) if name.startswith("parameter/")]
    known = all(names[0] in values for values in probes.values())
    found = {}
    for name in names:
        traces = []
        for kind, units in (("probe", probes), ("fisher", fishers)):
            if kind == "probe" and not known:
                traces.append(math.nan)
                continue
            tokens, sums = _by_batch(units, kind, (name,))
            traces.append(_ratio(sums, tokens)[0])
        found[name.removeprefix("parameter/")] = (traces[0], traces[1])
    return found
