"""How a gradient step is taken: plain torch in one process, or DeepSpeed under accelerate on a gang.

Both take weights that are the same on every rank, and give losses and full weights back; `loop.py` drives them: a step
is `accumulate`, then `apply`, so that what goes around an optimizer's step, such as a perturbation, finds its place.
"""

from __future__ import annotations

import gc
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from raysweep.objectives.base import LearningLoss, Loss
from raysweep.train.optimizers import Optimizer
from raysweep.train.partitions import PartitionedOptimizer, pieces_of
from raysweep.train.saved_state import Range, SavedState, Stepped, ranges_of
from raysweep.worker import Worker

Batch = Mapping[str, torch.Tensor]
Tensors = dict[str, torch.Tensor]


class _Rates:
    """The learning rates of an optimizer's groups, which keep their ratios as a schedule goes."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        # The groups themselves: ZeRO puts its partitions into them, and steps this optimizer.
        self._groups = optimizer.param_groups
        self._peaks = [group["lr"] for group in self._groups]

    def set(self, multiplier: float) -> None:
        """Each group's rate is its peak times `multiplier`."""
        for group, peak in zip(self._groups, self._peaks, strict=True):
            group["lr"] = peak * multiplier


class PlainEngine:
    """One process, whatever process group it may be part of: what `DeepSpeedEngine` is checked against.

    Args:
        model: moved to the worker's device; its weights are trained in place.
        objective: gives the loss of a micro-batch.
        optimizer: builds the optimizer of the model's trainable weights.
        clip_norm: largest norm of a step's gradient, over all weights; None: any.
        bf16: whether products are taken in bfloat16 (autocast); weights and gradients are float32 all the same.
        worker: says where.
    """

    def __init__(
        self,
        model: Any,
        *,
        objective: Loss | LearningLoss,
        optimizer: Optimizer,
        clip_norm: float | None,
        bf16: bool,
        worker: Worker,
    ) -> None:
        self.model = model.to(worker.device)
        self._objective, self._bf16 = objective, bf16
        self._parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self._stepped: Stepped = {n: (each, None) for n, each in model.named_parameters() if each.requires_grad}
        self._optimizer = optimizer.build(model)
        self._rates = _Rates(self._optimizer)
        self._max_norm = clip_norm if clip_norm is not None else float("inf")
        self._device_type = worker.device.split(":")[0]

    def accumulate(self, micro_batches: Sequence[Batch], *, num_tokens: int) -> torch.Tensor:
        """Add the gradients of a step's micro-batches up; this rank's share of the mean loss, not waited for.

        Args:
            micro_batches: this rank's part of the global batch.
            num_tokens: predicted tokens that the mean is over, those of all ranks.

        Returns:
            A scalar, in nats per predicted token: the sum over ranks is the mean loss of the global batch.
        """
        total = torch.zeros((), device=self._parameters[0].device)
        for batch in micro_batches:
            with torch.autocast(self._device_type, torch.bfloat16, enabled=self._bf16):
                loss = self._objective.loss_sum(self.model, batch) / num_tokens
            loss.backward()  # type: ignore[no-untyped-call]
            total += loss.detach()
        return total

    def apply(self, multiplier: float) -> torch.Tensor:
        """Clip what was accumulated, step, and forget it.

        Args:
            multiplier: of each group's own peak learning rate, by the schedule.

        Returns:
            Norm over all weights of the gradient before clipping, a scalar, not waited for.
        """
        norm = torch.nn.utils.clip_grad_norm_(self._parameters, self._max_norm)
        self._rates.set(multiplier)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        return norm

    def weights(self) -> Tensors:
        """All weights and buffers by name, as the model holds them: a later step changes them."""
        return dict(self.model.state_dict())

    def ranges(self) -> dict[str, Range]:
        """This rank's part of the weights and of the optimizer's states, to be saved: see `saved_state`."""
        return ranges_of(self._stepped, self._optimizer, rank=0)

    def load(self, saved: SavedState) -> None:
        """Go on from where a gang of any shape saved its `ranges`; the model has its weights back by then."""
        saved.load(self._stepped, self._optimizer)

    def optimizer_state(self) -> Tensors:
        """NAME.KEY -> each state of a weight, whole: the same on a gang of any shape.

        A weight of [out, in] has states of [out, in], and numbers such as AdamW's count of steps.
        """
        return _named(optimizer_tensors(self._optimizer, self._parameters), list(self._stepped))

    def set_optimizer_state(self, state: Tensors) -> None:
        """Go on with what `optimizer_state` gave, of these weights.

        Raises:
            KeyError: if a name is of no trainable weight.
        """
        tensors = _indexed(state, list(self._stepped), self._parameters)
        set_optimizer_tensors(self._optimizer, self._parameters, tensors)

    def close(self) -> None:
        """Give the memory of gradients and optimizer back."""
        for parameter in self._parameters:
            parameter.grad = None


# DeepSpeed would add up the gradients of micro-batches, and of ranks, in the model's bfloat16. Measured on a model of
# 0.1 M parameters, ZeRO 1 to 3: of 64 micro-batches the gradient was off by 1.12 % of its norm, and is by 0.71 % to
# 0.73 % (by 0.73 % with a single one: weights and the gradient of each micro-batch stay rounded to bfloat16; float32
# weights under autocast, as in one process: 0.37 %). Sums of ranks in float32 take twice the bytes.
SUMS_IN_FP32 = {"data_types": {"grad_accum_dtype": "fp32"}, "communication_data_type": "fp32"}


class DeepSpeedEngine:
    """A gang under DeepSpeed ZeRO 0, 1, 2 or 3, through accelerate's plugin; gradients are summed in float32.

    Args:
        model: the same weights on every rank.
        objective, optimizer, clip_norm: see `PlainEngine`.
        bf16: whether products are taken in bfloat16; what is stepped is float32 all the same.
        worker: this rank, and the stage of ZeRO.
        num_micro_batches: of each rank in every step.
        micro_batch_sequences: in each of them, at most.
    """

    def __init__(
        self,
        model: Any,
        *,
        objective: Loss | LearningLoss,
        optimizer: Optimizer,
        clip_norm: float | None,
        bf16: bool,
        worker: Worker,
        num_micro_batches: int,
        micro_batch_sequences: int,
    ) -> None:
        from accelerate import Accelerator
        from accelerate.utils import DeepSpeedPlugin

        _forget_accelerate()
        # Weights in bfloat16, and their float32 masters in the optimizer's partitions. Without ZeRO there are none:
        # float32 weights under autocast, as in one process.
        self._has_masters = bf16 and worker.zero_stage > 0
        if bf16 and not self._has_masters:
            model.forward = torch.autocast(worker.device.split(":")[0], torch.bfloat16)(model.forward)
        zero: dict[str, Any] = {"stage": worker.zero_stage}
        if worker.zero_stage == 3:
            # Small parameters stay whole on every rank otherwise, and what is gathered would depend on a default.
            zero |= {"stage3_param_persistence_threshold": 0, "stage3_gather_16bit_weights_on_model_save": True}
        config = {
            "train_micro_batch_size_per_gpu": micro_batch_sequences,
            "gradient_accumulation_steps": num_micro_batches,
            "gradient_clipping": clip_norm or 0.0,
            "zero_optimization": zero,
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
            "bf16": {"enabled": self._has_masters},
            "steps_per_print": 10**9,
            "wall_clock_breakdown": False,
        } | SUMS_IN_FP32
        # ZeRO-3 puts a function of its own in its place, for good: one that has no forward mode, which later stages of
        # this process need.
        self._linear = torch.nn.functional.linear
        plugin = DeepSpeedPlugin(hf_ds_config=config, zero3_init_flag=False)
        # Not `cpu=True`, with which accelerate would take DDP in place of DeepSpeed.
        self._accelerator = Accelerator(mixed_precision="bf16" if self._has_masters else "no", deepspeed_plugin=plugin)
        self._objective, self._worker = objective, worker
        self._base = optimizer.build(model)
        self._rates = _Rates(self._base)
        self._engine, self._optimizer = self._accelerator.prepare(model, self._base)
        self._num_micro_batches = num_micro_batches
        weights = {name: each for name, each in self._engine.module.named_parameters() if each.requires_grad}
        self._stepped: Stepped = {name: (weight, None) for name, weight in weights.items()}
        if worker.zero_stage:
            pieces = pieces_of(self._engine.optimizer, weights.values())
            self._stepped = {name: (piece.master, piece) for name, piece in zip(weights, pieces, strict=True)}
            if isinstance(self._base, PartitionedOptimizer):
                self._base.partition(dict(zip(weights.values(), pieces, strict=True)))

    def accumulate(self, micro_batches: Sequence[Batch], *, num_tokens: int) -> torch.Tensor:
        """See `PlainEngine.accumulate`. With the last micro-batch, gradients are summed over ranks."""
        engine = self._engine
        # DeepSpeed takes the mean over ranks and micro-batches; ours is a sum over the tokens of all of them.
        scale = self._worker.world_size * self._num_micro_batches / num_tokens
        total = torch.zeros((), device=self._worker.device)
        for index, batch in enumerate(micro_batches):
            is_last = index == len(micro_batches) - 1
            engine.set_gradient_accumulation_boundary(is_last)
            loss = self._objective.loss_sum(engine, batch)
            engine.backward(loss * scale)
            if not is_last:  # Counts the micro-batch; at the boundary it would step the optimizer too.
                engine.step()
            total += loss.detach() / num_tokens
        return total

    def apply(self, multiplier: float) -> torch.Tensor:
        """See `PlainEngine.apply`; the norm is that of the gradient summed over ranks, the same on all."""
        engine = self._engine
        if self._worker.zero_stage == 0:
            # Without ZeRO, DeepSpeed clips by this norm but does not tell it.
            whole = torch.nn.utils.get_total_norm([p.grad for p in engine.parameters() if p.grad is not None])
        self._rates.set(multiplier)
        engine.step()
        norm = engine.get_global_grad_norm()
        return whole if norm is None else torch.as_tensor(norm)

    def weights(self) -> Tensors:
        """All weights in float32, by name, gathered from the ranks; to be called by every rank, used by rank 0."""
        weights = dict(self._accelerator.get_state_dict(self._engine) or {})
        if self._has_masters:
            from deepspeed.utils import safe_get_full_fp32_param

            # The model's own are rounded to bfloat16; what the optimizer steps, and one process trains, is not.
            for name, parameter in self._engine.module.named_parameters(remove_duplicate=False):
                weights[name] = safe_get_full_fp32_param(parameter).detach().clone()
        return weights

    def ranges(self) -> dict[str, Range]:
        """See `PlainEngine.ranges`."""
        return ranges_of(self._stepped, self._base, rank=self._worker.rank)

    def load(self, saved: SavedState) -> None:
        """See `PlainEngine.load`."""
        saved.load(self._stepped, self._base)

    def optimizer_state(self) -> Tensors:
        """See `PlainEngine.optimizer_state`; to be called by every rank, used by rank 0."""
        state: Tensors = {}
        for name, (stepped, piece) in self._stepped.items():
            for key, value in self._base.state[stepped].items():
                # A number, such as AdamW's count of steps, is the same for all elements.
                whole = piece.join(value)[0] if piece and value.dim() else value
                state[f"{name}.{key}"] = whole.detach().cpu().clone()
        return state

    def set_optimizer_state(self, state: Tensors) -> None:
        """See `PlainEngine.set_optimizer_state`; each rank is given all of it, and keeps its part."""
        for name_and_key, given in state.items():
            name, _, key = name_and_key.rpartition(".")
            stepped, piece = self._stepped[name]
            states, value = self._base.state[stepped], given.to(self._worker.device)
            if piece and value.dim():
                if key not in states:
                    states[key] = torch.zeros_like(stepped)
                piece.take(value, states[key])
            else:
                states[key] = value

    def set_weights(self, weights: Tensors) -> None:
        """Step from these whole weights, where those of the model were rounded to bfloat16."""
        for name, (master, piece) in self._stepped.items():
            if piece:
                piece.take(weights[name].to(self._worker.device), master)

    def close(self) -> None:
        """Take the engine down; the process group stays."""
        self._engine.destroy()
        self._accelerator.free_memory()
        del self._engine, self._optimizer, self._base, self._rates, self._stepped
        torch.nn.functional.linear = self._linear
        _forget_accelerate()
        gc.collect()


def _forget_accelerate() -> None:
    """Accelerate keeps its set-up for the life of the process; the next stage may want another."""
    from accelerate.state import AcceleratorState, GradientState, PartialState

    AcceleratorState._reset_state(reset_partial_state=False)
    PartialState._reset_state()
    GradientState._reset_state()


def optimizer_tensors(optimizer: torch.optim.Optimizer, parameters: Sequence[torch.Tensor]) -> Tensors:
    """All that is saved of an optimizer, as state.INDEX.KEY; `parameters` are what it steps."""
    return {
        f"state.{index}.{name}": torch.as_tensor(value).detach().clone()
        for index, parameter in enumerate(parameters)
        for name, value in optimizer.state.get(parameter, {}).items()
        if value is not None
    }


def _named(tensors: Tensors, names: Sequence[str]) -> Tensors:
    """Tensors by state.INDEX.KEY, as an optimizer has them, by NAME.KEY, which holds for any."""
    split = {key: key.split(".", 2) for key in tensors}
    return {f"{names[int(split[key][1])]}.{split[key][2]}": value for key, value in tensors.items()}


def _indexed(state: Tensors, names: Sequence[str], parameters: Sequence[torch.Tensor]) -> Tensors:
    """The inverse of `_named`, on the weights' device; a KeyError if a name is of no weight."""
    index = {name: str(place) for place, name in enumerate(names)}
    split = {key: key.rpartition(".") for key in state}
    device = parameters[0].device
    return {f"state.{index[split[key][0]]}.{split[key][2]}": value.to(device) for key, value in state.items()}


def set_optimizer_tensors(
    optimizer: torch.optim.Optimizer, parameters: Sequence[torch.Tensor], tensors: Mapping[str, torch.Tensor]
) -> None:
    """Go on with what `optimizer_tensors` gave."""
    for key, value in tensors.items():
        _, index, name = key.split(".", 2)
        optimizer.state.setdefault(parameters[int(index)], {})[name] = value
