"""A linear probe: what a linear classifier reads out of a checkpoint's frozen features."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from pydantic import Field

from raysweep.data.corpora import Corpus
from raysweep.spec import Metric, StageSpec
from raysweep.tasks.spans import PCFGSpan, hidden_states
from raysweep.train.checkpoints import load_model
from raysweep.worker import Worker


class Probe(StageSpec):
    """Logistic regression on the concatenated states of all tokens (paper 1, Liu et al., 2022: AdamW, 100 epochs)."""

    kind: ClassVar[str] = "probe"
    wide: ClassVar[bool] = False
    VERSION: ClassVar[int] = 2

    task: PCFGSpan
    seed: int
    lr: float = Field(default=1e-3, gt=0)
    epochs: int = Field(default=100, ge=1)
    batch_size: int = Field(default=256, ge=1)

    def run(self, inputs: Mapping[str, Path], out: Path, worker: Worker) -> dict[str, float]:
        """Accuracy on the indicator split after the last epoch; features are standardised by the training split."""
        import torch
        import torch.nn.functional as F

        model = load_model(inputs["checkpoint"]).to(worker.device).eval()
        features, labels = self._features(model, "train")
        mean, spread = features.mean(dim=0), features.std(dim=0) + 1e-6
        features = (features - mean) / spread
        draw = torch.Generator().manual_seed(self.seed)
        weight = torch.zeros(self.task.num_classes, features.shape[1], device=features.device, requires_grad=True)
        bias = torch.zeros(self.task.num_classes, device=features.device, requires_grad=True)
        optimizer = torch.optim.AdamW([weight, bias], lr=self.lr)
        for _ in range(self.epochs):
            for rows in torch.randperm(len(features), generator=draw).split(self.batch_size):  # type: ignore[no-untyped-call]
                loss = F.cross_entropy(F.linear(features[rows], weight, bias), labels[rows])
                optimizer.zero_grad()
                loss.backward()  # type: ignore[no-untyped-call]
                optimizer.step()
        tested, right = self._features(model, "indicator")
        with torch.no_grad():
            hits = (F.linear((tested - mean) / spread, weight, bias).argmax(dim=1) == right).float().cpu().numpy()
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

    def _features(self, model: Any, split: Any) -> tuple[Any, Any]:
        import torch

        ids, labels = self.task.examples(split)
        states = torch.cat([part.flatten(1) for part in hidden_states(model, ids)])
        return states, torch.from_numpy(np.ascontiguousarray(labels)).to(states.device)
