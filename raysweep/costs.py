"""What a stage costs, from its declaration alone: FLOPs, memory, bytes on disk. Nothing is computed or loaded."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Container
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import numpy as np

from raysweep.data.corpora import Corpus
from raysweep.data.packing import dtype_of
from raysweep.data.sources import checkpoint_files
from raysweep.plan import Stage, Trial
from raysweep.search import Resources
from raysweep.stages.fetch import Fetch
from raysweep.stages.flatness import Flatness
from raysweep.stages.heldout import Heldout
from raysweep.stages.indicators import Indicators
from raysweep.stages.optimizer_state import OptimizerState
from raysweep.stages.pretrain import Pretrain, Recipe
from raysweep.stages.probe import Probe
from raysweep.stages.sft import Sft
from raysweep.stages.tokenize import Tokenize
from raysweep.tasks.files import TYPICAL_LENGTH
from raysweep.tasks.rows import MAX_LENGTH
from raysweep.train.precision import settled


@dataclass(frozen=True)
class Size:
    """Of a model. `num_bytes`: of its checkpoint."""

    num_parameters: int
    num_layers: int
    hidden_size: int
    num_heads: int
    num_bytes: int

    def gradient_flops(self, num_tokens: float, sequence_length: int) -> float:
        """Forward and backward: 6 N + 12 L h s a token (Chowdhery et al., 2022, appendix B)."""
        attention = 12.0 * self.num_layers * self.hidden_size * sequence_length
        return (6.0 * self.num_parameters + attention) * num_tokens

    def forward_flops(self, num_tokens: float, sequence_length: int) -> float:
        """A third of a gradient's."""
        return self.gradient_flops(num_tokens, sequence_length) / 3


def recipes_of(trial: Trial) -> list[Recipe]:
    """The recipes of a trial's checkpoints; none if its checkpoint exists already."""
    return [stage.spec.recipe for stage in trial.stages if isinstance(stage.spec, Pretrain)]


def size_of(trial: Trial) -> Size | None:
    """Of a trial's model; None if that lies at the hub, or cannot be told."""
    for recipe in recipes_of(trial)[:1]:
        if model := recipe.model:
            num = model.num_parameters(recipe.data.vocab_size)
            return Size(num, *model.dimensions(), num_bytes=4 * num)
    fetch = next(stage.spec for stage in trial.stages if isinstance(stage.spec, Fetch))
    return _size_of_folder(Path(fetch.source))


@cache
def _size_of_folder(folder: Path) -> Size | None:
    """From config.json and the headers of the weights' files."""
    if not folder.is_dir():
        return None
    files = checkpoint_files(folder)
    try:
        config = json.loads((folder / "config.json").read_text())
        num = sum(_num_weights(path) for path in files if path.suffix == ".safetensors")
        layers = next(config[name] for name in ("num_hidden_layers", "n_layer", "num_layers") if name in config)
        hidden = next(config[name] for name in ("hidden_size", "n_embd", "d_model") if name in config)
        heads = next(config[name] for name in ("num_attention_heads", "n_head", "num_heads") if name in config)
        num_bytes = sum(path.stat().st_size for path in files)
        return Size(num, int(layers), int(hidden), int(heads), num_bytes)
    except (OSError, ValueError, TypeError, KeyError, StopIteration, struct.error):
        return None  # Some other kind of model, or a damaged file: to load it is the stage's to try.


def _num_weights(path: Path) -> int:
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(length))
    return sum(math.prod(tensor["shape"]) for name, tensor in header.items() if name != "__metadata__")


def pretraining_tokens(stage: Stage) -> int:
    """Of the part of a trajectory between the checkpoint before and this one."""
    spec = stage.spec
    if not isinstance(spec, Pretrain):
        return 0
    before = [step for step in spec.recipe.checkpoint_steps if step < spec.step]
    return (spec.step - (before[-1] if before else 0)) * spec.recipe.batch_sequences * spec.recipe.sequence_length


def work_of(stage: Stage, finished: Container[str]) -> Stage:
    """The stage, or the training that it repeats: of a finished checkpoint whose optimizer's state was not kept."""
    spec = stage.spec
    if not isinstance(spec, OptimizerState) or stage.id in finished or stage.inputs["checkpoint"] not in finished:
        return stage
    return replace(stage, spec=spec.pretrain.with_(recipe=spec.pretrain.recipe.with_(checkpoints=())))


def stage_flops(stage: Stage, size: Size | None, corpus: Corpus) -> float:
    """FLOPs of a stage on a model of `size` and text of `corpus`; 0 where either has no part in it or is not known."""
    spec = stage.spec
    if isinstance(spec, Tokenize):
        return _sampling_flops(spec.corpus)
    if size is None:
        return 0.0
    if isinstance(spec, Pretrain):
        recipe = spec.recipe
        read = pretraining_tokens(stage) / recipe.sequence_length * recipe.input_length
        return size.gradient_flops(read, recipe.input_length)
    if isinstance(spec, Flatness):
        return size.gradient_flops(spec.predict()[0], spec.input_length)
    if isinstance(spec, Heldout):
        row = spec.objective.input_length(spec.sequence_length)
        return size.forward_flops(spec.max_sequences * row * len(corpus.domains), row)
    if isinstance(spec, Indicators):
        length = min(MAX_LENGTH, (2 + spec.kshot) * TYPICAL_LENGTH)
        scored = spec.max_examples * len(spec.tasks) * length
        return size.forward_flops(scored, length)
    if isinstance(spec, Probe):
        return _probe_flops(spec, size)
    return _sft_flops(spec, size) if isinstance(spec, Sft) else 0.0


def _sampling_flops(corpus: Corpus) -> float:
    """Of text that a model writes, which reads it all; reading what people wrote takes none to speak of."""
    size = _size_of_folder(Path(corpus.sampler.source)) if corpus.sampler else None
    if size is None:
        return 0.0
    num_tokens = corpus.tokens_bytes() // np.dtype(dtype_of(corpus.vocab_size)).itemsize
    return size.forward_flops(num_tokens, corpus.row_length or 0)


def _probe_flops(spec: Probe, size: Size) -> float:
    """Features of all tokens, and a linear classifier's epochs on them."""
    load = spec.task.workload()
    features = size.forward_flops((load.num_train + load.num_indicator) * load.length, load.length)
    weights = load.num_states * size.hidden_size * (spec.task.num_classes or 0)
    return features + 6.0 * weights * load.num_train * spec.epochs


def _sft_flops(spec: Sft, size: Size) -> float:
    """Training, and scoring of validation and test examples."""
    load, epochs = spec.task.workload(), spec.hyperparameters.epochs
    trained = size.gradient_flops(epochs * load.num_train * load.length, load.length)
    return trained + size.forward_flops((load.num_valid + load.num_test) * load.scored_length, load.length)


def training_memory_bytes(recipe: Recipe, size: Size, resources: Resources) -> int:
    """Of one worker in pretraining: weights, gradients, optimizer state as ZeRO shards them, and activations.

    Activations of a layer: s b h (34 + 5 a s / h) bytes in 16 bits without fused attention (Korthikanti et al., 2022),
    2 s b h where they are recomputed; twice that in 32 bits. The logits count once in 32 bits, with their gradient.
    """
    params, workers, stage = size.num_parameters, resources.workers, resources.zero_stage
    half = _in_half(recipe, resources)
    weights, gradients = (2, 2) if half else (4, 4)
    optimizer = 4 * recipe.optimizer.state_floats + (4 if half else 0)
    state = params * (
        weights / (workers if stage >= 3 else 1)
        + gradients / (workers if stage >= 2 else 1)
        + optimizer / (workers if stage >= 1 else 1)
    )
    length = recipe.input_length
    share = -(-recipe.batch_sequences // workers)
    batch = min(resources.micro_batch_sequences or share, share)
    token_layer = size.hidden_size * (34 + 5 * size.num_heads * length / size.hidden_size)
    kept = 2 * size.hidden_size * size.num_layers + token_layer
    per_token = (kept if resources.gradient_checkpointing else token_layer * size.num_layers) * (1 if half else 2)
    return int(state + batch * length * (per_token + 8 * recipe.data.vocab_size))


def _in_half(recipe: Recipe, resources: Resources) -> bool:
    return settled(recipe.precision, on_gpu=resources.gpus_per_worker > 0) == "bf16"


def stage_disk_bytes(stage: Stage, size: Size | None) -> int:
    """What a stage leaves in the store: tokens or a checkpoint; measurements are some kilobytes."""
    if isinstance(stage.spec, Fetch):
        taken = _size_of_folder(Path(stage.spec.source))
        return taken.num_bytes if taken else 0
    if isinstance(stage.spec, Pretrain):
        return size.num_bytes if size else 0
    if isinstance(stage.spec, OptimizerState):
        return 4 * stage.spec.pretrain.recipe.optimizer.state_floats * size.num_parameters if size else 0
    return stage.spec.corpus.tokens_bytes() if isinstance(stage.spec, Tokenize) else 0


def state_disk_bytes(recipe: Recipe, size: Size, resources: Resources) -> int:
    """Of a trajectory's resumable state, while it is trained: weights and optimizer state in 32 bits."""
    each = 4 + 4 * recipe.optimizer.state_floats + (2 if _in_half(recipe, resources) else 0)
    return each * size.num_parameters
