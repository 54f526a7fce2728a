"""The one way in for a model's weights: all of them from the checkpoint, or none."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from raysweep.durable import parse_object
from raysweep.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# What a masked model was pretrained with beside its masked words; no part of the language model.
OTHER_HEADS = (".pooler.", "cls.seq_relationship.", "sop_classifier.", "discriminator_predictions.")


Head = Literal["causal", "masked"]
"""What a model predicts: next tokens, from those before; or tokens in place, from both sides."""

SUPPORTED = "causal (...ForCausalLM, ...LMHeadModel) and masked (...ForMaskedLM) language models can be taken"


def read_config(checkpoint: Path) -> dict[str, Any]:
    """The config.json of a folder. Raises DataError if it is none."""
    path = checkpoint / "config.json"
    try:
        return parse_object(path.read_bytes())
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: not a configuration: {error}; save it with model.save_pretrained(folder)") from error


def head_of(config: Mapping[str, Any]) -> Head | None:
    """What a model predicts, by its config.json; None if it predicts no tokens, or is of no kind that is known here.

    A file that names no architecture is of the one its kind is pretrained as.
    """
    kind = str(config.get("model_type", ""))
    architecture = _architecture(config)
    if architecture.endswith("ForCausalLM"):
        return "causal"
    if architecture.endswith("ForMaskedLM"):
        return "masked"
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    )

    if architecture in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values():
        return "causal"
    # With the head of another task beside it, which is left out; or without a head, where that is tied.
    if architecture and not architecture.endswith(("ForPreTraining", "Model")):
        return None
    if kind in MODEL_FOR_MASKED_LM_MAPPING_NAMES:  # Before the other: of such kinds there are decoders too.
        return "masked"
    return "causal" if kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES else None


def _architecture(config: Mapping[str, Any]) -> str:
    """The class it was saved from; empty where it names none."""
    named = config.get("architectures") or [""]
    return str(named[0] if isinstance(named, list) else named)


def known_head(config: Mapping[str, Any]) -> Head | None:
    """What a model predicts; None where its configuration is empty, so not known. Raises DataError if no tokens."""
    head = head_of(config)
    if config and head is None:
        named = _architecture(config) or f"model_type {config.get('model_type')!r}"
        raise DataError(f"config.json: {named} predicts no tokens; {SUPPORTED}")
    return head


def reads_ahead(model: PreTrainedModel) -> bool:
    """Whether another last token changes what is predicted before it."""
    import torch

    ids = torch.arange(8).remainder(model.config.get_text_config().vocab_size).repeat(2, 1)
    ids[1, -1] = 0
    with torch.inference_mode():
        logits = model(input_ids=ids, use_cache=False).logits[:, :-1].float()
    # What is equal is so to the bit, but where the rounding of experts' sums goes with the tokens they get.
    return bool((logits[0] - logits[1]).abs().max() > 1e-4 * logits.abs().max())


def load_model(checkpoint: Path | str, *, name: str | None = None) -> PreTrainedModel:
    """A language model of a folder or a hub id, in float32 on the CPU, with every tensor its checkpoint's.

    Its configuration says whether it is a causal or a masked one. Tied weights may be stored once. No pickle is read,
    nor code of the checkpoint's own run.

    Args:
        checkpoint: a folder or a hub id.
        name: what errors call it; None: as it was given.

    Raises:
        DataError: if it is no language model, its weights cannot be read, or a tensor is missing, left over or of
            another shape; names them.
    """
    import torch
    from safetensors import SafetensorError
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM

    name = name or str(checkpoint)
    try:
        config = AutoConfig.from_pretrained(checkpoint, trust_remote_code=False)
        if (head := head_of(config.to_dict())) is None:
            what = _architecture(config.to_dict()) or config.model_type
            raise DataError(f"checkpoint {name!r}: {what} is no causal or masked language model")
        kind = AutoModelForMaskedLM if head == "masked" else AutoModelForCausalLM
        model, info = kind.from_pretrained(
            checkpoint,
            config=config,
            dtype=torch.float32,
            use_safetensors=True,
            trust_remote_code=False,
            ignore_mismatched_sizes=True,  # They are named below, with what is missing.
            output_loading_info=True,
        )
    except (OSError, ValueError, SafetensorError) as error:
        first_line = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise DataError(f"checkpoint {name!r}: weights cannot be loaded: {first_line}") from error
    if findings := _findings(info, is_masked=head == "masked"):
        raise DataError(
            f"checkpoint {name!r} does not fit its own config.json ({model.config.architectures}): "
            f"{'; '.join(findings)}. Random weights would be measured in their place; save it anew with "
            "model.save_pretrained(folder)"
        )
    return model


def _findings(info: Mapping[str, Any], *, is_masked: bool) -> list[str]:
    """What transformers could not place, in words; it leaves tied weights out by itself."""
    unexpected = {name for name in info["unexpected_keys"] if not (is_masked and any(o in name for o in OTHER_HEADS))}
    shapes = {f"{name} {list(there)}, not {list(wanted)}" for name, there, wanted in info["mismatched_keys"]}
    return [
        f"{words} {_some(names)}"
        for words, names in (
            ("missing", set(info["missing_keys"])),
            ("unexpected", unexpected),
            ("of another shape", shapes),
        )
        if names
    ]


def _some(names: set[str]) -> str:
    """The first few of many names."""
    first = sorted(names)[:3]
    return ", ".join(first) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
