"""Pretraining: a complete recipe, and the stage that trains it up to one of its checkpoints."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar

import numpy as np
from pydantic import Field, model_validator

from raysweep.data.corpora import Corpus
from raysweep.data.packing import Tokens
from raysweep.data.tokenizers import load_tokenizer
from raysweep.errors import collect
from raysweep.objectives.base import Arrays, ObjectiveSpec, add_extra_tokens
from raysweep.objectives.causal_lm import CausalLM
from raysweep.objectives.families import Objective
from raysweep.spec import Metric, Provenance, Spec, StageSpec, fingerprint
from raysweep.train.models import Model
from raysweep.train.optimizers import Optimizer
from raysweep.train.precision import Precision, settled
from raysweep.train.schedules import Cosine, Schedule
from raysweep.worker import Worker

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Held-out sequences of each domain that a checkpoint's loss is taken on.
HELDOUT_SEQUENCES = 256
# Beside config.json: what the checkpoint was trained by.
OBJECTIVE_FILE = "objective.json"
# What an objective draws on held-out text comes from this, and not from the seed of a run.
HELDOUT_DRAW = 5


_TOKENS = re.compile(r"(\d[\d_]*(?:\.\d+)?(?:e\d{1,2})?) tokens", re.ASCII)


class Recipe(Spec):
    """All that makes a pretraining run, but for its seed."""

    data: Corpus
    """What it is trained on."""
    model: Model
    """What is trained."""
    optimizer: Optimizer
    """How weights move."""
    objective: Objective = CausalLM()
    """What is minimised."""
    schedule: Schedule = Cosine()
    """How the learning rate goes over steps."""
    steps: int | None = Field(default=None, ge=1)
    """Optimizer steps of the whole trajectory; in place of tokens."""
    tokens: int | None = Field(default=None, ge=1)
    """In place of steps; rounded up to whole ones."""
    batch_sequences: int = Field(ge=1)
    """Of the global batch, whatever the number of workers."""
    sequence_length: int = Field(ge=2)
    """Tokens of a sequence."""
    clip_norm: float | None = Field(default=1.0, gt=0)
    """Longest gradient, in the Euclidean norm; null: any."""
    precision: Precision = "auto"
    """auto: bf16 on a GPU, fp32 on a CPU."""
    checkpoints: Annotated[tuple[int | float | str, ...], Provenance()] = ()
    """Where to save and measure one: after steps (300), a part of the trajectory (0.5; 1.0 is all of it) or tokens
    ("2e9 tokens"), which fit whatever batch size a variant has. None: at the end."""

    @model_validator(mode="after")
    def _consistent(self) -> Recipe:
        if self.steps is None and self.tokens is None:
            raise ValueError("steps or tokens is missing: how long shall it train?")
        if self.steps is not None and self.tokens is not None:
            raise ValueError(f"steps {self.steps} and tokens {self.tokens}: give either, and not both")
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
        row = self.data.row_length
        if row is not None and self.sequence_length != row:
            raise ValueError(
                f"sequence_length {self.sequence_length} must be {row}: data.sentence_length and the token that opens "
                "a sentence"
            )
        self.objective.input_length(self.sequence_length)  # May refuse it.
        if self.objective.head != self.model.head:
            raise ValueError(
                f"objective {self.objective.name} needs a {self.objective.head} model, and {self.model.name} is a "
                f"{self.model.head} one: change either"
            )
        self.objective.input_length(self.sequence_length)  # Raises if it cannot make rows of it.
        return self

    @property
    def num_steps(self) -> int:
        """Of the whole trajectory."""
        return self.steps or math.ceil((self.tokens or 0) / (self.batch_sequences * self.sequence_length))

    @property
    def checkpoint_steps(self) -> tuple[int, ...]:
        """The steps of its checkpoints, rising."""
        return tuple(map(self._step_of, self.checkpoints)) or (self.num_steps,)

    def _step_of(self, checkpoint: int | float | str) -> int:
        """Of a part the nearest step, of tokens the first at which they have been seen."""
        if isinstance(checkpoint, int):
            return checkpoint
        if isinstance(checkpoint, float):
            return max(1, round(checkpoint * self.num_steps)) if checkpoint > 0 else 0
        if not (found := _TOKENS.fullmatch(checkpoint)):
            raise ValueError(
                f'checkpoints: {checkpoint!r} is none; write a step (300), a part (0.5) or tokens ("2e9 tokens")'
            )
        return math.ceil(float(found[1]) / (self.batch_sequences * self.sequence_length))

    @property
    def num_parameters(self) -> int:
        """Of its model, with a row for each token that the objective adds."""
        return self.model.num_parameters(self.data.vocab_size + len(self.objective.extra_tokens()))

    def pin(self, base: Path) -> Recipe:
        """With its data pinned."""
        [data] = collect([(("data",), partial(self.data.pin, base))])
        return self.with_(data=data)  # type: ignore[no-any-return]


class Pretrain(StageSpec):
    """The checkpoint of a recipe and seed at one step.

    It goes on from the trajectory's saved state, where there is one at or before `step`, and trains from scratch
    where there is none: to the same result. `step` alone is part of the id, not the recipe's other checkpoints.
    """

    kind: ClassVar[str] = "pretrain"

    recipe: Recipe
    seed: int
    step: int

    @property
    def state_key(self) -> str:
        """One for all checkpoints of a trajectory."""
        recipe = self.recipe
        return f"trajectory-{fingerprint([recipe, list(recipe.checkpoint_steps), self.seed, self.VERSION])}"

    def run(self, inputs: Mapping[str, Path], out: Path, worker: Worker) -> dict[str, float]:
        """Writes a Hugging Face checkpoint, and curve.jsonl with the loss of every step so far."""
        from raysweep.objectives.inputs import check_prefixes
        from raysweep.train.checkpoints import load_model
        from raysweep.train.loop import train

        recipe, tokens = self.recipe, Tokens(inputs["tokens"])
        tokenizer = load_tokenizer(tokens.tokenizer_dir)
        specials = add_extra_tokens(tokenizer, recipe.objective)
        order = tokens.batches(recipe.data.mix, sequence_length=recipe.sequence_length, seed=self.seed)

        def batch_at(step: int) -> Arrays:
            ids = order.batch(step, recipe.batch_sequences)
            return recipe.objective.prepare(ids, np.random.default_rng([self.seed, 4, step]), specials)

        model = recipe.model.build(
            vocab_size=max(tokens.meta.vocab_size, len(tokenizer)),
            sequence_length=recipe.objective.input_length(recipe.sequence_length),
            seed=self.seed,
        )
        if "prefix_lengths" in batch_at(0):
            check_prefixes(model)
        config = model.config
        num_parameters = model.num_parameters()
        training = train(
            model,
            batch_at,
            objective=recipe.objective,
            optimizer=recipe.optimizer,
            schedule=recipe.schedule,
            num_steps=recipe.num_steps,
            seed=self.seed,
            stop_step=self.step,
            clip_norm=recipe.clip_norm,
            bf16=settled(recipe.precision, on_gpu=worker.device.startswith("cuda")) == "bf16",
            worker=worker,
            states=worker.state_dir,
        )
        if worker.rank == 0:
            # The trained weights may be sharded or wrapped; a plain model of the same configuration takes them.
            plain = type(model)(config)
            plain.load_state_dict({name: value.to("cpu") for name, value in training.weights.items()})
            plain.save_pretrained(out)
            tokenizer.save_pretrained(out)
            (out / OBJECTIVE_FILE).write_text(recipe.objective.model_dump_json(indent=1))
            self._write_curve(out / "curve.jsonl", training.losses, training.grad_norms)
        del model
        worker.barrier()
        trained = load_model(out).to(worker.device)
        heldout = heldout_metrics(
            trained,
            tokens,
            recipe.objective,
            mix=recipe.data.mix,
            sequence_length=recipe.sequence_length,
            worker=worker,
        )
        tail = training.losses[-max(1, len(training.losses) // 10) :]
        return {
            "loss_nats_per_token": sum(tail) / len(tail),
            **heldout,
            "num_tokens": float(self.step * recipe.batch_sequences * recipe.sequence_length),
            "num_predicted_tokens": float(training.num_predicted),
            "num_parameters": float(num_parameters),
            "tokens_per_second": training.tokens_per_second,
        }

    def metrics(self, corpus: Corpus) -> tuple[Metric, ...]:
        """Losses of the last steps and on held-out text, and what they took."""
        return (
            Metric("loss_nats_per_token", "min", "nats/token"),
            *declared_heldout(corpus, self.recipe.objective),
            Metric("num_tokens", unit="tokens"),
            Metric("num_predicted_tokens", unit="tokens"),
            Metric("num_parameters"),
        )

    def _write_curve(self, path: Path, losses: list[float], grad_norms: list[float]) -> None:
        recipe = self.recipe
        with path.open("w") as file:
            for step, (loss, norm) in enumerate(zip(losses, grad_norms, strict=True)):
                lr = recipe.optimizer.lr * recipe.schedule.multiplier(step, recipe.num_steps)
                line = {"step": step + 1, "loss_nats_per_token": loss, "lr": lr, "grad_norm": norm}
                file.write(json.dumps(line) + "\n")


def declared_heldout(corpus: Corpus, objective: ObjectiveSpec) -> tuple[Metric, ...]:
    """What `heldout_metrics` gives on text of `corpus`."""
    metrics = (
        Metric("heldout_loss_nats_per_token", "min", "nats/token"),
        Metric("ppl", "min"),
        *(Metric(f"ppl_{name}", "min") for name in sorted(corpus.domains)),
    )
    if not objective.is_likelihood:
        return metrics
    if corpus.knows_optimum(objective):
        return (*metrics, Metric("entropy_gap_nats_per_token", "min", "nats/token"))
    return (*metrics, Metric("bits_per_byte", "min", "bits/byte"))


def heldout_metrics(
    model: PreTrainedModel,
    tokens: Tokens,
    objective: ObjectiveSpec,
    *,
    mix: Mapping[str, float],
    sequence_length: int,
    worker: Worker,
    max_sequences: int = HELDOUT_SEQUENCES,
) -> dict[str, float]:
    """Held-out loss and perplexity of an objective, per domain and mixed by `mix`.

    What the objective draws, and which sequences it reads, are the same for all models and all numbers of workers.
    `entropy_gap_nats_per_token`, where the true distribution is known, is the loss above the best possible one;
    `bits_per_byte` is of the text. Both only where the loss is the text's own likelihood.
    """
    from raysweep.train.evaluate import heldout_loss, perplexity

    specials = add_extra_tokens(load_tokenizer(tokens.tokenizer_dir), objective)
    mine = {}
    for index, domain in enumerate(sorted(tokens.domains)):
        if index % worker.world_size == worker.rank:
            ids = tokens.valid(domain, sequence_length=sequence_length, max_sequences=max_sequences)
            draw = np.random.default_rng([HELDOUT_DRAW, *domain.encode()])
            mine[domain] = heldout_loss(model, objective.prepare(ids, draw, specials), objective)
    losses = {name: loss for part in worker.gather(mine) for name, loss in part.items()}
    mean = sum(share * losses[name] for name, share in mix.items())
    metrics = {"heldout_loss_nats_per_token": mean, "ppl": perplexity(mean)}
    metrics |= {f"ppl_{name}": perplexity(losses[name]) for name in sorted(losses)}
    if not objective.is_likelihood:
        return metrics
    best = tokens.meta.optimal_loss_nats_per_token
    if best is not None:
        metrics["entropy_gap_nats_per_token"] = mean - best
    sizes = [tokens.meta.domains[name] for name in sorted(losses)]
    if all(size.valid_bytes for size in sizes):
        bits = [
            losses[name] / math.log(2) * size.num_valid_tokens / (size.valid_bytes or 1)
            for name, size in zip(sorted(losses), sizes, strict=True)
        ]
        metrics["bits_per_byte"] = sum(mix.get(name, 0.0) * bit for name, bit in zip(sorted(losses), bits, strict=True))
    return metrics
