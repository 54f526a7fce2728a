"""How weights move. To add an optimizer: a spec with `build`, and its name in the last line."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field

from raysweep.spec import Spec

if TYPE_CHECKING:
    import torch

Unit = Annotated[float, Field(ge=0, lt=1)]


class AdamW(Spec):
    """AdamW (Loshchilov and Hutter, 2019). Weight decay acts on matrices, embeddings among them, not on norms."""

    name: Literal["adamw"] = "adamw"
    """Which optimizer."""
    lr: float = Field(gt=0)
    """Peak learning rate; the schedule multiplies it."""
    betas: tuple[Unit, Unit] = (0.9, 0.95)
    """Decay rates of the running means of gradients and of their squares."""
    eps: float = Field(default=1e-8, gt=0)
    """Added to the root of the second mean."""
    weight_decay: float = Field(default=0.1, ge=0)
    """Times the learning rate: the part of a matrix taken off at a step."""

    state_floats: ClassVar[int] = 2
    """Numbers kept per parameter."""

    def build(self, parameters: Iterable[torch.nn.Parameter]) -> torch.optim.Optimizer:
        """The optimizer of these parameters."""
        import torch

        groups = decay_groups(parameters, self.weight_decay)
        return torch.optim.AdamW(groups, lr=self.lr, betas=self.betas, eps=self.eps, fused=True)


class SGD(Spec):
    """Stochastic gradient descent with heavy-ball momentum."""

    name: Literal["sgd"]
    """Which optimizer."""
    lr: float = Field(gt=0)
    """Peak learning rate; the schedule multiplies it."""
    momentum: Unit = 0.9
    """Part of the last step that the next one keeps."""
    weight_decay: float = Field(default=0.0, ge=0)
    """Added to a matrix's gradient, times the matrix."""

    state_floats: ClassVar[int] = 1
    """Numbers kept per parameter."""

    def build(self, parameters: Iterable[torch.nn.Parameter]) -> torch.optim.Optimizer:
        """The optimizer of these parameters."""
        import torch

        groups = decay_groups(parameters, self.weight_decay)
        return torch.optim.SGD(groups, lr=self.lr, momentum=self.momentum, fused=True)


def decay_groups(parameters: Iterable[torch.nn.Parameter], weight_decay: float) -> list[dict[str, Any]]:
    """Matrices with weight decay, vectors (norms, biases) without; empty groups left out."""
    groups: dict[float, list[torch.nn.Parameter]] = {}
    for parameter in parameters:
        if parameter.requires_grad:
            # Under ZeRO-3 a parameter is empty here, and its shape stands beside it.
            shape = getattr(parameter, "ds_shape", parameter.shape)
            groups.setdefault(weight_decay if len(shape) >= 2 else 0.0, []).append(parameter)
    return [{"params": group, "weight_decay": decay} for decay, group in groups.items()]


Optimizer = Annotated[AdamW | SGD, Field(discriminator="name")]
