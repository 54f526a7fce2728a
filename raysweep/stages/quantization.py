"""Sensitivity of a checkpoint to quantization: how much the loss that it was trained by rises at few bits a weight."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar

from pydantic import Field, field_validator

from raysweep.costs import Size
from raysweep.data.corpora import Corpus
from raysweep.errors import StageError
from raysweep.objectives.families import Objective
from raysweep.resources import Resources
from raysweep.spec import Metric
from raysweep.stages.base import StageSpec, Subject
from raysweep.stages.held_text import HeldText
from raysweep.train.checkpoints import load_model
from raysweep.worker import Worker

if TYPE_CHECKING:
    import torch


class Quantization(StageSpec):
    """Rise of the loss on held-out text where linear layers have their weights rounded to the nearest of 2^bits values.

    The baseline RTN of GPTQ (Frantar et al., 2023, arXiv 2210.17323), asymmetric, with a grid for each group of weights
    of one output; of all linear layers but the output layer, and no embedding. Nor are experts whose weights are one
    tensor of three dimensions, as those of Mixtral; `share_rounded` is of all weights. It needs no data and no GPU:
    rounded weights are multiplied in 32 bits, as weights alone are quantized. More pretraining may make models more
    sensitive (Kumar et al., 2024, arXiv 2411.04330), as sharpness does. Errors hold the chance of the text.
    """

    kind: ClassVar[str] = "quantization"
    wide: ClassVar[bool] = False
    reads_text: ClassVar[bool] = True
    of_weights: ClassVar[bool] = True
    filled: ClassVar[frozenset[str]] = frozenset({"text"})

    bits: tuple[Annotated[int, Field(ge=2, le=16)], ...] = Field(default=(4, 8), min_length=1)
    """Of a weight, at each of which the rise is measured; 8 as a control, where it is next to none."""
    group: int = Field(default=128, ge=2)
    """Weights along the input that share a grid; the last group of an input may be smaller."""
    num_sequences: int = Field(default=512, ge=2)
    """Held-out sequences, each domain's share by its mix; fewer where a domain has not its share."""
    text: HeldText | None = None
    """Filled from pretrain."""

    @field_validator("bits")
    @classmethod
    def _distinct(cls, bits: tuple[int, ...]) -> tuple[int, ...]:
        if len(set(bits)) != len(bits):
            raise ValueError(f"{list(bits)} holds one twice")
        return bits

    def bind(self, subject: Subject) -> Quantization:
        """With the text and the objective."""
        return self.with_(text=HeldText.of(subject))  # type: ignore[no-any-return]

    @property
    def loss_of(self) -> Objective | None:
        """What the model was trained by."""
        return self.text.loss if self.text else None

    def run(self, inputs: Mapping[str, Path], out: Path, worker: Worker) -> dict[str, float]:
        """A rise and its error for each number of bits, in nats per predicted token, and the weights rounded over all.

        Raises:
            StageError: if the model has no linear layer inside.
        """
        import torch
        from transformers.pytorch_utils import Conv1D

        from raysweep.train.adapters import find_targets
        from raysweep.train.evaluate import heldout

        assert self.text
        model = load_model(inputs["checkpoint"]).to(worker.device)
        try:
            layers = [model.get_submodule(name) for name in find_targets(model, "all-linear")]
        except ValueError as error:
            raise StageError(f"quantization: {error}") from error
        rows = self.text.rows(inputs["tokens"], inputs["checkpoint"], num_sequences=self.num_sequences)
        before = heldout(model, rows, self.text.loss)
        whole = [layer.weight.detach().clone() for layer in layers]
        metrics = {"share_rounded": sum(weight.numel() for weight in whole) / model.num_parameters()}
        for bits in self.bits:
            with torch.no_grad():
                for layer, weight in zip(layers, whole, strict=True):
                    # GPT-2's layers hold their weights as [in, out].
                    turned = weight.T if isinstance(layer, Conv1D) else weight
                    rounded = round_to_nearest(turned, bits=bits, group=self.group)
                    layer.weight.copy_(rounded.T if isinstance(layer, Conv1D) else rounded)
            rise, stderr = heldout(model, rows, self.text.loss).less(before)
            metrics |= {f"rise_{bits}_bits": rise, f"rise_{bits}_bits_stderr": stderr}
        return metrics

    def metrics(self, corpus: Corpus) -> tuple[Metric, ...]:
        """A rise and its error for each number of bits, and the share of the weights that is rounded."""
        rises = tuple(
            metric
            for bits in self.bits
            for metric in (
                Metric(f"rise_{bits}_bits", "min", "nats/token"),
                Metric(f"rise_{bits}_bits_stderr", unit="nats/token"),
            )
        )
        return (*rises, Metric("share_rounded"))

    def flops(self, size: Size, corpus: Corpus) -> float:
        """Forward passes: one for each number of bits, and one of the weights as they are."""
        assert self.text
        tokens = (1 + len(self.bits)) * self.num_sequences * self.text.input_length
        return size.forward_flops(tokens, self.text.input_length)

    def memory_bytes(self, size: Size, resources: Resources) -> int:
        """Weights and their copy; activations of a layer and logits of a batch."""
        assert self.text
        return 2 * size.weights_bytes + self.text.batch_bytes(size, self.num_sequences)

    def disk_bytes(self, size: Size) -> int:
        """None: its numbers stand in its record."""
        return 0


def round_to_nearest(weight: torch.Tensor, *, bits: int, group: int) -> torch.Tensor:
    """Weights [out, in], each moved to the nearest of the 2^bits values s (q - z) of its group, of one output.

    s = (max - min) / (2^bits - 1) and z = round(-min / s), max and min of the group and 0, which is among the values;
    q = 0 .. 2^bits - 1. But for errors of floating point, no weight is moved by more than s / 2.

    >>> import torch
    >>> round_to_nearest(torch.tensor([[0.0, 0.1, 0.9, 3.0, -8.0, 1.0]]), bits=2, group=4)
    tensor([[ 0.,  0.,  1.,  3., -9.,  0.]])
    """
    import torch

    parts = []
    for part in torch.split(weight, group, dim=1):
        low, high = part.amin(dim=1, keepdim=True).clamp(max=0), part.amax(dim=1, keepdim=True).clamp(min=0)
        scale = (high - low) / (2**bits - 1)
        scale = torch.where(scale > 0, scale, torch.ones_like(scale))  # Of a group of zeros.
        zero = (-low / scale).round()
        parts.append(((part / scale).round() + zero).clamp(0, 2**bits - 1).sub(zero).mul(scale))
    return torch.cat(parts, dim=1)
