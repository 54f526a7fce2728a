"""A linear probe: what a linear classifier reads out of a checkpoint's frozen features."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar

from pydantic import Field

from raysweep.costs import Size
from raysweep.data.corpora import Corpus
from raysweep.data.tokenizers import load_tokenizer
from raysweep.resources import Resources
from raysweep.spec import Metric
from raysweep.stages.base import StageSpec
from raysweep.tasks.families import Task
from raysweep.train.checkpoints import load_model
from raysweep.train.evaluate import ROWS_OF_STATES
from raysweep.worker import Worker


class Probe(StageSpec):
    """Logistic regression on frozen features (paper 1, Liu et al., 2022: states of all tokens, AdamW, 100 epochs)."""

    kind: ClassVar[str] = "probe"
    wide: ClassVar[bool] = False
    VERSION: ClassVar[int] = 2

    task: Task
    seed: int
    lr: float = Field(default=1e-3, gt=0)
    epochs: int = Field(default=100, ge=1)
    batch_size: int = Field(default=256, ge=1)

    def run(self, inputs: Mapping[str, Path], out: Path, worker: Worker) -> dict[str, float]:
        """Accuracy on the indicator split after the last epoch; features are standardised by the training split."""
        import torch
        import torch.nn.functional as F

        model = load_model(inputs["checkpoint"]).to(worker.device).eval()
        tokenizer = load_tokenizer(inputs["checkpoint"])
        ((features, labels),) = self.task.features(model, tokenizer, "train")
        mean, spread = features.mean(dim=0), features.std(dim=0) + 1e-6
        # By the training split's mean and spread, and so is what is tested: of that nothing is known beforehand.
        features = (features - mean) / spread
        num_classes = self.task.num_classes
        assert num_classes is not None  # Such a task has no features.
        draw = torch.Generator().manual_seed(self.seed)
        weight = torch.zeros(num_classes, features.shape[1], device=features.device, requires_grad=True)
        bias = torch.zeros(num_classes, device=features.device, requires_grad=True)
        optimizer = torch.optim.AdamW([weight, bias], lr=self.lr)
        for _ in range(self.epochs):
            for rows in torch.randperm(len(features), generator=draw).split(self.batch_size):  # type: ignore[no-untyped-call]
                loss = F.cross_entropy(F.linear(features[rows], weight, bias), labels[rows])
                optimizer.zero_grad()
                loss.backward()  # type: ignore[no-untyped-call]
                optimizer.step()
        ((tested, right),) = self.task.features(model, tokenizer, "indicator")
        with torch.no_grad():
            hits = (F.linear((tested - mean) / spread, weight, bias).argmax(dim=1) == right).float().cpu().numpy()
        if not math.isfinite(float(loss.detach())):  # States that are no numbers: class 0 would be picked each time.
            hits[:] = math.nan
        return {
            "score": float(hits.mean()),
            "score_stderr": float(hits.std(ddof=1) / math.sqrt(len(hits))) if len(hits) > 1 else math.nan,
            "train_loss_nats": float(loss.detach()),
        }

    def metrics(self, corpus: Corpus) -> tuple[Metric, ...]:
        """Its accuracy; how well it fits the examples that it was fitted to says nothing of the checkpoint."""
        return (
            Metric("score", "max", "share"),
            Metric("score_stderr", unit="share"),
            Metric("train_loss_nats", unit="nats"),
        )

    def flops(self, size: Size, corpus: Corpus) -> float:
        """Features of all tokens, and a linear classifier's epochs on them."""
        load = self.task.workload()
        features = size.forward_flops((load.num_train + load.num_indicator) * load.length, load.length)
        weights = load.num_states * size.hidden_size * (self.task.num_classes or 0)
        return features + 6.0 * weights * load.num_train * self.epochs

    def memory_bytes(self, size: Size, resources: Resources) -> int:
        """Weights, the training examples' features, as they are and standardised, and a batch that is read for them."""
        load = self.task.workload()
        features = 2 * 4 * load.num_train * load.num_states * size.hidden_size
        rows = min(ROWS_OF_STATES, load.num_train)
        return size.weights_bytes + features + rows * load.length * size.forward_bytes

    def disk_bytes(self, size: Size) -> int:
        """None: its numbers stand in its record."""
        return 0
