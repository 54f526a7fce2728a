"""Parts of probe vectors are those of the whole, however a model is sharded."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from raysweep.curvature.operators import MovableParameters
from raysweep.curvature.probes import PIECE, Packed, Probe, probe_vector
from raysweep.curvature.zero3 import MovableShards, rows_of

ALONE = {"reduce": lambda whole: whole, "release": lambda: None}


class Sharded:
    """A model's parameters as ZeRO-3 leaves them on one worker: padded shards of equal length."""

    def __init__(self, model: nn.Module, rank: int, world_size: int) -> None:
        self.parameters = {}
        for name, whole in model.named_parameters():
            length = -(-whole.numel() // world_size)
            padded = torch.full((length * world_size,), torch.nan)
            padded[: whole.numel()] = whole.detach().flatten()
            part = nn.Parameter(torch.empty(0))
            part.ds_numel, part.ds_tensor = whole.numel(), padded[rank * length : (rank + 1) * length].clone()
            self.parameters[name] = part

    def named_parameters(self):
        return self.parameters.items()


@given(
    shape=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    world_size=st.integers(1, 5),
    distribution=st.sampled_from(["rademacher", "gaussian"]),
)
def test_shards_of_a_vector_are_the_vector(shape, world_size, distribution):
    model = nn.Linear(*shape)
    whole = probe_vector(dict(model.named_parameters()), seed=3, probe=5, distribution=distribution)
    squares = [sum(float(p.detach().square().sum()) for p in model.parameters())] + [0.0] * (world_size - 1)
    parts = []
    for rank in range(world_size):
        shards = MovableShards(Sharded(model, rank, world_size), rank=rank, gather=lambda square: squares, **ALONE)
        parts.append(shards.probe(seed=3, probe=5, distribution=distribution))
        assert shards.rms > 0
    for name, expected in whole.items():
        together = torch.cat([part[name] for part in parts])
        assert torch.equal(together[: expected.numel()], expected.flatten())
        assert not together[expected.numel() :].any()


@given(
    num=st.sampled_from([1, 9, PIECE, PIECE + 1, 2 * PIECE + 13]),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    distribution=st.sampled_from(["rademacher", "gaussian"]),
)
def test_pieces_of_a_vector_are_the_vector(num, dtype, distribution):
    like = {"w": torch.empty(num, 1, dtype=dtype)}
    whole = probe_vector(like, seed=3, probe=5, distribution=distribution)["w"]
    # One piece is overwritten by the next.
    pieces = [piece.clone() for piece in Probe(like, seed=3, probe=5, distribution=distribution).pieces("w")]
    assert torch.equal(torch.cat(pieces), whole.flatten())
    assert pieces[0].dtype == dtype
    assert len(pieces) == (1 if distribution == "gaussian" else -(-num // PIECE))


@given(
    sizes=st.lists(st.sampled_from([1, 63, 64, 65, PIECE, PIECE + 1]), min_size=1, max_size=5),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    distribution=st.sampled_from(["rademacher", "gaussian"]),
    is_dict=st.booleans(),
)
def test_both_sides_are_the_weights_and_the_vector(sizes, dtype, distribution, is_dict):
    weights = {f"w{place}": torch.randn(size, 1, dtype=dtype) for place, size in enumerate(sizes)}
    parameters = {name: nn.Parameter(weight.clone()) for name, weight in weights.items()}
    movable = MovableParameters(parameters, 0.5)
    vector = movable.probe(seed=3, probe=5, distribution=distribution)
    whole = probe_vector(weights, seed=3, probe=5, distribution=distribution)
    for _ in range(2):  # What is kept of the first time is not written to.
        with movable.sides(dict(vector) if is_dict else vector, 2) as (go_ahead, go_behind):
            for go, way in ((go_behind, -1), (go_ahead, 1)):
                go()
                for name, parameter in parameters.items():
                    assert torch.equal(parameter, torch.add(weights[name], whole[name], alpha=way))
        assert all(torch.equal(parameters[name], weights[name]) for name in weights)


def test_only_signs_are_drawn_side_by_side():
    like = {"w": torch.zeros(3)}
    vector = Probe(like, seed=0, probe=0, distribution="gaussian")
    with pytest.raises(ValueError, match="only signs"):
        next(vector.pieces_of(Packed(like)))


def test_shards_are_moved_and_put_back():
    model = nn.Linear(3, 2, bias=False)
    sharded = Sharded(model, 1, 4)
    shards = MovableShards(sharded, rank=1, gather=lambda square: [square], **ALONE)
    shards.step = 0.5
    before = sharded.parameters["weight"].ds_tensor.clone()
    vector = shards.probe(seed=0, probe=0)
    with shards.moves() as move:
        move(vector, -2)
        torch.testing.assert_close(sharded.parameters["weight"].ds_tensor, before - vector["weight"])
    assert torch.equal(sharded.parameters["weight"].ds_tensor, before)
    with shards.sides(vector, 2) as (go_ahead, go_behind):
        for go, way in ((go_behind, -1), (go_ahead, 1)):
            go()
            torch.testing.assert_close(sharded.parameters["weight"].ds_tensor, before + way * vector["weight"])
    assert torch.equal(sharded.parameters["weight"].ds_tensor, before)


def test_rows_are_dealt_and_an_idle_worker_predicts_nothing():
    batch = {"input_ids": torch.arange(5)[:, None].expand(5, 3)}
    parts = [rows_of(batch, rank=rank, world_size=7) for rank in range(7)]
    assert [part["row"].tolist() for part in parts[:5]] == [[0], [1], [2], [3], [4]]
    assert all(torch.equal(part["input_ids"][:, 0], part["row"]) for part in parts)
    assert ["labels" in part for part in parts] == [False] * 5 + [True] * 2
    assert all(bool((part["labels"] == -100).all()) for part in parts[5:])
