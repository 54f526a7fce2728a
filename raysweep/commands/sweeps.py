"""plan and run: from a sweep file to results."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from raysweep.commands.arguments import above_zero, add_address, add_overrides, gpu, named, share, store_of, use_address
from raysweep.commands.output import exit_code_of, print_json, print_ranking
from raysweep.devices import memory_bytes, peak_flops
from raysweep.errors import ClusterError
from raysweep.printable import printable


def add(commands: Any, common: argparse.ArgumentParser) -> None:
    """Give the parser `plan` and `run`; `common` holds the options of all commands."""
    plan = commands.add_parser("plan", parents=[common], help="what a sweep would run, and its cost; computes nothing")
    plan.add_argument("--mfu", type=share, default=0.4, help="model FLOPs utilization assumed (default: 0.4)")
    plan.add_argument(
        "--gpu",
        type=gpu,
        metavar="NAME",
        help="such as H100 or A100-80GB: its peak TFLOP/s, and whether each stage fits its memory",
    )
    plan.add_argument(
        "--peak-tflops", type=above_zero, help="of one GPU (default: that of --gpu, else 989, H100 dense bf16)"
    )
    plan.set_defaults(command=_plan)

    run = commands.add_parser("run", parents=[common], help="run a sweep, or go on with it")
    for sub in (plan, run):
        sub.add_argument("sweep", type=Path, metavar="SWEEP.yaml")
        add_overrides(sub)
    run.add_argument("--runner", choices=["tune", "inline"], default="tune", help="inline: in this process, no Ray")
    run.add_argument("--run", type=named, metavar="NAME", help="name of the run (default: sweep name and identity)")
    run.add_argument(
        "--fail-fast", action="store_true", help="end at the first stage that fails for good; training is saved first"
    )
    add_address(run)
    run.set_defaults(command=_run)


DEFAULT_PEAK_FLOPS = 989e12
"""Of an H100, where a plan is told of no GPU."""


def _plan(args: argparse.Namespace) -> int:
    from raysweep.estimates import estimate
    from raysweep.runners.hardware import gangs_chosen
    from raysweep.screen import print_plan
    from raysweep.space import load

    space, lines = gangs_chosen(load(args.sweep, args.overrides), gpu=args.gpu)
    named_peak, memory = (peak_flops(args.gpu), memory_bytes(args.gpu)) if args.gpu else (None, None)
    peak = args.peak_tflops * 1e12 if args.peak_tflops else named_peak or DEFAULT_PEAK_FLOPS
    plan = estimate(space, store_of(args), mfu=args.mfu, peak_flops=peak, gpu_memory=memory, choices=lines)
    if args.json:
        print_json(plan.to_dict())
    else:
        print_plan(plan)
    return 0


def _run(args: argparse.Namespace) -> int:
    from raysweep.board import Board
    from raysweep.results import Results
    from raysweep.runners import run_sweep
    from raysweep.runs import status
    from raysweep.space import load

    if args.address and args.runner == "inline":
        raise ClusterError(f"--address {args.address}: the inline runner uses no cluster; leave one of the two out")
    use_address(args)
    space, store = load(args.sweep, args.overrides), store_of(args)
    with Board(space) as board:
        run = run_sweep(space, store, runner=args.runner, name=args.run, show=board.show, fail_fast=args.fail_fast)
        results = Results(run)
    # First what needs no room on the disk.
    if not args.json:
        print_ranking(results)
    code = exit_code_of(results)
    report = results.write_report()
    if args.json:
        print_json({**status(results.run), "ranking": results.ranking.to_dict(), "report": str(report)})
    else:
        print(printable(f"report: {report}"))
    return code
