"""What a sweep will cost, from its declaration alone: stages, tokens, FLOPs, memory, GPU-hours. Nothing is computed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from raysweep.plan import Stage, Trial
from raysweep.search import Resources
from raysweep.space import SearchSpace
from raysweep.stages.flatness import Flatness
from raysweep.stages.indicators import Indicators
from raysweep.stages.pretrain import Pretrain, Recipe
from raysweep.stages.sft import MAX_LENGTH, Sft
from raysweep.store import Store
from raysweep.tasks.spans import PCFGSpan

TYPICAL_LENGTH = 128
"""Tokens of a fine-tuning example, assumed; the text is not read for a plan."""


@dataclass(frozen=True)
class Plan:
    """A sweep's cost. `stages`, `stages_done`: distinct stages by kind; `flops` and `tokens`: what is still to do."""

    name: str
    run: str
    num_variants: int
    num_trials: int
    stages: Mapping[str, int]
    stages_done: Mapping[str, int]
    num_parameters: tuple[int, int] | None
    """Smallest and largest; None if all checkpoints exist already."""
    tokens: int
    """Of pretraining."""
    flops: float
    memory_bytes_per_worker: int
    """Of the largest training; the accelerator's own context not counted."""
    gpu_hours: float
    mfu: float
    peak_flops: float
    flatness_rse: float | None
    """Relative standard error of Hessian traces that the flatness budget is expected to give."""
    note: str

    def to_dict(self) -> dict[str, Any]:
        """As JSON values."""
        total, done = sum(self.stages.values()), sum(self.stages_done.values())
        return asdict(self) | {"num_stages": total, "num_stages_done": done, "num_stages_to_do": total - done}


def estimate(space: SearchSpace, store: Store, *, mfu: float, peak_flops: float) -> Plan:
    """Expand a sweep and add its stages up; shared stages count once.

    Args:
        space: the sweep.
        store: looked at for what is finished, by one listing.
        mfu: model FLOPs utilization assumed, of `peak_flops` per GPU.
        peak_flops: FLOP/s of one GPU.
    """
    search = space.declared.search
    picked_later = search.name == "optuna"
    points = [{}] * (search.num_trials or 0) if picked_later else list(space.points())
    finished = set() if picked_later else store.finished_ids()
    seen: set[str] = set()
    stages: Counter[str] = Counter()
    done: Counter[str] = Counter()
    sizes: list[int] = []
    tokens, flops, memory = 0, 0.0, 0
    rse: float | None = None
    for point in points:
        for seed in space.declared.seeds:
            trial = space.trial(point, seed)
            recipe = recipe_of(trial)
            if recipe:
                sizes.append(recipe.num_parameters)
                memory = max(memory, training_memory_bytes(recipe, space.declared.resources))
            for stage in trial.stages:
                if stage.id in seen and not picked_later:
                    continue
                seen.add(stage.id)
                stages[stage.kind] += 1
                if isinstance(stage.spec, Flatness):
                    rse = max(rse or 0.0, stage.spec.predict()[1])
                if stage.id in finished:
                    done[stage.kind] += 1
                    continue
                flops += stage_flops(stage, trial)
                tokens += _pretraining_tokens(stage, trial)
    notes = ["Optuna picks the points; counted as if each were the base recipe."] if picked_later else []
    if (sft := space.declared.sft) and sft.lrs == "auto":
        rates = ", ".join(f"{lr:g}" for lr in sft.first_lrs)
        notes.append(f"sft.lrs auto: counted are the rates it begins with ({rates}), so there are at least so many.")
    return Plan(
        name=space.name,
        run=space.run_name(),
        num_variants=len(points),
        num_trials=len(points) * len(space.declared.seeds),
        stages=dict(stages),
        stages_done=dict(done),
        num_parameters=(min(sizes), max(sizes)) if sizes else None,
        tokens=tokens,
        flops=flops,
        memory_bytes_per_worker=memory,
        gpu_hours=flops / (mfu * peak_flops) / 3600,
        mfu=mfu,
        peak_flops=peak_flops,
        flatness_rse=rse,
        note=" ".join(notes),
    )


def recipe_of(trial: Trial) -> Recipe | None:
    """The recipe of a trial; None if its checkpoint exists already."""
    return next((stage.spec.recipe for stage in trial.stages if isinstance(stage.spec, Pretrain)), None)


def gradient_flops_per_token(recipe: Recipe) -> float:
    """Forward and backward: 6 N + 12 L h s (Chowdhery et al., 2022, appendix B)."""
    model = recipe.model
    return 6.0 * recipe.num_parameters + 12.0 * model.num_layers * model.hidden_size * recipe.sequence_length


def stage_flops(stage: Stage, trial: Trial) -> float:
    """FLOPs of a stage; 0 where it trains and measures no model, or the model's size is not known."""
    recipe, spec = recipe_of(trial), stage.spec
    if recipe is None:
        return 0.0
    gradient = gradient_flops_per_token(recipe)
    if isinstance(spec, Pretrain):
        return gradient * _pretraining_tokens(stage, trial)
    if isinstance(spec, Flatness):
        return gradient * spec.predict()[0]
    if isinstance(spec, Indicators):
        heldout = spec.max_sequences * spec.sequence_length * len(recipe.data.domains)
        scored = spec.max_examples * len(spec.tasks) * min(MAX_LENGTH, (2 + spec.kshot) * TYPICAL_LENGTH)
        return gradient / 3 * (heldout + scored)
    if isinstance(spec, Sft):
        task = spec.task
        num, length = (
            (task.num_train, recipe.sequence_length)
            if isinstance(task, PCFGSpan)
            else (task.max_train_examples, TYPICAL_LENGTH)
        )
        return gradient * spec.hyperparameters.epochs * num * length
    return 0.0


def training_memory_bytes(recipe: Recipe, resources: Resources) -> int:
    """Of one worker in pretraining: weights, gradients, optimizer state as ZeRO shards them, and activations.

    Activations of a layer: s b h (34 + 5 a s / h) bytes in 16 bits without fused attention (Korthikanti et al., 2022),
    2 s b h where they are recomputed; twice that in 32 bits. The logits count once in 32 bits, with their gradient.
    """
    params, workers, stage = recipe.num_parameters, resources.workers, resources.zero_stage
    half = recipe.precision == "bf16" or (recipe.precision == "auto" and resources.gpus_per_worker > 0)
    weights, gradients = (2, 2) if half else (4, 4)
    optimizer = 4 * recipe.optimizer.state_floats + (4 if half else 0)
    state = params * (
        weights / (workers if stage >= 3 else 1)
        + gradients / (workers if stage >= 2 else 1)
        + optimizer / (workers if stage >= 1 else 1)
    )
    model, length = recipe.model, recipe.sequence_length
    share = -(-recipe.batch_sequences // workers)
    batch = min(resources.micro_batch_sequences or share, share)
    token_layer = model.hidden_size * (34 + 5 * model.num_heads * length / model.hidden_size)
    kept = 2 * model.hidden_size * model.num_layers + token_layer
    per_token = (kept if resources.gradient_checkpointing else token_layer * model.num_layers) * (1 if half else 2)
    return int(state + batch * length * (per_token + 8 * recipe.data.vocab_size))


def _pretraining_tokens(stage: Stage, trial: Trial) -> int:
    """Of the part of a trajectory between the checkpoint before and this one."""
    spec = stage.spec
    if not isinstance(spec, Pretrain):
        return 0
    before = [step for step in spec.recipe.checkpoint_steps if step < spec.step]
    return (spec.step - (before[-1] if before else 0)) * spec.recipe.batch_sequences * spec.recipe.sequence_length
