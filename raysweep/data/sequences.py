"""Text as token sequences of one length in random order, for measuring a model on it."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from raysweep.data.formats import read_texts
from raysweep.objectives.base import Arrays, Ints

# Text is read, from all files in turn, until it makes this many sequences.
MAX_SEQUENCES = 4096
# The part of a masked model's tokens that is hidden (Devlin et al., 2019).
MASKED = 0.15


def sequences(tokenizer: Any, paths: Sequence[str], *, length: int, seed: int) -> Arrays:
    """Documents in a row, with the special tokens that the tokenizer gives each and an end-of-text, cut to length.

    Args:
        tokenizer: of a causal model.
        paths: files; see `formats.read_texts`.
        length: tokens of a sequence.
        seed: of the order.

    Returns:
        `input_ids` [n, length].

    Raises:
        ValueError: if the text makes fewer than two sequences.
        DataError: if a file is malformed.
    """
    ids = _cut(tokenizer, paths, length, special=True)
    return {"input_ids": ids[np.random.default_rng([seed, 3]).permutation(len(ids))]}


def masked_sequences(tokenizer: Any, paths: Sequence[str], *, length: int, seed: int) -> Arrays:
    """The same for a masked model: between its start and separator tokens if it has them, some tokens hidden.

    Each token is hidden with probability MASKED, and one of each sequence for sure; a mask always stands in its place.

    Args:
        tokenizer: of a masked model, which has a mask token.
        paths: files; see `formats.read_texts`.
        length: tokens of a sequence, with those at its ends.
        seed: of the order and of what is hidden.

    Returns:
        `input_ids` [n, length], and `labels` alike: the hidden tokens, -100 elsewhere.

    Raises:
        ValueError: if the text makes fewer than two sequences.
        DataError: if a file is malformed.
    """
    ends = [each for each in (tokenizer.cls_token_id, tokenizer.sep_token_id) if each is not None]
    ends = ends if len(ends) == 2 else []
    ids = _cut(tokenizer, paths, length - len(ends), special=False)
    draw = np.random.default_rng([seed, 3])
    ids = ids[draw.permutation(len(ids))]
    hidden = draw.random(ids.shape) < MASKED
    # A sequence with nothing hidden would have no loss.
    hidden[np.arange(len(ids)), draw.integers(ids.shape[1], size=len(ids))] = True
    inputs, labels = np.where(hidden, tokenizer.mask_token_id, ids), np.where(hidden, ids, -100)
    if ends:
        inputs = np.pad(inputs, ((0, 0), (1, 1)), constant_values=((0, 0), ends))
        labels = np.pad(labels, ((0, 0), (1, 1)), constant_values=-100)
    return {"input_ids": inputs, "labels": labels}


def _cut(tokenizer: Any, paths: Sequence[str], length: int, *, special: bool) -> Ints:
    if length < 2:
        raise ValueError(f"sequences of {length} tokens of text have nothing to predict")
    # Long documents are cut here; the tokenizer's own limit is none of ours.
    tokenizer.model_max_length = int(1e9)
    ids = np.fromiter(
        itertools.islice(_tokens(tokenizer, paths, special=special), MAX_SEQUENCES * length), dtype=np.int64
    )
    num = len(ids) // length
    if num < 2:
        raise ValueError(
            f"the text has {len(ids)} tokens; an error bar needs two sequences at least, of {length} tokens each"
        )
    return ids[: num * length].reshape(num, length)


def _tokens(tokenizer: Any, paths: Sequence[str], *, special: bool) -> Iterator[int]:
    """Token ids of documents from all files in turn, so that text which ends early is not of the first file alone."""
    readers = [read_texts([path]) for path in paths]
    while readers:
        for reader in list(readers):
            text = next(reader, None)
            if text is None:
                readers.remove(reader)
                continue
            ids = tokenizer(text, add_special_tokens=special)["input_ids"]
            yield from ids
            if special and tokenizer.eos_token_id is not None and ids[-1:] != [tokenizer.eos_token_id]:
                yield tokenizer.eos_token_id
