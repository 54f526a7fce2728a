"""How a checkpoint's training loss was falling when it was saved, from the curve that lies beside its weights."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, ClassVar, NamedTuple

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from raysweep.costs import Size
from raysweep.data.corpora import Corpus
from raysweep.objectives.families import Objective
from raysweep.resources import Resources
from raysweep.spec import Metric, Neutral
from raysweep.stages.base import StageSpec, Subject
from raysweep.stages.pretrain import read_curve
from raysweep.worker import Worker

MIN_STEPS = 8
"""Of which fewer tell no curvature."""

Floats = NDArray[np.float64]


class Curve(StageSpec):
    """Slope and curvature of the training loss over ln(step), by least squares; no model is loaded.

    Over the last part of the steps of its phase, each step's loss being that of its own batch by the phase's own
    objective, so that variants compare where objective and text are the same. The slope is that of a straight line,
    below 0 where the loss falls; the curvature, the second derivative of a parabola, is above 0 where the fall slows
    down. Lower counts as better for both: such a loss has further to fall.
    """

    kind: ClassVar[str] = "curve"
    wide: ClassVar[bool] = False
    filled: ClassVar[frozenset[str]] = frozenset({"objective", "steps_before"})

    part: float = Field(default=0.5, gt=0, le=1)
    """Of the steps of the phase so far, the last ones."""
    objective: Objective | None = None
    """Whose loss it is; filled from pretrain, and none of a checkpoint that was not trained here."""
    steps_before: Annotated[int, Neutral(0)] = 0
    """Of earlier phases; filled from pretrain."""

    def bind(self, subject: Subject) -> Curve:
        """With the objective that trains, and where its phase begins."""
        return self.with_(objective=subject.trained_by, steps_before=subject.steps_before)  # type: ignore[no-any-return]

    @property
    def loss_of(self) -> Objective | None:
        """What it was trained by."""
        return self.objective

    def run(self, inputs: Mapping[str, Path], out: Path, worker: Worker) -> dict[str, float]:
        """NaN where there is no curve, as of a checkpoint that was not trained here, or too few steps."""
        lines = [line for line in read_curve(inputs["checkpoint"]) if line["step"] > self.steps_before]
        lines = lines[-max(MIN_STEPS, math.ceil(self.part * len(lines))) :]
        if len(lines) < MIN_STEPS:
            return dict.fromkeys(("slope", "slope_stderr", "curvature", "curvature_stderr"), math.nan)
        steps, losses = (np.array([line[name] for line in lines]) for name in ("step", "loss_nats_per_token"))
        fit = fit_parabola(np.log(steps), losses)
        return {
            "slope": fit.slope,
            "slope_stderr": fit.slope_stderr,
            "curvature": fit.curvature,
            "curvature_stderr": fit.curvature_stderr,
        }

    def metrics(self, corpus: Corpus) -> tuple[Metric, ...]:
        """In nats per predicted token, by the natural logarithm of steps."""
        return tuple(
            metric
            for name in ("slope", "curvature")
            for metric in (Metric(name, "min", "nats/token"), Metric(f"{name}_stderr", unit="nats/token"))
        )

    def flops(self, size: Size, corpus: Corpus) -> float:
        """None of a model."""
        return 0.0

    def memory_bytes(self, size: Size, resources: Resources) -> int:
        """None: some numbers a step."""
        return 0

    def disk_bytes(self, size: Size) -> int:
        """None: its numbers stand in its record."""
        return 0


class Parabola(NamedTuple):
    """What `fit_parabola` finds."""

    slope: float
    slope_stderr: float
    curvature: float
    curvature_stderr: float


def fit_parabola(x: Floats, y: Floats) -> Parabola:
    """Slope of the straight line, and second derivative of the parabola, that are nearest to points by least squares.

    The parabola is a + b (x - mean) + c/2 q(x), with q = x^2 less its own straight line: then b is the line's slope.
    Errors are those of Newey and West (1987), of residuals that depend on the floor(4 (n/100)^(2/9)) before them, with
    n / (n - 3) for the fit; where they depend on more they are too small, by a fifth of an AR(1) of 0.5.

    Args:
        x: [n], rising.
        y: [n].

    >>> x = np.linspace(1.0, 2.0, 11)
    >>> fit = fit_parabola(x, 3 - 2 * (x - 1.5) + 4 * (x - 1.5) ** 2)
    >>> round(fit.slope, 9), round(fit.curvature, 9), fit.slope_stderr < 1e-9
    (-2.0, 8.0, True)
    """
    num = len(x)
    line = np.stack([np.ones(num), x - x.mean()], axis=1)
    square = line[:, 1] ** 2 / 2
    bent = square - line @ np.linalg.lstsq(line, square, rcond=None)[0]
    design = np.concatenate([line, bent[:, None]], axis=1)
    inverse = np.diag(1 / (design**2).sum(axis=0))  # Its columns are orthogonal.
    fitted = inverse @ design.T @ y
    scores = design * (y - design @ fitted)[:, None]
    middle = scores.T @ scores
    num_lags = math.floor(4 * (num / 100) ** (2 / 9))
    for lag in range(1, num_lags + 1):
        crossed = scores[lag:].T @ scores[:-lag]
        middle += (1 - lag / (num_lags + 1)) * (crossed + crossed.T)
    variance = np.diag(inverse @ middle @ inverse) * num / (num - design.shape[1])
    _, slope, curvature = map(float, fitted)
    _, slope_stderr, curvature_stderr = map(float, np.sqrt(np.maximum(variance, 0)))
    return Parabola(slope, slope_stderr, curvature, curvature_stderr)
