"""The one training loop, of pretraining and fine-tuning.

The batch of a step is global: its loss is the summed loss over all labelled tokens of it, divided by their number,
however it is cut over ranks and micro-batches.
"""

from __future__ import annotations

import logging
import math
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from raysweep.allocator import keep_freed_memory
from raysweep.errors import Diverged
from raysweep.objectives.base import LearningLoss, Loss
from raysweep.objectives.output_loss import use_loss_layer
from raysweep.train.ascent import Step
from raysweep.train.compiled import compile_blocks
from raysweep.train.deepspeed_engine import DeepSpeedEngine
from raysweep.train.engines import PlainEngine, Tensors
from raysweep.train.flat import AVERAGE, FlatSpec
from raysweep.train.micro_batches import Cutter, draws_seed, num_read
from raysweep.train.models import fuse_norms
from raysweep.train.optimizers import Optimizer
from raysweep.train.saved_state import LEARNT, Range, SavedState, find_damage, write_state
from raysweep.train.schedules import Schedule
from raysweep.worker import Reached, StateDir, Worker

logger = logging.getLogger(__name__)

# Steps between looks at the losses: each look waits for the device.
LOOK_EVERY = 10

# A mean loss over LOOK_EVERY steps of this many times the first step's, taken as 1 nat if it is less, has run away:
# fine-tuning may start near zero, where batches differ by more than that.
RUNAWAY = 3.0

_STEP = re.compile(r"step-(\d{1,18})", re.ASCII)

GetBatch = Callable[[int], Mapping[str, Any]]
"""step -> global batch; see `objectives.base.Arrays`.

Where `lengths` are given, one process computes rows of like length together, without most of the padding.
"""


@dataclass(frozen=True)
class Training:
    """A training up to some step. `losses` (nats per token) and `grad_norms` are those of every step from 0."""

    losses: list[float]
    grad_norms: list[float]
    weights: Tensors = field(repr=False)
    """By name; empty on ranks other than 0."""
    tokens_per_second: float
    """Read in this call."""
    num_predicted: list[int]
    """Tokens that were predicted in each step from 0."""
    gangs: list[dict[str, int]]
    """What trained it, one after another: the first step of each, its `num_workers` and `zero_stage`."""


def train(
    model: Any,
    batches: GetBatch,
    *,
    objective: Loss,
    optimizer: Optimizer,
    schedule: Schedule,
    num_steps: int,
    seed: int,
    steps_before: int = 0,
    stop_step: int | None = None,
    clip_norm: float | None = 1.0,
    bf16: bool = False,
    worker: Worker,
    states: StateDir | None = None,
    save_every_seconds: float = 600.0,
    is_start_exact: bool = False,
    optimizer_from: Path | None = None,
    optimizer_out: Path | None = None,
    flat: FlatSpec | None = None,
) -> Training:
    """Train `model` to `stop_step`; to be called by every rank of the gang.

    With `states` it goes on from the last state saved there at or before `stop_step`, and saves one every
    `save_every_seconds`, when `worker.save_asked`, and at the end. On the CPU, and on a gang of the shape that saved
    it, that gives the same bits as no break; a gang of other ranks or another ZeRO stage goes on too, and its sums are
    rounded otherwise. What a model draws in a step (dropout) follows from `seed`, the step and the rank alone.

    Args:
        model: a Hugging Face language model or a `Classifier`, with the same weights on every rank; changed.
        batches: gives the global batch of each step from 0, the same on every rank.
        objective: what is minimised.
        optimizer: how weights move, at its peak rate.
        schedule: factor on that rate at each step.
        num_steps: over which the schedule goes.
        seed: of what the model draws.
        steps_before: those of earlier trainings that this one goes on from: its step 0 draws as the next one of these.
        stop_step: number of steps after which to stop; None: num_steps.
        clip_norm: largest norm of a step's gradient, over all weights; None: any.
        bf16: whether products are taken in bfloat16; the optimizer's weights are float32 all the same.
        worker: this rank, and how many sequences it takes at a time; in another shape of gang sums are rounded
            otherwise, and dropout draws otherwise.
        states: where; None: nothing is saved on the way.
        save_every_seconds: at least so long between two states, but for the last and those that are asked for.
        is_start_exact: whether to begin with the very weights of `model`, where ZeRO would round them to bfloat16.
        optimizer_from: the optimizer's state to begin with, of a file that a training left as `optimizer_out`.
        optimizer_out: where to write it at the end: full tensors by the weight's name, for a gang of any shape.
        flat: what draws it to flat minima; its averages, where it has some, are the weights that are given back.

    Raises:
        Diverged: on every rank, if a loss or gradient is not finite, or the loss runs away.
    """
    stop = num_steps if stop_step is None else stop_step
    saved = _latest(states, stop, worker)
    if saved:
        saved.load_weights(model)
    if worker.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    first_batch = batches(0)
    if worker.device.startswith("cuda"):
        # On a CPU, where memory is seldom short, the loss of all logits at once is as fast.
        use_loss_layer(model, compiled=worker.compile)
    else:
        keep_freed_memory()
    # Compiled blocks want batches of one shape; and they fuse norms by themselves.
    if worker.compile and "lengths" not in first_batch:
        compile_blocks(model)
    else:
        fuse_norms(model)
    model.train()
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    exact = is_start_exact and bf16 and worker.zero_stage > 0
    weights = {name: each.detach().clone() for name, each in model.named_parameters()} if exact else {}
    # DeepSpeed is told the number of micro-batches before the first; all batches have as many sequences.
    cutter = Cutter(worker, num_sequences=len(first_batch["input_ids"]))
    learning = objective.learning()
    settings: dict[str, Any] = {
        "objective": learning or objective,
        "optimizer": optimizer,
        "clip_norm": clip_norm,
        "bf16": bf16,
        "worker": worker,
    }
    engine: PlainEngine | DeepSpeedEngine
    if worker.world_size == 1 and worker.zero_stage == 0:
        engine = PlainEngine(model, **settings)
    else:
        engine = DeepSpeedEngine(
            model,
            **settings,
            num_micro_batches=cutter.num_micro,
            micro_batch_sequences=cutter.micro_sequences,
            has_own_steps=flat is not None and flat.has_own_steps,
        )
    try:
        log = _Log(**saved.log) if saved else _Log([], [], [], [])
        if len(log.losses) < stop:
            log.enter(worker)
        if saved:
            engine.load(saved)
            if learning:
                learning.load_state({key: saved.read(LEARNT, key) for key in saved.keys(LEARNT)}, worker.device)
            saved = None  # Its open files would keep their room on the disk when the state is dropped.
            logger.info("going on from step %d of %d", len(log.losses), num_steps)
        else:
            if exact and isinstance(engine, DeepSpeedEngine):
                engine.set_weights(weights)
            if optimizer_from:
                engine.set_optimizer_state(_fitted(load_file(optimizer_from), shapes))
        first, began, num_tokens = len(log.losses), time.perf_counter(), 0
        last_save = time.monotonic()
        window: list[tuple[torch.Tensor, torch.Tensor]] = []
        for step in range(first, stop):
            batch = batches(step)
            num_tokens += num_read(batch)
            log.num_predicted.append(objective.num_predicted(batch))
            taken = Step(
                engine,
                batch,
                objective=objective,
                cutter=cutter,
                worker=worker,
                # Anew at each step, so that a run that is resumed draws what one without a break does.
                draws=draws_seed(seed, step=steps_before + step, rank=worker.rank),
                common_draws=draws_seed(seed, step=steps_before + step, rank=None),
                number=step,
                multiplier=schedule.multiplier(step, num_steps),
            )
            window.append(flat.take(taken) if flat else taken.plain())
            if flat:
                flat.end_step(engine.tensors, engine.states, step=step, num_steps=num_steps)
            if learning:
                learning.end_step(worker.sum)
            if step == stop - 1 or step % LOOK_EVERY == LOOK_EVERY - 1:
                due = time.monotonic() - last_save > save_every_seconds or worker.save_asked()
                due = log.take(window, due=due, worker=worker)
                window = []
                rate = num_tokens / (time.perf_counter() - began)
                worker.report(Reached(step + 1, loss=log.losses[-1], num_tokens=num_tokens, tokens_per_second=rate))
                if states and (due or step == stop - 1):
                    _save(engine, learning, log, states, worker)
                    worker.report(Reached(step + 1, saved_step=step + 1))
                    last_save = time.monotonic()
        seconds = time.perf_counter() - began
        if optimizer_out:
            # A later phase's averages are its own.
            whole = engine.optimizer_state()
            state = {name: whole[name] for name in whole if not name.rpartition(".")[2].startswith(AVERAGE)}
            if worker.rank == 0:
                save_file({name: value.contiguous() for name, value in state.items()}, optimizer_out)
        weights = engine.weights()
        if flat:
            weights |= engine.average(flat.mean)
        return Training(
            losses=log.losses,
            grad_norms=log.grad_norms,
            weights=weights if worker.rank == 0 else {},
            tokens_per_second=num_tokens / seconds if stop > first else math.nan,
            num_predicted=log.num_predicted,
            gangs=log.gangs,
        )
    finally:
        engine.close()


def _fitted(state: Tensors, shapes: Mapping[str, torch.Size]) -> Tensors:
    """The optimizer's state, with zeros for the rows that a weight has gained since."""
    fitted = {}
    for key, value in state.items():
        shape = shapes[key.rpartition(".")[0]]
        if value.dim() and value.shape != shape:
            whole = torch.zeros(shape, dtype=value.dtype)
            whole[: len(value)] = value
            value = whole
        fitted[key] = value
    return fitted


@dataclass
class _Log:
    """What every step so far gave."""

    losses: list[float]
    grad_norms: list[float]
    num_predicted: list[int]
    gangs: list[dict[str, int]]

    def take(self, window: list[tuple[torch.Tensor, torch.Tensor]], *, due: bool, worker: Worker) -> bool:
        """Add the steps of a window, summed over ranks; whether any of them says it is time to save.

        Raises:
            Diverged: see `train`.
        """
        # One wait for the device and one collective for the whole window.
        losses = torch.stack([loss for loss, _ in window]).double()
        norms = [float(norm) for _, norm in window]
        shared = torch.cat([losses, torch.tensor([float(due)], device=losses.device).double()])
        if worker.world_size > 1:
            torch.distributed.all_reduce(shared)
        *values, flag = shared.tolist()
        for value, norm in zip(values, norms, strict=True):
            if not (math.isfinite(value) and math.isfinite(norm)):
                raise Diverged(len(self.losses), value)
            self.losses.append(value)
            self.grad_norms.append(norm)
        if sum(values) / len(values) > RUNAWAY * max(self.losses[0], 1.0):
            raise Diverged(len(self.losses) - 1, self.losses[-1])
        return bool(flag > 0)

    def enter(self, worker: Worker) -> None:
        """Note that from now on steps are this gang's."""
        gang = {"first_step": len(self.losses), "num_workers": worker.world_size, "zero_stage": worker.zero_stage}
        last = self.gangs[-1] if self.gangs else {}
        if {**last, "first_step": 0} != {**gang, "first_step": 0}:
            self.gangs.append(gang)


def _save(
    engine: PlainEngine | DeepSpeedEngine, learning: LearningLoss | None, log: _Log, states: StateDir, worker: Worker
) -> None:
    """Save the state after the last step, then drop older ones; it counts once its last file is there."""
    name = f"step-{len(log.losses)}"
    if worker.rank == 0:
        states.remove(name)  # Of a gang that was killed as it saved, or one that cannot be used.
    worker.barrier()
    ranges = engine.ranges()
    if learning and worker.rank == 0:  # The same on every rank.
        learnt = learning.state().items()
        ranges |= {f"{LEARNT}.{key}": Range(tuple(value.shape), 0, value.flatten()) for key, value in learnt}
    write_state(states, name, ranges, asdict(log), worker)
    if worker.rank == 0:
        for old in filter(_STEP.fullmatch, states.names() - {name}):
            states.remove(old)
    worker.barrier()
    states.drop_copies(but=name)


def _latest(states: StateDir | None, stop: int, worker: Worker) -> SavedState | None:
    """The latest saved state at or before `stop`, whatever gang has saved it; to be called by every rank."""
    if states is None:
        return None
    # What rank 0 finds: others may see a folder that is older or newer by a moment.
    found = worker.gather([int(name[1]) for name in map(_STEP.fullmatch, states.names()) if name])[0]
    for step in sorted((each for each in found if each <= stop), reverse=True):
        name = f"step-{step}"
        if not (damage := find_damage(states, name, worker)):
            return SavedState(states.path / name)
        if worker.rank == 0:
            logger.warning("state %s is not used: %s", states.path / name, damage)
    return None
