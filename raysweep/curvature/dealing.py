"""How independent pieces of work are given out: by default, one after another in this process."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Protocol, TypeVar

Item = TypeVar("Item", bound=Hashable)
Value = TypeVar("Value")


class Deal(Protocol):
    """Has pieces of work run by whom it likes, and gives all their values, in order.

    Items are told apart by their `str`; values are plain, so that they can be saved as JSON.
    """

    def __call__(self, items: Sequence[Item], run: Callable[[Item], Value]) -> Sequence[Value]:
        """Values of `run` for all items, on every process that takes part."""


def one_after_another(items: Sequence[Item], run: Callable[[Item], Value]) -> list[Value]:
    """A `Deal` of one process: each item in turn, results in the same order."""
    return [run(item) for item in items]
