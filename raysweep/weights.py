"""What the files of a checkpoint say of its weights, without reading one: which hold them, and how many there are."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from raysweep.durable import parse_object
from raysweep.errors import DataError

INDEX = ".safetensors.index.json"
"""What the name of a file ends in that says which file holds which tensor."""


def check_files(folder: Path, files: Iterable[Path]) -> None:
    """See that none of a checkpoint's files leads out of its folder, by a link or by what an index names.

    In the cache of the Hugging Face hub files are links into `blobs` beside the snapshots, which are its own.

    Raises:
        DataError: names the file, and where it leads.
    """
    files = list(files)
    root = folder.resolve()
    homes = [root, root.parents[1] / "blobs"] if root.parent.name == "snapshots" else [root]
    for path in files:
        target = path.resolve()
        if not any(target.is_relative_to(home) for home in homes):
            raise DataError(f"{path}: a link to {target}, outside of the checkpoint; copy the file there in its place")
    names = {path.name for path in files}
    for path in files:
        if path.name.endswith(INDEX):
            strange = sorted(_named(path) - names)
            if strange:
                raise DataError(f"{path}: names {strange[0]!r}, which is no file of the checkpoint; save it anew")


def _named(index: Path) -> set[str]:
    """The files that an index names. Raises DataError if it is none."""
    try:
        named = parse_object(index.read_bytes())["weight_map"]
        return {str(name) for name in named.values()}
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise DataError(f"{index}: no index of weights ({type(error).__name__}: {error}); save it anew") from error


def num_stored(folder: Path) -> tuple[int, int]:
    """(tensors, numbers in them) of all *.safetensors of a folder, by their headers. Raises DataError."""
    from safetensors import SafetensorError, safe_open

    num_tensors = num_numbers = 0
    for path in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(path, framework="np") as file:
                for name in file.keys():  # noqa: SIM118 - no mapping
                    size = 1
                    for length in file.get_slice(name).get_shape():
                        size *= length
                    num_tensors, num_numbers = num_tensors + 1, num_numbers + size
        except (OSError, SafetensorError) as error:
            raise DataError(f"{path}: not whole ({error}); copy it again") from error
    return num_tensors, num_numbers
