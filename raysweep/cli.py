"""The command line: plan | run | status | rank | report | export | trace | schema | doctor.

Results go to stdout, as one JSON document with --json; the board and logs go to stderr. Exit codes: 0 done,
1 some stages failed, 2 something the user can mend, 130 interrupted, 143 terminated.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import importlib.metadata
import json
import logging
import math
import os
import shlex
import signal
import sys
import threading
import typing
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from raysweep.curvature.cost import Products
from raysweep.curvature.settings import TraceSettings
from raysweep.errors import RaysweepError, StoreError
from raysweep.printable import printable

# What a file system says that is full, or has become read-only.
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    args = _parser().parse_args(argv)
    logs = logging.StreamHandler(sys.stderr)
    logs.setFormatter(_Printable("%(levelname)s %(message)s"))
    logging.basicConfig(handlers=[logs], level=logging.INFO if args.verbose else logging.WARNING)
    try:
        with _terminable() as terminated:
            return int(args.command(args))
    except RaysweepError as error:
        return _mistake(error, as_json=args.json)
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # A second Ctrl-C would only break the tidying up.
        was, code = ("terminated", 143) if terminated.is_set() else ("interrupted", 130)
        print(f"{was}: what is finished is kept; the same command goes on from there", file=sys.stderr)
        return code
    except BrokenPipeError:  # `raysweep plan ... | head`
        return 0
    except OSError as error:
        if error.errno not in NO_ROOM:
            raise
        where = error.filename or "the disk"
        text = f"{where} cannot be written: {os.strerror(error.errno)}; make room, and run the same command again"
        return _mistake(StoreError(text), as_json=args.json)


def _mistake(error: RaysweepError, *, as_json: bool) -> int:
    if as_json:
        _print_json({"error": type(error).__name__, "message": str(error)})
    for line in str(error).splitlines():
        print(printable(f"{type(error).__name__}: {line}"), file=sys.stderr)
    return 2


@contextlib.contextmanager
def _terminable() -> Iterator[threading.Event]:
    """While in it, SIGTERM ends a command as Ctrl-C does; says whether it came."""
    terminated = threading.Event()

    def terminate(number: int, frame: Any) -> None:
        terminated.set()
        raise KeyboardInterrupt  # What every library lets through.

    before = signal.signal(signal.SIGTERM, terminate)
    try:
        yield terminated
    finally:
        signal.signal(signal.SIGTERM, before)


class _Printable(logging.Formatter):
    """Log lines quote what others wrote: names of files, messages of libraries."""

    def format(self, record: logging.LogRecord) -> str:
        return printable(super().format(record))


class _PrintCompletion(argparse.Action):
    """`--print-completion SHELL`: a script for the shell's own completion, made from the parser itself."""

    def __call__(self, parser: argparse.ArgumentParser, namespace: Any, values: Any, option: Any = None) -> None:
        try:
            import shtab
        except ImportError:
            parser.exit(2, "--print-completion needs the package shtab: pip install shtab\n")
        commands: Any = next(action.choices for action in parser._actions if action.metavar == "COMMAND")
        for action in [action for command in commands.values() for action in command._actions]:
            if action.metavar in ("SWEEP.yaml", "RUN", "DIR", "FILES", "MODEL", "ROOT"):
                action.complete = shtab.FILE
        print(shtab.complete(parser, shell=values))
        parser.exit()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="raysweep", description="Which way to pretrain fine-tunes best?")
    parser.add_argument("--version", action="version", version=f"raysweep {importlib.metadata.version('raysweep')}")
    parser.add_argument(
        "--print-completion", action=_PrintCompletion, choices=["bash", "zsh", "tcsh"], help="a script to source"
    )
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--json", action="store_true", help="one JSON document on stdout")
    common.add_argument("--store", type=_named, metavar="ROOT", help="folder or URL (default: raysweep-store)")
    common.add_argument("-v", "--verbose", action="store_true", help="log what happens")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    plan = commands.add_parser("plan", parents=[common], help="what a sweep would run, and its cost; computes nothing")
    plan.add_argument("--mfu", type=_above_zero, default=0.4, help="model FLOPs utilization assumed (default: 0.4)")
    plan.add_argument(
        "--peak-tflops", type=_above_zero, default=989.0, help="of one GPU (default: 989, H100 dense bf16)"
    )
    plan.set_defaults(command=_plan)

    run = commands.add_parser("run", parents=[common], help="run a sweep, or go on with it")
    for sub in (plan, run):
        sub.add_argument("sweep", type=Path, metavar="SWEEP.yaml")
    run.add_argument("--runner", choices=["tune", "inline"], default="tune", help="inline: in this process, no Ray")
    run.add_argument("--run", type=_named, metavar="NAME", help="name of the run (default: sweep name and identity)")
    run.set_defaults(command=_run)

    for name, command, text in (
        ("status", _status, "stages done, running and failed"),
        ("rank", _rank, "which checkpoint is best, and which indicator tells"),
        ("report", _report, "write report.html"),
        ("export", _export, "take a checkpoint out of the store, ready for from_pretrained"),
    ):
        sub = commands.add_parser(name, parents=[common], help=text)
        sub.add_argument("run", metavar="RUN", help="name or folder of a run, or its sweep file")
        sub.set_defaults(command=command)
    sub.add_argument("--to", required=True, metavar="DIR", help="a folder that is new or empty, or hub:owner/name")
    sub.add_argument(
        "--checkpoint", default="1", metavar="WHICH", help="place in the ranking, label or stage id (default: the best)"
    )

    trace = commands.add_parser("trace", parents=[common], help="flatness of language models: traces of the Hessian")
    trace.add_argument("models", nargs="+", metavar="MODEL", help="folder or hub id; several are compared")
    trace.add_argument(
        "--data", nargs="+", default=(), metavar="FILES", help="globs of .txt, .jsonl(.gz, .zst), .parquet"
    )
    trace.add_argument("--samples", type=_count, default=0, metavar="N", help="measure on N sequences of its own, too")
    trace.add_argument("--sequence-length", type=_count, metavar="N", help="tokens (default: 512, or what it takes)")
    _add_setting(trace, "rse", type=_above_zero)
    _add_setting(trace, "max_units", type=_count, metavar="N")
    _add_setting(trace, "products", choices=typing.get_args(Products))
    _add_setting(trace, "parts", action="store_true")
    trace.add_argument(
        "--shape",
        type=_count,
        nargs="?",
        const=8,
        default=0,
        metavar="N",
        help="also eigenvalues, sharpness and scale-free forms, on N sequences (8); takes some 200 products",
    )
    trace.add_argument("--parameters", nargs="+", default=("*",), metavar="PATTERN", help="of names, such as '*.mlp.*'")
    _add_setting(trace, "seed", type=_seed)
    trace.set_defaults(command=_trace)

    schema = commands.add_parser("schema", parents=[common], help="JSON Schema of the sweep file")
    schema.set_defaults(command=_schema)
    doctor = commands.add_parser("doctor", parents=[common], help="check this machine")
    doctor.set_defaults(command=_doctor)
    return parser


def _add_setting(parser: argparse.ArgumentParser, name: str, **how: Any) -> None:
    """An option as the field of `TraceSettings` says it."""
    field = TraceSettings.model_fields[name]
    text = f"{field.description} (default: {field.default})".replace("`", "")
    parser.add_argument(f"--{name.replace('_', '-')}", dest=name, default=field.default, help=text, **how)


def _plan(args: argparse.Namespace) -> int:
    from raysweep.estimates import estimate
    from raysweep.screen import print_plan
    from raysweep.space import load

    space = load(args.sweep)
    plan = estimate(space, _store(args), mfu=args.mfu, peak_flops=args.peak_tflops * 1e12)
    if args.json:
        _print_json(plan.to_dict())
    else:
        print_plan(plan)
    return 0


def _run(args: argparse.Namespace) -> int:
    from raysweep.board import Board
    from raysweep.results import Results
    from raysweep.runners import run_sweep
    from raysweep.runs import status
    from raysweep.space import load

    space, store = load(args.sweep), _store(args)
    with Board(space) as board:
        results = Results(run_sweep(space, store, runner=args.runner, name=args.run, show=board.show))
    failures = results.failures
    if not args.json:
        # First what needs no room on the disk.
        _print_ranking(results)
        for failure in failures:
            print(printable(f"FAILED {failure['stage']}: {failure['cause']}"), file=sys.stderr)
    report = results.write_report()
    if args.json:
        _print_json({**status(results.run), "ranking": results.ranking.to_dict(), "report": str(report)})
    else:
        print(printable(f"report: {report}"))
    return 1 if failures else 0


def _status(args: argparse.Namespace) -> int:
    from raysweep.runs import status
    from raysweep.screen import print_status

    found = status(_results(args).run)
    if args.json:
        _print_json(found)
    else:
        print_status(found)
    return 1 if found["failures"] else 0


def _rank(args: argparse.Namespace) -> int:
    results = _results(args)
    if args.json:
        _print_json(results.ranking.to_dict())
    else:
        _print_ranking(results)
    return 0


def _report(args: argparse.Namespace) -> int:
    path = _results(args).write_report()
    if args.json:
        _print_json({"report": str(path)})
    else:
        print(printable(path))
    return 0


def _export(args: argparse.Namespace) -> int:
    from raysweep.export import export

    results = _results(args)
    exported = export(results.ranking, results.run.store, to=args.to, which=args.checkpoint)
    if args.json:
        _print_json(exported.to_dict())
    else:
        print(printable(f"{exported.label}: {exported.to}"))
    return 0


def _trace(args: argparse.Namespace) -> int:
    from raysweep.screen import print_traces
    from raysweep.stages.flatness import Shape
    from raysweep.trace import Request, measure

    request = Request(
        models=tuple(args.models),
        data=tuple(args.data),
        num_samples=args.samples,
        sequence_length=args.sequence_length,
        traces=TraceSettings(
            rse=args.rse,
            min_units=min(TraceSettings().min_units, args.max_units),
            max_units=args.max_units,
            products=args.products,
            parts=args.parts,
            seed=args.seed,
        ),
        shape=Shape(num_sequences=args.shape) if args.shape else None,
        parameters=tuple(args.parameters),
    )
    found, differences, failures = measure(request, show=lambda line: print(printable(line), file=sys.stderr))
    documents = [each.to_dict() for each in found], [each.to_dict() for each in differences]
    if not args.json:
        print_traces(*documents)
    elif len(args.models) == 1:
        _print_json(documents[0][0])
    else:
        _print_json({"traces": documents[0], "differences": documents[1], "failures": failures})
    for failure in failures:
        print(printable(f"DataError: {failure}"), file=sys.stderr)
    return 1 if failures else 0


def _count(text: str) -> int:
    if (number := int(text)) < 2:
        raise argparse.ArgumentTypeError(f"{number}: at least 2")
    return number


def _seed(text: str) -> int:
    if (number := int(text)) < 0:
        raise argparse.ArgumentTypeError(f"{number}: must be 0 or more")
    return number


def _named(text: str) -> str:
    if not text:  # As of "$STORE" that is not set: the default would be another place than was meant.
        raise argparse.ArgumentTypeError("is empty; name one, or leave the option out")
    return text


def _above_zero(text: str) -> float:
    if not 0 < (number := float(text)) < math.inf:
        raise argparse.ArgumentTypeError(f"{number}: must be a finite number above 0")
    return number


def _schema(args: argparse.Namespace) -> int:
    from raysweep.declared import Declared

    _print_json(Declared.model_json_schema(by_alias=True))
    return 0


def _doctor(args: argparse.Namespace) -> int:
    from raysweep.doctor import checks

    found = checks(_store(args))
    if args.json:
        _print_json([check.to_dict() for check in found])
    else:
        for check in found:
            print(printable(f"{'ok  ' if check.ok else 'FAIL'}  {check.name}: {check.message}"))
    return 0 if all(check.ok for check in found) else 2


def _store(args: argparse.Namespace) -> Any:
    from raysweep.store import DEFAULT_ROOT, Store

    store = Store(args.store or DEFAULT_ROOT)
    if store.url.startswith("memory://"):
        raise StoreError(f"store {store.url!r} is gone when this command ends; give a folder, or a URL that lasts")
    return store


def _results(args: argparse.Namespace) -> Any:
    from raysweep.results import Results

    return Results.open(args.run, store=args.store)


def _print_ranking(results: Any) -> None:
    from raysweep.analysis.terminal import format_terminal

    print(format_terminal(results.ranking))
    if results.ranking.best is not None:
        store = shlex.quote(results.run.store.url)
        print(printable(f"to take it along: raysweep export {results.run.name} --store {store} --to DIR"))


def _print_json(document: Any) -> None:
    print(json.dumps(document, indent=1, sort_keys=False, default=str))


if __name__ == "__main__":
    sys.exit(main())
