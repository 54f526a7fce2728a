"""Ranges of a state: what was cut in one way is read in any other."""

import threading
from dataclasses import replace
from itertools import pairwise
from math import prod

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from raysweep.train.partitions import Piece
from raysweep.train.saved_state import INDEX, Part, SavedState, find_damage, overlaps, ranges_of, write_state
from raysweep.worker import StateDir, Worker

SHAPES = {"embedding": (5, 3), "norm": (4,), "scale": (1,), "cube": (2, 3, 2)}


def cut(ends: list[int], size: int) -> list[tuple[int, int]]:
    """`size` elements, cut at `ends`; some parts are empty."""
    edges = [0, *sorted(min(end, size) for end in ends), size]
    return list(pairwise(edges))


class Ranks:
    """Workers in threads that gather as a gang does."""

    def __init__(self, world_size: int) -> None:
        self.values, self.barrier = [None] * world_size, threading.Barrier(world_size)

    def worker(self, rank: int) -> Worker:
        worker = replace(Worker(), rank=rank, world_size=len(self.values))
        object.__setattr__(worker, "gather", lambda value: self._gather(rank, value))
        return worker

    def _gather(self, rank: int, value: object) -> list:
        self.values[rank] = value
        self.barrier.wait()
        return list(self.values)


def stepped_of(ends: list[int], rank: int) -> tuple[dict, torch.optim.Optimizer]:
    """A rank's partition, of all weights in a row cut at `ends`, and its optimizer."""
    sizes = [prod(shape) for shape in SHAPES.values()]
    begin, end = cut(ends, sum(sizes))[rank]
    master = torch.nn.Parameter(torch.arange(begin, end, dtype=torch.float32))
    stepped, at = {}, 0
    for (name, shape), size in zip(SHAPES.items(), sizes, strict=True):
        start, stop = max(begin, at), min(end, at + size)
        numel = max(0, stop - start)
        start = start - at if numel else 0
        offset = max(begin, at) - begin if numel else 0
        stepped[name] = (master, Piece(master, torch.Size(shape), start, offset, numel, is_cut=False))
        at += size
    optimizer = torch.optim.AdamW([master])
    optimizer.state[master] = {"step": torch.tensor(7.0), "exp_avg": master.detach() + 0.5}
    return stepped, optimizer


@settings(max_examples=20)
@given(ends=st.lists(st.integers(0, 32), max_size=4), others=st.lists(st.integers(0, 32), max_size=4))
def test_any_partition_is_read_as_any_other(tmp_path_factory, ends, others):
    folder = tmp_path_factory.mktemp("state")
    ranks = Ranks(len(ends) + 1)

    def write(rank: int) -> None:
        stepped, optimizer = stepped_of(ends, rank)
        write_state(
            StateDir(folder.parent),
            folder.name,
            ranges_of(stepped, optimizer, rank=rank),
            {"losses": [1.0]},
            ranks.worker(rank),
        )

    threads = [threading.Thread(target=write, args=(rank,)) for rank in range(len(ends) + 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    saved = SavedState(folder)
    assert saved.log == {"losses": [1.0]}
    at = 0.0
    for name, shape in SHAPES.items():
        whole = torch.arange(at, at + prod(shape)).view(shape)
        assert torch.equal(saved.read(name, "master"), whole)
        assert torch.equal(saved.read(name, "exp_avg"), whole + 0.5)
        at += prod(shape)
    for rank in range(len(others) + 1):
        stepped, optimizer = stepped_of(others, rank)
        wanted = {key: value.clone() for key, value in next(iter(optimizer.state.values())).items()}
        master = next(iter(stepped.values()))[0]
        weights = master.detach().clone()
        optimizer.state.clear()
        master.data.zero_()
        saved.load(stepped, optimizer)
        assert torch.equal(master, weights)
        assert all(torch.equal(optimizer.state[master][key], wanted[key]) for key in wanted)


def test_a_state_is_written_and_checked_in_files_of_a_bounded_size(tmp_path, monkeypatch):
    monkeypatch.setattr("raysweep.train.saved_state.FILE_BYTES", 40)
    stepped, optimizer = stepped_of([], rank=0)
    write_state(StateDir(tmp_path.parent), tmp_path.name, ranges_of(stepped, optimizer, rank=0), {}, Worker())
    files = [load_file(path) for path in tmp_path.glob("*.safetensors")]
    assert sum(len(file) for file in files) == 3 * len(SHAPES)
    assert all(len(file) == 1 or sum(each.nbytes for each in file.values()) <= 40 for file in files)
    # Of 4 bytes each, the numbers share files.
    assert 1 < len(files) < 3 * len(SHAPES)
    assert find_damage(StateDir(tmp_path.parent), tmp_path.name, Worker()) == ""
    (tmp_path / "rank0-1.safetensors").unlink()
    assert "rank0-1.safetensors" in find_damage(StateDir(tmp_path.parent), tmp_path.name, Worker())


def test_a_range_in_no_file_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="elements 3 to 6 are in no file"):
        list(overlaps([Part("a", 0, 3), Part("b", 4, 6)], 0, 6))
    weight = torch.nn.Parameter(torch.zeros(2, 2))
    write_state(
        StateDir(tmp_path.parent),
        tmp_path.name,
        ranges_of({"a": (weight, None)}, torch.optim.SGD([weight]), rank=0),
        {},
        Worker(),
    )
    index = tmp_path / INDEX
    index.write_text(index.read_text().replace("0, 4]]", "0, 3]]"))
    with pytest.raises(ValueError, match="elements 3 to 4 are in no file"):
        SavedState(tmp_path)
