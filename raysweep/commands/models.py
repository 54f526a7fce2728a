"""trace and compare: any language models, outside a sweep."""

from __future__ import annotations

import argparse
import sys
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from raysweep.commands.arguments import above_zero, count, seed, store_of
from raysweep.commands.output import print_json
from raysweep.curvature.cost import Products
from raysweep.curvature.settings import TraceSettings
from raysweep.docstrings import docs_of
from raysweep.errors import DataError
from raysweep.flatter import changes
from raysweep.printable import printable


def add(commands: Any, common: argparse.ArgumentParser) -> None:
    """Give the parser `trace` and `compare`; `common` holds the options of all commands."""
    trace = commands.add_parser("trace", parents=[common], help="flatness of language models: traces of the Hessian")
    trace.add_argument("models", nargs="+", metavar="MODEL", help="folder or hub id; several are compared")
    trace.add_argument(
        "--data", nargs="+", default=(), metavar="FILES", help="globs of .txt, .jsonl(.gz, .zst), .parquet"
    )
    trace.add_argument("--samples", type=count, default=0, metavar="N", help="measure on N sequences of its own, too")
    trace.add_argument("--sequence-length", type=count, metavar="N", help="tokens (default: 512, or what it takes)")
    docs = docs_of(TraceSettings)
    _add_setting(trace, docs, "rse", type=above_zero)
    _add_setting(trace, docs, "max_units", type=count, metavar="N")
    _add_setting(trace, docs, "products", choices=typing.get_args(Products))
    _add_setting(trace, docs, "parts", action="store_true")
    trace.add_argument(
        "--shape",
        type=count,
        nargs="?",
        const=8,
        default=0,
        metavar="N",
        help="also eigenvalues, sharpness and scale-free forms, on N sequences (8); takes some 200 products",
    )
    trace.add_argument("--parameters", nargs="+", default=("*",), metavar="PATTERN", help="of names, such as '*.mlp.*'")
    _add_setting(trace, docs, "seed", type=seed)
    trace.set_defaults(command=_trace)
    compare = commands.add_parser("compare", parents=[common], help="which of two checkpoints will fine-tune better")
    compare.add_argument("first", metavar="A", help="folder or hub id of a Hugging Face checkpoint")
    compare.add_argument("second", metavar="B", help="likewise")
    compare.add_argument(
        "--with",
        dest="comparers",
        type=Path,
        metavar="DIR",
        help="what `raysweep rank --learn DIR` made (without: what each indicator says, and no probability)",
    )
    compare.add_argument(
        "--measure",
        type=Path,
        metavar="SWEEP.yaml",
        help="what is measured, and on what: with --with, the sweep file of the run learnt from",
    )
    compare.set_defaults(command=_compare)


def _add_setting(parser: argparse.ArgumentParser, docs: Mapping[str, str], name: str, **how: Any) -> None:
    """An option as the field of `TraceSettings` says it."""
    field = TraceSettings.model_fields[name]
    text = f"{docs[name]} (default: {field.default})".replace("`", "")
    parser.add_argument(f"--{name.replace('_', '-')}", dest=name, default=field.default, help=text, **how)


def _trace(args: argparse.Namespace) -> int:
    from raysweep.runners.journal import quiet_libraries
    from raysweep.screen import print_traces
    from raysweep.stages.flatness import Shape
    from raysweep.trace import Request, measure

    quiet_libraries()
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
            head="closed_form" if args.products == "logit_differences" else "probed",
            parts=args.parts,
            seed=args.seed,
        ),
        shape=Shape(num_sequences=args.shape) if args.shape else None,
        parameters=tuple(args.parameters),
    )
    measured, differences, failures = measure(request, show=lambda line: print(printable(line), file=sys.stderr))
    documents = [each.to_dict() for each in measured], [each.to_dict() for each in differences]
    if not args.json:
        print_traces(*documents)
    elif len(args.models) == 1:
        print_json(documents[0][0])
    else:
        by_model = {each["model"]: each for each in documents[0]}
        for each in documents[1]:
            found = changes(by_model[each["model"]], by_model[each["less"]], each)
            each["changes"] = [change.to_dict() for change in found]
        print_json({"traces": documents[0], "differences": documents[1], "failures": failures})
    for failure in failures:
        print(printable(f"DataError: {failure}"), file=sys.stderr)
    return 1 if failures else 0


def _compare(args: argparse.Namespace) -> int:
    from raysweep.analysis.learnt_page import format_comparison, format_side_by_side
    from raysweep.analysis.ranking import plain_json
    from raysweep.comparing import compare, side_by_side

    names = (args.first, args.second)
    if not args.measure:
        raise DataError(
            "compare: measured how? Give --measure SWEEP.yaml: with --with DIR, the sweep file of the run that it was "
            "learnt from (a comparer does not hold one, as paths in it are relative to its folder); without, any that "
            "names indicators, which are then shown side by side"
        )
    document = (
        compare(names, comparers=args.comparers, sweep=args.measure, store=store_of(args))
        if args.comparers
        else side_by_side(names, sweep=args.measure, store=store_of(args))
    )
    if args.json:
        print_json(plain_json(document))
    else:
        print(format_comparison(document) if args.comparers else format_side_by_side(document))
    return 0
