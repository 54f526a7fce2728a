"""Wheels for a machine without a network: fetched beforehand, and there unpacked as far as it lacks them.

    python tests/benchmarks/gpu/carry.py fetch WHEELS --python 3.12      (as `make wheels` calls it)
    python tests/benchmarks/gpu/carry.py unpack WHEELS --to FOLDER       (as `make gpu` does)

`carried.txt` lists them. It needs pip, and no package.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
NAMES, CONSTRAINTS = HERE / "carried.txt", HERE.parents[2] / "constraints.txt"
# Published as source alone; without its operators, which are compiled where they are used, it is Python alone.
AS_SOURCE = "deepspeed"
# Of the C library that wheels may ask for; pip takes each word alone.
PLATFORMS = [
    f"{name}_x86_64"
    for name in ("manylinux_2_28", "manylinux_2_27", "manylinux_2_17", "manylinux2014", "manylinux2010", "manylinux1")
]
LIMIT_BYTES = 60 * 2**20


def fetch(folder: Path, python: str) -> None:
    """Download wheels for Linux on x86-64 and this version of Python, of the versions that were tested."""
    names = [line for line in NAMES.read_text().splitlines() if line and not line.startswith("#")]
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    given = ["--no-deps", "--constraint", str(CONSTRAINTS)]
    target = ["--only-binary=:all:", "--implementation", "cp", "--python-version", python]
    target += [word for platform in PLATFORMS for word in ("--platform", platform)]
    wheels = [name for name in names if name != AS_SOURCE]
    subprocess.run([*pip, "download", *given, *target, "--dest", str(folder), *wheels], check=True)
    subprocess.run([*pip, "wheel", *given, "--no-build-isolation", "--wheel-dir", str(folder), AS_SOURCE], check=True)
    size = sum(wheel.stat().st_size for wheel in folder.glob("*.whl"))
    print(f"{len(names)} wheels in {folder}: {size / 2**20:.1f} MiB")
    if size > LIMIT_BYTES:
        raise SystemExit(f"more than {LIMIT_BYTES // 2**20} MiB; take a name out of {NAMES}")


def unpack(wheels: Path, folder: Path) -> None:
    """Put what this Python lacks of the wheels into a folder, to be named in PYTHONPATH."""
    lacking = [wheel for wheel in sorted(wheels.glob("*.whl")) if not _is_installed(wheel, folder)]
    if lacking:
        print(f"unpacking {len(lacking)} wheels: {', '.join(wheel.name.split('-')[0] for wheel in lacking)}")
        pip = [sys.executable, "-m", "pip", "install", "--disable-pip-version-check", "--quiet", "--no-index"]
        subprocess.run([*pip, "--no-deps", "--target", str(folder), *map(str, lacking)], check=True)


def _is_installed(wheel: Path, folder: Path) -> bool:
    name = wheel.name.split("-")[0]
    where = [str(folder), *sys.path]
    return any(importlib.metadata.distributions(name=name, path=where))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    verbs = parser.add_subparsers(dest="verb", required=True)
    fetching, unpacking = verbs.add_parser("fetch"), verbs.add_parser("unpack")
    for each in (fetching, unpacking):
        each.add_argument("wheels", type=Path)
    fetching.add_argument("--python", default="3.12", help="version that they are for (default: 3.12)")
    unpacking.add_argument("--to", type=Path, required=True)
    args = parser.parse_args()
    fetch(args.wheels, args.python) if args.verb == "fetch" else unpack(args.wheels, args.to)
