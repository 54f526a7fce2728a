"""An optimizer, tried on a small layer before it is trusted with a model: what it gets wrong shows in no loss."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cache

import torch

from raysweep.errors import StageError
from raysweep.train.engines import optimizer_tensors, set_optimizer_tensors
from raysweep.train.optimizers import OptimizerSpec
from raysweep.train.partitions import PartitionedOptimizer

Tensor = torch.Tensor

NUM_STEPS = 4


@cache
def check_optimizer(spec: OptimizerSpec, *, is_cut: bool) -> None:
    """See that an optimizer does what schedules, saved states, ZeRO and plans take for granted.

    Args:
        spec: whose optimizer it is.
        is_cut: whether ranks will hold flat partitions of the weights, as under ZeRO 1 to 3.

    Raises:
        StageError: if it steps at a rate of 0, keeps more than its state of each weight says or than `state_floats`
            promises, or, where `is_cut`, steps a partition otherwise than the whole weights.
    """
    try:
        _check_rate(spec)
        _check_state(spec)
        _check_resumed(spec)
        if is_cut:
            _check_cut(spec)
    except StageError as error:
        raise StageError(f"optimizer {spec.name}: {error}") from error


def _check_rate(spec: OptimizerSpec) -> None:
    weights, optimizer = _built(spec)
    before = _flat(weights)
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    _step(optimizer, weights, range(NUM_STEPS))
    if not torch.equal(_flat(weights), before):
        raise StageError("weights move at a rate of 0, so no schedule reaches it; step by each group's lr")


def _check_state(spec: OptimizerSpec) -> None:
    weights, optimizer = _built(spec)
    _step(optimizer, weights, range(NUM_STEPS))
    for weight in weights:
        states = {key: torch.as_tensor(value) for key, value in optimizer.state[weight].items() if value is not None}
        tensors = {key: state for key, state in states.items() if state.dim()}
        for key, state in tensors.items():
            if state.shape != weight.shape:
                raise StageError(
                    f"state {key!r} of a weight {list(weight.shape)} is {list(state.shape)}; what is cut and saved "
                    "with a weight has its shape, or is a number"
                )
        if len(tensors) > spec.state_floats:
            raise StageError(
                f"it keeps {len(tensors)} numbers per parameter ({', '.join(tensors)}), and state_floats, which a plan "
                f"reckons memory by, is {spec.state_floats}"
            )


def _check_resumed(spec: OptimizerSpec) -> None:
    """The second half of the steps, in one run, and by a new optimizer that was given what is saved of the first."""
    half = NUM_STEPS // 2
    weights, optimizer = _built(spec)
    _step(optimizer, weights, range(half))
    again, resumed = _built(spec)
    with torch.no_grad():
        for weight, saved in zip(again, weights, strict=True):
            weight.copy_(saved)
    set_optimizer_tensors(resumed, again, optimizer_tensors(optimizer, weights))
    _step(optimizer, weights, range(half, NUM_STEPS))
    _step(resumed, again, range(half, NUM_STEPS))
    if not torch.equal(_flat(weights), _flat(again)):
        raise StageError("a resumed run takes other steps; keep what a step leaves in `state` of each weight")


def _check_cut(spec: OptimizerSpec) -> None:
    """Steps of whole weights, and of each rank's half of all of a group in a row."""
    weights, optimizer = _built(spec)
    if isinstance(optimizer, PartitionedOptimizer):  # It puts weights together again, which takes all ranks.
        return
    _step(optimizer, weights, range(NUM_STEPS))
    mend = "derive it from PartitionedOptimizer, or train with resources.zero_stage: 0"
    try:
        halves = [_stepped_half(spec, rank) for rank in range(2)]
    except Exception as error:  # Whatever a member runs into on weights that it did not expect.
        raise StageError(f"it cannot step a part of a weight ({type(error).__name__}: {error}); {mend}") from error
    cut = torch.cat([torch.cat(parts) for parts in zip(*halves, strict=True)])
    whole = _flat([weight for group in optimizer.param_groups for weight in group["params"]])
    # float32, perhaps in another order of the same sums
    if not torch.allclose(cut, whole, rtol=1e-5, atol=1e-7):
        raise StageError(f"a weight that is cut over ranks is stepped otherwise than a whole one; {mend}")


def _stepped_half(spec: OptimizerSpec, rank: int) -> list[Tensor]:
    """A rank's part of each group after all steps, as DeepSpeed lays them out."""
    weights, optimizer = _built(spec)
    numbers = {id(weight): number for number, weight in enumerate(weights)}
    parts: list[tuple[torch.nn.Parameter, slice, list[Tensor]]] = []
    for group in optimizer.param_groups:
        row = _flat(group["params"])
        place = slice(len(row) // 2, None) if rank else slice(len(row) // 2)
        parts.append((torch.nn.Parameter(row[place].clone()), place, group["params"]))
        group["params"] = [parts[-1][0]]
    for step in range(NUM_STEPS):
        for part, place, whole in parts:
            part.grad = _flat([_gradient(weight, numbers[id(weight)], step) for weight in whole])[place]
        optimizer.step()
    return [part.detach() for part, _, _ in parts]


def _built(spec: OptimizerSpec) -> tuple[list[torch.nn.Parameter], torch.optim.Optimizer]:
    """The weights of a layer, always the same, and their optimizer."""
    # Without drawing from the process's own generator.
    with torch.random.fork_rng(devices=[]):
        layer = torch.nn.Linear(5, 7)
    weights = list(layer.parameters())
    with torch.no_grad():
        for number, weight in enumerate(weights):
            weight.copy_(_gradient(weight, number, -1))
    return weights, spec.build(layer)


def _step(optimizer: torch.optim.Optimizer, weights: Sequence[torch.nn.Parameter], steps: range) -> None:
    for step in steps:
        for number, weight in enumerate(weights):
            weight.grad = _gradient(weight, number, step)
        optimizer.step()


def _gradient(weight: Tensor, number: int, step: int) -> Tensor:
    """Of weight `number` at a step: drawn, of the size that a clipped gradient's elements may have."""
    draw = torch.Generator().manual_seed(100 * (step + 1) + number)
    return 0.1 * torch.randn(weight.shape, generator=draw)


def _flat(weights: Iterable[Tensor]) -> Tensor:
    return torch.cat([weight.detach().flatten() for weight in weights])
