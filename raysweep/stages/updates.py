"""Sharpness of a checkpoint's own loss along updates: that of its own gradient, and those of fine-tuning on tasks."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

from pydantic import Field

from raysweep.costs import Size
from raysweep.data.corpora import Corpus
from raysweep.data.tokenizers import load_tokenizer
from raysweep.errors import Diverged
from raysweep.memory import Step, training_bytes
from raysweep.objectives.base import Arrays, ObjectiveSpec
from raysweep.objectives.families import Objective
from raysweep.resources import Resources
from raysweep.spec import Metric
from raysweep.stages.base import StageSpec, Subject
from raysweep.stages.held_text import HeldText
from raysweep.stages.sft import Hyperparameters, Sft
from raysweep.tasks.families import Task
from raysweep.tasks.rows import batch_tokens
from raysweep.train.checkpoints import load_model
from raysweep.train.evaluate import BATCH
from raysweep.worker import Worker

if TYPE_CHECKING:
    from raysweep.curvature.probes import Tensors

NATS = "nats/token"
EPS = 2.0**-23
"""Of float32, in which models are measured."""
NUM_LOSSES = 10
"""Of a search for a critical step, as many as a plan reckons with: it begins where a quadratic loss would have it, so
2 or 3 to have it between two steps, and 7 to narrow it down."""


class Updates(StageSpec):
    """Curvature where training goes next, which traces do not tell.

    Along the gradient g of a batch, the update that plain SGD would take: the *directional sharpness* g'Hg / g'g, and
    the *critical sharpness* 2 / eta, with eta the smallest step at which that batch's loss is above its start (Kalra et
    al., 2026, arXiv 2601.16979); of a quadratic loss they are equal. Each batch of held-out text has both, and the
    error is that of the mean over batches. They depend on the batch's size: the fewer sequences, the more of the
    gradient is noise.

    Along u, what a brief fine-tuning on a task adds to the weights: u'Hu / u'u of the own loss, to which forgetting is
    proportional (Watts et al., 2026, arXiv 2605.02105); and the same from finite steps: with r the distance along u at
    which the own loss has risen by `rise_nats`, 2 rise / r^2. Relative critical sharpness, of one loss along the update
    of another, asks for any rise at all; but at a minimum half of all directions rise at once, so that a rise is
    declared here. Errors hold the chance of the text; the fine-tuning is one.
    """

    kind: ClassVar[str] = "updates"
    wide: ClassVar[bool] = False
    reads_text: ClassVar[bool] = True
    of_weights: ClassVar[bool] = True
    filled: ClassVar[frozenset[str]] = frozenset({"text", "tasks"})

    batch_sequences: int = Field(default=64, ge=1)
    """Held-out sequences of a batch, whose gradient is an update."""
    num_batches: int = Field(default=8, ge=2)
    """Batches of different sequences, fewer where the text has not so many; at least 2."""
    rise_nats: float = Field(default=0.1, gt=0)
    """Of the own loss along fine-tuning's update, in nats per token."""
    lr: float = Field(default=1e-3, gt=0)
    """Of the brief fine-tuning."""
    hyperparameters: Hyperparameters = Hyperparameters(epochs=1, max_examples=128)
    """Of the brief fine-tuning."""
    seed: int = Field(default=0, ge=0)
    """Of the brief fine-tuning."""
    text: HeldText | None = None
    """Filled from pretrain."""
    tasks: dict[str, Task] = Field(default_factory=dict)
    """Name to task; filled from sft.tasks."""

    def pin(self, base: Path, *, on_gpu: bool) -> Updates:
        """With the precision that fine-tuning trains in."""
        return self.given(hyperparameters=self.hyperparameters.in_numbers_of(on_gpu=on_gpu))

    def bind(self, subject: Subject) -> Updates:
        """With the text, the objective and the tasks; without tasks, its own updates are all."""
        return self.with_(text=HeldText.of(subject), tasks=dict(subject.tasks))  # type: ignore[no-any-return]

    @property
    def loss_of(self) -> Objective | None:
        """What the model was trained by."""
        return self.text.loss if self.text else None

    def run(self, inputs: Mapping[str, Path], out: Path, worker: Worker) -> dict[str, float]:
        """Sharpnesses, means over batches and tasks; NaN where a step is not found or fine-tuning diverges."""
        from raysweep.curvature.language import prepare
        from raysweep.train.gradients import gradient

        assert self.text
        loss = self.text.loss
        model = load_model(inputs["checkpoint"]).to(worker.device)
        prepare(model, twice_differentiable=False)
        places = [_Place(model, batch, loss) for batch in self._batches(inputs)]
        metrics = _summary("", [place.down(gradient(model, place.rows, loss)) for place in places])
        of_tasks = []
        for name, task in sorted(self.tasks.items()):
            update = self._update(inputs["checkpoint"], task, worker)
            of_tasks.append([place.along(update, self.rise_nats) if update else UNKNOWN for place in places])
            means = _summary(f"{name}/finetuning_", of_tasks[-1])
            metrics |= {name: value for name, value in means.items() if not name.endswith("_stderr")}
        if of_tasks:
            of_batches = [
                Sharpness(*map(fmean, zip(*of_batch, strict=True))) for of_batch in zip(*of_tasks, strict=True)
            ]
            metrics |= _summary("finetuning_", of_batches)
        return metrics

    def metrics(self, corpus: Corpus) -> tuple[Metric, ...]:
        """Of own updates and, over tasks and of each, of fine-tuning's; errors of what is a mean over tasks."""
        prefixes = ["", *(["finetuning_"] if self.tasks else [])]
        of_tasks = [f"{name}/finetuning_" for name in self.tasks]
        return (
            *(
                Metric(f"{prefix}{name}", "min", NATS)
                for prefix in (*prefixes, *of_tasks)
                for name in Sharpness._fields
            ),
            *(Metric(f"{prefix}{name}_stderr", unit=NATS) for prefix in prefixes for name in Sharpness._fields),
        )

    def flops(self, size: Size, corpus: Corpus) -> float:
        """Of each batch and direction some losses and two gradients; its own gradient; and the fine-tunings."""
        assert self.text
        length, num = self.text.input_length, self.num_batches * (1 + len(self.tasks))
        tokens = self.batch_sequences * length
        measured = num * (NUM_LOSSES * size.forward_flops(tokens, length) + 2 * size.gradient_flops(tokens, length))
        own = self.num_batches * size.gradient_flops(tokens, length)
        return measured + own + sum(self._finetuning(task).training_flops(size) for task in self.tasks.values())

    def memory_bytes(self, size: Size, resources: Resources) -> int:
        """What a gradient's pass holds, beside a copy of the weights, a direction and two gradients; or fine-tuning."""
        assert self.text
        tokens = min(BATCH, self.batch_sequences) * self.text.input_length
        on_gpu = resources.gpus_per_worker > 0
        step = Step(tokens=tokens, logit_tokens=tokens, optimizer_floats=4, on_gpu=on_gpu)
        read = min(batch_tokens(on_gpu=on_gpu), self.batch_sequences * self.text.input_length)
        losses = 3 * size.weights_bytes + read * (size.forward_bytes + 4 * size.vocab_size)
        tuned = (self._finetuning(task).memory_bytes(size, resources.alone) for task in self.tasks.values())
        return max(training_bytes(size, step), losses, 2 * size.weights_bytes + max(tuned, default=0))

    def disk_bytes(self, size: Size) -> int:
        """None: its numbers stand in its record."""
        return 0

    def _batches(self, inputs: Mapping[str, Path]) -> list[Arrays]:
        """Of `batch_sequences` each, or of fewer where the text has not two such batches."""
        assert self.text
        wanted = self.batch_sequences * self.num_batches
        rows = self.text.rows(inputs["tokens"], inputs["checkpoint"], num_sequences=wanted)
        there = len(rows["input_ids"])
        size = max(1, min(self.batch_sequences, there // 2))
        return [
            {name: values[start : start + size] for name, values in rows.items()}
            for start in range(0, there - size + 1, size)
        ]

    def _finetuning(self, task: Task) -> Sft:
        return Sft(task=task, lr=self.lr, seed=self.seed, hyperparameters=self.hyperparameters)

    def _update(self, checkpoint: Path, task: Task, worker: Worker) -> Tensors | None:
        """What fine-tuning adds to the weights, of length 1; None if it diverges or moves none."""
        model, tokenizer = load_model(checkpoint), load_tokenizer(checkpoint)
        before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
        moved = dict(model.named_parameters())
        try:
            self._finetuning(task).fit(model, tokenizer, worker.alone())
        except Diverged:
            return None
        update = {name: moved[name].detach() - start.to(moved[name].device) for name, start in before.items()}
        length = math.sqrt(sum(float(part.double().square().sum()) for part in update.values()))
        return {name: part / length for name, part in update.items()} if length else None


class Sharpness(NamedTuple):
    """Of a loss along a direction, in nats per token and squared length; of its own gradient, per step."""

    critical_sharpness: float
    directional_sharpness: float


UNKNOWN = Sharpness(math.nan, math.nan)


class _Place:
    """The mean loss of a batch around the weights that a model has."""

    def __init__(self, model: Any, rows: Arrays, loss: ObjectiveSpec) -> None:
        from raysweep.curvature.operators import named_parameters
        from raysweep.train.gradients import dot

        self.rows = rows
        self._model, self._objective = model, loss
        self._parameters = named_parameters(model)
        self._size = math.sqrt(dot(self._parameters, self._parameters))
        self._before = self._loss()

    def down(self, gradient: Tensors) -> Sharpness:
        """Down the gradient g: 2 / eta, and g'Hg / g'g."""
        from raysweep.curvature.critical import quadratic_step
        from raysweep.train.gradients import dot

        length = math.sqrt(dot(gradient, gradient))
        if not length > 0:
            return UNKNOWN
        slope, sharpness = self._derivatives(gradient, length)
        guess = quadratic_step(-slope, sharpness * length**2, 0.0)
        return Sharpness(2 / self._critical(gradient, length=-length, target=0.0, guess=guess), sharpness)

    def along(self, direction: Tensors, rise: float) -> Sharpness:
        """Along a direction of length 1: 2 rise / r^2, and v'Hv."""
        from raysweep.curvature.critical import quadratic_step

        slope, sharpness = self._derivatives(direction, 1.0)
        radius = self._critical(direction, length=1.0, target=rise, guess=quadratic_step(slope, sharpness, rise))
        return Sharpness(2 * rise / radius**2, sharpness)

    def _critical(self, direction: Tensors, *, length: float, target: float, guess: float) -> float:
        """In multiples of a direction of this length; below 0: of its negative."""
        from raysweep.curvature.critical import critical_step
        from raysweep.curvature.operators import MovableParameters

        sign = math.copysign(1.0, length)
        with MovableParameters(self._parameters, sign).moves() as move:

            def rise(step: float) -> float:
                move(direction, step)
                return self._loss() - self._before

            # The start is far below most answers, and not so far that rounding is all that is seen.
            return critical_step(rise, start=1e-3 * self._size / abs(length), target=target, guess=guess)

    def _derivatives(self, direction: Tensors, length: float) -> tuple[float, float]:
        """Along u of this length: u'g, and u'Hu / u'u by central differences; see `finite_difference_product`."""
        from raysweep.curvature.operators import STEP_SHARE, MovableParameters
        from raysweep.train.gradients import dot, gradient

        step: float = STEP_SHARE * EPS ** (1 / 3) * self._size / length
        slopes: list[float] = []
        with MovableParameters(self._parameters, step).moves() as move:
            for way in (1, -1):
                move(direction, way)
                slopes.append(dot(gradient(self._model, self.rows, self._objective), direction))
        ahead, behind = slopes
        return (ahead + behind) / 2, (ahead - behind) / (2 * step * length * length)

    def _loss(self) -> float:
        from raysweep.train.evaluate import heldout

        most = batch_tokens(on_gpu=next(self._model.parameters()).is_cuda)
        size = max(1, most // self.rows["input_ids"].shape[1])
        return heldout(self._model, self.rows, self._objective, batch_size=size).mean


def _summary(prefix: str, values: Sequence[Sharpness]) -> dict[str, float]:
    """Means over batches, and their errors."""
    from raysweep.curvature.averages import Estimate

    metrics: dict[str, float] = {}
    for name, each in zip(Sharpness._fields, zip(*values, strict=True), strict=True):
        estimate = Estimate.of(each)
        metrics |= {f"{prefix}{name}": estimate.mean, f"{prefix}{name}_stderr": estimate.stderr}
    return metrics
