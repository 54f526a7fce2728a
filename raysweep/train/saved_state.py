"""The resumable state of a training, by parameter: what one gang has saved, a gang of any other shape goes on with.

Of each weight there are its float32 values and each of its optimizer's states, in a row. Every rank writes the range
of it that it steps, and reads what it will step, whatever file that is in: an index says which elements are where.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from raysweep.durable import file_sha256, parse_object, sync
from raysweep.train.partitions import Piece
from raysweep.worker import StateDir, Worker

INDEX = "index.json"

DIGESTS = "digests.json"
"""Name -> SHA-256 of every other file of a state, the index among them."""

# Of a file, unless it is one range alone: so much of a state is held a second time while it is written.
FILE_BYTES = 2**28

WEIGHT = "master"
"""Key of a weight's own values, beside those of its optimizer's states."""

LEARNT = "learning loss"
"""In place of a weight's name: of what a `LearningLoss` keeps."""

Stepped = Mapping[str, tuple[torch.Tensor, Piece | None]]
"""Name of a weight -> the tensor that is stepped, and what of it is the weight's; None: all of it, on every rank."""


@dataclass(frozen=True)
class Part:
    """Elements `start` to `stop` of a tensor, in a row, that a file of this name holds."""

    file: str
    start: int
    stop: int


@dataclass(frozen=True)
class Range:
    """Elements of a tensor [*shape], in a row from `start`, which a later step changes; a number is one element."""

    shape: tuple[int, ...]
    start: int
    values: torch.Tensor


def overlaps(parts: Sequence[Part], start: int, stop: int) -> Iterator[tuple[Part, int, int]]:
    """Where elements `start` to `stop` lie: parts in order, and from which to which of a part's own elements.

    Raises:
        ValueError: if an element is in no part.

    >>> [(part.file, *cut) for part, *cut in overlaps([Part("a", 0, 6), Part("b", 6, 10)], 4, 9)]
    [('a', 4, 6), ('b', 0, 3)]
    """
    at = start
    for part in sorted(parts, key=lambda part: part.start):
        if part.start <= at < min(part.stop, stop):
            end = min(part.stop, stop)
            yield part, at - part.start, end - part.start
            at = end
    if at < stop:
        raise ValueError(f"elements {at} to {stop} are in no file")


class SavedState:
    """A state on disk; values are read as they are asked for, range by range.

    Args:
        folder: one that `write_state` has filled, and in which `find_damage` finds none.

    Raises:
        ValueError: if an element of a tensor is in no file.
    """

    def __init__(self, folder: Path) -> None:
        index = json.loads((folder / INDEX).read_text())
        self.log: dict[str, Any] = index["log"]
        self._shapes = {key: tuple(each["shape"]) for key, each in index["tensors"].items()}
        self._parts = {key: [Part(*part) for part in each["parts"]] for key, each in index["tensors"].items()}
        self._keys: dict[str, list[str]] = {}
        for key in self._shapes:
            name, _, state = key.rpartition(".")
            self._keys.setdefault(name, []).append(state)
        names = {part.file for parts in self._parts.values() for part in parts}
        self._files: dict[str, Any] = {name: safe_open(folder / name, framework="pt") for name in names}
        for key, shape in self._shapes.items():
            for _ in overlaps(self._parts[key], 0, prod(shape)):
                pass

    def keys(self, name: str) -> list[str]:
        """`WEIGHT` and the optimizer's states of a weight; none if it is not here."""
        return self._keys.get(name, [])

    def is_number(self, name: str, key: str) -> bool:
        """Whether a state is one number for all elements of its weight, such as AdamW's count of steps."""
        return key != WEIGHT and self._shapes[f"{name}.{key}"] == ()

    def read(self, name: str, key: str, start: int = 0, numel: int | None = None) -> torch.Tensor:
        """`numel` elements from `start`, in a row; None: all there are, in their shape."""
        path = f"{name}.{key}"
        shape = self._shapes[path]
        stop = prod(shape) if numel is None else start + numel
        cuts = [
            self._files[part.file].get_slice(path)[begin:end]
            for part, begin, end in overlaps(self._parts[path], start, stop)
        ]
        values = torch.cat(cuts) if cuts else torch.zeros(0)
        return values.view(shape) if numel is None else values

    def load_weights(self, model: torch.nn.Module) -> None:
        """Give a whole model its trained weights, one after another."""
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if self.keys(name):
                    parameter.copy_(self.read(name, WEIGHT))

    def load(self, stepped: Stepped, optimizer: torch.optim.Optimizer) -> None:
        """Put what this rank steps, and the optimizer's states of it, in their places."""
        for name, (tensor, piece) in stepped.items():
            states = optimizer.state[tensor]
            for key in self.keys(name):
                if self.is_number(name, key):
                    states[key] = self.read(name, key).to(tensor.device)
                    continue
                if key != WEIGHT and key not in states:
                    states[key] = torch.zeros_like(tensor)
                flat = tensor if key == WEIGHT else states[key]
                if piece is None:
                    flat.detach().copy_(self.read(name, key))
                else:
                    piece.own(flat).copy_(self.read(name, key, piece.start, piece.numel))


def ranges_of(stepped: Stepped, optimizer: torch.optim.Optimizer, *, rank: int) -> dict[str, Range]:
    """NAME.KEY -> what a rank has to write; of what all ranks hold, rank 0 writes all."""
    ranges = {}
    for name, (tensor, piece) in stepped.items():
        for key, given in {WEIGHT: tensor, **optimizer.state.get(tensor, {})}.items():
            if given is None:
                continue
            value = torch.as_tensor(given).detach()
            if piece is None or value.dim() == 0:
                if rank == 0:
                    ranges[f"{name}.{key}"] = Range(tuple(value.shape), 0, value.flatten())
            elif piece.numel:
                ranges[f"{name}.{key}"] = Range(tuple(piece.shape), piece.start, piece.own(value))
    return ranges


def write_state(
    states: StateDir, name: str, ranges: Mapping[str, Range], log: Mapping[str, Any], worker: Worker
) -> None:
    """Write this rank's ranges, and on rank 0 the index, and bring them to the disk. To be called by every rank.

    Args:
        states: where all ranks see them.
        name: of the folder, which counts once DIGESTS is in it.
        ranges: see `ranges_of`.
        log: what of a state is no tensor, the same on every rank.
    """
    folder = states.path / name
    folder.mkdir(parents=True, exist_ok=True)
    written, digests = {}, {}
    for number, keys in enumerate(_batches(ranges)):
        file = f"rank{worker.rank}-{number}.safetensors"
        # Copies: a file takes no two views of one tensor.
        save_file({key: ranges[key].values.to("cpu", copy=True) for key in keys}, folder / file)
        digests[file] = _settled(folder / file)
        states.send(f"{name}/{file}")
        for key in keys:
            start = ranges[key].start
            written[key] = (ranges[key].shape, (file, start, start + len(ranges[key].values)))
    tensors: dict[str, Any] = {}
    all_digests: dict[str, str] = {}
    for theirs, their_digests in worker.gather((written, digests)):
        all_digests |= their_digests
        for key, (shape, part) in theirs.items():
            tensors.setdefault(key, {"shape": shape, "parts": []})["parts"].append(part)
    if worker.rank == 0:
        (folder / INDEX).write_text(json.dumps({"log": log, "tensors": tensors}))
        all_digests[INDEX] = _settled(folder / INDEX)
        (folder / DIGESTS).write_text(json.dumps(all_digests))
        sync(folder / DIGESTS)
        sync(folder)
        sync(states.path)
        for file in (INDEX, DIGESTS):
            states.send(f"{name}/{file}")


def find_damage(states: StateDir, name: str, worker: Worker) -> str:
    """What of a state is not as it was written; empty: all is, and it lies on every rank's host.

    To be called by every rank, each reads a share of it.
    """
    damage = ""
    try:
        folder = states.fetch(name, DIGESTS)
        digests = parse_object((folder / DIGESTS).read_bytes())
        for file in sorted(digests)[worker.rank :: worker.world_size]:
            if file_sha256(folder / file) != digests[file]:
                raise ValueError(f"{file} is not as it was written")
    except (OSError, ValueError) as error:
        damage = str(error)
    return next(filter(None, worker.gather(damage)), "")


def _batches(ranges: Mapping[str, Range]) -> Iterator[list[str]]:
    """Keys of what makes a file together."""
    batch: list[str] = []
    num_bytes = 0
    for key, each in ranges.items():
        if batch and num_bytes + each.values.nbytes > FILE_BYTES:
            yield batch
            batch, num_bytes = [], 0
        batch.append(key)
        num_bytes += each.values.nbytes
    if batch:
        yield batch


def _settled(path: Path) -> str:
    """The digest of a file, which is brought to the disk."""
    sync(path)
    return file_sha256(path)
