"""Supervised fine-tuning of a checkpoint on one task, or a mixture of several, with one learning rate and seed."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache, partial
from itertools import chain
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

import numpy as np
from pydantic import Field, model_validator

from raysweep.costs import Size
from raysweep.data.corpora import Corpus
from raysweep.data.tokenizers import load_tokenizer
from raysweep.errors import Diverged, StageError
from raysweep.memory import TrainingSteps, training_bytes
from raysweep.objectives.base import Arrays, Ints, Loss
from raysweep.objectives.families import Objective
from raysweep.resources import Resources
from raysweep.spec import Metric, Neutral, Spec
from raysweep.stages.base import StageSpec
from raysweep.stages.held_text import HeldText
from raysweep.tasks.base import OOD, Fitted, Split, TaskSpec
from raysweep.tasks.families import Task
from raysweep.tasks.mixture import Mixture
from raysweep.tasks.rows import batch_tokens
from raysweep.train.checkpoints import load_model
from raysweep.train.methods import Full, Method
from raysweep.train.optimizers import SGD, AdamW, Lion, Optimizer
from raysweep.train.precision import Precision, settled
from raysweep.train.schedules import Cosine
from raysweep.worker import Worker

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


NUM_SEQUENCES = 512
"""Held-out sequences that forgetting is measured on."""
FORGETTING = (
    Metric("forgetting_nats_per_token", "min", "nats/token"),
    Metric("forgetting_stderr", unit="nats/token"),
)
LIKELIHOOD = (
    Metric("log_likelihood", "max", "nats/token"),
    Metric("log_likelihood_stderr", unit="nats/token"),
    Metric("valid_log_likelihood", "max", "nats/token"),
)
OUT_OF_DOMAIN = (
    Metric("ood_score", "max", "share"),
    Metric("ood_score_stderr", unit="share"),
    Metric("num_ood_examples", unit="examples"),
)
OUT_OF_DOMAIN_LIKELIHOOD = (
    Metric("ood_log_likelihood", "max", "nats/token"),
    Metric("ood_log_likelihood_stderr", unit="nats/token"),
)
NUM_VALID = "num_valid_examples"
"""Of a task; the error of its validation score goes by it."""
PICKS = ("valid_score", "valid_log_likelihood")
"""What the rate may be picked by: of a mixture the means over its tasks."""
OF_TRAINING = ("loss_nats_per_token", "num_steps", *(metric.name for metric in FORGETTING))
"""What is told of a training as a whole, however many tasks it is scored on."""


class Hyperparameters(Spec):
    """What all fine-tuning runs of a sweep share. Cosine decay to zero."""

    epochs: float = Field(default=2.0, gt=0)
    """Passes over a task's training examples; may be a fraction."""
    batch_sequences: int = Field(default=16, ge=1)
    """Examples of a batch."""
    warmup: float = Field(default=0.06, ge=0, le=1)
    """Fraction of the steps."""
    weight_decay: float = Field(default=0.01, ge=0)
    """The optimizer's, on matrices alone."""
    precision: Precision = "auto"
    """auto: bf16 on a GPU, fp32 on a CPU."""
    max_examples: Annotated[int | None, Neutral(None)] = Field(default=None, ge=1)
    """Training examples of a task, the first so many, of each task of a mixture too; left out: all. A probe may be
    fitted to more (see probes)."""
    examples: Annotated[Literal["first", "by_seed"], Neutral("first")] = "first"
    """Which max_examples it is trained on: the first ones of the task, or others under each seed, no example under two,
    so that seeds differ by the chance of their labelled examples, too; not of mixtures."""
    optimizer: Annotated[Literal["adamw", "sgd", "lion"], Neutral("adamw")] = "adamw"
    """What takes the steps, with its defaults of pretraining but for AdamW's betas, 0.9 and 0.999. Checkpoints may
    fine-tune best by the optimizer that pretrained them (Liu et al., 2025), so tables hold it: sft_optimizer."""

    @model_validator(mode="after")
    def _some_are_drawn(self) -> Hyperparameters:
        if self.examples == "by_seed" and self.max_examples is None:
            raise ValueError("examples: by_seed draws max_examples of a task's examples: set that")
        return self

    def optimizer_at(self, lr: float) -> Optimizer:
        """The optimizer, at a peak learning rate."""
        given: dict[str, Any] = {"name": self.optimizer, "lr": lr, "weight_decay": self.weight_decay}
        if self.optimizer == "adamw":
            # The betas of BERT's fine-tuning (Devlin et al., 2019), where pretraining's second is 0.95.
            return AdamW(**given, betas=(0.9, 0.999))
        return SGD(**given) if self.optimizer == "sgd" else Lion(**given)

    def in_numbers_of(self, *, on_gpu: bool) -> Hyperparameters:
        """With what "auto" stands for there: a model that is trained in other numbers is another one."""
        return self.with_(precision=settled(self.precision, on_gpu=on_gpu))  # type: ignore[no-any-return]

    def num_examples(self, num_train: int) -> int:
        """Of so many training examples, those that are trained on."""
        return min(num_train, self.max_examples or num_train)


class Sft(StageSpec):
    """Fine-tune by a method; score on held-out splits. The learning rate is picked later, by `valid_score` or, where it
    is measured, `valid_log_likelihood`. Of a mixture, metrics of one task are called <task>/<metric>."""

    VERSION: ClassVar[int] = 2
    kind: ClassVar[str] = "sft"
    wide: ClassVar[bool] = False

    task: Task | Mixture
    lr: float = Field(gt=0)
    seed: int
    hyperparameters: Hyperparameters = Hyperparameters()
    method: Annotated[Method, Neutral(Full())] = Full()
    """Which weights are trained."""
    forgetting: Annotated[HeldText | None, Neutral(None)] = None
    """The text on whose loss it is told what is forgotten, of which it then takes the tokens; None: it is not."""
    likelihood: Annotated[bool, Neutral(False)] = False
    """Whether the likelihood of right answers is measured beside the score, and picks the learning rate."""

    def run(self, inputs: Mapping[str, Path], out: Path, worker: Worker) -> dict[str, float]:
        """Writes predictions.jsonl: a line for each test example with its id, what the model said, and its scores; of a
        mixture also its task, and of another domain the split ood.

        Of several ranks all train, and rank 0 scores: the others have no metrics.

        Raises:
            Diverged: also if the last step left no numbers to score.
            StageError: if the task scores otherwise than it says.
        """
        model, tokenizer = load_model(inputs["checkpoint"]), load_tokenizer(inputs["checkpoint"])
        forgetting = self._forgetting(model, inputs, worker) if self.forgetting and worker.rank == 0 else dict
        fitted = self.fit(model, tokenizer, worker)
        if worker.rank > 0:
            return {}
        forgotten = forgetting()
        metrics: dict[str, float] = {}
        picks: list[dict[str, float]] = []
        with (out / "predictions.jsonl").open("w") as file:
            for name, task in self.task.parts.items():
                values, lines = self._scored(task, fitted, tokenizer)
                picks.append({metric: values.pop(metric) for metric in PICKS if metric in values})
                metrics |= {_of_part(name, metric): value for metric, value in values.items()}
                which = {"task": name} if name else {}
                file.writelines(json.dumps(which | line) + "\n" for line in lines)
        return {
            **metrics,
            **{metric: fmean(each[metric] for each in picks) for metric in picks[0]},
            # Of the last tenth of the steps: that of a single batch says little.
            "loss_nats_per_token": float(np.mean(fitted.losses[-max(1, len(fitted.losses) // 10) :])),
            "num_steps": float(len(fitted.losses)),
            **forgotten,
        }

    def _scored(
        self, task: TaskSpec, fitted: Fitted, tokenizer: PreTrainedTokenizerBase
    ) -> tuple[dict[str, float], list[dict[str, Any]]]:
        """Metrics of one task, and the lines of its predictions."""
        tests: list[Split] = ["test", *_ood_of(task)]
        # The rate is picked by the first, and the others are shown: who picks by what is shown flatters it.
        splits: list[Split] = ["valid", *tests]
        rows = {split: task.score(fitted.model, tokenizer, split) for split in splits}
        for row in chain(*rows.values()):
            if set(row.scores) != set(task.score_names):
                raise StageError(f"form {task.form}: scores are {sorted(row.scores)}, not {sorted(task.score_names)}")
            if math.isnan(row.scores["score"]):
                raise Diverged(len(fitted.losses), math.nan)
        values = {split: {"score": [row.scores["score"] for row in own]} for split, own in rows.items()}
        if self.likelihood:
            for split in splits:
                values[split]["log_likelihood"] = self._likelihoods(task, fitted, tokenizer, split)
        lines: list[dict[str, Any]] = []
        metrics = {name: float(np.mean([row.scores[name] for row in rows["test"]])) for name in task.score_names}
        for split in tests:
            mark, before = ({"split": split}, f"{split}_") if split == OOD else ({}, "")
            for place, (name, row) in enumerate(zip(task.ids(split), rows[split], strict=True)):
                own = {metric: each[place] for metric, each in values[split].items()}
                lines.append({"id": name, **mark, "output": row.output, **row.scores, **own})
            for metric, each in values[split].items():
                metrics |= {f"{before}{metric}": float(np.mean(each)), f"{before}{metric}_stderr": _stderr(each)}
            metrics[f"num_{split}_examples"] = float(len(rows[split]))
        metrics |= {f"valid_{metric}": float(np.mean(each)) for metric, each in values["valid"].items()}
        return {**metrics, "chance_score": task.chance(), NUM_VALID: float(len(rows["valid"]))}, lines

    def fit(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, worker: Worker) -> Fitted:
        """The model fine-tuned, its own weights among what `Fitted.model` has; see `TaskSpec.fit`."""
        given = self.hyperparameters
        limit = None if given.examples == "by_seed" else given.max_examples  # Else drawn of all in `_train`.
        return self.task.fit(model, tokenizer, partial(self._train, worker=worker), seed=self.seed, max_examples=limit)

    @property
    def num_valid(self) -> list[float]:
        """Validation examples of each task, at most: no file is read."""
        return [float(task.workload().num_valid) for task in self.task.parts.values()]

    def loss_of_metric(self, name: str) -> Objective | None:
        """Forgetting is of what the model was trained by; scores and losses of answers compare all."""
        return self.forgetting.loss if self.forgetting and name in {metric.name for metric in FORGETTING} else None

    def is_wide(self, resources: Resources) -> bool:
        """By the gang's resources: it is no part of what is asked, so not of the id."""
        return resources.fine_tunes_wide

    def metrics(self, corpus: Corpus) -> tuple[Metric, ...]:
        """Scores of the task's form, chance beside them, and what the rate is picked by."""
        every = (
            replace(metric, name=_of_part(name, metric.name))
            for name, task in self.task.parts.items()
            for metric in self._metrics_of(task)
        )
        return tuple(dict.fromkeys(every))

    def _metrics_of(self, task: TaskSpec) -> tuple[Metric, ...]:
        return (
            *(Metric(name, "max", "share") for name in task.score_names),
            Metric("score_stderr", unit="share"),
            Metric("chance_score", unit="share"),
            Metric("valid_score", "max", "share"),
            Metric("loss_nats_per_token", "min", "nats/token"),
            Metric("num_steps", unit="steps"),
            Metric("num_test_examples", unit="examples"),
            Metric(NUM_VALID, unit="examples"),
            *(LIKELIHOOD if self.likelihood else ()),
            *(OUT_OF_DOMAIN if _ood_of(task) else ()),
            *(OUT_OF_DOMAIN_LIKELIHOOD if _ood_of(task) and self.likelihood else ()),
            *(FORGETTING if self.forgetting else ()),
        )

    def flops(self, size: Size, corpus: Corpus) -> float:
        """Training, scoring of validation and test examples, and the own loss before and after."""
        times = 2 if self.likelihood else 1
        loads = [task.workload() for task in self.task.parts.values()]
        scored = sum(
            size.forward_flops(
                times * (load.num_valid + load.num_test + load.num_ood) * load.scored_length, load.length
            )
            for load in loads
        )
        row = self.forgetting.input_length if self.forgetting else 0
        return self.training_flops(size) + scored + 2 * size.forward_flops(NUM_SEQUENCES * row, row)

    def training_flops(self, size: Size) -> float:
        """Of training alone."""
        total = 0.0
        for task in self.task.parts.values():
            length = task.workload().length
            tokens = self.hyperparameters.epochs * self.hyperparameters.num_examples(task.num_finetuned) * length
            total += size.gradient_flops(tokens, length, adapters=self.method.adapters)
        return total

    @property
    def training(self) -> TrainingSteps:
        """Of sequences of typical length, of a mixture that of its longest task. Logits are made for the few tokens of
        an answer or for classes: none are counted."""
        given, tasks = self.hyperparameters, self.task.parts.values()
        return TrainingSteps(
            sequences=min(given.batch_sequences, sum(given.num_examples(task.num_finetuned) for task in tasks)),
            length=max(task.workload().length for task in tasks),
            optimizer_floats=given.optimizer_at(self.lr).state_floats,
            precision=given.precision,
            logits=0,
            by_length=True,
            adapters=self.method.adapters,
        )

    def memory_bytes(self, size: Size, resources: Resources) -> int:
        """What training holds, whole on one worker; or sharded, beside the weights that are scored. Or what scoring
        does, where that is more."""
        # The weights that will be scored: of a GPU's gang they are in the host's memory.
        beside = size.weights_bytes if self.is_wide(resources) and not resources.gpus_per_worker else 0
        trained = training_bytes(size, self.training.step(self.gang(resources))) + beside
        return max(trained, size.weights_bytes + self._scoring_bytes(size, on_gpu=resources.gpus_per_worker > 0))

    def host_bytes(self, size: Size, resources: Resources) -> int:
        """The model as it is loaded; of a wide one also the copy that the gang trains."""
        return size.weights_bytes * (2 if self.is_wide(resources) else 1)

    def _scoring_bytes(self, size: Size, *, on_gpu: bool) -> int:
        """Of prompts that answers are read or written behind, of classes, which are read off a state, none; or of the
        own loss."""
        loads = [task.workload() for task in self.task.parts.values() if task.num_classes is None]
        tokens = [min(batch_tokens(on_gpu=on_gpu), load.num_test * load.length) for load in loads]
        own = self.forgetting.batch_bytes(size, NUM_SEQUENCES) if self.forgetting else 0
        return max(own, max(tokens, default=0) * size.prompt_bytes)

    def disk_bytes(self, size: Size) -> int:
        """Predictions, of some kilobytes: the weights are not kept."""
        return 0

    def _likelihoods(
        self, task: TaskSpec, fitted: Fitted, tokenizer: PreTrainedTokenizerBase, split: Split
    ) -> list[float]:
        """Of the right answers of a split; see `TaskSpec.log_likelihoods`."""
        values = task.log_likelihoods(fitted.model, tokenizer, split)
        if not np.isfinite(values).all():
            raise Diverged(len(fitted.losses), math.nan)
        return values

    def _forgetting(
        self, model: PreTrainedModel, inputs: Mapping[str, Path], worker: Worker
    ) -> Callable[[], dict[str, float]]:
        """Reads the own loss now; what is given back tells how much it has risen since."""
        from raysweep.train.evaluate import heldout, heldout_once

        text = self.forgetting
        assert text
        # Each seed reads other sequences, so that seeds differ by all chance that a rise has.
        rows = text.rows(inputs["tokens"], inputs["checkpoint"], num_sequences=NUM_SEQUENCES, draw=self.seed)
        before = heldout_once(model.to(worker.device), rows, text.loss)
        if worker.world_size > 1:
            model.cpu()  # A gang trains a copy, beside which these weights would stay on the GPU.

        def risen() -> dict[str, float]:
            rise = heldout(model, rows, text.loss).less(before)
            return {metric.name: value for metric, value in zip(FORGETTING, rise, strict=True)}

        return risen

    def _in_half(self, *, on_gpu: bool) -> bool:
        return settled(self.hyperparameters.precision, on_gpu=on_gpu) == "bf16"

    def _train(
        self,
        model: torch.nn.Module,
        batch: Callable[[Sequence[int]], Arrays],
        *,
        loss: Loss,
        num_examples: int,
        worker: Worker,
    ) -> list[float]:
        """See `tasks.base.Train`; the examples come in a new order each epoch."""
        from raysweep.train.loop import train

        given = self.hyperparameters
        drawn = np.arange(num_examples)
        if given.examples == "by_seed":
            drawn = _share(num_examples, given.max_examples or num_examples, self.seed)
        num_examples = len(drawn)
        size = min(given.batch_sequences, num_examples)
        # What fills no batch is left out, other examples in each epoch.
        per_epoch = num_examples // size

        @lru_cache(maxsize=1)  # Of one epoch at a time, for all its steps.
        def order(epoch: int) -> Any:
            return drawn[np.random.default_rng([self.seed, epoch]).permutation(num_examples)]

        def batch_at(step: int) -> Arrays:
            epoch, place = divmod(step, per_epoch)
            return batch(order(epoch)[place * size : (place + 1) * size])

        is_wide = worker.world_size > 1
        end = self.method.begin(model, seed=self.seed)
        # What DeepSpeed leaves of a model may be sharded, in bfloat16 or under autocast: the model gets weights alone.
        trained = copy.deepcopy(model) if is_wide else model
        training = train(
            trained,
            batch_at,
            objective=loss,
            optimizer=given.optimizer_at(self.lr),
            schedule=Cosine(warmup=given.warmup, final=0.0),
            num_steps=max(1, round(given.epochs * per_epoch)),
            seed=self.seed,
            bf16=self._in_half(on_gpu=worker.device.startswith("cuda")),
            worker=worker,
        )
        if is_wide and worker.rank == 0:
            model.load_state_dict(dict(model.state_dict()) | _learnt(trained, training.weights))
            model.to(worker.device)
        end()
        return training.losses


def _share(num: int, size: int, seed: int) -> Ints:
    """Numbers in [0, num) of `size` examples: seeds 0, 1, ... have others, as long as `num` is enough for them all."""
    order = np.random.default_rng([0, 0, 1]).permutation(num)
    start = seed % max(1, num // size) * size
    return order[start : start + size]


def _ood_of(task: TaskSpec) -> list[Split]:
    """The split of another domain, where the task has one."""
    return [OOD] if task.workload().num_ood else []


def _of_part(name: str, metric: str) -> str:
    """What a metric is called that is of one task of a mixture; the name of a task that stands alone is empty."""
    return metric if not name or metric in (*PICKS, *OF_TRAINING) else f"{name}/{metric}"


def _stderr(values: Sequence[float]) -> float:
    """Of the mean over test examples; NaN of one."""
    return float(np.std(values, ddof=1)) / math.sqrt(len(values)) if len(values) > 1 else math.nan


def _learnt(model: torch.nn.Module, weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Of a model's weights those that take gradients: a gang may have rounded the others to bfloat16."""
    parameters = model.named_parameters(remove_duplicate=False)
    return {name: weights[name] for name, each in parameters if each.requires_grad}
