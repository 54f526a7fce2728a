"""Any language model of Hugging Face's transformers, by the name of its class and the fields of its configuration."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple

from raysweep.document import nearest
from raysweep.objectives.heads import Head, architecture_of, head_of

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

# What a configuration says of how it was saved, not of the model.
_OF_THE_FILE = ("architectures", "model_type", "transformers_version", "_name_or_path", "dtype")


MAX_LAYERS = 10_000
"""Each is made, if without weights, to see what a model is."""


class Sketch(NamedTuple):
    """What is known of a model before its weights are made."""

    head: Head
    max_length: int | None
    is_tied: bool
    num_layers: int
    hidden_size: int
    num_heads: int
    inner_numbers: int
    inner_float32: int


# Tensors of the inner size that feed-forward layers keep for their backward pass, as autograd has them. A gate, its
# activation, what it gates, and their product; without a gate, what goes into the activation and what comes out of it;
# more where the activation is made of simple operations.
GATED, PLAIN, PLAIN_IN_STEPS = 4, 2, 5
_IN_STEPS = ("gelu_new", "gelu_fast", "gelu_accurate", "quick_gelu", "relu2")
# Of these, which a power is among: CUDA's autocast takes it in float32, and with it what it goes into, three of five.
_WITH_POWERS, FLOAT32_OF_POWERS = ("gelu_new", "gelu_accurate"), 3


def inner_numbers(config: Mapping[str, Any]) -> tuple[int, int]:
    """Numbers of a token that a block's feed-forward layers keep for their backward pass.

    Args:
        config: the content of a config.json; silu is taken for a gate's, as of Llama and most since.

    Returns:
        How many, and how many of them are in float32 under CUDA's autocast to bfloat16.

    >>> inner_numbers({"hidden_size": 8, "intermediate_size": 24, "hidden_act": "silu"})
    (96, 0)
    >>> inner_numbers({"n_embd": 8, "n_inner": None, "activation_function": "gelu_new"})
    (160, 96)
    """
    hidden = _first(config, "hidden_size", "n_embd", "d_model")
    inner = _first(config, "intermediate_size", "n_inner", "ffn_dim", "d_ff", "encoder_ffn_dim") or 4 * int(hidden or 0)
    activation = _first(
        config, "hidden_activation", "hidden_act", "activation_function", "feed_forward_proj", "activation"
    )
    is_gated = "gated" in str(activation) or activation in ("silu", "swish") or "hidden_activation" in config
    each = GATED if is_gated else PLAIN_IN_STEPS if activation in _IN_STEPS else PLAIN
    return each * int(inner), FLOAT32_OF_POWERS * int(inner) if activation in _WITH_POWERS else 0


def _first(config: Mapping[str, Any], *names: str) -> Any:
    return next((config[name] for name in names if config.get(name)), None)


def described(config: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """The class, and the fields that differ from its configuration's defaults, of what a config.json says.

    Fields are those of the transformers that is installed: what an older one has written is read as that reads it, so
    two files that say the same in other words have one id.

    Args:
        config: the content of a config.json.

    Raises:
        ValueError: if it is no language model, or no configuration of its kind.
    """
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CAUSAL
    from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES as MASKED

    architecture, head, kind = architecture_of(config), head_of(config), config.get("model_type")
    if head is None:
        raise ValueError(f"{architecture or f'model_type {kind!r}'} is no causal or masked language model")
    if head_of({"architectures": [architecture]}) is None:  # Without the head, or with that of another task.
        architecture = (MASKED if head == "masked" else CAUSAL)[str(kind)]
    config_class = _class_of(architecture).config_class
    try:
        whole = config_class.from_dict(dict(config)).to_dict()
        defaults = _defaults(config_class)
        fields = {key: whole[key] for key in defaults if _is_own(key) and whole[key] != defaults[key]}
        for key in sorted(fields.keys() - config.keys()):
            # What follows from other fields, such as the width of a head, is left to follow from them.
            rest = {name: value for name, value in fields.items() if name != key}
            if config_class(**rest).to_dict()[key] == whole[key]:
                fields = rest
    except Exception as error:
        raise ValueError(f"no configuration of {architecture}: {_reason(error)}") from error
    return architecture, json.loads(json.dumps(fields))


def configured(
    architecture: str, fields: Mapping[str, Any], vocab_size: int
) -> tuple[type[PreTrainedModel], PreTrainedConfig]:
    """The class and the configuration of a model of this vocabulary, which has no padding.

    Args:
        architecture: name of a class of transformers, such as GPT2LMHeadModel.
        fields: of its configuration, by the names that transformers takes.
        vocab_size: rows of its embedding.

    Raises:
        ValueError: if there is no such class or field, or a field is the tokenizer's to say; names it.
    """
    model_class = _class_of(architecture)
    known = {**_defaults(model_class.config_class), **dict.fromkeys(model_class.config_class.attribute_map)}
    for name in fields:
        if name == "vocab_size" or name.endswith("_token_id"):
            raise ValueError(f"fields: {name} is the tokenizer's to say; remove it")
        if name not in known or not _is_own(name):
            close = nearest(name, [key for key in known if _is_own(key)], most=1)
            meant = f", did you mean {close[0]!r}" if close else ""
            raise ValueError(f"fields: {model_class.config_class.__name__} has no {name!r}{meant}")
    try:
        config = model_class.config_class(**fields)
        text = config.get_text_config()
        text.vocab_size, text.bos_token_id, text.eos_token_id = vocab_size, 0, 0
        # A padding token would get no gradient: in packed text every token is read.
        text.pad_token_id = None
    except Exception as error:
        raise ValueError(f"{architecture} cannot be made of these fields: {_reason(error)}") from error
    if (num_layers := getattr(text, "num_hidden_layers", None) or 0) > MAX_LAYERS:
        raise ValueError(f"fields: num_hidden_layers {num_layers:,}: at most {MAX_LAYERS:,}")
    return model_class, config


@cache
def sketch(architecture: str, fields: str) -> Sketch:
    """What is known of a model before it has weights; it is made, and run on two tokens, on the meta device.

    Args:
        architecture: see `configured`.
        fields: as JSON with sorted keys, so that what is made once is kept.

    Raises:
        ValueError: if it cannot be made, or does not read text without padding.
    """
    import torch

    model = _skeleton(architecture, fields, 8)  # Of a vocabulary of 8: nothing that is asked here depends on it.
    ids = torch.zeros(1, 2, dtype=torch.long, device="meta")
    try:
        model(input_ids=ids)
    except RuntimeError:
        pass  # Some operations have no form without numbers.
    except Exception as error:
        raise ValueError(
            f"{architecture} does not read text that has no padding token ({_reason(error)}); take another"
        ) from error
    text, head = model.config.get_text_config(), head_of({"architectures": [architecture]})
    assert head, "see _class_of"
    inner, inner_float32 = inner_numbers(text.to_dict())
    return Sketch(
        head=head,
        max_length=getattr(text, "max_position_embeddings", None),
        is_tied=getattr(model.config, "tie_word_embeddings", False),  # As transformers reads it: some have none.
        num_layers=text.num_hidden_layers,
        hidden_size=text.hidden_size,
        num_heads=getattr(text, "num_attention_heads", None) or 0,  # None where nothing attends.
        inner_numbers=inner,
        inner_float32=inner_float32,
    )


@cache
def num_parameters(architecture: str, fields: str, vocab_size: int) -> int:
    """Number of weights, counted on the meta device, tied ones once.

    Args:
        architecture, fields: see `sketch`.
        vocab_size: rows of its embedding.

    Raises:
        ValueError: if it cannot be made.
    """
    return int(_skeleton(architecture, fields, vocab_size).num_parameters())


def _skeleton(architecture: str, fields: str, vocab_size: int) -> PreTrainedModel:
    import torch

    model_class, config = configured(architecture, json.loads(fields), vocab_size)
    try:
        with torch.device("meta"):
            return model_class(config)
    except Exception as error:
        raise ValueError(f"{architecture} cannot be made of these fields: {_reason(error)}") from error


def _class_of(architecture: str) -> Any:
    """The class of transformers. Raises ValueError if it is no language model's."""
    import transformers
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CAUSAL
    from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES as MASKED

    model_class = getattr(transformers, architecture, None)
    if head_of({"architectures": [architecture]}) is None or not hasattr(model_class, "config_class"):
        close = nearest(architecture, [*CAUSAL.values(), *MASKED.values()], most=1)
        meant = f", did you mean {close[0]!r}" if close else ""
        raise ValueError(f"architecture: transformers has no language model {architecture!r}{meant}")
    return model_class


@cache
def _defaults(config_class: Any) -> dict[str, Any]:
    defaults: dict[str, Any] = config_class().to_dict()
    return defaults


def _is_own(name: str) -> bool:
    """Whether a field is the model's, not of the file or of the vocabulary, which comes with the text."""
    return name not in _OF_THE_FILE and name != "vocab_size" and not name.endswith("_token_id")


def _reason(error: Exception) -> str:
    """One line of what transformers has to say."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    # What its declared fields find has the reason in the last line, behind the name of an error.
    return lines[-1].partition(": ")[2] if type(error).__name__.startswith("Strict") else lines[0]
