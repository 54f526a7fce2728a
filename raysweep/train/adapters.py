"""LoRA's matrices in a model, by Hugging Face's PEFT."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from raysweep.errors import StageError


def add_lora(
    model: torch.nn.Module,
    *,
    r: int,
    lora_alpha: int,
    lora_dropout: float,
    target_modules: Sequence[str] | Literal["all-linear"],
    seed: int,
) -> Callable[[], None]:
    """Put PEFT's adapters into a language model, which is frozen; what stands around it, such as a new head, is not.

    Args:
        model: a Hugging Face language model, or a module that holds one; changed in place.
        r, lora_alpha, lora_dropout, target_modules: as of `peft.LoraConfig`.
        seed: of the A matrices, drawn on the CPU, whose own random numbers go on as if none had been.

    Returns:
        Adds the products of the matrices to the weights they stand beside, and takes them out. To be called once.

    Raises:
        StageError: if PEFT is not installed, or the model has no such layers.
    """
    try:
        from peft import LoraConfig, LoraModel
    except ImportError as error:
        raise StageError(f"lora needs PEFT: pip install 'raysweep[lora]' ({error})") from error
    language_model = next(each for each in model.modules() if isinstance(each, PreTrainedModel))
    try:
        targets = find_targets(language_model, target_modules)
    except ValueError as error:
        raise StageError(f"sft.methods: target_modules: {error}") from error
    config = LoraConfig(
        r=r,
        lora_alpha=lora_alpha,
        lora_dropout=lora_dropout,
        target_modules=target_modules if isinstance(target_modules, str) else list(target_modules),
        # GPT-2's layers hold their weights as [in, out].
        fan_in_fan_out=isinstance(language_model.get_submodule(targets[0]), Conv1D),
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        adapted = LoraModel(language_model, config, "default")

    def merge() -> None:
        adapted.merge_and_unload()
        language_model.requires_grad_(True)

    return merge


def find_targets(model: PreTrainedModel, target_modules: Sequence[str] | Literal["all-linear"]) -> list[str]:
    """Names of the linear layers that get adapters, in the model's order.

    Args:
        model: a language model, with a head or without; it may be on the meta device.
        target_modules: last parts of names; all-linear: all linear layers but the output layer.

    Raises:
        ValueError: if a name is of no linear layer, or of the output layer; says which names there are, if any.
    """
    output = model.get_output_embeddings()
    linear = [
        name
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear | Conv1D) and module is not output
    ]
    if not linear:
        raise ValueError(f"{type(model).__name__} has no linear layer inside")
    if target_modules == "all-linear":
        return linear
    ends = dict.fromkeys(name.rpartition(".")[2] for name in linear)
    for target in target_modules:
        if not any(_is_named(name, target) for name in linear):
            raise ValueError(f"{type(model).__name__} has no linear layer {target!r} inside; it has {', '.join(ends)}")
    return [name for name in linear if any(_is_named(name, target) for target in target_modules)]


def _is_named(name: str, target: str) -> bool:
    """As PEFT matches a list of names."""
    return name == target or name.endswith(f".{target}")
