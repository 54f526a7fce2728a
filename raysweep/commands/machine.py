"""doctor and schema: before there is a sweep."""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from raysweep.commands.arguments import add_address, add_overrides, store_of, use_address
from raysweep.commands.output import print_json
from raysweep.printable import printable

if TYPE_CHECKING:
    from raysweep.runners.node_facts import Check


def add(commands: Any, common: argparse.ArgumentParser) -> None:
    """Give the parser `schema` and `doctor`; `common` holds the options of all commands."""
    schema = commands.add_parser("schema", parents=[common], help="JSON Schema of the sweep file")
    schema.set_defaults(command=_schema)
    doctor = commands.add_parser("doctor", parents=[common], help="check this machine, and a cluster")
    add_address(doctor)
    doctor.add_argument("sweep", type=Path, nargs="?", metavar="SWEEP.yaml", help="is there room for what it writes?")
    add_overrides(doctor)
    doctor.set_defaults(command=_doctor)


def _schema(args: argparse.Namespace) -> int:
    from raysweep.declared import Declared
    from raysweep.docstrings import schema_of

    print_json(schema_of(Declared))
    return 0


def _doctor(args: argparse.Namespace) -> int:
    from raysweep.doctor import checks, cluster_checks
    from raysweep.estimates import ToWrite
    from raysweep.space import load

    store = store_of(args)
    to_write = ToWrite.of(load(args.sweep, args.overrides), store) if args.sweep else None
    results: list[Check] = []

    def tell(found: Iterable[Check]) -> None:
        for check in found:
            results.append(check)
            if not args.json:
                print(printable(f"{'ok  ' if check.ok else 'FAIL'}  {check.name}: {check.message}"), flush=True)

    tell(checks(store, to_write))
    if use_address(args):
        tell(cluster_checks(store, to_write))
    if args.json:
        print_json([check.to_dict() for check in results])
    return 0 if all(check.ok for check in results) else 2
