"""Pretraining: a complete recipe, and the stage that trains it up to one of its checkpoints."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from pydantic import Field, model_validator

from raysweep.costs import Size
from raysweep.data.corpora import Corpus
from raysweep.data.sources import AS_SOURCE, Source
from raysweep.errors import Place, collect
from raysweep.memory import TrainingSteps, training_bytes
from raysweep.objectives.causal_lm import CausalLM
from raysweep.objectives.families import Objective
from raysweep.objectives.heads import Head
from raysweep.objectives.optimum import LabelledLaw
from raysweep.resources import Resources
from raysweep.spec import Metric, Neutral, Provenance, Spec, fingerprint
from raysweep.stages.base import StageSpec
from raysweep.stages.fetch import OBJECTIVE_FILE
from raysweep.stages.phases import Before, Phase
from raysweep.stages.trajectory import Trajectory
from raysweep.train.flat import FlatMethod
from raysweep.train.models import Model
from raysweep.train.optimizers import Optimizer
from raysweep.train.precision import Precision
from raysweep.train.schedules import Cosine, Schedule
from raysweep.worker import Worker

if TYPE_CHECKING:
    from raysweep.train.loop import Training

CURVE = "curve.jsonl"
"""In a checkpoint's folder: step, loss, rate, gradient's norm and predicted tokens of every step so far."""

GANGS = "gangs.json"
"""In a checkpoint's folder: what trained its phase, one gang after another; see `train.loop.Training.gangs`."""

# Of one step, whose rows are at hand at once: 16 GiB. The largest batches that are trained with are a tenth of it.
MAX_BATCH_TOKENS = 2**31

_TOKENS = re.compile(r"(\d[\d_]*(?:\.\d+)?(?:e\d{1,2})?) tokens", re.ASCII)


class Recipe(Spec):
    """All that makes a pretraining run, but for its seed."""

    data: Corpus
    """What it is trained on."""
    model: Model | None = None
    """What is trained; in place of start."""
    start: Annotated[Source | None, AS_SOURCE, Neutral(None)] = None
    """A checkpoint to train on from, in place of a model: a folder, relative to the sweep file, or a hub id, with an
    optional @commit; safetensors only. Its tokenizer reads the data, and the optimizer is fresh."""
    optimizer: Optimizer
    """How gradients become steps, and at which peak rate."""
    objective: Objective = CausalLM()
    """What of a text is predicted from what; its loss is minimised."""
    schedule: Schedule = Cosine()
    """How the learning rate goes over steps."""
    steps: int | None = Field(default=None, ge=1)
    """Optimizer steps of the whole trajectory, or of what comes before its phases; in place of tokens."""
    tokens: int | None = Field(default=None, ge=1)
    """In place of steps; rounded up to whole ones."""
    batch_sequences: int = Field(ge=1)
    """Of the global batch, whatever the number of workers."""
    sequence_length: int = Field(ge=2)
    """Tokens of a sequence."""
    clip_norm: float | None = Field(default=1.0, gt=0)
    """Longest gradient, in the Euclidean norm; null: any."""
    flat: Annotated[FlatMethod | None, Neutral(None)] = None
    """What draws it to flat minima; null: nothing but the optimizer."""
    precision: Precision = "auto"
    """auto: bf16 on a GPU, fp32 on a CPU."""
    checkpoints: Annotated[tuple[int | float | str, ...], Provenance()] = ()
    """Where to save and measure one: after steps (300), a part of the trajectory (0.5; 1.0 is all of it) or tokens
    ("2e9 tokens"), which fit whatever batch size a variant has. None: at the end."""
    phases: Annotated[tuple[Phase, ...], Neutral(())] = ()
    """What it goes on with, one after another; each inherits what it does not change."""
    leave_optimizer_state: Annotated[bool, Neutral(False)] = False
    """Whether the optimizer's state at the end stays in the store, for a phase of a later sweep to go on with; without
    it, such a phase trains what it follows once more. AdamW's takes twice the bytes of the weights."""

    @model_validator(mode="after")
    def _consistent(self) -> Recipe:
        if self.model is None and self.start is None:
            raise ValueError("model or start is missing: what shall be trained?")
        if self.model is not None and self.start is not None:
            raise ValueError(f"start {self.start.source!r} has an architecture of its own; remove model")
        if self.start and not self.data.takes_tokenizer:
            raise ValueError(f"data {self.data.name} cannot be read by the tokenizer of a checkpoint (start); use text")
        if self.steps is None and self.tokens is None and not self.phases:
            raise ValueError("steps or tokens is missing: how long shall it train?")
        if self.steps is not None and self.tokens is not None:
            raise ValueError(f"steps {self.steps} and tokens {self.tokens}: give either, and not both")
        if (num_tokens := self.batch_sequences * self.sequence_length) > MAX_BATCH_TOKENS:
            raise ValueError(
                f"batch_sequences {self.batch_sequences:,} of sequence_length {self.sequence_length:,} are "
                f"{num_tokens:,} tokens a step; at most {MAX_BATCH_TOKENS:,}"
            )
        if self.checkpoints and not self.num_steps:
            raise ValueError("checkpoints: pretrain has no steps of its own beside its phases; give them to a phase")
        for at, step in zip(self.checkpoints, self.checkpoint_steps, strict=False):
            if not 0 < step <= self.num_steps:
                which = f"step {at}" if isinstance(at, int) else f"{at!r}, step {step},"
                raise ValueError(f"checkpoints: {which} is not within 1 to {self.num_steps}, the last step")
        for (at, step), (later, other) in pairwise(zip(self.checkpoints, self.checkpoint_steps, strict=False)):
            if step == other:
                raise ValueError(f"checkpoints: {at} and {later} are both step {step} of {self.num_steps}")
            if step > other:
                raise ValueError(
                    f"checkpoints: {later} is step {other}, and comes after {at}, step {step}; let them rise"
                )
        if self.flat:
            self._check_flat(self.flat)
        row = self.data.row_length
        if row is not None and self.sequence_length != row:
            raise ValueError(
                f"sequence_length {self.sequence_length} must be {row}, the tokens of a row of data {self.data.name} "
                "with the one that opens it"
            )
        if self.model and (problem := self.model.corpus_problem(self.data)):
            raise ValueError(f"model {self.model.name}: {problem}")
        trained, head = _trained_model(self.model, self.start)
        if head and self.objective.head != head:
            raise ValueError(
                f"objective {self.objective.name} needs a {self.objective.head} model, and {trained} is a {head} one: "
                "change either"
            )
        if self.objective.reads_labels and not isinstance(self.data, LabelledLaw):
            raise ValueError(
                f"objective {self.objective.name} reads the labels of a language of a known law, and data is "
                f"{self.data.name}: use pcfg or hmm"
            )
        # An error where the objective can make no rows of such sequences.
        length, most = self.input_length, self.model.max_length if self.model else None
        if most is not None and length > most:
            raise ValueError(
                f"sequence_length {self.sequence_length} makes inputs of {length} tokens, and model {trained} takes "
                f"{most} at most: lower it, or give the model more positions"
            )
        return self

    def _check_flat(self, flat: FlatMethod) -> None:
        if flat.has_own_steps and self.objective.reads_labels:
            raise ValueError(
                f"flat {flat.name} takes several gradients in a step, and objective {self.objective.name} learns from "
                "each: use label_noise or an average (ema, swa, lawa), or another objective"
            )
        if flat.needs_domains and len(self.data.mix) < 2:
            raise ValueError(
                f"flat {flat.name} compares domains, and data has one alone ({next(iter(self.data.mix))}): give it "
                "another domain, or use another method"
            )

    @property
    def num_steps(self) -> int:
        """Of the whole trajectory, or of what comes before its phases."""
        return self.steps or math.ceil((self.tokens or 0) / (self.batch_sequences * self.sequence_length))

    @property
    def input_length(self) -> int:
        """Tokens of the longest row that the model reads; a text's `sequence_length`, and what is written beside it."""
        return self.objective.input_length(self.sequence_length)

    @property
    def checkpoint_steps(self) -> tuple[int, ...]:
        """The steps of its checkpoints, rising."""
        return tuple(map(self._step_of, self.checkpoints)) or (self.num_steps,)

    def _step_of(self, checkpoint: int | float | str) -> int:
        """Of a part the nearest step, of tokens the first at which they have been seen."""
        if isinstance(checkpoint, int):  # 1 is a step, and 1.0 all of the trajectory.
            return checkpoint
        if isinstance(checkpoint, float):
            return max(1, round(checkpoint * self.num_steps)) if checkpoint > 0 else 0
        if not (tokens := _TOKENS.fullmatch(checkpoint)):
            raise ValueError(
                f'checkpoints: {checkpoint!r} is none; write a step (300), a part (0.5) or tokens ("2e9 tokens")'
            )
        return math.ceil(float(tokens[1]) / (self.batch_sequences * self.sequence_length))

    def pin_source(self, base: Path) -> Recipe:
        """With what it starts from pinned, its data as it is."""
        return self.with_(start=self.start and self.start.pin(base))  # type: ignore[no-any-return]

    def pin(self, base: Path) -> Recipe:
        """With its data pinned, and what it starts from."""
        pins: list[tuple[Place, Callable[[], Any]]] = [(("data",), partial(self.data.pin, base))]
        if self.start:
            pins.append((("start",), partial(self.start.pin, base)))
        data, *start = collect(pins)
        return self.with_(data=data, start=start[0] if start else None)  # type: ignore[no-any-return]


def _trained_model(model: Model | None, start: Source | None) -> tuple[str, Head | None]:
    """Its name, and what it predicts, as far as that is known."""
    if model:
        return model.name, model.head
    return (start.source, start.head) if start else ("", None)


class Pretrain(StageSpec):
    """The checkpoint of a recipe and seed at one step.

    It goes on from the trajectory's saved state, where there is one at or before `step`; else it trains from the
    beginning, to the same result: from random weights, or from the checkpoint "start" and the optimizer state
    "optimizer" where its inputs have them. `step` alone is part of the id, not the recipe's other checkpoints.
    """

    kind: ClassVar[str] = "pretrain"
    timings: ClassVar[tuple[Metric, ...]] = (Metric("tokens_per_second", "max", "tokens/s"),)

    recipe: Recipe
    seed: int
    step: int
    """Counted from the beginning of the recipe, which is that of its phase."""
    before: Annotated[Before | None, Neutral(None)] = None
    """What a phase goes on from."""

    @property
    def state_key(self) -> str:
        """One for all checkpoints of a trajectory."""
        recipe = self.recipe
        return f"trajectory-{fingerprint([recipe, list(recipe.checkpoint_steps), self.seed, self.VERSION])}"

    @property
    def loss_of(self) -> Objective:
        """What it trains by."""
        return self.recipe.objective

    def run(self, inputs: Mapping[str, Path], out: Path, worker: Worker) -> dict[str, float]:
        """Writes a Hugging Face checkpoint, curve.jsonl with the loss of every step so far, and gangs.json."""
        recipe, run = self.recipe, Trajectory(self.recipe, self.seed, self.before, inputs)
        training = run.train(self.step, worker)
        curve = [*(read_curve(run.start) if run.start else ()), *self._curve_lines(training)]
        if worker.rank == 0:
            # The trained weights may be sharded or wrapped; a plain model of the same configuration takes them.
            plain = type(run.model)(run.config)
            plain.load_state_dict({name: value.to("cpu") for name, value in training.weights.items()})
            plain.save_pretrained(out)
            run.tokenizer.save_pretrained(out)
            (out / OBJECTIVE_FILE).write_text(recipe.objective.measured.model_dump_json(indent=1))
            (out / CURVE).write_text("".join(json.dumps(line) + "\n" for line in curve))
            (out / GANGS).write_text(json.dumps(training.gangs))
        # Of the last tenth of all steps, as far as they are of this phase: others may have had another loss.
        tail = training.losses[-max(1, len(curve) // 10) :]
        tokens_before = self.before.tokens if self.before else 0
        return {
            "loss_nats_per_token": sum(tail) / len(tail),
            "num_tokens": float(tokens_before + self.step * recipe.batch_sequences * recipe.sequence_length),
            "num_predicted_tokens": float(sum(line.get("num_predicted_tokens", math.nan) for line in curve)),
            "num_parameters": float(run.num_parameters),
            "tokens_per_second": training.tokens_per_second,
        }

    def metrics(self, corpus: Corpus) -> tuple[Metric, ...]:
        """The loss of the last steps, and what they took."""
        return (
            Metric("loss_nats_per_token", "min", "nats/token"),
            Metric("num_tokens", unit="tokens"),
            Metric("num_predicted_tokens", unit="tokens"),
            Metric("num_parameters"),
        )

    @property
    def model_size(self) -> Size | None:
        """Of the recipe's model, its checkpoint in 32 bits; of one that starts from a checkpoint, that one's."""
        if (model := self.recipe.model) is None:
            return None
        vocab_size = self.recipe.data.vocab_size
        num = model.num_parameters(vocab_size)
        return Size(num, *model.dimensions(), vocab_size=vocab_size, num_bytes=4 * num)

    @property
    def pretraining_tokens(self) -> int:
        """Of the part of the trajectory between the checkpoint before and this one."""
        # Earlier checkpoints of the trajectory leave its state, so that each stage trains its own part only.
        before = [step for step in self.recipe.checkpoint_steps if step < self.step]
        return (self.step - (before[-1] if before else 0)) * self.recipe.batch_sequences * self.recipe.sequence_length

    @property
    def training(self) -> TrainingSteps:
        """Of all workers. The loss of every next token is made a few tokens at a time; of others, the labelled ones at
        once."""
        recipe, flat = self.recipe, self.recipe.flat
        is_causal = recipe.objective.name == "causal_lm"
        return TrainingSteps(
            sequences=recipe.batch_sequences,
            length=recipe.input_length,
            optimizer_floats=recipe.optimizer.state_floats + (flat.saved_floats + flat.passing_floats if flat else 0),
            precision=recipe.precision,
            logits=None if is_causal else recipe.objective.mean_predicted(recipe.sequence_length),
        )

    def flops(self, size: Size, corpus: Corpus) -> float:
        """Gradients of all rows since the checkpoint before, of each as many as a step takes; a row may be longer than
        its text."""
        length = self.recipe.input_length
        read = self.pretraining_tokens / self.recipe.sequence_length * length
        return size.gradient_flops(read, length) * (self.recipe.flat.passes if self.recipe.flat else 1)

    def memory_bytes(self, size: Size, resources: Resources) -> int:
        """That of a training step, of the rank with most of the batch; see `memory.training_bytes`."""
        return training_bytes(size, self.training.step(resources))

    def host_bytes(self, size: Size, resources: Resources) -> int:
        """The model as it is made; rank 0 holds it twice as it saves, when the others hold none."""
        return size.weights_bytes * (2 if resources.workers == 1 else 1)

    def disk_bytes(self, size: Size) -> int:
        """The checkpoint, its weights in 32 bits."""
        return size.num_bytes

    def state_bytes(self, size: Size, resources: Resources) -> int:
        """Weights, the optimizer's state and averages in 32 bits, whatever gang saves them."""
        averages = self.recipe.flat.saved_floats if self.recipe.flat else 0
        return 4 * (1 + self.recipe.optimizer.state_floats + averages) * size.num_parameters

    def _curve_lines(self, training: Training) -> Iterator[dict[str, float]]:
        recipe, before = self.recipe, self.before.steps if self.before else 0
        steps = zip(training.losses, training.grad_norms, training.num_predicted, strict=True)
        for step, (loss, norm, num_predicted) in enumerate(steps):
            yield {
                "step": before + step + 1,
                "loss_nats_per_token": loss,
                "lr": recipe.optimizer.lr * recipe.schedule.multiplier(step, recipe.num_steps),
                "grad_norm": norm,
                "num_predicted_tokens": num_predicted,
            }


def read_curve(checkpoint: Path) -> list[dict[str, float]]:
    """The curve of a checkpoint, one line a step; none of one that was not trained here."""
    path = checkpoint / CURVE
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
