"""The one way in for a model's weights: all of them from the checkpoint, or none."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from raysweep.errors import DataError, first_line
from raysweep.objectives.heads import architecture_of, head_of
from raysweep.weights import num_stored

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# What a masked model was pretrained with beside its masked words; no part of the language model.
OTHER_HEADS = (".pooler.", "cls.seq_relationship.", "sop_classifier.", "discriminator_predictions.")


def reads_ahead(model: PreTrainedModel) -> bool:
    """Whether another last token changes what is predicted before it: tried on one sequence of 8 tokens.

    Args:
        model: in evaluation mode, on the CPU.
    """
    import torch

    ids = torch.arange(8).remainder(model.config.get_text_config().vocab_size).repeat(2, 1)
    ids[1, -1] = 0
    with torch.inference_mode():
        logits = model(input_ids=ids, use_cache=False).logits[:, :-1].float()
    # What is equal is so to the bit, but where the rounding of experts' sums goes with the tokens they get.
    return bool((logits[0] - logits[1]).abs().max() > 1e-4 * logits.abs().max())


def max_tokens(model: PreTrainedModel) -> int | None:
    """Tokens of the longest row that a model can read; None if its configuration names no number of positions."""
    for name, module in model.named_modules():
        if name.endswith("position_embeddings") and getattr(module, "padding_idx", None) is not None:
            # RoBERTa and its kind count positions from behind the padding token's id: rows up to it are never read.
            return int(module.num_embeddings - module.padding_idx - 1)
    return getattr(model.config, "max_position_embeddings", None)


def check_size(checkpoint: Path, *, name: str | None = None) -> None:
    """See that a folder's weights are about as many as its configuration asks for, before any is made.

    What a configuration asks for beyond its weights would be drawn at random, which takes minutes and all the memory
    there is.

    Args:
        checkpoint: a folder from elsewhere.
        name: what errors call it; None: as it was given.

    Raises:
        DataError: says how many there are and how many are asked for.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM

    import raysweep.train.one_layer_model  # noqa: F401 - makes it known to transformers.

    name = name or str(checkpoint)
    num_tensors, num_numbers = num_stored(checkpoint)
    if num_tensors == 0:
        return  # There is nothing that may be read, which loading says better.
    try:
        config = AutoConfig.from_pretrained(checkpoint, trust_remote_code=False)
        text = config.get_text_config()
        if (num_layers := getattr(text, "num_hidden_layers", None) or 0) > num_tensors:
            raise DataError(f"checkpoint {name!r}: {num_layers:,} layers in config.json, and {num_tensors:,} tensors")
        kind = AutoModelForMaskedLM if head_of(config.to_dict()) == "masked" else AutoModelForCausalLM
        with torch.device("meta"):
            asked = kind.from_config(config, trust_remote_code=False).num_parameters()
    except DataError:
        raise
    except Exception as error:  # Whatever transformers and torch make of numbers that are none.
        reason = first_line(error)
        raise DataError(f"checkpoint {name!r}: no model can be made of its config.json: {reason}") from error
    # What is tied is stored once, and another task's head may lie beside it. A head that is missing, which loading
    # names, is no more than the embedding that is there.
    if asked > 2 * num_numbers:
        raise DataError(
            f"checkpoint {name!r}: config.json asks for {asked:,} parameters, and its weights hold {num_numbers:,}; "
            "correct config.json, or save the model anew with model.save_pretrained(folder)"
        )


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

    import raysweep.train.one_layer_model  # noqa: F401 - makes it known to transformers.

    name = name or str(checkpoint)
    try:
        config = AutoConfig.from_pretrained(checkpoint, trust_remote_code=False)
        if (head := head_of(config.to_dict())) is None:
            what = architecture_of(config.to_dict()) or config.model_type
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
        raise DataError(f"checkpoint {name!r}: weights cannot be loaded: {first_line(error)}") from error
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
