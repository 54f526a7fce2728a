"""How weights move. To add an optimizer: a spec with `build`, and its name in the last line."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field

from raysweep.spec import Spec

if TYPE_CHECKING:
    import torch

DecayRate = Annotated[float, Field(ge=0, lt=1)]


class OptimizerSpec(Spec):
    """A declared optimizer: it builds torch's own or ours, and says how much state that keeps."""

    state_floats: ClassVar[int]
    """Numbers kept per parameter, at most."""

    name: str
    lr: float

    @abstractmethod
    def build(self, model: torch.nn.Module) -> torch.optim.Optimizer:
        """The optimizer of a model's trainable weights, at peak learning rates, each group at its own.

        A schedule multiplies the rates of all groups alike, so they keep their ratios.

        Its steps go by each group's `lr`, and what they leave is in its `state`, by weight: tensors of the weight's
        shape, or numbers. Under ZeRO its groups hold flat partitions of their weights later on: what steps more than
        single elements is a `PartitionedOptimizer`. `optimizer_check` sees to all this before a run trains.
        """


class AdamW(OptimizerSpec):
    """AdamW (Loshchilov and Hutter, 2019). Weight decay acts on matrices, embeddings among them, not on norms."""

    name: Literal["adamw"] = "adamw"
    """Which optimizer."""
    lr: float = Field(gt=0)
    """Peak learning rate; the schedule multiplies it."""
    betas: tuple[DecayRate, DecayRate] = (0.9, 0.95)
    """Decay rates of the running means of gradients and of their squares."""
    eps: float = Field(default=1e-8, gt=0)
    """Added to the root of the second mean."""
    weight_decay: float = Field(default=0.1, ge=0)
    """Times the learning rate: the part of a matrix taken off at a step."""

    state_floats: ClassVar[int] = 2

    def build(self, model: torch.nn.Module) -> torch.optim.Optimizer:
        """torch's own, which decays weights apart from the gradient (decoupled), in one fused operation."""
        import torch

        groups = decay_groups(model.parameters(), self.weight_decay)
        return torch.optim.AdamW(groups, lr=self.lr, betas=self.betas, eps=self.eps, fused=True)


class SGD(OptimizerSpec):
    """Stochastic gradient descent with heavy-ball momentum."""

    name: Literal["sgd"]
    """Which optimizer."""
    lr: float = Field(gt=0)
    """Peak learning rate; the schedule multiplies it."""
    momentum: DecayRate = 0.9
    """Part of the last step that the next one keeps."""
    weight_decay: float = Field(default=0.0, ge=0)
    """Added to a matrix's gradient, times the matrix."""

    state_floats: ClassVar[int] = 1

    def build(self, model: torch.nn.Module) -> torch.optim.Optimizer:
        """torch's own, whose decay is part of the gradient, so of the momentum too; in one fused operation."""
        import torch

        groups = decay_groups(model.parameters(), self.weight_decay)
        return torch.optim.SGD(groups, lr=self.lr, momentum=self.momentum, fused=True)


class Lion(OptimizerSpec):
    """Lion (Chen et al., 2023): every element of a weight moves by the learning rate, in the momentum's direction.

    Rates are three to ten times smaller than AdamW's, and decays larger by as much.
    """

    name: Literal["lion"]
    """Which optimizer."""
    lr: float = Field(gt=0)
    """Peak learning rate; the schedule multiplies it."""
    betas: tuple[DecayRate, DecayRate] = (0.9, 0.99)
    """Parts of the momentum in a step's direction, and in the momentum that is kept."""
    weight_decay: float = Field(default=0.1, ge=0)
    """Times the learning rate: the part of a matrix taken off at a step."""

    state_floats: ClassVar[int] = 1

    def build(self, model: torch.nn.Module) -> torch.optim.Optimizer:
        """Ours: see `lion.Lion`; torch has none."""
        from raysweep.train import lion

        return lion.Lion(decay_groups(model.parameters(), self.weight_decay), lr=self.lr, betas=self.betas)


class Muon(OptimizerSpec):
    """Muon (Jordan et al., 2024) on the matrices of hidden layers, AdamW on embeddings, output layer, norms and biases.

    Steps of a matrix are scaled to the size that AdamW's have (Liu et al., 2025), so that rates and decays of AdamW
    suit both. Experts' weights, which are stacked in three dimensions, are AdamW's.
    """

    name: Literal["muon"]
    """Which optimizer."""
    lr: float = Field(gt=0)
    """Peak learning rate of the matrices; the schedule multiplies it."""
    momentum: DecayRate = 0.95
    """Decay rate of the running mean of a matrix's gradients; the step is Nesterov's."""
    adamw_lr: float | None = Field(default=None, gt=0)
    """Peak learning rate of the others; None: lr."""
    betas: tuple[DecayRate, DecayRate] = (0.9, 0.95)
    """Of AdamW: decay rates of the running means of gradients and of their squares."""
    eps: float = Field(default=1e-8, gt=0)
    """Of AdamW: added to the root of the second mean."""
    weight_decay: float = Field(default=0.1, ge=0)
    """Times the learning rate: the part of a matrix, embeddings among them, taken off at a step."""

    # Muon's momentum is one; a plan need not know how many weights are AdamW's.
    state_floats: ClassVar[int] = 2

    def build(self, model: torch.nn.Module) -> torch.optim.Optimizer:
        """torch's Muon and AdamW as one optimizer: see `muon.MuonAdamW`."""
        import torch

        from raysweep.train.muon import MuonAdamW, hidden_matrices

        matrices = hidden_matrices(model)
        own = set(matrices)
        others = decay_groups((each for each in model.parameters() if each not in own), self.weight_decay)
        return MuonAdamW(
            torch.optim.Muon(
                matrices,
                lr=self.lr,
                momentum=self.momentum,
                weight_decay=self.weight_decay,
                adjust_lr_fn="match_rms_adamw",
            ),
            torch.optim.AdamW(others, lr=self.adamw_lr or self.lr, betas=self.betas, eps=self.eps, fused=True),
        )


def decay_groups(parameters: Iterable[torch.nn.Parameter], weight_decay: float) -> list[dict[str, Any]]:
    """Groups for an optimizer: matrices with weight decay, vectors (norms, biases) without; empty groups left out.

    Args:
        parameters: those that take no gradient are left out.
        weight_decay: of whatever has two dimensions or more, embeddings among them.

    >>> groups = decay_groups(torch.nn.Linear(2, 3).parameters(), weight_decay=0.1)
    >>> [(tuple(group["params"][0].shape), group["weight_decay"]) for group in groups]
    [((3, 2), 0.1), ((3,), 0.0)]
    """
    groups: dict[float, list[torch.nn.Parameter]] = {}
    for parameter in parameters:
        if parameter.requires_grad:
            # Under ZeRO-3 a parameter is empty here, and its shape stands beside it.
            shape = getattr(parameter, "ds_shape", parameter.shape)
            groups.setdefault(weight_decay if len(shape) >= 2 else 0.0, []).append(parameter)
    return [{"params": group, "weight_decay": decay} for decay, group in groups.items()]


Optimizer = Annotated[AdamW | SGD | Lion | Muon, Field(discriminator="name")]
