"""How a training is drawn to flat minima. To add a method: a spec that says what it changes, and its name below."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
from pydantic import Field

from raysweep.objectives.base import IGNORED, Arrays, Specials
from raysweep.spec import Spec


class FlatSpec(Spec):
    """A declared method, by what it changes of a training: nothing, as long as a member does not say so."""

    name: str

    def relabel(self, rows: Arrays, draw: np.random.Generator, specials: Specials) -> Arrays:
        """The rows of a step as they are trained on: what is predicted may change, not where, nor what is read.

        Args:
            rows: what an objective has prepared; not to be changed.
            draw: made from the seed and the step, for this alone; what is drawn is the same on every rank.
            specials: as for `ObjectiveSpec.prepare`.
        """
        return rows


class LabelNoise(FlatSpec):
    """Some labels are others, drawn anew at each step (Blanc et al., 2020; Damian et al., 2021).

    Noise of the gradient stays where the loss is fitted, and drifts along minima towards those of a smaller trace of
    the Hessian. The loss of the curve is that of the noisy labels; held-out losses and flatness know of no noise.
    """

    name: Literal["label_noise"]
    """Which method."""
    probability: float = Field(default=0.1, gt=0, lt=1)
    """That a label is replaced by a word of the vocabulary, drawn evenly: at times by itself."""

    def relabel(self, rows: Arrays, draw: np.random.Generator, specials: Specials) -> Arrays:
        """See `FlatSpec.relabel`.

        >>> rows = {"input_ids": np.array([[7, 8, 9]]), "labels": np.array([[IGNORED, 8, 9]])}
        >>> noise = LabelNoise(name="label_noise", probability=0.999)
        >>> noise.relabel(rows, np.random.default_rng(0), Specials({}, 2))["labels"]
        array([[-100,    0,    0]])
        """
        labels, words = rows["labels"], specials.words
        replaced = (labels != IGNORED) & (draw.random(labels.shape) < self.probability)
        drawn: Any = words[draw.integers(len(words), size=labels.shape)]
        return rows | {"labels": np.where(replaced, drawn, labels)}


FlatMethod = LabelNoise
