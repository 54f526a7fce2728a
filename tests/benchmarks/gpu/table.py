"""Rows that are kept as soon as they are measured, so that a part cut short is gone on with, and their Markdown."""

from __future__ import annotations

import gc
import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

Numbers = Mapping[str, float]
Measure = Callable[[], tuple[str, Numbers]]
"""Gives a result in words, and the numbers that later rows reckon with."""


class Table:
    """The rows of a folder's rows.jsonl, of one device; the last of a name counts.

    Args:
        folder: made if it is not there.
        device: name of the device that is measured: rows of another are left out.
    """

    def __init__(self, folder: Path, device: str) -> None:
        self._path, self._device = folder / "rows.jsonl", device
        folder.mkdir(parents=True, exist_ok=True)
        lines = self._path.read_text().splitlines() if self._path.exists() else []
        rows = [json.loads(line) for line in lines]
        self._rows = {row["what"]: row for row in rows if row["device"] == device}

    def measure(self, what: str, measure: Measure) -> Numbers:
        """Numbers of a row: of before, or measured now; none if that fails, which the next run tries again."""
        if (row := self._rows.get(what)) and not row["failed"]:
            return row["numbers"]  # type: ignore[no-any-return]
        began = time.perf_counter()
        try:
            result, numbers = measure()
            failed = False
        except Exception as error:  # Whatever it is, the other rows are worth having.
            lines = str(error).strip().splitlines() or [""]
            result, numbers, failed = f"failed: {type(error).__name__}: {lines[0][:200]}", {}, True
        release_memory()
        self.write(what, result, numbers, failed=failed, seconds=time.perf_counter() - began)
        return numbers

    def write(
        self, what: str, result: str, numbers: Numbers | None = None, *, failed: bool = False, seconds: float = 0.0
    ) -> None:
        """Keep a row, and show it."""
        row = {"what": what, "result": result, "numbers": dict(numbers or {}), "device": self._device, "failed": failed}
        self._rows[what] = row | {"seconds": round(seconds, 1)}
        with self._path.open("a") as file:
            file.write(json.dumps(self._rows[what]) + "\n")
        print(f"| {what} | {result} |", flush=True)

    def markdown(self) -> str:
        """All rows of the device, in the order in which they first came."""
        lines = [f"| {row['what']} | {row['result']} |" for row in self._rows.values()]
        return "\n".join([f"| what, on {self._device} | result |", "| --- | --- |", *lines, ""])


def release_memory() -> None:
    """Give all that nothing refers to back to the device, and begin to count its peak anew."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def synchronize() -> None:
    """Wait for the device, before the clock is read."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def peak_gib() -> float:
    """Memory that tensors held at the most since `release_memory`, in GiB; NaN on a CPU, where torch does not count."""
    return torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else float("nan")


def reserved_gib() -> float:
    """Memory that torch's allocator held at the most, its gaps between tensors included, in GiB; NaN on a CPU."""
    return torch.cuda.max_memory_reserved() / 2**30 if torch.cuda.is_available() else float("nan")


def in_words(gib: float) -> str:
    """Such as 31.4 GiB."""
    return f"{gib:.1f} GiB" if gib == gib else "not counted on a CPU"
