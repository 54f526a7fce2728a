"""The special tokens that an objective finds in a checkpoint that it measures."""

from __future__ import annotations

from pathlib import Path

from raysweep.data.tokenizers import load_tokenizer
from raysweep.errors import DataError
from raysweep.objectives.base import ObjectiveSpec, Specials, add_extra_tokens


def checkpoint_specials(checkpoint: Path, objective: ObjectiveSpec) -> Specials:
    """By the checkpoint's own tokenizer, in which an earlier phase may have put tokens of another objective.

    Raises:
        DataError: if it lacks a token that the objective writes: the model has never seen it.
    """
    tokenizer = load_tokenizer(checkpoint)
    num_known = len(tokenizer)
    # What it lacks is added behind all it knows, so that the number tells which were there.
    specials = add_extra_tokens(tokenizer, objective)
    if missing := [token for token, number in specials.ids.items() if number >= num_known]:
        raise DataError(
            f"checkpoint {checkpoint}: objective {objective.name} needs {missing[0]!r}, which is not in its tokenizer; "
            "measure it by the objective that it was trained by"
        )
    return specials
