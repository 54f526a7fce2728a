"""Token rows of unequal length: cut to what a model can read, padded, batched."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import takewhile
from typing import TYPE_CHECKING, Any, NamedTuple

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


class Asked(NamedTuple):
    """A prompt that fits with each of its answers, as token ids."""

    prompt: list[int]
    answers: list[list[int]]
    is_cut: bool
    """Whether the prompt lost its beginning, or an answer its end."""


def prompt_ids(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
    """Each text's tokens, and before them what the tokenizer begins a text with, as that of Llama does with <s>."""
    if not texts:
        return []
    # Not what it would close a text with: an answer goes on.
    plain, framed = tokenizer("a", add_special_tokens=False)["input_ids"], tokenizer("a")["input_ids"]
    first = [*takewhile(lambda token: token not in plain, framed)]
    return [first + ids for ids in tokenizer(list(texts), add_special_tokens=False)["input_ids"]]


def ask(
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    answers: Sequence[Sequence[str]],
    *,
    max_length: int,
    end: Sequence[int] = (),
) -> list[Asked]:
    """Prompts and the answers that go on from each, split into tokens as one text.

    A tokenizer may begin a text otherwise than it goes on (Llama's puts a blank before it), so an answer's tokens are
    those of prompt and answer behind those of the prompt, as in lm-evaluation-harness. All answers of a prompt follow
    the same tokens: it is cut to fit with the longest, and ends before a token that would reach into an answer.

    Args:
        tokenizer: the checkpoint's.
        prompts: texts.
        answers: of each prompt, one or more: texts as they stand behind it, with the blank that sets them off.
        max_length: tokens of a prompt and an answer, at least 2 more than `end` has.
        end: tokens that close an answer.
    """
    before = prompt_ids(tokenizer, prompts)
    whole = iter(prompt_ids(tokenizer, [p + text for p, of in zip(prompts, answers, strict=True) for text in of]))
    return [
        _asked(prompt, [next(whole) for _ in of], max_length, end) for prompt, of in zip(before, answers, strict=True)
    ]


def _asked(prompt: list[int], whole: Sequence[list[int]], max_length: int, end: Sequence[int]) -> Asked:
    num = max(1, min(_num_shared(prompt, ids) for ids in whole))
    answers = [ids[num:] for ids in whole]
    longest = max(map(len, answers)) + len(end)
    # At least one token of the prompt has to stand before an answer.
    kept = [[*ids[: max_length - 1 - len(end)], *end] for ids in answers]
    return Asked(fit(prompt[:num], max_length - max(map(len, kept))), kept, is_cut=num + longest > max_length)


def _num_shared(left: Sequence[int], right: Sequence[int]) -> int:
    """Tokens that two rows have in common before they part."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(left, right, strict=False)))


def fit(prompt: Sequence[int], room: int) -> list[int]:
    """The prompt without its beginning where it is longer than `room`, which is 1 at least.

    >>> fit([1, 2, 3], 2)
    [2, 3]
    """
    return list(prompt)[-max(1, room) :]


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
