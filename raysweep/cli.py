"""The command line: plan | run | status | rank | report | trace | schema | doctor.

Results go to stdout, as one JSON document with --json; the board and logs go to stderr. Exit codes: 0 done,
1 some stages failed, 2 something the user can mend, 130 interrupted.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from raysweep.curvature.cost import Products
from raysweep.errors import RaysweepError

DEFAULT_STORE = "raysweep-store"


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    args = _parser().parse_args(argv)
    logging.basicConfig(
        stream=sys.stderr, level=logging.INFO if args.verbose else logging.WARNING, format="%(levelname)s %(message)s"
    )
    try:
        return int(args.command(args))
    except RaysweepError as error:
        if args.json:
            _print_json({"error": type(error).__name__, "message": str(error)})
        for line in str(error).splitlines():
            print(f"{type(error).__name__}: {line}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted: what is finished is kept; the same command goes on from there", file=sys.stderr)
        return 130
    except BrokenPipeError:  # `raysweep plan ... | head`
        return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="raysweep", description="Which way to pretrain fine-tunes best?")
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--json", action="store_true", help="one JSON document on stdout")
    common.add_argument("--store", default=None, metavar="ROOT", help=f"folder or URL (default: {DEFAULT_STORE})")
    common.add_argument("-v", "--verbose", action="store_true", help="log what happens")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    plan = commands.add_parser("plan", parents=[common], help="what a sweep would run, and its cost; computes nothing")
    plan.add_argument("sweep", type=Path, metavar="SWEEP.yaml")
    plan.add_argument("--mfu", type=float, default=0.4, help="model FLOPs utilization assumed (default: 0.4)")
    plan.add_argument("--peak-tflops", type=float, default=989.0, help="of one GPU (default: 989, H100 dense bf16)")
    plan.set_defaults(command=_plan)

    run = commands.add_parser("run", parents=[common], help="run a sweep, or go on with it")
    run.add_argument("sweep", type=Path, metavar="SWEEP.yaml")
    run.add_argument("--runner", choices=["tune", "inline"], default="tune", help="inline: in this process, no Ray")
    run.add_argument("--run", default=None, metavar="NAME", help="name of the run (default: sweep name and identity)")
    run.set_defaults(command=_run)

    for name, command, text in (
        ("status", _status, "stages done, running and failed"),
        ("rank", _rank, "which checkpoint is best, and which indicator tells"),
        ("report", _report, "write report.html"),
    ):
        sub = commands.add_parser(name, parents=[common], help=text)
        sub.add_argument("run", metavar="RUN", help="name or folder of a run, or its sweep file")
        sub.set_defaults(command=command)

    trace = commands.add_parser("trace", parents=[common], help="flatness of language models: traces of the Hessian")
    trace.add_argument("models", nargs="+", metavar="MODEL", help="folder or hub id; several are compared")
    trace.add_argument("--data", nargs="+", default=(), metavar="FILES", help="text: .txt, .jsonl, .jsonl.gz; globs")
    trace.add_argument("--samples", type=_count, default=0, metavar="N", help="measure on N sequences of its own, too")
    trace.add_argument("--sequence-length", type=_count, metavar="N", help="tokens (default: 512, or what it takes)")
    trace.add_argument("--rse", type=_above_zero, default=0.05, help="relative standard error wanted (default: 0.05)")
    trace.add_argument(
        "--max-units", type=_count, default=256, metavar="N", help="most probe vectors, and label draws (default: 256)"
    )
    trace.add_argument(
        "--products",
        choices=typing.get_args(Products),
        default="logit_differences",
        help="how v'Hv is made, at 1, 2 or 3 gradients; the first, the default, tells no Hessian traces of parts",
    )
    trace.add_argument("--parts", action="store_true", help="also traces by layer and by block, the Fisher's at least")
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
    trace.add_argument("--seed", type=int, default=0, help="of probes, draws and the order of the text")
    trace.set_defaults(command=_trace)

    schema = commands.add_parser("schema", parents=[common], help="JSON Schema of the sweep file")
    schema.set_defaults(command=_schema)
    doctor = commands.add_parser("doctor", parents=[common], help="check this machine")
    doctor.set_defaults(command=_doctor)
    return parser


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
    from raysweep.runners import run_sweep
    from raysweep.runs import status
    from raysweep.screen import Board
    from raysweep.space import load

    space, store = load(args.sweep), _store(args)
    with Board(space) as board:
        run = run_sweep(space, store, runner=args.runner, name=args.run, show=board.show)
    from raysweep.analysis.report import write_report

    report = write_report(run)
    failures = run.failures()
    if args.json:
        _print_json({**status(run), "ranking": _ranking(run).to_dict(), "report": str(report)})
    else:
        _print_ranking(run)
        print(f"\nrun {run.name}: report {report}")
        for failure in failures:
            print(f"FAILED {failure['stage']}: {failure['cause']}", file=sys.stderr)
    return 1 if failures else 0


def _status(args: argparse.Namespace) -> int:
    from raysweep.runs import status
    from raysweep.screen import print_status

    found = status(_find_run(args))
    if args.json:
        _print_json(found)
    else:
        print_status(found)
    return 1 if found["failures"] else 0


def _rank(args: argparse.Namespace) -> int:
    run = _find_run(args)
    if args.json:
        _print_json(_ranking(run).to_dict())
    else:
        _print_ranking(run)
    return 0


def _report(args: argparse.Namespace) -> int:
    from raysweep.analysis.report import write_report

    path = write_report(_find_run(args))
    if args.json:
        _print_json({"report": str(path)})
    else:
        print(path)
    return 0


def _trace(args: argparse.Namespace) -> int:
    from raysweep.screen import print_traces
    from raysweep.trace import Request, measure

    request = Request(
        models=tuple(args.models),
        data=tuple(args.data),
        num_samples=args.samples,
        sequence_length=args.sequence_length,
        rse=args.rse,
        max_units=args.max_units,
        products=args.products,
        shape_sequences=args.shape,
        parameters=tuple(args.parameters),
        parts=args.parts,
        seed=args.seed,
    )
    found, differences, failures = measure(request, show=lambda line: print(line, file=sys.stderr))
    documents = [each.to_dict() for each in found], [each.to_dict() for each in differences]
    if not args.json:
        print_traces(*documents)
    elif len(args.models) == 1:
        _print_json(documents[0][0])
    else:
        _print_json({"traces": documents[0], "differences": documents[1], "failures": failures})
    for failure in failures:
        print(f"DataError: {failure}", file=sys.stderr)
    return 1 if failures else 0


def _count(text: str) -> int:
    if (number := int(text)) < 2:
        raise argparse.ArgumentTypeError(f"{number}: at least 2")
    return number


def _above_zero(text: str) -> float:
    if not (number := float(text)) > 0:
        raise argparse.ArgumentTypeError(f"{number}: must be above 0")
    return number


def _schema(args: argparse.Namespace) -> int:
    from raysweep.space import Declared

    _print_json(Declared.model_json_schema(by_alias=True))
    return 0


def _doctor(args: argparse.Namespace) -> int:
    from raysweep.doctor import checks

    found = checks(_store(args))
    if args.json:
        _print_json([check.to_dict() for check in found])
    else:
        for check in found:
            print(f"{'ok  ' if check.ok else 'FAIL'}  {check.name}: {check.message}")
    return 0 if all(check.ok for check in found) else 2


def _store(args: argparse.Namespace) -> Any:
    from raysweep.store import Store

    return Store(args.store or DEFAULT_STORE)


def _find_run(args: argparse.Namespace) -> Any:
    from raysweep.runs import Run
    from raysweep.store import Store

    path = Path(args.run)
    if path.suffix in (".yaml", ".yml") and path.is_file():
        from raysweep.space import load

        return Run.find(_store(args), load(path).run_name())
    if args.store is None and (path / "sweep.yaml").is_file():
        return Run.find(Store(path.absolute().parent.parent), path.name)
    return Run.find(_store(args), args.run)


def _ranking(run: Any) -> Any:
    from raysweep.analysis.ranking import rank
    from raysweep.analysis.tables import checkpoint_table

    return rank(checkpoint_table(run))


def _print_ranking(run: Any) -> None:
    from raysweep.analysis.terminal import format_terminal

    print(format_terminal(_ranking(run)))


def _print_json(document: Any) -> None:
    print(json.dumps(document, indent=1, sort_keys=False, default=str))


if __name__ == "__main__":
    sys.exit(main())
