"""What arguments may be, and what they name: a store, a run's results."""

from __future__ import annotations

import argparse
import math
import os
from typing import TYPE_CHECKING

from raysweep.devices import known_gpus, memory_bytes
from raysweep.errors import DataError, StoreError
from raysweep.validation import suggested

if TYPE_CHECKING:
    from raysweep.results import Results
    from raysweep.store import Store

RUN_HELP = "name or folder of a run, or its sweep file"


def add_overrides(parser: argparse.ArgumentParser) -> None:
    """Let a command take `key=value` after its sweep file, wherever its options stand: see `cli.main`."""
    text = "after a sweep file: in place of what it says, such as pretrain.steps=200 or 'sweep.size.grid=[1, 2]'"
    parser.add_argument("overrides", nargs="*", default=[], metavar="KEY=VALUE", help=text)


def store_of(args: argparse.Namespace) -> Store:
    """The store of `--store`. Raises StoreError if it would not outlive the command."""
    from raysweep.store import DEFAULT_ROOT, Store

    store = Store(args.store or DEFAULT_ROOT)
    if store.url.startswith("memory://"):
        raise StoreError(f"store {store.url!r} is gone when this command ends; give a folder, or a URL that lasts")
    return store


def results_of(args: argparse.Namespace) -> Results:
    """The results of the run that RUN names, by the target that is asked for. Raises DataError if there is none."""
    from raysweep.results import Results

    results = Results.open(args.run, store=args.store, overrides=args.overrides)
    if not (target := getattr(args, "target", None)):
        return results
    known = [column.name for column in results.columns if column.may_be_target and column.name in results.checkpoints]
    if target not in known:
        raise DataError(f"--target: no column {target!r}{suggested(target, known, 'targets')}")
    return results.by(target)


def add_address(parser: argparse.ArgumentParser) -> None:
    """`--address`, of a Ray cluster."""
    parser.add_argument(
        "--address", type=named, metavar="A", help="of a Ray cluster, as IP:PORT or auto (default: RAY_ADDRESS)"
    )


def use_address(args: argparse.Namespace) -> bool:
    """Make `--address` the cluster of this process; says whether there is one."""
    if args.address:
        os.environ["RAY_ADDRESS"] = args.address
    return "RAY_ADDRESS" in os.environ


def count(text: str) -> int:
    """A whole number of 2 or more: one draw has no error bar, and one token predicts none."""
    if (number := _whole(text)) < 2:
        raise argparse.ArgumentTypeError(f"{number}: at least 2")
    return number


def seed(text: str) -> int:
    """A whole number of 0 or more, as generators take it."""
    if (number := _whole(text)) < 0:
        raise argparse.ArgumentTypeError(f"{number}: must be 0 or more")
    return number


def named(text: str) -> str:
    """Any name that is not empty."""
    if not text:  # As of "$STORE" that is not set: the default would be another place than was meant.
        raise argparse.ArgumentTypeError("is empty; name one, or leave the option out")
    return text


def names(text: str) -> tuple[str, ...]:
    """Names between commas, none of them empty."""
    return tuple(named(name.strip()) for name in text.split(","))


def hours(text: str) -> float:
    """Hours of GPUs, or of workers: `20gpuh`, `20h`, or the number alone."""
    number = text.removesuffix("h").removesuffix("gpu")
    if math.isnan(_number(number)):
        raise argparse.ArgumentTypeError(f"{text!r} is no number of hours; write 20gpuh, 20h or 20")
    return above_zero(number)


def costs(text: str) -> dict[str, float]:
    """`name=hours` between commas."""
    pairs = [part.partition("=") for part in names(text)]
    if bare := [name for name, equals, _ in pairs if not equals]:
        raise argparse.ArgumentTypeError(f"{bare[0]!r} has no hours; write NAME=HOURS, such as sft=1gpuh")
    return {name: hours(amount) for name, _, amount in pairs}


def gpu(text: str) -> str:
    """The name of a GPU that is in the table."""
    if memory_bytes(text) is None:
        raise argparse.ArgumentTypeError(f"{text!r} is not known; known are {', '.join(known_gpus())}")
    return text


def above_zero(text: str) -> float:
    """A finite number above 0."""
    if not 0 < (number := _number(text)) < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r}: must be a finite number above 0")
    return number


def share(text: str) -> float:
    """A part of a whole: above 0, and at most 1."""
    if not 0 < (number := _number(text)) <= 1:
        raise argparse.ArgumentTypeError(f"{text!r}: must be a number above 0, and at most 1")
    return number


def _whole(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}: must be a whole number") from None


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan
