"""A checkpoint as a point of a larger model's weights, with the same function: what is of weights is measured there.

Sizes are then compared in one parametrisation, as by paper 1 (Liu et al., 2022, arXiv 2210.14199, appendix B).
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from raysweep.costs import Size
from raysweep.data.corpora import Corpus
from raysweep.data.tokenizers import load_tokenizer
from raysweep.errors import SpaceError, StageError
from raysweep.resources import Resources
from raysweep.spec import Metric
from raysweep.stages.base import StageSpec, Subject
from raysweep.stages.fetch import OBJECTIVE_FILE
from raysweep.train.checkpoints import load_model
from raysweep.train.models import Model
from raysweep.worker import Worker

if TYPE_CHECKING:
    import torch

TOLERANCE = 1e-4
"""Of log-probabilities, in nats: ten times what rounding in float32 does to them."""
_NUM_ROWS, _LENGTH = 8, 16
_WHERE = ("model",)


class Enlarge(StageSpec):
    """Every checkpoint, embedded in `model` with the same function: flatness is measured of that; see `enlarged`.

    Held-out losses, probes and fine-tuning stay with the checkpoint as it was trained.
    """

    kind: ClassVar[str] = "enlarge"
    wide: ClassVar[bool] = False
    filled: ClassVar[frozenset[str]] = frozenset({"vocab_size"})

    model: Model
    """The larger model: of the checkpoints' kind, with heads as large as theirs, and at least as wide and deep."""
    vocab_size: int = 0
    """Rows of the text's embedding; filled from pretrain.data."""

    def bind(self, subject: Subject) -> Enlarge:
        """With the text's vocabulary.

        Raises:
            SpaceError: if the model that is trained does not fit into the larger one.
        """
        if subject.model and (problem := _problem(subject.model, self.model)):
            raise SpaceError(problem, _WHERE)
        return self.with_(vocab_size=subject.corpus.vocab_size)  # type: ignore[no-any-return]

    @property
    def model_size(self) -> Size:
        """Of the larger model."""
        num = self.model.num_parameters(self.vocab_size)
        return Size(num, *self.model.dimensions(), vocab_size=self.vocab_size, num_bytes=4 * num)

    def run(self, inputs: Mapping[str, Path], out: Path, worker: Worker) -> dict[str, float]:
        """Writes a Hugging Face checkpoint, with the tokenizer and the objective of the one that it is made of.

        Raises:
            StageError: if the two do not predict the same.
        """
        from raysweep.train.enlarged import enlarged

        given = inputs["checkpoint"]
        small = load_model(given)
        config = small.config
        _, larger = self.model.configure(
            vocab_size=config.vocab_size, sequence_length=getattr(config, "max_position_embeddings", 0)
        )
        try:
            large = enlarged(small, larger)
        except ValueError as error:
            raise StageError(f"enlarge.model: {error}") from error
        off = _largest_difference(small, large)
        if not off <= TOLERANCE:
            raise StageError(
                f"enlarge.model: enlarged, the checkpoint's log-probabilities are off by {off:.2g} nats; give the "
                "larger model the settings of the one that is trained, but for its size"
            )
        large.save_pretrained(out)
        load_tokenizer(given).save_pretrained(out)
        if (given / OBJECTIVE_FILE).exists():
            shutil.copy(given / OBJECTIVE_FILE, out)
        return {"num_parameters": float(large.num_parameters()), "largest_difference": off}

    def metrics(self, corpus: Corpus) -> tuple[Metric, ...]:
        """How large it is, and how far its log-probabilities are from the checkpoint's on random tokens."""
        return (Metric("num_parameters"), Metric("largest_difference", unit="nats"))

    def flops(self, size: Size, corpus: Corpus) -> float:
        """Two forward passes over some random rows."""
        return size.forward_flops(2 * _NUM_ROWS * _LENGTH, _LENGTH)

    def memory_bytes(self, size: Size, resources: Resources) -> int:
        """The weights of both models."""
        return size.weights_bytes + self.model_size.weights_bytes

    def host_bytes(self, size: Size, resources: Resources) -> int:
        """All that it holds: it has no use for a GPU."""
        return self.memory_bytes(size, resources)

    def disk_bytes(self, size: Size) -> int:
        """The larger checkpoint, its weights in 32 bits."""
        return self.model_size.num_bytes


def _problem(small: Model, large: Model) -> str | None:
    """Why one does not fit into the other, by what they declare; what else does not fit is found when it is done."""
    kinds = [getattr(each, "architecture", "") or each.name for each in (small, large)]
    if kinds[0] != kinds[1]:
        return f"a {kinds[0]} model does not fit into one of {kinds[1]}: both are of one kind"
    has, gets = small.dimensions(), large.dimensions()
    for name in ("hidden_size", "num_layers", "num_heads"):
        if getattr(gets, name) < getattr(has, name):
            return f"{name} {getattr(gets, name)} is less than the {getattr(has, name)} of pretrain.model; raise it"
    heads = [each.hidden_size // each.num_heads for each in (has, gets)]
    if heads[0] != heads[1]:
        numbers = f"a head has {heads[1]} numbers (hidden_size / num_heads), and {heads[0]} in pretrain.model"
        return f"{numbers}; make them equal"
    return None


def _largest_difference(small: Any, large: Any) -> float:
    """Of the two models' log-probabilities, over all tokens of some random rows, in nats."""
    import torch

    rows = torch.randint(small.config.vocab_size, (_NUM_ROWS, _LENGTH), generator=torch.Generator().manual_seed(0))
    length = min(_LENGTH, getattr(small.config, "max_position_embeddings", _LENGTH))
    with torch.inference_mode():
        one, other = (_log_probabilities(model, rows[:, :length]) for model in (small, large))
    return float((one - other).abs().max())


def _log_probabilities(model: Any, rows: torch.Tensor) -> torch.Tensor:
    return model(input_ids=rows).logits.double().log_softmax(dim=-1)  # type: ignore[no-any-return]
