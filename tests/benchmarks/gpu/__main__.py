"""All that is measured on a machine with one GPU, part by part, each in a process of its own of at most nine minutes.

    python tests/benchmarks/gpu --to FOLDER [--parts NAME,...]        (as `make gpu` calls it)

Rows go into FOLDER/rows.jsonl as they are measured, and into FOLDER/table.md; what is there already is not measured
again. A name that begins others, such as `throughput`, stands for them all; `parts.py` has the parts. Without a GPU,
DEVICE=cpu runs it all at tiny sizes.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from pathlib import Path

from parts import PARTS
from table import Table

LIMIT_SECONDS = 540.0


def main() -> int:
    """Exit code: 1 if a part was cut short or broke down."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--to", type=Path, required=True)
    parser.add_argument("--parts", default="", help="names, or beginnings of names, with commas; default: all")
    parser.add_argument("--alone", help=argparse.SUPPRESS)
    args = parser.parse_args()
    asked = [part for part in args.parts.split(",") if part]
    if unknown := [part for part in asked if not any(name.startswith(part) for name in PARTS)]:
        parser.error(f"no part {unknown[0]!r}; there are {', '.join(PARTS)}")
    from subjects import device_title  # Imports torch, which takes seconds: mistakes are told before.

    if args.alone:
        PARTS[args.alone](Table(args.to, device_title()))
        return 0
    code = 0
    for name in PARTS:
        if not asked or any(name.startswith(part) for part in asked):
            code |= _run(name, args.to)
    table = Table(args.to, device_title()).markdown()
    (args.to / "table.md").write_text(table)
    print(f"\n{table}")
    return code


def _run(name: str, folder: Path) -> int:
    began = time.monotonic()
    print(f"part {name}", file=sys.stderr, flush=True)
    command = [sys.executable, str(Path(__file__).parent), "--to", str(folder), "--alone", name]
    try:
        code = subprocess.run(command, timeout=LIMIT_SECONDS).returncode
    except subprocess.TimeoutExpired:
        print(f"part {name}: cut short after {LIMIT_SECONDS:.0f} s; its rows stay", file=sys.stderr)
        return 1
    took = time.monotonic() - began
    print(f"part {name}: {took:.0f} s" + (f", and broke down ({code})" if code else ""), file=sys.stderr, flush=True)
    return int(code != 0)


if __name__ == "__main__":
    sys.exit(main())
