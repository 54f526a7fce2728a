"""submit, logs and cancel: a run that somebody else drives, or drove."""

from __future__ import annotations

import argparse
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from raysweep.commands.arguments import RUN_HELP, add_overrides, named, results_of
from raysweep.commands.output import print_json
from raysweep.errors import SpaceError, StoreError
from raysweep.printable import printable


def add(commands: Any, common: argparse.ArgumentParser) -> None:
    """`submit`, `logs` and `cancel`."""
    submit = commands.add_parser("submit", parents=[common], help="run a sweep as a Ray job, and follow it")
    submit.add_argument("sweep", type=Path, metavar="SWEEP.yaml")
    submit.add_argument("--address", type=named, required=True, metavar="URL", help="job server: http://HEAD:8265")
    submit.add_argument("--run", type=named, metavar="NAME", help="name of the run (default: sweep name and identity)")
    submit.add_argument("--working-dir", type=Path, metavar="DIR", help="sent along; default: the sweep file alone")
    submit.add_argument("--no-wait", action="store_true", help="do not follow it")
    submit.set_defaults(command=_submit)
    logs = commands.add_parser("logs", parents=[common], help="what happened in a run, and why a stage failed")
    logs.set_defaults(command=_logs)
    cancel = commands.add_parser("cancel", parents=[common], help="stop a run; what is being trained is saved first")
    cancel.set_defaults(command=_cancel)
    for sub in (logs, cancel):
        sub.add_argument("run", metavar="RUN", help=RUN_HELP)
    cancel.add_argument(
        "--address", type=named, metavar="URL", help="RUN is the id of a job there; without it its store tells"
    )
    logs.add_argument("stage", nargs="?", metavar="STAGE", help="of this stage alone: its id, or the beginning of it")
    for sub in (submit, logs, cancel):
        add_overrides(sub)


def _submit(args: argparse.Namespace) -> int:
    from raysweep.runners.jobs import Submission, follow, submit

    if not args.store:
        raise StoreError("a job needs --store: a URL, or an absolute folder that all nodes share")
    if not args.sweep.is_file():
        raise SpaceError(f"{args.sweep}: no such file")
    job_id, is_new = submit(
        Submission(
            args.address,
            args.sweep,
            store=args.store,
            overrides=tuple(args.overrides),
            run=args.run,
            working_dir=args.working_dir,
        )
    )
    where = f"--address {args.address}"
    did = "was submitted" if is_new else "is there already and goes on"
    print(printable(f"job {job_id} {did}; raysweep cancel {job_id} {where} stops it"), file=sys.stderr)
    code = 0
    if not args.no_wait:
        try:
            code = follow(args.address, job_id, lambda text: print(printable(text), end="", flush=True))
        except KeyboardInterrupt:
            print(f"job {job_id} goes on; the same command follows it again", file=sys.stderr)
            return 130
    if args.json:
        print_json({"job": job_id, "exit_code": None if args.no_wait else code})
    return code


def _logs(args: argparse.Namespace) -> int:
    if args.stage and "=" in args.stage:  # It stands before them, and there may be none.
        args.stage, args.overrides = None, [args.stage, *args.overrides]
    run = results_of(args).run
    events, failures = list(run.events()), run.failures()
    if args.stage:
        events = [event for event in events if str(event.get("stage", "")).startswith(args.stage)]
        failures = [failure for failure in failures if failure["stage"].startswith(args.stage)]
        if not events and not failures:
            raise StoreError(f"run {run.name!r} has no stage {args.stage!r} that was started; raysweep logs {run.name}")
    if args.json:
        print_json({"run": run.name, "events": events, "failures": failures})
        return 0
    for event in events:
        print(printable(_line(event)))
    for failure in failures:
        text = failure["log"] if args.stage else f"{failure['cause']} (raysweep logs {run.name} {failure['stage']})"
        print(printable(f"failed, {failure['attempts']} time(s): {failure['stage']}: {text}"))
    return 0


def _line(event: dict[str, Any]) -> str:
    when = datetime.fromtimestamp(float(event.get("time", 0)), UTC).strftime("%Y-%m-%d %H:%M:%S")
    parts = [when, f"{event.get('event', ''):8}", str(event.get("stage", ""))]
    if "wall_seconds" in event:
        parts.append(f"{event['wall_seconds']:.1f} s")
    if event.get("status") == "diverged":
        parts.append("diverged")
    parts += [str(event[name]) for name in ("cause", "message") if name in event]
    if event.get("retry"):
        parts.append("(tried again)")
    return " ".join(parts).rstrip()


def _cancel(args: argparse.Namespace) -> int:
    from raysweep.runners.drivers import cancel
    from raysweep.runners.jobs import stop

    said = stop(args.run, args.address) if args.address else cancel(results_of(args).run, stop_job=stop)
    if args.json:
        print_json({"message": said})
    else:
        print(printable(said))
    return 0
