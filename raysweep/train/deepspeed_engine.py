"""Steps of a gang under DeepSpeed, through accelerate's plugin: the interface is `PlainEngine`'s."""

from __future__ import annotations

import contextlib
import gc
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from raysweep.objectives.base import LearningLoss, Loss
from raysweep.train.engines import Batch, LossSum, Mean, Rates, Tensors, average_of, dot
from raysweep.train.optimizers import Optimizer
from raysweep.train.partitions import PartitionedOptimizer, masters_of, pieces_of
from raysweep.train.saved_state import Range, SavedState, Stepped, ranges_of
from raysweep.worker import Worker

# DeepSpeed would add up the gradients of micro-batches, and of ranks, in the model's bfloat16: of 64 micro-batches the
# gradient is then off by 1.15 % of its norm, and so by 0.62 % (tests/benchmarks/accumulation.py; by 0.64 % of a single
# one, as weights and the gradient of each stay rounded to bfloat16; float32 weights under autocast, as in one process:
# 0.47 %). Sums of ranks in float32 take twice the bytes.
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
        has_own_steps: whether gradients are taken, and it is `step` that clips and steps. DeepSpeed then only sums and
            shards them, and brings weights to the ranks that compute with them.
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
        has_own_steps: bool = False,
    ) -> None:
        from accelerate import Accelerator
        from accelerate.utils import DeepSpeedPlugin
        from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

        _import_muon()
        _forget_accelerate()
        # Weights in bfloat16, and their float32 masters in the optimizer's partitions. Without ZeRO there are none:
        # float32 weights under autocast, as in one process.
        self._has_masters = bf16 and worker.zero_stage > 0
        if bf16 and not self._has_masters:
            model.forward = torch.autocast(worker.device.split(":")[0], torch.bfloat16)(model.forward)
        # The buffer that gradients are reduced in is of this size however small the model is: 2 GB by default.
        num_trained = sum(each.numel() for each in model.parameters() if each.requires_grad)
        bucket = min(num_trained, int(DeepSpeedZeroConfig().reduce_bucket_size))
        zero: dict[str, Any] = {"stage": worker.zero_stage, "reduce_bucket_size": bucket}
        if worker.zero_stage == 3:
            # Small parameters stay whole on every rank otherwise, and what is gathered would depend on a default.
            zero |= {"stage3_param_persistence_threshold": 0, "stage3_gather_16bit_weights_on_model_save": True}
        config = {
            "train_micro_batch_size_per_gpu": micro_batch_sequences,
            "gradient_accumulation_steps": num_micro_batches,
            "gradient_clipping": 0.0 if has_own_steps else clip_norm or 0.0,
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
        self._rates = Rates(self._base)
        self._max_norm = clip_norm if clip_norm is not None else float("inf")
        self._taker = _Taker(self._base) if has_own_steps else None
        self._engine, self._optimizer = self._accelerator.prepare(model, self._taker or self._base)
        self._num_micro_batches = num_micro_batches
        weights = {name: each for name, each in self._engine.module.named_parameters() if each.requires_grad}
        self._stepped: Stepped = {name: (weight, None) for name, weight in weights.items()}
        if worker.zero_stage:
            pieces = pieces_of(self._engine.optimizer, weights.values())
            self._stepped = {name: (piece.master, piece) for name, piece in zip(weights, pieces, strict=True)}
            if isinstance(self._base, PartitionedOptimizer):
                self._base.partition(dict(zip(weights.values(), pieces, strict=True)))

    def accumulate(
        self, micro_batches: Sequence[Batch], *, num_tokens: int, loss_sum: LossSum | None = None
    ) -> torch.Tensor:
        """See `PlainEngine.accumulate`. With the last micro-batch, gradients are summed over ranks."""
        engine = self._engine
        # DeepSpeed takes the mean over ranks and micro-batches; ours is a sum over the tokens of all of them.
        scale = self._worker.world_size * self._num_micro_batches / num_tokens
        total = torch.zeros((), device=self._worker.device)
        for index, batch in enumerate(micro_batches):
            is_last = index == len(micro_batches) - 1
            engine.set_gradient_accumulation_boundary(is_last)
            loss = (loss_sum or self._objective.loss_sum)(engine, batch)
            engine.backward(loss * scale)
            if not is_last:  # Counts the micro-batch; at the boundary it would step the optimizer too.
                engine.step()
            total += loss.detach() / num_tokens
        return total

    def apply(self, multiplier: float) -> torch.Tensor:
        """See `PlainEngine.apply`; the norm is that of the gradient summed over ranks, the same on all."""
        if self._taker:
            return self.step(self.take(), multiplier)
        engine = self._engine
        if self._worker.zero_stage == 0:
            # Without ZeRO, DeepSpeed clips by this norm but does not tell it.
            whole = torch.nn.utils.get_total_norm([p.grad for p in engine.parameters() if p.grad is not None])
        self._rates.set(multiplier)
        engine.step()
        norm = engine.get_global_grad_norm()
        return whole if norm is None else torch.as_tensor(norm)

    @property
    def tensors(self) -> list[torch.Tensor]:
        """See `PlainEngine.tensors`: without ZeRO the weights, else this rank's partitions."""
        return masters_of(self._engine.optimizer)

    @property
    def states(self) -> list[dict[str, Any]]:
        """See `PlainEngine.states`."""
        return [self._base.state[each] for each in self.tensors]

    def take(self) -> list[torch.Tensor]:
        """See `PlainEngine.take`; summed over ranks, as `accumulate` has left them."""
        assert self._taker
        self._taker.gradients.clear()
        # Which brings the weights to all ranks, too, as if they had been stepped.
        self._engine.step()
        return [self._taker.gradients.pop(each)[1] for each in self.tensors]

    def push(self) -> None:
        """See `PlainEngine.push`."""
        optimizer = self._engine.optimizer
        if self._worker.zero_stage == 3:
            for index in range(len(optimizer.fp16_groups)):
                optimizer._reassign_or_swap_out_partitioned_parameters(index)
        elif self._worker.zero_stage:
            optimizer.update_lp_params()

    def dot(self, left: Sequence[torch.Tensor], right: Sequence[torch.Tensor]) -> torch.Tensor:
        """See `PlainEngine.dot`."""
        total = dot(left, right)
        if self._worker.zero_stage:
            torch.distributed.all_reduce(total)
        return total

    def step(self, gradients: Sequence[torch.Tensor], multiplier: float) -> torch.Tensor:
        """See `PlainEngine.step`."""
        assert self._taker
        norm = self.dot(gradients, gradients).sqrt()
        # As `torch.nn.utils.clip_grad_norm_` does.
        torch._foreach_mul_(list(gradients), (self._max_norm / (norm + 1e-6)).clamp(max=1.0))
        self._rates.set(multiplier)
        self._taker.step_base(dict(zip(self.tensors, gradients, strict=True)))
        self.push()
        return norm

    def average(self, mean: Mean) -> Tensors:
        """See `PlainEngine.average`; to be called by every rank, used by rank 0."""
        return average_of(self._engine.module, self._stepped, self._base, mean)

    def weights(self) -> Tensors:
        """All weights by name, gathered from the ranks; to be called by every rank, used by rank 0.

        Trained ones are in float32; those that take no gradient are as the engine multiplies them.
        """
        weights = dict(self._accelerator.get_state_dict(self._engine) or {})
        if self._has_masters:
            from deepspeed.utils import safe_get_full_fp32_param

            # The model's own are rounded to bfloat16; what the optimizer steps, and one process trains, is not.
            for name, parameter in self._engine.module.named_parameters(remove_duplicate=False):
                if parameter.requires_grad:
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
        del self._engine, self._optimizer, self._base, self._taker, self._rates, self._stepped
        torch.nn.functional.linear = self._linear
        _forget_accelerate()
        gc.collect()


class _Taker(torch.optim.Optimizer):
    """Stands for an optimizer before DeepSpeed, and takes the gradients that this would step by.

    Args:
        base: whose groups it shares: DeepSpeed puts its partitions into them, for good or (ZeRO-3) for a step.
    """

    def __init__(self, base: torch.optim.Optimizer) -> None:
        super().__init__(base.param_groups, {})
        self._base = base
        self.gradients: dict[torch.Tensor, tuple[int, torch.Tensor]] = {}
        """What is stepped -> the number of its group, and its gradient."""
        self._places: dict[torch.Tensor, int] = {}

    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Take the gradients of what its groups hold now."""
        assert closure is None, "losses are computed before"
        # By identity: ZeRO hands it one group at a time.
        numbers = {id(group): number for number, group in enumerate(self._base.param_groups)}
        for group in self.param_groups:
            for each in group["params"]:
                # A copy, as DeepSpeed may use its buffer again.
                given = torch.zeros_like(each) if each.grad is None else each.grad.clone()
                self.gradients[each] = (numbers[id(group)], given)
                self._places[each] = numbers[id(group)]

    def step_base(self, gradients: Mapping[torch.Tensor, torch.Tensor]) -> None:
        """Have the base step all that it was handed, by these gradients."""
        groups = self._base.param_groups
        held = [group["params"] for group in groups]
        for number, group in enumerate(groups):
            group["params"] = [each for each, place in self._places.items() if place == number]
        for each, gradient in gradients.items():
            each.grad = gradient
        self._base.step()
        for group, each in zip(groups, held, strict=True):
            group["params"] = each
        for each in gradients:
            each.grad = None


def _import_muon() -> None:
    """Import DeepSpeed's own Muon, which is never used here, without torch's compiler.

    DeepSpeed looks whether an optimizer is one. Its module decorates functions with `torch.compile`, for which torch
    imports the whole of Inductor: 2.4 s of each process's first stage (of 3.2; CPU, 12 steps of a tiny model).
    """
    before = os.environ.get("TORCHDYNAMO_DISABLE")
    os.environ["TORCHDYNAMO_DISABLE"] = "1"  # Read as a function is decorated, so that others are still compiled.
    try:
        with contextlib.suppress(ImportError):  # Where another version has it elsewhere, it takes its time.
            import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: F401
    finally:
        del os.environ["TORCHDYNAMO_DISABLE"]
        if before is not None:
            os.environ["TORCHDYNAMO_DISABLE"] = before


def _forget_accelerate() -> None:
    """Accelerate keeps its set-up for the life of the process; the next stage may want another."""
    from accelerate.state import AcceleratorState, GradientState, PartialState

    AcceleratorState._reset_state(reset_partial_state=False)
    PartialState._reset_state()
    GradientState._reset_state()
