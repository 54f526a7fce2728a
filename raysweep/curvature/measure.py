"""The traces of a language model's curvature on batches of text, to a target error."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from raysweep.curvature.adaptive import Budget, Reason, Traces, next_units, stop_reason, summarize
from raysweep.curvature.cost import COST, Products
from raysweep.curvature.differences import step_for
from raysweep.curvature.language import Batch
from raysweep.curvature.operators import Shifted, named_parameters
from raysweep.curvature.probes import Distribution
from raysweep.curvature.units import Unit, Values, fisher_unit, probe_unit

logger = logging.getLogger(__name__)

# Batches whose first probe is also taken with twice the step, to know the error of differences.
CHECKED = 2

Share = Callable[[Sequence[Unit], Callable[[Unit], Values]], Sequence[Values]]
"""Has units run by whom it likes, and gives all their values, in order."""


@dataclass(frozen=True)
class Measured:
    """Traces, what they were made of, and why the measurement ended."""

    traces: Traces
    units: dict[Unit, Values]
    reason: Reason
    gradient_equivalents: float
    """Work in gradients of one batch; see `cost.COST`."""

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
        }


def one_after_another(units: Sequence[Unit], run: Callable[[Unit], Values]) -> list[Values]:
    """A `Share` of one process."""
    return [run(unit) for unit in units]


def measure_traces(
    model: Any,
    batches: Sequence[Batch],
    *,
    budget: Budget,
    seed: int = 0,
    products: Products = "logit_differences",
    distribution: Distribution = "rademacher",
    share: Share = one_after_another,
) -> Measured:
    """Traces of the Hessian, Gauss-Newton and Fisher matrices of the mean token loss over all `batches`' text.

    Two models measured with one seed on the same batches share probe vectors and draws unit by unit, so that the
    difference of their traces has an error of its own: see `compare`.

    Args:
        model: brought into shape by `language.prepare`; the parameters that require a gradient are measured.
        batches: alike draws from the text, in an order that means nothing; a handful of sequences each at most.
        budget: when to stop.
        seed: of probe vectors and label draws.
        products: how v'Hv is made.
        distribution: of probe vectors.
        share: who runs the units of a round.

    Raises:
        ValueError: if there are fewer than two batches, or a loss is not finite.
    """
    if len(batches) < 2:
        raise ValueError(f"an error bar needs at least two batches; there are {len(batches)}")
    done: dict[Unit, Values] = {}
    shifted: Shifted | None = None

    def run(unit: Unit) -> Values:
        if unit.kind == "fisher":
            return fisher_unit(model, batches[unit.batch], unit, seed=seed)
        assert shifted is not None  # The first round is of Fisher draws.
        return probe_unit(
            model,
            batches[unit.batch],
            unit,
            seed=seed,
            products=products,
            distribution=distribution,
            shifted=shifted,
            check=unit.batch < CHECKED and unit.draw == 0,
        )

    while units := next_units(done, len(batches), budget, products):
        if done and shifted is None:
            # The first round was of Fisher draws, which tell how far a probe vector moves the logits.
            first = [values for _, values in sorted(done.items())]
            trace = sum(values["fisher"] for values in first) / sum(values["num_tokens"] for values in first)
            shifted = Shifted(named_parameters(model), step_for(trace))
        done |= dict(zip(units, share(units, run), strict=True))
    traces = summarize(done)
    reason = stop_reason(done, len(batches), budget) or "units"
    if traces.difference_error > budget.rse / 4:
        logger.warning(
            "finite differences are off by about %.2g of the trace; measure with exact products",
            traces.difference_error,
        )
    checks = sum("residual_2h" in values for values in done.values())
    cost = traces.num_probes * COST[products] + traces.num_fisher_draws * COST["fisher"] + checks * 2 / 3
    return Measured(traces, done, reason, cost)
