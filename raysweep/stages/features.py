"""How many directions a checkpoint's features fill, on held-out text."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from pydantic import Field

from raysweep.costs import Size
from raysweep.data.corpora import Corpus
from raysweep.errors import DataError
from raysweep.objectives.base import Arrays, Floats
from raysweep.resources import Resources
from raysweep.spec import Metric
from raysweep.stages.base import StageSpec, Subject
from raysweep.stages.held_text import HeldText
from raysweep.train.checkpoints import load_model
from raysweep.train.evaluate import BATCH
from raysweep.worker import Worker

GROUPS = 8
"""Of sequences, one of which is left out at a time for the error."""


class FeatureRank(StageSpec):
    """RankMe (Garrido et al., 2023, arXiv 2210.02885): effective rank of the last layer's states over all tokens.

    exp(-sum_k p_k log p_k), p_k = s_k / sum s, s the singular values of the matrix of states [tokens, hidden]. Of all
    that the own objective reads but its padding; no scale of states changes it.
    """

    kind: ClassVar[str] = "features"
    wide: ClassVar[bool] = False
    reads_text: ClassVar[bool] = True
    filled: ClassVar[frozenset[str]] = frozenset({"text"})

    num_sequences: int = Field(default=512, ge=GROUPS)
    """Held-out sequences, each domain's share by its mix; fewer where a domain has not its share."""
    text: HeldText | None = None
    """Filled from pretrain."""

    def bind(self, subject: Subject) -> FeatureRank:
        """With the text and the objective, by which rows are read."""
        return self.with_(text=HeldText.of(subject))  # type: ignore[no-any-return]

    def run(self, inputs: Mapping[str, Path], out: Path, worker: Worker) -> dict[str, float]:
        """The rank, its error by leaving out groups of sequences (the jackknife), and the states' mean square.

        Raises:
            DataError: if there are fewer held-out sequences than groups.
        """
        assert self.text
        model = load_model(inputs["checkpoint"]).to(worker.device).eval()
        rows = self.text.rows(inputs["tokens"], inputs["checkpoint"], num_sequences=self.num_sequences)
        if (there := len(rows["input_ids"])) < GROUPS:
            raise DataError(f"features: there are {there} held-out sequences, and {GROUPS} or more are needed")
        ends = np.linspace(0, len(rows["input_ids"]), num=GROUPS + 1).astype(int)
        groups = [
            _moment(model, {name: each[start:end] for name, each in rows.items()}, device=worker.device)
            for start, end in itertools.pairwise(ends)
        ]
        moments, counts = zip(*groups, strict=True)
        whole = np.sum(moments, axis=0)
        left = np.array([effective_rank(whole - each) for each in moments])
        return {
            "effective_rank": effective_rank(whole),
            "effective_rank_stderr": float(np.sqrt((GROUPS - 1) / GROUPS * ((left - left.mean()) ** 2).sum())),
            "mean_square": float(np.trace(whole) / (sum(counts) * len(whole))),
        }

    def metrics(self, corpus: Corpus) -> tuple[Metric, ...]:
        """More directions are declared the better; the mean square has no better side."""
        return Metric("effective_rank", "max"), Metric("effective_rank_stderr"), Metric("mean_square")

    def flops(self, size: Size, corpus: Corpus) -> float:
        """A forward pass, and a product of the states with themselves."""
        assert self.text
        tokens = self.num_sequences * self.text.input_length
        return size.forward_flops(tokens, self.text.input_length) + 2.0 * tokens * size.hidden_size**2

    def memory_bytes(self, size: Size, resources: Resources) -> int:
        """Weights, a batch's activations, and moments of all groups in 64 bits."""
        assert self.text
        tokens = min(BATCH, self.num_sequences) * self.text.input_length
        return size.weights_bytes + tokens * size.forward_bytes + 8 * (GROUPS + 2) * size.hidden_size**2

    def disk_bytes(self, size: Size) -> int:
        """None: its numbers stand in its record."""
        return 0


def _moment(model: Any, rows: Arrays, *, device: str) -> tuple[Floats, int]:
    """X'X [d, d] of the states X of all tokens that are read, and their number."""
    import torch

    from raysweep.objectives.inputs import model_inputs

    num, width = rows["input_ids"].shape
    is_read = torch.arange(width) < torch.from_numpy(rows.get("lengths", np.full(num, width)))[:, None]
    total: Any = 0.0
    for start in range(0, num, BATCH):
        part = {name: each[start : start + BATCH] for name, each in rows.items() if name != "lengths"}
        batch = {name: torch.from_numpy(np.ascontiguousarray(each)).to(device) for name, each in part.items()}
        with torch.inference_mode():
            # No keys and values are kept, of which a causal model would have those of all layers.
            states = model.base_model(**model_inputs(model, batch), use_cache=False).last_hidden_state
            kept = states[is_read[start : start + BATCH].to(device)].double()
            total = total + (kept.T @ kept).cpu().numpy()
    return total, int(is_read.sum())


def effective_rank(moment: Floats) -> float:
    """exp of the entropy of the singular values of X, from X'X [d, d]; NaN if that holds what is no number.

    >>> effective_rank(np.diag([4.0, 4.0, 0.0])), round(effective_rank(np.diag([9.0, 1.0])), 3)
    (2.0, 1.755)
    """
    if not np.isfinite(moment).all():
        return float("nan")
    singular = np.sqrt(np.maximum(np.linalg.eigvalsh(moment), 0.0))
    p = singular[singular > 0] / singular.sum()
    return float(np.exp(-(p * np.log(p)).sum()))
