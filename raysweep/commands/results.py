"""status, rank, report and export: what a run gave so far."""

from __future__ import annotations

import argparse
from typing import Any

from raysweep.commands.arguments import RUN_HELP, add_overrides, results_of
from raysweep.commands.output import exit_code_of, print_json, print_ranking
from raysweep.printable import printable


def add(commands: Any, common: argparse.ArgumentParser) -> None:
    """Give the parser `status`, `rank`, `report` and `export`; `common` holds the options of all commands."""
    for name, command, text in (
        ("status", _status, "stages done, running and failed"),
        ("rank", _rank, "which checkpoint is best, and which indicator tells"),
        ("report", _report, "write report.html"),
        ("export", _export, "take a checkpoint out of the store, ready for from_pretrained"),
    ):
        sub = commands.add_parser(name, parents=[common], help=text)
        sub.add_argument("run", metavar="RUN", help=RUN_HELP)
        add_overrides(sub)
        sub.set_defaults(command=command)
    sub.add_argument("--to", required=True, metavar="DIR", help="a folder that is new or empty, or hub:owner/name")
    sub.add_argument(
        "--checkpoint",
        default="1",
        metavar="WHICH",
        help="place in the ranking, label or stage id, or chosen, as search.choose says (default: the best)",
    )


def _status(args: argparse.Namespace) -> int:
    from raysweep.runs import status
    from raysweep.screen import print_status

    counts = status(results_of(args).run)
    if args.json:
        print_json(counts)
    else:
        print_status(counts)
    return 1 if counts["failures"] else 0


def _rank(args: argparse.Namespace) -> int:
    results = results_of(args)
    if args.json:
        print_json(results.ranking.to_dict())
    else:
        print_ranking(results)
    return exit_code_of(results)


def _report(args: argparse.Namespace) -> int:
    results = results_of(args)
    path = results.write_report()
    if args.json:
        print_json({"report": str(path)})
    else:
        print(printable(path))
    return exit_code_of(results)


def _export(args: argparse.Namespace) -> int:
    from raysweep.analysis.choosing import search_of
    from raysweep.export import export

    results = results_of(args)
    choose = search_of(results.run).choose
    exported = export(results.ranking, results.run.store, to=args.to, which=args.checkpoint, choose=choose)
    if args.json:
        print_json(exported.to_dict())
    else:
        print(printable(f"{exported.label}: {exported.to}"))
    return 0
