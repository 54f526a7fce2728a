"""The traces of a language model's curvature on batches of text, to a target error."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from typing import Any

import torch

from raysweep.curvature.adaptive import REPEATED, Reason, next_units, stop_reason
from raysweep.curvature.averages import (
    Level,
    Moments,
    Part,
    Traces,
    change_of_step,
    part_of,
    summarize,
    traces_of_parts,
)
from raysweep.curvature.cost import COST, Products, first_draws
from raysweep.curvature.dealing import Deal, one_after_another
from raysweep.curvature.differences import step_for
from raysweep.curvature.groups import Groups, can_be_joined, cheapest_size
from raysweep.curvature.head import EVERY, OutputLayer
from raysweep.curvature.language import Batch, predicting_logits
from raysweep.curvature.operators import MovableParameters, named_parameters
from raysweep.curvature.settings import TraceSettings
from raysweep.curvature.units import Unit, Values, fisher_unit, probe_unit, response_unit

logger = logging.getLogger(__name__)

# The step of differences is found on the first probes of this many batches, by what twice the step changes. What it
# may be wrong by, relative to the Gauss-Newton trace, is this part of the target error.
NUM_CALIBRATION = 2
TOLERANCE = 0.1
# The first batches, which have several units: with the step's, of `adaptive.REPEATED` another probe.
NUM_REPEATED = max(NUM_CALIBRATION, REPEATED)
MAX_ATTEMPTS = 6


@dataclass(frozen=True)
class Measured:
    """Traces, what they were made of, and why the measurement ended.

    >>> measured = measure_traces(model, batches, TraceSettings(rse=0.2))
    >>> sorted(measured.units)[0]
    Unit(kind='probe', batch=0, draw=0)
    """

    traces: Traces
    units: dict[Unit, Values]
    reason: Reason
    gradient_equivalents: float
    """Work in gradients of one batch; see `cost.COST`."""
    unit_batches: int
    """That share a probe vector; see `groups`."""

    def parts(self, level: Level) -> dict[str, Part]:
        """Traces of the diagonal blocks by "parameter", "layer" or "block".

        Raises:
            ValueError: if there are too few label draws for an error; see `TraceSettings.parts`.
        """
        return traces_of_parts(self.units, partial(part_of, level=level))

    def roles(self, role: Callable[[str], str]) -> dict[str, Part]:
        """The same by what parameters are for; see `roles.roles_of`. Raises ValueError as `parts` does."""
        return traces_of_parts(self.units, role)

    def metrics(self) -> dict[str, float]:
        """All numbers by name; traces are in nats per predicted token."""
        traces = self.traces
        return {
            "hessian_trace": traces.hessian.mean,
            "hessian_trace_stderr": traces.hessian.stderr,
            "hessian_trace_stderr_probe": traces.stderr_probe,
            "hessian_trace_stderr_data": traces.stderr_data,
            "fisher_trace": traces.fisher.mean,
            "fisher_trace_stderr": traces.fisher.stderr,
            "gauss_newton_trace": traces.gauss_newton.mean,
            "gauss_newton_trace_stderr": traces.gauss_newton.stderr,
            "residual_trace": traces.residual.mean,
            "residual_trace_stderr": traces.residual.stderr,
            "difference_error": traces.difference_error,
            "target_reached": float(self.reason == "reached"),
            "num_probes": float(traces.num_probes),
            "num_fisher_draws": float(traces.num_fisher_draws),
            "num_tokens": float(traces.num_tokens),
            "gradient_equivalents": self.gradient_equivalents,
            "unit_batches": float(self.unit_batches),
        }


def measure_traces(
    model: Any,
    batches: Sequence[Batch],
    settings: TraceSettings = TraceSettings(),
    *,
    deal: Deal = one_after_another,
    movable: MovableParameters | None = None,
    unit_batches: int | None = None,
) -> Measured:
    """Traces of the Hessian, Gauss-Newton and Fisher matrices of the mean token loss over all `batches`' text.

    Each is a mean over units of work, a batch with a probe vector v or with label draws, taken round by round until its
    relative standard error is the one asked for: Tr H = E v'Hv / tokens, v'Hv the second derivative of the summed loss
    along v (Hutchinson, 1990). `averages` says how units become estimates, `differences` how v'Hv is made by default.

    Two models measured with one seed on the same batches share probe vectors and draws unit by unit, so that the
    difference of their traces has an error of its own: see `paired_difference`; the second is measured with the
    `unit_batches` of the first.

    Args:
        model: brought into shape by `language.prepare`; the parameters that require a gradient are measured.
        batches: alike draws from the text, in an order that means nothing; a handful of sequences each at most.
        settings: when to stop, and how products are made.
        deal: who runs the units of a round.
        movable: what moves the parameters; see `zero3.MovableShards`. Then no two batches share a probe vector.
        unit_batches: that share a probe vector; None: as the first units say, within `settings.max_unit_batches`.

    Returns:
        Traces in nats per predicted token, and the units they are made of.

    Raises:
        ValueError: if there are fewer than two batches, or a loss is not finite.

    >>> measured = measure_traces(model, batches, TraceSettings(rse=0.2))
    >>> low, high = measured.traces.hessian.relative_interval()
    >>> low < measured.traces.hessian.mean < high
    True
    """
    if not all(isinstance(batch, Mapping) for batch in batches):
        raise ValueError("a batch is a mapping with input_ids, as a tokenizer gives it; see curvature.language")
    if len(batches) < 2:
        raise ValueError(f"an error bar needs at least two batches; there are {len(batches)}")
    if settings.head == "closed_form" and movable is not None:
        raise ValueError("head closed_form: a sharded model's output layer is in no worker whole; set it to probed")
    done: dict[Unit, Values] = {}
    products = settings.products
    may_grow = unit_batches is None and movable is None
    groups = Groups(batches, unit_batches or 1)
    output = OutputLayer.of(model, batches[0]) if settings.head == "closed_form" else None
    movable = movable or MovableParameters(output.rest if output else named_parameters(model), math.nan)
    given: dict[str, Any] = {"seed": settings.seed, "movable": movable, "distribution": settings.distribution}

    @lru_cache(maxsize=NUM_REPEATED)
    @torch.no_grad()
    def at_weights(group: int, is_rest: bool) -> torch.Tensor:
        batch = groups.rest(group) if is_rest else groups.of(group)
        return output.states(model, batch) if output else predicting_logits(model, batch)[0]

    def probe(unit: Unit, products: Products, *, check: bool, is_rest: bool = False) -> Values:
        batch = groups.rest(unit.batch) if is_rest else groups.of(unit.batch)
        here = None
        if products == "logit_differences" and unit.batch < NUM_REPEATED:
            here = at_weights(unit.batch, is_rest)
        else:
            at_weights.cache_clear()
        return probe_unit(model, batch, unit, products=products, check=check, here=here, output=output, **given)

    def run(unit: Unit) -> Values:
        if unit.kind == "rest":
            of = replace(unit, kind="probe")
            return probe(of, products, check="residual_2h" in done[of], is_rest=True)
        if unit.kind == "fisher":
            return fisher_unit(model, groups.of(unit.batch), unit, seed=settings.seed)
        if unit.kind == "response":
            here = at_weights(unit.batch, False)
            return response_unit(model, groups.of(unit.batch), unit, here=here, output=output, **given)
        if unit.kind == "step":
            return probe(Unit("probe", unit.batch, 0), "logit_differences", check=True)
        check = products != "logit_differences" and unit.batch < NUM_CALIBRATION and unit.draw == 0
        return probe(unit, products, check=check)

    (response,) = deal([Unit("response", 0, 0)], run)
    if output and groups.num >= EVERY:  # Of fewer batches none may be the one that a pass of its own is for.
        output = output.given(response)
    found, cost_of_step = _find_step(movable, response, min(NUM_CALIBRATION, groups.num), settings.rse, run, deal)
    known = dict(found) if products == "logit_differences" else {}  # They are probes, too.
    while units := next_units(done, groups.num, settings):
        missing = [unit for unit in units if unit not in known]
        known |= dict(zip(missing, deal(missing, run), strict=True))
        done |= {unit: known[unit] for unit in units}
        if may_grow and stop_reason(done, groups.num, settings) is None and _may_share(batches, settings):
            size = cheapest_size(
                Moments.of(done),
                settings,
                num_batches=len(batches),
                num_tokens=batches[0]["input_ids"].numel(),
                device=batches[0]["input_ids"].device.type,
            )
            if size > 1:
                groups = Groups(batches, size)
                at_weights.cache_clear()
                rests = deal([replace(unit, kind="rest") for unit in done], run)
                done = {unit: _sum(done[unit], rest) for unit, rest in zip(done, rests, strict=True)}
        may_grow = False
    # Those that were taken as probes, too, are in the number of probes below.
    if products == "logit_differences":
        cost_of_step -= len(found.keys() & done.keys()) * COST[products]
    traces = summarize(done)
    reason = stop_reason(done, groups.num, settings) or "units"
    if traces.difference_error > settings.rse / 4:
        logger.warning(
            "finite differences are off by about %.2g of the trace; measure with exact products",
            traces.difference_error,
        )
    cost = traces.num_probes * COST[products] + traces.num_fisher_draws * COST["fisher"]
    return Measured(traces, done, reason, groups.size * cost + (unit_batches or 1) * cost_of_step, groups.size)


def _may_share(batches: Sequence[Batch], settings: TraceSettings) -> bool:
    """Whether batches may share a probe vector: label draws, which have none, are of single ones."""
    draws = first_draws(settings.products, parts=settings.parts, min_units=settings.min_units)
    return settings.max_unit_batches > 1 and not draws and can_be_joined(batches)


def _sum(left: Values, right: Values) -> Values:
    return {name: left[name] + right[name] for name in left}


def _find_step(
    movable: MovableParameters,
    response: Values,
    num_batches: int,
    rse: float,
    run: Callable[[Unit], Values],
    deal: Deal,
) -> tuple[dict[Unit, Values], float]:
    """Set the step of differences to one whose error is known to be small, or else to the best that rounding allows.

    How fast curvature changes along a probe differs between models by orders of magnitude (an SGD run of 195 steps
    took a tenth of the step of the same run with AdamW), so no rule from norms alone will do.

    Returns:
        The probe units that were computed on the way, with the step that was chosen; the cost of all, in gradients.
    """
    movable.step = step_for(response["gauss_newton"] / response["num_tokens"], movable.rms)
    tries: list[_Try] = []

    def attempt() -> _Try:
        made = deal([Unit("step", batch, len(tries)) for batch in range(num_batches)], run)
        tries.append(_Try(movable.step, made))
        return tries[-1]

    chosen = attempt()
    while chosen.error > TOLERANCE * rse and len(tries) < MAX_ATTEMPTS:
        # The error falls as the square of the step: aim at half of what is tolerated, by tenfold at most at once.
        shorter = min(0.5, max(0.1, math.sqrt(0.5 * TOLERANCE * rse / chosen.error)))
        movable.step = chosen.step * shorter
        last = attempt()
        if last.error > chosen.error and last.follows(chosen):
            # Rounding grows as the inverse square of the step, truncation as the square: best is where they are equal.
            # What twice the step changes is three times the error of truncation, but about that of rounding.
            truncation = min(each.error / each.step**2 for each in tries[:-1] if last.follows(each))
            movable.step = (3 * last.error * last.step**2 / truncation) ** 0.25
            chosen = attempt()
            break
        chosen = last
    # Forward passes: two for the response, and of each probe one at the weights and two with each of two steps. One
    # at the weights is counted for each, though probes of one batch share it.
    passes = 2 + 5 * num_batches * len(tries)
    return {Unit("probe", batch, 0): each for batch, each in enumerate(chosen.probes)}, passes / 3


@dataclass(frozen=True)
class _Try:
    """A step of differences, and probes with it and with twice of it."""

    step: float
    probes: Sequence[Values]

    @property
    def gauss_newton(self) -> float:
        return math.fsum(each["gauss_newton"] for each in self.probes)

    @property
    def error(self) -> float:
        """Of v'Hv by truncation, relative to v'Gv: a third of what twice the step changes."""
        return math.fsum(abs(change_of_step(each)) for each in self.probes) / 3 / self.gauss_newton

    def follows(self, longer: _Try) -> bool:
        """Whether v'Gv, which rounding hardly touches, was about right with a longer step.

        Where a step is so long that the logits no longer follow it, v'Gv is far too small, and its error says nothing.
        """
        return self.gauss_newton < 2 * longer.gauss_newton


def distance(left: Measured, right: Measured) -> tuple[float, float]:
    """Of the Hessian's trace of `left` from that of `right`, relative to the latter, and its standard error.

    For measurements on different text, as of a model's own samples; see `paired_difference` for the same text.
    """
    mine, theirs = left.traces.hessian, right.traces.hessian
    return mine.mean / theirs.mean - 1, math.hypot(mine.stderr, theirs.stderr) / abs(theirs.mean)


def paired_difference(left: Measured, right: Measured) -> Traces:
    """The traces of `left` less those of `right`, from the units that both have taken.

    Measured with one seed on the same batches they share probe vectors and draws, whose chance then cancels: the
    error of a difference is its own, and below that of two separate measurements.

    Args:
        left, right: of two models, or of one at two times.

    Raises:
        ValueError: if they share too few units, or a batch was another text.

    >>> measured = measure_traces(model, batches)
    >>> paired_difference(measured, measured).hessian.interval()
    (0.0, 0.0)
    """
    if left.unit_batches != right.unit_batches:
        raise ValueError(
            f"batches that share a probe vector: {left.unit_batches} of one measurement, {right.unit_batches} of the "
            "other; measure the second with unit_batches of the first"
        )
    both = sorted(left.units.keys() & right.units.keys())
    if not any(unit.kind == "probe" for unit in both):
        raise ValueError("the two measurements share no units; measure both with one seed on the same batches")
    differences: dict[Unit, Values] = {}
    for unit in both:
        mine, theirs = left.units[unit], right.units[unit]
        if mine["num_tokens"] != theirs["num_tokens"]:
            raise ValueError(f"batch {unit.batch} is not the same text in both; measure both on the same batches")
        names = [name for name in mine if name in theirs and name != "num_tokens"]
        differences[unit] = {"num_tokens": mine["num_tokens"]} | {name: mine[name] - theirs[name] for name in names}
    traces = summarize(differences)
    # At most; errors of one sign cancel in part.
    errors = (abs(each.traces.difference_error * each.traces.hessian.mean) for each in (left, right))
    scale = abs(traces.hessian.mean)
    return replace(traces, difference_error=math.fsum(errors) / scale if scale else 0.0)
