"""Supervised fine-tuning of a checkpoint on one task, with one learning rate and seed."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from pydantic import Field

from raysweep.data.corpora import Corpus
from raysweep.errors import StageError
from raysweep.objectives.base import IGNORED, Loss
from raysweep.objectives.causal_lm import AnswerLM
from raysweep.spec import Metric, Spec, StageSpec
from raysweep.tasks.base import Answered, TextTask, fit, pad, token_ids
from raysweep.tasks.families import Task
from raysweep.tasks.spans import PCFGSpan
from raysweep.train.checkpoints import load_model
from raysweep.train.optimizers import AdamW
from raysweep.train.precision import Precision, settled
from raysweep.train.schedules import Cosine
from raysweep.worker import Worker

if TYPE_CHECKING:
    from transformers import PreTrainedModel

MAX_LENGTH = 512
"""Tokens of prompt and answer together; a longer prompt loses its beginning."""


def context_length(model: PreTrainedModel) -> int:
    """Tokens that prompt and answer may have together: as many as the model has positions, at most `MAX_LENGTH`."""
    return min(MAX_LENGTH, getattr(model.config, "max_position_embeddings", MAX_LENGTH))


class Hyperparameters(Spec):
    """What all fine-tuning runs of a sweep share. AdamW, cosine decay to zero."""

    epochs: float = Field(default=2.0, gt=0)
    """Passes over a task's training examples; may be a fraction."""
    batch_sequences: int = Field(default=16, ge=1)
    """Examples of a batch."""
    warmup: float = Field(default=0.06, ge=0, le=1)
    """Fraction of the steps."""
    weight_decay: float = Field(default=0.01, ge=0)
    """AdamW's, on matrices."""
    precision: Precision = "auto"
    """auto: bf16 on a GPU, fp32 on a CPU."""


class Sft(StageSpec):
    """Fine-tune all weights; score on held-out splits. The learning rate is picked by `valid_score`, later."""

    VERSION: ClassVar[int] = 2
    kind: ClassVar[str] = "sft"
    wide: ClassVar[bool] = False

    task: Task
    lr: float = Field(gt=0)
    seed: int
    hyperparameters: Hyperparameters = Hyperparameters()

    def run(self, inputs: Mapping[str, Path], out: Path, worker: Worker) -> dict[str, float]:
        """Writes predictions.jsonl: a line for each test example with its id, what the model said, and its scores."""
        from transformers import AutoTokenizer

        model = load_model(inputs["checkpoint"])
        if isinstance(self.task, PCFGSpan):
            losses, valid, test = self._run_classifier(model, self.task, worker)
        else:
            tokenizer = AutoTokenizer.from_pretrained(inputs["checkpoint"])
            losses, valid, test = self._run_text(model, tokenizer, self.task, worker)
        with (out / "predictions.jsonl").open("w") as file:
            for name, row in zip(self.task.ids("test"), test, strict=True):
                file.write(json.dumps({"id": name, "output": row.output, **row.scores}) + "\n")
        metrics = {name: float(np.mean([row.scores[name] for row in test])) for name in self.task.score_names}
        spread = float(np.std([row.scores["score"] for row in test], ddof=1)) if len(test) > 1 else math.nan
        return {
            **metrics,
            "score_stderr": spread / math.sqrt(len(test)),
            "chance_score": self.task.chance(),
            "valid_score": float(np.mean([row.scores["score"] for row in valid])),
            "loss_nats_per_token": float(np.mean(losses[-max(1, len(losses) // 10) :])),
            "num_steps": float(len(losses)),
            "num_test_examples": float(len(test)),
        }

    def metrics(self, corpus: Corpus) -> tuple[Metric, ...]:
        """Scores of the task's form, chance beside them, and what the rate is picked by."""
        return (
            *(Metric(name, "max", "share") for name in self.task.score_names),
            Metric("score_stderr", unit="share"),
            Metric("chance_score", unit="share"),
            Metric("valid_score", "max", "share"),
            Metric("loss_nats_per_token", "min", "nats/token"),
            Metric("num_steps", unit="steps"),
            Metric("num_test_examples", unit="examples"),
        )

    def _run_text(
        self, model: Any, tokenizer: Any, task: TextTask, worker: Worker
    ) -> tuple[list[float], list[Answered], list[Answered]]:
        if tokenizer.eos_token_id is None:
            raise StageError("the checkpoint's tokenizer has no eos_token, which ends an answer; set it in the folder")
        max_length = context_length(model)
        examples = task.examples("train")
        prompts = token_ids(tokenizer, [task.prompt(example) for example in examples])
        answers = token_ids(tokenizer, [task.answer(example) for example in examples])
        pairs = [
            fit(prompt, [*answer, tokenizer.eos_token_id], max_length)
            for prompt, answer in zip(prompts, answers, strict=True)
        ]

        def batch(rows: Sequence[int]) -> dict[str, Any]:
            ids, mask = pad([pairs[row][0] for row in rows], value=0)
            labels = np.where(mask == 1, ids, IGNORED)
            for index, row in enumerate(rows):
                labels[index, : pairs[row][1]] = IGNORED
            return {"input_ids": ids, "labels": labels, "lengths": mask.sum(axis=1)}

        losses = self._train(model, AnswerLM(), batch, len(pairs), worker)
        model.eval()
        valid, test = (
            task.evaluate(model, tokenizer, task.examples(split), max_length=max_length) for split in ("valid", "test")
        )
        return losses, valid, test

    def _run_classifier(
        self, model: Any, task: PCFGSpan, worker: Worker
    ) -> tuple[list[float], list[Answered], list[Answered]]:
        from raysweep.train.classifier import Classification, Classifier

        ids, labels = task.examples("train")
        classifier = Classifier(model, length=ids.shape[1], num_classes=task.num_classes, seed=self.seed)

        def batch(rows: Sequence[int]) -> dict[str, Any]:
            # The class is the last token's label; nothing else is predicted.
            placed = np.full_like(ids[rows], IGNORED)
            placed[:, -1] = labels[rows]
            return {"input_ids": ids[rows], "labels": placed}

        losses = self._train(classifier, Classification(), batch, len(ids), worker)
        classifier.eval()
        scored = []
        for split in ("valid", "test"):
            part, right = task.examples(split)
            said = classifier.predict(part)
            hits = (said == right).astype(float).tolist()
            scored.append(
                [
                    Answered(output, {"score": hit, "accuracy": hit})
                    for output, hit in zip(said.tolist(), hits, strict=True)
                ]
            )
        return losses, scored[0], scored[1]

    def _train(
        self, model: Any, objective: Loss, batch: Callable[[Sequence[int]], dict[str, Any]], num: int, worker: Worker
    ) -> list[float]:
        from raysweep.train.loop import train

        given = self.hyperparameters
        size = min(given.batch_sequences, num)
        per_epoch = num // size

        @lru_cache(maxsize=1)
        def order(epoch: int) -> Any:
            return np.random.default_rng([self.seed, epoch]).permutation(num)

        def batch_at(step: int) -> dict[str, Any]:
            epoch, place = divmod(step, per_epoch)
            return batch(order(epoch)[place * size : (place + 1) * size])

        return train(
            model,
            batch_at,
            objective=objective,
            optimizer=AdamW(lr=self.lr, weight_decay=given.weight_decay, betas=(0.9, 0.999)),
            schedule=Cosine(warmup=given.warmup, final=0.0),
            num_steps=max(1, round(given.epochs * per_epoch)),
            seed=self.seed,
            bf16=settled(given.precision, on_gpu=worker.device.startswith("cuda")) == "bf16",
            worker=worker,
        ).losses
