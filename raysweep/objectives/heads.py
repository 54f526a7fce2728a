"""What a language model predicts, and what a checkpoint's config.json tells of that: no weights are read."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from raysweep.durable import parse_object
from raysweep.errors import DataError

Head = Literal["causal", "masked"]
"""What a model predicts: next tokens, from those before; or tokens in place, from both sides."""

SUPPORTED = "causal (...ForCausalLM, ...LMHeadModel) and masked (...ForMaskedLM) language models can be taken"


def read_config(checkpoint: Path) -> dict[str, Any]:
    """The config.json of a checkpoint's folder.

    Raises:
        DataError: if there is none, or it holds no JSON object.
    """
    path = checkpoint / "config.json"
    try:
        return parse_object(path.read_bytes())
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: not a configuration: {error}; save it with model.save_pretrained(folder)") from error


def head_of(config: Mapping[str, Any]) -> Head | None:
    """What a model predicts, by its config.json; None if it predicts no tokens, or is of no kind that is known here.

    A file that names no architecture is of the one its kind is pretrained as.

    Args:
        config: the content of config.json; `architectures` and `model_type` of it are read.

    >>> head_of({"architectures": ["GPT2LMHeadModel"]}), head_of({"architectures": ["BertForMaskedLM"]})
    ('causal', 'masked')
    >>> head_of({"architectures": ["BertForSequenceClassification"]}) is None
    True
    """
    kind = str(config.get("model_type", ""))
    architecture = architecture_of(config)
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


def architecture_of(config: Mapping[str, Any]) -> str:
    """The class it was saved from; empty where it names none."""
    named = config.get("architectures") or [""]
    return str(named[0] if isinstance(named, list) else named)


def known_head(config: Mapping[str, Any]) -> Head | None:
    """What a model predicts; None where its configuration is empty, so not known.

    Raises:
        DataError: if it predicts no tokens.
    """
    head = head_of(config)
    if config and head is None:
        named = architecture_of(config) or f"model_type {config.get('model_type')!r}"
        raise DataError(f"config.json: {named} predicts no tokens; {SUPPORTED}")
    return head
