"""Noise of a checkpoint's gradients from batch to batch, and how much gradient there is left beside it."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar

import numpy as np
from pydantic import Field

from raysweep.costs import Size
from raysweep.data.corpora import Corpus
from raysweep.errors import DataError
from raysweep.memory import Step, training_bytes
from raysweep.objectives.families import Objective
from raysweep.resources import Resources
from raysweep.spec import Metric
from raysweep.stages.base import StageSpec, Subject
from raysweep.stages.held_text import HeldText
from raysweep.train.checkpoints import load_model
from raysweep.train.evaluate import BATCH
from raysweep.worker import Worker

FIELDS = (Metric("trace", "min", "nats^2"), Metric("signal", "min"))
"""Of the covariance per sequence; and of |G|^2 over it, which falls as nothing is left to learn."""


class GradientNoise(StageSpec):
    """Trace of the covariance of a sequence's gradient, and |G|^2 over it: the inverse of the simple noise scale.

    McCandlish et al., 2018, arXiv 1812.06162. At a minimum that predicts exactly, the covariance is the Fisher matrix
    of sequences, and its trace another flatness. Of the own loss, on held-out text; errors hold the chance of the text.
    """

    kind: ClassVar[str] = "gradient_noise"
    wide: ClassVar[bool] = False
    reads_text: ClassVar[bool] = True
    of_weights: ClassVar[bool] = True
    filled: ClassVar[frozenset[str]] = frozenset({"text"})

    num_batches: int = Field(default=16, ge=3)
    """Whose gradients are compared; all are held at once."""
    batch_sequences: int = Field(default=16, ge=1)
    """Held-out sequences of a batch; fewer where the text has not so many."""
    text: HeldText | None = None
    """Filled from pretrain."""

    def bind(self, subject: Subject) -> GradientNoise:
        """With the text and the objective."""
        return self.with_(text=HeldText.of(subject))  # type: ignore[no-any-return]

    @property
    def loss_of(self) -> Objective | None:
        """What the model was trained by."""
        return self.text.loss if self.text else None

    def run(self, inputs: Mapping[str, Path], out: Path, worker: Worker) -> dict[str, float]:
        """Both with their errors.

        Raises:
            DataError: if there are fewer held-out sequences than batches.
        """
        from raysweep.curvature.gradient_noise import noise_and_signal
        from raysweep.curvature.language import prepare
        from raysweep.train.gradients import dot, gradient

        assert self.text
        model = load_model(inputs["checkpoint"]).to(worker.device)
        prepare(model, twice_differentiable=False)
        wanted = self.num_batches * self.batch_sequences
        rows = self.text.rows(inputs["tokens"], inputs["checkpoint"], num_sequences=wanted)
        size = len(rows["input_ids"]) // self.num_batches
        if not size:
            there = len(rows["input_ids"])
            raise DataError(f"gradient_noise: num_batches {self.num_batches}: there are {there} held-out sequences")
        gradients = [
            gradient(model, {name: each[start : start + size] for name, each in rows.items()}, self.text.loss)
            for start in range(0, size * self.num_batches, size)
        ]
        products = np.zeros((self.num_batches, self.num_batches))
        for one, other in itertools.combinations_with_replacement(range(self.num_batches), 2):
            products[one, other] = products[other, one] = dot(gradients[one], gradients[other])
        estimate, error = noise_and_signal(products)
        # Of a sequence: a batch's gradient is a mean, whose covariance falls with its size.
        return {
            "trace": size * estimate.trace,
            "trace_stderr": size * error.trace,
            "signal": estimate.signal / size,
            "signal_stderr": error.signal / size,
        }

    def metrics(self, corpus: Corpus) -> tuple[Metric, ...]:
        """Both with their errors."""
        return (*FIELDS, *(Metric(f"{metric.name}_stderr", unit=metric.unit) for metric in FIELDS))

    def flops(self, size: Size, corpus: Corpus) -> float:
        """A gradient of each batch."""
        assert self.text
        tokens = self.num_batches * self.batch_sequences * self.text.input_length
        return size.gradient_flops(tokens, self.text.input_length)

    def memory_bytes(self, size: Size, resources: Resources) -> int:
        """What a gradient's pass holds, and all batches' gradients."""
        assert self.text
        tokens = min(BATCH, self.batch_sequences) * self.text.input_length
        step = Step(
            tokens=tokens,
            logit_tokens=tokens,
            optimizer_floats=self.num_batches,
            on_gpu=resources.gpus_per_worker > 0,
        )
        return training_bytes(size, step)

    def disk_bytes(self, size: Size) -> int:
        """None: its numbers stand in its record."""
        return 0
