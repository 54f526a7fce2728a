"""What units of work amount to: traces, their variances, and the weight of the control variate. Pure arithmetic.

Tr H = Tr G + Tr(H - G). Every probe vector gives both parts at once, v'Gv and v'(H - G)v. The first has a second
estimator, the Fisher norms F, cheaper than an exact product, so with weight w

    T = mean(v'(H - G)v) + (1 - w) mean(v'Gv) + w mean(F)

is unbiased for any w; the one of least variance is taken. F and v'Gv have the same mean, so that Tr F is best made
of both, too.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy.special import stdtrit

from raysweep.curvature.units import Unit, Values


@dataclass(frozen=True)
class Estimate:
    """A mean, its standard error (NaN if unknown) and the degrees of freedom of that error.

    >>> estimate = Estimate.of([1.0, 2.0, 3.0, 4.0])
    >>> estimate.mean, round(estimate.stderr, 3), estimate.df
    (2.5, 0.645, 3)
    >>> [round(end, 2) for end in estimate.interval()]
    [0.45, 4.55]
    """

    mean: float
    stderr: float
    df: int

    @staticmethod
    def of(values: Sequence[float]) -> Estimate:
        """Mean of independent values [n] and its error, std / sqrt(n); a single one tells none."""
        num = len(values)
        stderr = float(np.std(values, ddof=1) / num**0.5) if num > 1 else math.nan
        return Estimate(float(np.mean(values)), stderr, num - 1)

    def root(self) -> Estimate:
        """Of the square root; its error by the delta method."""
        root = math.sqrt(self.mean)
        return Estimate(root, self.stderr / (2 * root) if root else 0.0, self.df)

    def interval(self, level: float = 0.95) -> tuple[float, float]:
        """Confidence interval by Student's t: mean -+ t(df) stderr, which holds the truth in `level` of all cases.

        Args:
            level: from 0 to 1.
        """
        half = self._quantile(level) * self.stderr
        return self.mean - half, self.mean + half

    def relative_interval(self, level: float = 0.95) -> tuple[float, float]:
        """The same in the logarithm: for what was measured until its error was a given part of it.

        Then the stated error is small where the estimate is, and equal steps to both sides would favour low ones.
        """
        half = min(self._quantile(level) * self.rse, 700.0)  # exp of more overflows.
        low, high = sorted((self.mean * math.exp(-half), self.mean * math.exp(half)))
        return low, high

    def _quantile(self, level: float) -> float:
        return float(stdtrit(max(self.df, 1), (1 + level) / 2))

    @property
    def rse(self) -> float:
        """Relative standard error; infinite for a mean of 0."""
        return self.stderr / abs(self.mean) if self.mean else math.inf


@dataclass(frozen=True)
class Traces:
    """Traces of curvature matrices of the mean token loss (nats per predicted token), over the chosen parameters.

    >>> traces = measure_traces(model, batches, TraceSettings(rse=0.2)).traces
    >>> traces.num_tokens
    600
    """

    hessian: Estimate
    fisher: Estimate
    """From v'Gv and label draws, where there are some, whose mean is the same."""
    gauss_newton: Estimate
    """From v'Gv alone."""
    residual: Estimate
    stderr_probe: float
    """The part of `hessian.stderr` that comes from probe vectors: more of them on the same text would lower it.

    Told by the few batches that have several, so roughly: it may be as large as the whole by chance.
    """
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


Level = Literal["parameter", "layer", "block"]


@dataclass(frozen=True)
class Part:
    """Traces of the diagonal block of some parameters; the Hessian's is None where products say nothing of parts.

    >>> settings = TraceSettings(rse=0.5, products="gradient_differences", parts=True)
    >>> parts = measure_traces(model, batches, settings).parts("block")
    >>> list(parts)
    ['model.embed_tokens', 'model.layers.0', 'model.layers.1', 'model.norm']
    """

    hessian: Estimate | None
    fisher: Estimate


def summarize(done: Mapping[Unit, Values]) -> Traces:
    """What units amount to, summed in a fixed order: the traces, their errors, and where the errors come from.

    The trace of the Hessian is the control-variate estimate of the module's docstring; its standard error is that of a
    ratio of sums over batches, by the delta method (Cochran, 1977, section 6.3).

    Args:
        done: units with the sums that `probe_unit` and `fisher_unit` give; probes among them.

    Returns:
        Traces per predicted token.
    """
    probes = dict(_of_kind(done, "probe"))
    moments = Moments.of(done)
    variance, weight = moments.now
    # Told by a few batches, it may be more than the whole by chance. Where it is not known (NaN), neither part is.
    spread = min(_probe_variance(probes, weight, moments.tokens_of_batch), variance)
    # A batch's are those of its probes, where it has any.
    tokens = {unit.batch: values["num_tokens"] for kind in ("fisher", "probe") for unit, values in _of_kind(done, kind)}
    # Batches are what is independent, however many probe vectors each has. How many there are was chosen by what they
    # said, and an error is rather too small where a measurement ends by it: with all degrees of freedom, intervals of
    # 20 to 40 batches held the truth in 92 to 94 % of simulated runs in place of 95, with half of them in 94 to 96.
    df = max(1, (moments.num_probe - 1) // 2)
    trace = moments.hessian + weight * (moments.fisher - moments.gauss_newton)
    return Traces(
        hessian=Estimate(trace, math.sqrt(variance), df),
        fisher=moments.both_fishers,
        gauss_newton=Estimate(moments.gauss_newton, math.sqrt(moments.gg / moments.num_probe), df),
        residual=Estimate(moments.hessian - moments.gauss_newton, math.sqrt(moments.rr / moments.num_probe), df),
        stderr_probe=math.sqrt(spread),
        stderr_data=math.sqrt(variance - spread),
        weight=weight,
        num_probes=len(probes),
        num_fisher_draws=sum(unit.kind == "fisher" for unit in done),
        num_tokens=int(sum(tokens.values())),
        difference_error=_difference_error(probes, trace),
    )


@dataclass(frozen=True)
class Moments:
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
    """Of batches with draws; with fewer than four their variance `ff` is infinite, so that they get no weight."""
    num_both: int
    tokens_of_batch: float

    @staticmethod
    def of(done: Mapping[Unit, Values]) -> Moments:
        """Draws of one batch are averaged first: batches are what is independent."""
        probes = _of_kind(done, "probe")
        tokens, h = _by_batch(probes, ("gauss_newton", "residual"))
        _, g = _by_batch(probes, ("gauss_newton",))
        f_tokens, f = _by_batch(_of_kind(done, "fisher"), ("fisher",))
        hessian, off_h = _ratio(h, tokens)
        gauss_newton, off_g = _ratio(g, tokens)
        fisher, off_f = _ratio(f, f_tokens) if f else (0.0, {})
        off_r = {batch: off_h[batch] - off_g[batch] for batch in off_h}
        return Moments(
            hessian=hessian,
            gauss_newton=gauss_newton,
            fisher=fisher,
            hh=_covariance(off_h, off_h),
            gg=_covariance(off_g, off_g),
            rr=_covariance(off_r, off_r),
            hg=_covariance(off_h, off_g),
            # A few draws may be alike by chance, and would be given all the weight: the mean of an inverse chi square.
            ff=_covariance(off_f, off_f) * (len(f) - 1) / (len(f) - 3) if len(f) > 3 else math.inf,
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
        """Variances of the traces of the Hessian and of the Fisher matrix with other numbers of batches."""
        sizes = num_probe, num_fisher, max(0, num_probe + num_fisher - num_batches)
        return self._with(*sizes)[0], self._fisher_with(*sizes)[0]

    @property
    def both_fishers(self) -> Estimate:
        """Trace of the Fisher matrix from both streams; degrees of freedom by Satterthwaite (1946)."""
        variance, weight = self._fisher_with(self.num_probe, self.num_fisher, self.num_both)
        streams = ((weight, self.gg, self.num_probe), (1 - weight, self.ff, self.num_fisher))
        terms = [(share**2 * each / num, num - 1) for share, each, num in streams if share and num > 1]
        spread = math.fsum(term**2 / df for term, df in terms)
        df = math.fsum(term for term, _ in terms) ** 2 / spread if spread else 0
        return Estimate(self.fisher + weight * (self.gauss_newton - self.fisher), math.sqrt(variance), int(df))

    def _with(self, num_probe: int, num_fisher: int, num_both: int) -> tuple[float, float]:
        hh, hg = self.hh / num_probe, self.hg / num_probe
        if math.isinf(self.ff):
            return hh, 0.0
        gg, ff, hf, gf = self._fishers(num_probe, num_fisher, num_both)
        # Var(h + w (f - g)) = hh + 2 w (hf - hg) + w^2 (ff + gg - 2 gf)
        return _least(hh, hf - hg, ff + gg - 2 * gf)

    def _fisher_with(self, num_probe: int, num_fisher: int, num_both: int) -> tuple[float, float]:
        if math.isinf(self.ff):
            return self.gg / num_probe, 1.0
        gg, ff, _, gf = self._fishers(num_probe, num_fisher, num_both)
        # Var(f + w (g - f)) = ff + 2 w (gf - ff) + w^2 (ff + gg - 2 gf)
        return _least(ff, gf - ff, ff + gg - 2 * gf)

    def _fishers(self, num_probe: int, num_fisher: int, num_both: int) -> tuple[float, float, float, float]:
        # Only batches that both streams have seen make their means covary.
        share = num_both / (num_probe * num_fisher)
        return self.gg / num_probe, self.ff / num_fisher, self.hf * share, self.gf * share


def _least(constant: float, slope: float, square: float) -> tuple[float, float]:
    """Least value of `constant + 2 w slope + w^2 square` for w from 0 to 1, and that w."""
    # `square` is the variance of f - g: where it is 0 or not known, no weight is better than another.
    if not 0 < square < math.inf:
        return constant, 0.0
    weight = min(max(-slope / square, 0.0), 1.0)
    return max(0.0, constant + 2 * weight * slope + weight**2 * square), weight


def _of_kind(done: Mapping[Unit, Values], kind: str) -> list[tuple[Unit, Values]]:
    """Units of one kind with their values, in ascending order."""
    rows = [(unit, values) for unit, values in done.items() if unit.kind == kind]
    # By a key: Python's own comparison of two units takes ten times as long.
    return sorted(rows, key=lambda row: (row[0].batch, row[0].draw))


def _by_batch(units: Sequence[tuple[Unit, Values]], names: Sequence[str]) -> tuple[dict[int, float], dict[int, float]]:
    """Tokens of each batch, and its sum of `names`, averaged over draws; by batch in the order of `units`."""
    draws: dict[int, list[float]] = {}
    tokens: dict[int, float] = {}
    for unit, values in units:
        draws.setdefault(unit.batch, []).append(math.fsum([values[name] for name in names]))
        tokens[unit.batch] = values["num_tokens"]
    return tokens, {batch: math.fsum(values) / len(values) for batch, values in draws.items()}


def _ratio(sums: Mapping[int, float], tokens: Mapping[int, float]) -> tuple[float, dict[int, float]]:
    """Sum over tokens, and what each batch differs by, such that its variance over batches is that of the ratio."""
    mean = math.fsum(sums.values()) / math.fsum(tokens.values())
    size = math.fsum(tokens.values()) / len(tokens)
    # S / T to first order: d(S / T) = (dS - S/T dT) / T.
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
        # What of h + w (f - g) depends on the probe vector: h - w g, with h = g + residual.
        value = values["residual"] + (1 - weight) * values["gauss_newton"]
        draws.setdefault(unit.batch, []).append(value / tokens_of_batch)
    squares = math.fsum((x - math.fsum(xs) / len(xs)) ** 2 for xs in draws.values() for x in xs)
    freedom = sum(len(xs) - 1 for xs in draws.values())
    if freedom == 0:
        return math.nan
    # The variance of one draw, pooled over batches, in a mean over batches of means over their draws.
    return squares / freedom * math.fsum(1 / len(xs) for xs in draws.values()) / len(draws) ** 2


def change_of_step(values: Values) -> float:
    """What twice the step of differences changes in v'Hv, of a probe that was checked: three times the step's error.

    That is of truncation, which grows as the square of the step.
    """
    return values["gauss_newton_2h"] + values["residual_2h"] - values["gauss_newton"] - values["residual"]


def _difference_error(probes: Mapping[Unit, Values], trace: float) -> float:
    """Relative, as `change_of_step` tells it on a few probes.

    One that moves the logits further has, as from a longer step, a larger error.
    """
    checked = [values for values in probes.values() if "residual_2h" in values]
    seen = math.fsum(values["gauss_newton"] for values in checked)
    if not trace or not seen:
        return 0.0
    # Only a few probes are checked; of the others the error is reckoned by how far they move the logits.
    usual = seen / math.fsum(values["num_tokens"] for values in checked)
    weighted = math.fsum(
        values["gauss_newton"] * max(1.0, values["gauss_newton"] / values["num_tokens"] / usual)
        for values in probes.values()
    )
    tokens = math.fsum(values["num_tokens"] for values in probes.values())
    return abs(math.fsum(map(change_of_step, checked)) / 3 / seen * weighted / tokens / trace)


def traces_of_parts(done: Mapping[Unit, Values], part: Callable[[str], str]) -> dict[str, Part]:
    """Traces of parts of a model, from the units of the whole, in the model's order.

    Args:
        done: units, with values of single parameters.
        part: what part a parameter, by name, belongs to; see `part_of`.

    Raises:
        ValueError: if there are too few label draws for an error.
    """
    names: dict[str, list[str]] = {}
    fishers = {unit: values for unit, values in done.items() if unit.kind == "fisher"}
    if len({unit.batch for unit in fishers}) < 2:
        raise ValueError("traces of parts are of label draws, two at least; measure with TraceSettings(parts=True)")
    for name in next(iter(fishers.values())):
        if name.startswith("parameter/"):
            names.setdefault(part(name.removeprefix("parameter/")), []).append(name)
    first = next(iter(names.values()))[0]
    known = all(first in values for unit, values in done.items() if unit.kind == "probe")
    return {
        name: Part(_estimate(done, "probe", group) if known else None, _estimate(done, "fisher", group))
        for name, group in names.items()
    }


def part_of(parameter: str, level: Level) -> str:
    """The layer ("model.layers.0.mlp.up_proj") or block ("model.layers.0") of a parameter's name, or itself."""
    if level == "parameter":
        return parameter
    layer = parameter.rpartition(".")[0] or parameter
    block = re.match(r"(.*?\.\d+)\.", parameter) if level == "block" else None
    return block[1] if block else layer


def ratio_estimate(sums: Sequence[float], tokens: Sequence[float]) -> Estimate:
    """The sum over batches over that of their tokens, and its standard error by the delta method.

    >>> ratio_estimate([4.0, 6.0], [2.0, 2.0])
    Estimate(mean=2.5, stderr=0.5, df=1)
    """
    mean, off = _ratio(dict(enumerate(sums)), dict(enumerate(tokens)))
    return Estimate(mean, math.sqrt(_covariance(off, off) / len(off)), len(off) - 1)


def _estimate(done: Mapping[Unit, Values], kind: str, names: Sequence[str]) -> Estimate:
    tokens, sums = _by_batch(_of_kind(done, kind), names)
    return ratio_estimate([*sums.values()], [tokens[batch] for batch in sums])
