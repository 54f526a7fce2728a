"""The command line; each command lives in `raysweep.commands`.

Results go to stdout, as one JSON document with --json; the board and logs go to stderr. Exit codes: 0 done,
1 some stages failed, 2 something the user can mend, 130 interrupted, 143 terminated.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import importlib.metadata
import logging
import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from typing import Any

from raysweep.commands import machine, models, results, running, stores, sweeps
from raysweep.commands.arguments import named
from raysweep.commands.output import print_json, stdout_for_documents
from raysweep.errors import RaysweepError, StoreError
from raysweep.patience import AWAY
from raysweep.printable import printable
from raysweep.secrets import without_secrets

# What a file system says that is full, or has become read-only.
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    args = _parsed(argv)
    logs = logging.StreamHandler(sys.stderr)
    logs.setFormatter(_Printable("%(levelname)s %(message)s"))
    logging.basicConfig(handlers=[logs], level=logging.INFO if args.verbose else logging.WARNING)
    try:
        with _terminable() as terminated, stdout_for_documents() if args.json else contextlib.nullcontext():
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
        if error.errno not in (*NO_ROOM, *AWAY):
            raise
        where = error.filename or "the disk"
        did, mend = (
            ("cannot be written", "make room") if error.errno in NO_ROOM else ("is away", "wait until it is back")
        )
        text = f"{where} {did}: {os.strerror(error.errno)}; {mend}, and run the same command again"
        return _mistake(StoreError(text), as_json=args.json)


def _parsed(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = _parser()
    args, others = parser.parse_known_args(argv)
    # argparse gives all places to what comes before the next option, and leaves over what comes after it.
    takes_overrides = hasattr(args, "overrides")
    if others and (not takes_overrides or any(other.startswith("-") for other in others)):
        mend = "; what the sweep file says is given without dashes: pretrain.steps=200" if takes_overrides else ""
        parser.error(f"unrecognized arguments: {' '.join(others)}{mend}")
    if takes_overrides:
        args.overrides = [*args.overrides, *others]
    return args


def _mistake(error: RaysweepError, *, as_json: bool) -> int:
    message = without_secrets(str(error))
    if as_json:
        print_json({"error": type(error).__name__, "message": message})
    for line in message.splitlines():
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
        return printable(without_secrets(super().format(record)))


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
    common.add_argument("--store", type=named, metavar="ROOT", help="folder or URL (default: raysweep-store)")
    common.add_argument("-v", "--verbose", action="store_true", help="log what happens")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for module in (sweeps, running, results, stores, models, machine):
        module.add(commands, common)
    return parser


if __name__ == "__main__":
    sys.exit(main())
