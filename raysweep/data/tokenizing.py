"""Documents to files of token ids, on every core there is: the same bytes however many there are."""

from __future__ import annotations

import contextlib
import os
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import numpy.typing as npt

from raysweep.durable import replacing

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

T = TypeVar("T")
R = TypeVar("R")

SplitText = tuple[str, str]
"""(name of a split, text)"""

Encode = Callable[[Sequence[str]], Sequence[Sequence[int]]]
"""Documents to their token ids."""

# A core's work at a time: enough that handing it out costs nothing, little enough for any memory.
BATCH_DOCUMENTS = 512
BATCH_CHARACTERS = 2**19

# Batches per core that are read ahead, so that no core waits for the reader.
AHEAD = 2


@dataclass
class Written:
    """What a file of tokens holds so far: ids, and UTF-8 bytes of their text."""

    num_tokens: int = 0
    num_bytes: int = 0


def num_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def encoder(tokenizer: PreTrainedTokenizerBase) -> Encode:
    """What makes token ids of documents, without special tokens around them; several threads may call it at once.

    Args:
        tokenizer: one written in Rust has its truncation and padding taken out.

    What is written in Rust is asked directly: the layer above it sets the padding at each call, which another thread
    cannot bear, and copies what nobody reads here.
    """
    if not tokenizer.is_fast:
        return lambda texts: tokenizer(list(texts), add_special_tokens=False)["input_ids"]
    rust = tokenizer.backend_tokenizer
    rust.no_truncation()
    rust.no_padding()
    return lambda texts: [each.ids for each in rust.encode_batch_fast(texts, add_special_tokens=False)]


def write_tokens(
    documents: Iterable[SplitText],
    encode: Encode,
    paths: Mapping[str, Path],
    *,
    before: Sequence[int],
    after: Sequence[int],
    dtype: str,
    num_threads: int,
) -> Mapping[str, Written]:
    """Write the ids of the documents of each split in a row, in the order of the documents.

    Memory is that of a few batches for each thread, or of the longest document. Threads are enough: tokenizers in Rust
    leave Python's lock alone, and about a twentieth of the work is Python's (reading, and ids into arrays).

    Args:
        documents: each with its split; read by this thread alone.
        encode: see `encoder`.
        paths: split -> the file of its ids; all are written whole, or none.
        before: ids in front of each document.
        after: ids behind it.
        dtype: of the ids in the files.
        num_threads: that encode at once; nothing in the files depends on it.

    Returns:
        split -> what was written.

    Raises:
        DataError: whatever `documents` raises; there is no file then.
    """

    # Arrays are made by the threads, so that the one which reads and writes has little else to do.
    def encoded(batch: Sequence[SplitText]) -> list[npt.NDArray[Any]]:
        return [np.asarray([*before, *ids, *after], dtype) for ids in encode([text for _, text in batch])]

    written = {split: Written() for split in paths}
    with contextlib.ExitStack() as stack:
        wholes = {split: stack.enter_context(replacing(path)) for split, path in paths.items()}
        with contextlib.ExitStack() as opened:
            files = {split: opened.enter_context(path.open("wb")) for split, path in wholes.items()}
            with contextlib.closing(_in_order(encoded, _batches(documents), num_threads)) as batches:
                for batch, rows in batches:
                    for (split, text), row in zip(batch, rows, strict=True):
                        files[split].write(row.data)
                        written[split].num_tokens += len(row)
                        written[split].num_bytes += len(text.encode())
    return written


def _batches(documents: Iterable[SplitText]) -> Iterator[list[SplitText]]:
    batch: list[SplitText] = []
    num_characters = 0
    for document in documents:
        batch.append(document)
        num_characters += len(document[1])
        if len(batch) == BATCH_DOCUMENTS or num_characters >= BATCH_CHARACTERS:
            yield batch
            batch, num_characters = [], 0
    if batch:
        yield batch


def _in_order(work: Callable[[T], R], items: Iterable[T], num_threads: int) -> Generator[tuple[T, R]]:
    """Each item with what `work` makes of it, in order; `AHEAD` items a thread are taken ahead, and no more."""
    pool = ThreadPoolExecutor(num_threads)
    waiting: deque[tuple[T, Future[R]]] = deque()
    try:
        for item in items:
            waiting.append((item, pool.submit(work, item)))
            if len(waiting) > AHEAD * num_threads:
                first, future = waiting.popleft()
                yield first, future.result()
        for first, future in waiting:
            yield first, future.result()
    finally:
        pool.shutdown(cancel_futures=True)
