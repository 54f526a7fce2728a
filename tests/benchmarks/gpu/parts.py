"""The parts of the table: name -> what writes its rows. The first ones are those that bars are of."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module

from table import Table

SIZES = ("1B", "124M", "350M")


def _of_size(name: str) -> Callable[[Table], None]:
    def run(table: Table) -> None:
        from subjects import SUBJECTS
        from throughput import main

        main(table, name, SUBJECTS[name])

    return run


def _module(name: str) -> Callable[[Table], None]:
    return lambda table: import_module(name).main(table)


PARTS = {f"throughput-{name}": _of_size(name) for name in SIZES} | {
    name: _module(name) for name in ("flatness", "zero", "kernels", "memory", "minima", "finetuning", "quickstart")
}
