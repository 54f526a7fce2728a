"""Token rows of unequal length: cut to what a model can read, padded, batched."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

MAX_LENGTH = 512
"""Tokens of a row where nothing else is said; a longer prompt loses its beginning."""


def batch_tokens(*, on_gpu: bool) -> int:
    """Tokens of a batch of rows that are only read, padding included. On a GPU fewer leave it waiting for launches."""
    return 16384 if on_gpu else 4096


def context_length(model: PreTrainedModel, *, at_most: int = MAX_LENGTH) -> int:
    """Tokens that a row may have: as many as the model has positions, if that is not more than `at_most`."""
    from raysweep.train.checkpoints import max_tokens

    return min(at_most, max_tokens(model) or at_most)


def token_ids(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
    """Each text's tokens, without those that a tokenizer adds at its ends."""
    return tokenizer(list(texts), add_special_tokens=False)["input_ids"] if texts else []


def fit(prompt: Sequence[int], answer: Sequence[int], max_length: int) -> tuple[list[int], int]:
    """(token ids, how many of them are prompt): the prompt loses its beginning where both are too long.

    At least the prompt's last token is kept, which an answer is predicted from, and the answer loses its end for it.

    Args:
        prompt, answer: token ids.
        max_length: tokens of both.

    >>> fit([1, 2, 3], [8, 9], 4)
    ([2, 3, 8, 9], 2)
    """
    room = max(1, max_length - len(answer))
    kept = list(prompt)[-room:]
    return [*kept, *answer][:max_length], len(kept)


def pad(rows: Sequence[Sequence[int]], *, value: int, left: bool = False) -> tuple[Any, Any]:
    """(values [n, longest], mask of what is no padding [n, longest]), both int64 numpy arrays.

    Args:
        rows: at least one, of any lengths.
        value: of padding.
        left: whether padding stands before a row, not behind it.

    >>> pad([[5], [6, 7]], value=0)[0]
    array([[5, 0],
           [6, 7]])
    """
    import numpy as np

    width = max(len(row) for row in rows)
    values = np.full((len(rows), width), value, np.int64)
    mask = np.zeros((len(rows), width), np.int64)
    for index, row in enumerate(rows):
        place = slice(width - len(row), width) if left else slice(0, len(row))
        values[index, place] = row
        mask[index, place] = 1
    return values, mask


def in_batches(lengths: Sequence[int], run: Callable[[list[int]], list[Any]], *, max_tokens: int) -> list[Any]:
    """`run` over batches of rows of like length, each of about `max_tokens`; results in the order of the rows.

    Args:
        lengths: tokens of each row.
        run: takes the indices of a batch's rows, and gives a result for each.
        max_tokens: of a batch, padding included; a row alone may have more.

    >>> in_batches([9, 2, 2], lambda rows: [f"in {rows}"] * len(rows), max_tokens=10)
    ['in [0]', 'in [1, 2]', 'in [1, 2]']
    """
    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    results: dict[int, Any] = {}
    start = 0
    while start < len(order):
        stop = start + 1
        # Lengths rise, so the last row's is the width of all.
        while stop < len(order) and (stop - start + 1) * lengths[order[stop]] <= max_tokens:
            stop += 1
        results |= zip(order[start:stop], run(order[start:stop]), strict=True)
        start = stop
    return [results[index] for index in range(len(lengths))]
