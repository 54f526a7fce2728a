"""status, rank, report and export: what a run gave so far."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from raysweep.commands.arguments import RUN_HELP, add_overrides, costs, hours, named, names, results_of
from raysweep.commands.output import exit_code_of, print_json, print_ranking
from raysweep.errors import DataError
from raysweep.printable import printable
from raysweep.validation import suggested

if TYPE_CHECKING:
    from raysweep.analysis.budget import Known
    from raysweep.analysis.learning import Learnt
    from raysweep.analysis.ranking import Ranking

TABLE_OPTIONS = ("higher", "lower", "config", "variant", "gaps", "costs", "drop_flagged")


def add(commands: Any, common: argparse.ArgumentParser) -> None:
    """Give the parser `status`, `rank`, `report` and `export`; `common` holds the options of all commands."""
    for name, command, text in (
        ("status", _status, "stages done, running and failed"),
        ("rank", _rank, "which checkpoint is best, and which indicator tells"),
        ("report", _report, "write report.html"),
        ("export", _export, "take a checkpoint out of the store, ready for from_pretrained"),
    ):
        sub = commands.add_parser(name, parents=[common], help=text)
        # A table is ranked in a run's place.
        sub.add_argument("run", metavar="RUN", nargs="?" if name == "rank" else None, help=RUN_HELP)
        add_overrides(sub)
        sub.set_defaults(command=command)
        if name in ("rank", "report", "export"):
            what = "what a run's checkpoints are ranked by, such as sft/mean_score or sft/TASK/log_likelihood"
            of_table = (
                "; of a table, the score after fine-tuning, taken as higher is better (give a loss "
                "with its sign turned), its standard errors in COLUMN_stderr where there is such a column"
                if name == "rank"
                else ""
            )
            sub.add_argument("--target", type=named, metavar="COLUMN", help=what + of_table)
        if name == "rank":
            _add_table(sub)
    sub.add_argument("--to", required=True, metavar="DIR", help="a folder that is new or empty, or hub:owner/name")
    sub.add_argument(
        "--checkpoint",
        default="1",
        metavar="WHICH",
        help="place in the ranking, label or stage id, or chosen, as search.choose says (default: the best)",
    )


def _add_table(rank: argparse.ArgumentParser) -> None:
    """The options by which `rank` takes a table that no run made."""
    rank.add_argument(
        "--table",
        type=Path,
        metavar="FILE",
        help="in place of a run: a .csv or .parquet of indicators and scores; a run's own tables/checkpoints.parquet "
        "knows its columns",
    )
    for option, text in (
        ("higher", "indicators of which higher values are better"),
        ("lower", "indicators of which lower values are better"),
        ("config", "what was known before anything was measured, such as lr,objective,mix"),
    ):
        rank.add_argument(f"--{option}", type=names, default=(), metavar="COLUMNS", help=f"{text}; between commas")
    rank.add_argument(
        "--variant",
        type=named,
        metavar="COLUMN",
        help="rows alike in it are no independent witnesses (default: variant if there is one, else the configuration)",
    )
    rank.add_argument(
        "--gaps", type=named, metavar="COLUMN", help="an indicator, such as perplexity: pairs by their difference in it"
    )
    rank.add_argument("--learn", type=Path, metavar="DIR", help="learn to compare checkpoints by it, for `compare`")
    rank.add_argument(
        "--without",
        type=names,
        default=(),
        metavar="NAMES",
        help="with --learn: indicators to leave out, by name or by its beginning, such as early_sft; between commas",
    )
    rank.add_argument(
        "--budget",
        type=hours,
        metavar="HOURS",
        help="what to buy next with so many GPU hours, such as 20gpuh; on CPUs they are hours of workers",
    )
    rank.add_argument(
        "--costs",
        type=costs,
        default={},
        metavar="NAME=HOURS",
        help="of a table: hours of each indicator on one row, and of sft; between commas (a run has its own)",
    )
    rank.add_argument("--drop-flagged", action="store_true", help="leave out copies of rows, and collapsed ones")


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
    _check_together(args)
    if args.table or args.run is None:
        return _rank_table(args)
    if given := [f"--{name.replace('_', '-')}" for name in TABLE_OPTIONS if getattr(args, name)]:
        raise DataError(
            f"{given[0]} tells of a table's columns; give --table FILE in place of {args.run!r}, or leave it out"
        )
    results = results_of(args)
    if args.learn:
        from raysweep.comparing import learn_from_run

        return _print_learnt(learn_from_run(results, args.learn, without=args.without), args)
    if args.budget:
        from raysweep.analysis.budget_page import known_of_run

        return _print_budget(results.ranking, known_of_run(results.ranking, results.stages), args)
    if args.json:
        from raysweep.analysis.fixed_rates import fixed_rates
        from raysweep.analysis.ranking import plain_json

        rates = [asdict(each) for each in fixed_rates(results.ranking, results.stages)]
        print_json(results.ranking.to_dict() | {"fixed_rates": plain_json(rates)})
    else:
        print_ranking(results)
    return exit_code_of(results)


def _check_together(args: argparse.Namespace) -> None:
    """That no option is ignored, and `--learn` can be written. Raises DataError."""
    if args.learn and args.budget:
        raise DataError("--learn and --budget are answered one at a time; leave one of them out")
    if args.learn and args.drop_flagged:
        raise DataError("--learn leaves out copies and collapsed rows in its own way; leave --drop-flagged out")
    if args.without and not args.learn:
        raise DataError("--without says what is not learnt from: give --learn DIR too, or leave it out")
    if args.learn and args.learn.is_file():
        raise DataError(f"--learn: {args.learn} is a file; name a folder, which is made if it is not there")
    if args.table and args.costs and not args.budget:
        raise DataError("--costs says what a budget buys: give --budget HOURS too, or leave it out")
    if args.table and args.budget and not args.costs:
        raise DataError("--budget needs what a row costs in hours: --costs sft=HOURS,INDICATOR=HOURS,...")
    known = ["sft", *args.higher, *args.lower]
    if len(known) > 1 and (unknown := [name for name in args.costs if args.table and name not in known]):
        raise DataError(
            f"--costs: {unknown[0]!r} is no indicator{suggested(unknown[0], known, 'those with costs are')}"
        )


def _print_budget(ranking: Ranking, known: Known, args: argparse.Namespace) -> int:
    from raysweep.analysis.budget_page import budget_document, format_budget
    from raysweep.analysis.ranking import plain_json

    document = budget_document(ranking, known, args.budget)
    if args.json:
        print_json(plain_json(document))
    else:
        print(format_budget(document))
    return 0


def _print_learnt(learnt: list[Learnt], args: argparse.Namespace) -> int:
    from raysweep.analysis.learnt_page import format_learnt, learnt_document

    if args.json:
        print_json({"comparer": str(args.learn), "targets": [learnt_document(each) for each in learnt]})
    else:
        for each in learnt:
            print(format_learnt(each))
        print(printable(f"saved: {args.learn}; raysweep compare A B --with {args.learn} --measure SWEEP.yaml"))
    return 0


def _rank_table(args: argparse.Namespace) -> int:
    from raysweep.analysis.given_table import Roles, rank_table
    from raysweep.analysis.terminal import format_indicators

    if args.run is not None or not args.table:
        both = f", not both {args.run!r} and --table {args.table}" if args.table else ""
        raise DataError(f"rank takes a run's name, folder or sweep file, or --table FILE{both}")
    roles = Roles(
        args.target or "",
        higher=args.higher,
        lower=args.lower,
        config=args.config,
        variant=args.variant,
        gaps=args.gaps,
    )
    if args.learn:
        from raysweep.comparing import learn_from_table

        return _print_learnt(learn_from_table(args.table, roles, args.learn, without=args.without), args)
    ranking = rank_table(args.table, roles, drop_flagged=args.drop_flagged)
    if args.budget:
        from raysweep.analysis.budget_page import known_of

        return _print_budget(ranking, known_of(ranking, args.costs), args)
    if args.json:
        print_json(ranking.to_dict())
    else:
        print(format_indicators(ranking))
    return 0


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
    from raysweep.export import CHOSEN, export

    if args.target and args.checkpoint == CHOSEN:
        raise DataError(f"--checkpoint {CHOSEN} goes by search.choose, not by --target; leave one of them out")
    results = results_of(args)
    choose = search_of(results.run).choose
    exported = export(results.ranking, results.run.store, to=args.to, which=args.checkpoint, choose=choose)
    if args.json:
        print_json(exported.to_dict())
    else:
        print(printable(f"{exported.label}: {exported.to}"))
    return 0
