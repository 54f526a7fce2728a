"""ls and gc: what lies in a store."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from raysweep.commands.arguments import store_of
from raysweep.commands.output import print_json


def add(commands: Any, common: argparse.ArgumentParser) -> None:
    """`ls` and `gc`."""
    ls = commands.add_parser("ls", parents=[common], help="the runs of a store")
    ls.set_defaults(command=_ls)
    gc = commands.add_parser("gc", parents=[common], help="what no run of a store refers to; deletes it with --yes")
    gc.add_argument("--yes", action="store_true", help="delete it")
    gc.add_argument(
        "--forget", nargs="+", default=(), metavar="RUN", help="these runs, too, and what they alone refer to"
    )
    gc.set_defaults(command=_gc)


def _ls(args: argparse.Namespace) -> int:
    from raysweep.inventory import list_runs
    from raysweep.screen import print_runs

    found = [row.to_dict() for row in list_runs(store_of(args))]
    if args.json:
        print_json(found)
    else:
        print_runs(found)
    return 0


def _gc(args: argparse.Namespace) -> int:
    from raysweep.inventory import find_garbage, free, held_runs
    from raysweep.screen import print_garbage

    store = store_of(args)
    with held_runs(store) as runs:
        garbage = find_garbage(store, runs, forget=args.forget)
        if args.yes:
            free(store, runs, garbage)
    found = [each.to_dict() for each in garbage]
    if args.json:
        print_json({"deleted": args.yes, "garbage": found})
    else:
        print_garbage(found, deleted=args.yes)
        if garbage and not args.yes:
            print("nothing was deleted; --yes does it", file=sys.stderr)
    return 0
