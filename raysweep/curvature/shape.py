"""What the trace hides: the spectrum of the Hessian, sharpness, and forms that rescaling leaves alone.

All on a fixed piece of text: error bars are those of random vectors, not of the text.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Literal

import numpy as np

from raysweep.curvature.averages import Estimate
from raysweep.curvature.cost import Products
from raysweep.curvature.dealing import Deal, one_after_another
from raysweep.curvature.estimators import random_vector
from raysweep.curvature.language import Batch, prepare
from raysweep.curvature.linear import curvature_operator
from raysweep.curvature.operators import named_parameters
from raysweep.curvature.settings import ShapeSettings
from raysweep.curvature.sharpness import (
    Scale,
    adaptive_trace,
    average_sharpness,
    relative_flatness,
    worst_sharpness,
)
from raysweep.curvature.spectrum import Array, Density, lanczos, largest, quadrature
from raysweep.curvature.units import Values

LANCZOS = "lanczos"


def measure_shape(
    model: Any,
    batches: Sequence[Batch],
    settings: ShapeSettings = ShapeSettings(),
    *,
    seed: int = 0,
    products: Products = "exact",
    deal: Deal = one_after_another,
) -> tuple[dict[str, Values], dict[str, float]]:
    """All that `shape_tasks` measures, and the numbers of `shape_metrics`.

    Args:
        model: brought into shape here, as the products need it.
        batches: the text; see `language`.
        settings: of how much.
        seed: of all random vectors.
        products: of the traces; where they are logit differences, which give no vectors, products here are exact.
        deal: who does which task.

    >>> _, metrics = measure_shape(model, batches[:1], ShapeSettings(num_steps=4, num_eigenvalues=1))
    >>> metrics["stable_rank"] >= 1
    True
    """
    how: Literal["exact", "gradient_differences"] = (
        "gradient_differences" if products == "gradient_differences" else "exact"
    )
    prepare(model, twice_differentiable=how == "exact")
    tasks = shape_tasks(model, batches, settings, seed=seed, products=how)
    found = dict(zip(tasks, deal(list(tasks), lambda name: tasks[name]()), strict=True))
    return found, shape_metrics(found, sum(part.numel() for part in named_parameters(model).values()))


def shape_tasks(
    model: Any,
    batches: Sequence[Batch],
    settings: ShapeSettings,
    *,
    seed: int,
    products: Literal["exact", "gradient_differences"] = "exact",
) -> dict[str, Callable[[], Values]]:
    """Independent pieces of work by name; what they give is summed up by `shape_metrics`.

    Args:
        model: brought into shape by `language.prepare`; the parameters that require a gradient are measured.
        batches: the text; see `language`.
        settings: of how much; sharpness and traces, too, take `num_steps` products or losses.
        seed: of all random vectors.
        products: how Hessian-vector products are made.
    """
    operator = curvature_operator(model, batches, products=products)
    radius: dict[Scale, float] = {"plain": settings.rho, "adaptive": settings.adaptive_rho}
    spread: dict[Scale, float] = {"plain": settings.noise, "adaptive": settings.adaptive_noise}
    num_steps = settings.num_steps

    def process(index: int) -> Values:
        start = random_vector(operator, index, seed=seed, distribution="gaussian")
        found = lanczos(operator, start, num_steps=num_steps)
        nodes, weights = quadrature(found)
        values = {f"node/{i}": float(node) for i, node in enumerate(nodes)}
        values |= {f"weight/{i}": float(weight) for i, weight in enumerate(weights)}
        best, _, residuals = largest(found, settings.num_eigenvalues)
        values |= {f"eigenvalue/{i}": float(value) for i, value in enumerate(best)}
        return values | {f"residual/{i}": float(value) for i, value in enumerate(residuals)}

    def worst(scale: Scale) -> Values:
        return {"": worst_sharpness(model, batches, rho=radius[scale], scale=scale, num_steps=3)}

    def average(scale: Scale) -> Values:
        return _estimate(
            average_sharpness(model, batches, noise=spread[scale], scale=scale, num_draws=num_steps, seed=seed)
        )

    tasks: dict[str, Callable[[], Values]] = {
        f"{LANCZOS}/{i}": partial(process, i) for i in range(settings.num_vectors)
    }
    if settings.geodesic_rho:
        tasks["worst_sharpness_geodesic"] = lambda: {
            "": worst_sharpness(model, batches, rho=settings.geodesic_rho, scale="geodesic", num_steps=3)
        }
    return tasks | {
        "worst_sharpness": partial(worst, "plain"),
        "worst_sharpness_adaptive": partial(worst, "adaptive"),
        "average_sharpness": partial(average, "plain"),
        "average_sharpness_adaptive": partial(average, "adaptive"),
        "adaptive_trace": lambda: _estimate(adaptive_trace(operator, model, num_products=num_steps, seed=seed)),
        "relative_flatness": lambda: _estimate(relative_flatness(operator, model, num_products=num_steps, seed=seed)),
    }


def shape_metrics(found: Mapping[str, Values], num_parameters: int) -> dict[str, float]:
    """All numbers by name: those of `shape_tasks`, and the spectrum's, of size `num_parameters`."""
    # The process that eigenvalues are read from.
    first = found[f"{LANCZOS}/0"]
    metrics: dict[str, float] = {}
    for rank, (value, error) in enumerate(zip(_column(first, "eigenvalue"), _column(first, "residual"), strict=True)):
        metrics |= {f"eigenvalue_{rank + 1}": float(value), f"eigenvalue_{rank + 1}_error": float(error)}
    density = density_of(found, num_parameters)
    norm = density.total("square").root()
    metrics |= {
        "frobenius_norm": norm.mean,
        "frobenius_norm_stderr": norm.stderr,
        "effective_rank": density.effective_rank,
        "stable_rank": density.stable_rank,
    }
    for name, values in found.items():
        if not name.startswith(LANCZOS):
            metrics |= {f"{name}{suffix}": float(value) for suffix, value in values.items()}
    return metrics


def density_of(found: Mapping[str, Values], num_parameters: int) -> Density:
    """The density of eigenvalues from all Lanczos processes."""
    rows = [values for name, values in sorted(found.items()) if name.startswith(LANCZOS)]
    return Density.of([(_column(row, "node"), _column(row, "weight")) for row in rows], num_parameters)


def _column(values: Values, name: str) -> Array:
    return np.array([value for key, value in values.items() if key.startswith(f"{name}/")])


def _estimate(estimate: Estimate) -> Values:
    return {"": estimate.mean, "_stderr": estimate.stderr}
