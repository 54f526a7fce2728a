"""Optimizers, by their formulas and torch's own; Muon also where its matrices are cut over ranks."""

import pytest
import torch
from ranks import run_ranks
from tiny import free_port
from tiny_models import build

from raysweep.objectives.causal_lm import CausalLM
from raysweep.train.engines import PlainEngine
from raysweep.train.models import Llama
from raysweep.train.muon import MuonAdamW, hidden_matrices
from raysweep.train.optimizers import SGD, AdamW, Lion, Muon, decay_groups
from raysweep.train.partitions import Piece
from raysweep.worker import Worker


def two_numbers() -> torch.nn.Linear:
    """A model of one matrix, [[1, -2]]."""
    model = torch.nn.Linear(2, 1, bias=False, dtype=torch.float64)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[1.0, -2.0]]))
    return model


def steps(optimizer: torch.optim.Optimizer, model: torch.nn.Linear, num: int) -> torch.Tensor:
    """Down half the squared length of the weights, whose gradient they are."""
    for _ in range(num):
        optimizer.zero_grad()
        (model.weight.square().sum() / 2).backward()
        optimizer.step()
    return model.weight.detach()


def llama(**given) -> torch.nn.Module:
    return Llama(hidden_size=16, num_layers=2, num_heads=2, **given).build(vocab_size=20, sequence_length=8, seed=0)


def test_only_matrices_decay():
    model = llama()
    groups = decay_groups(model.parameters(), 0.1)
    decayed, spared = (group["params"] for group in groups)
    assert all(parameter.ndim == 2 for parameter in decayed)
    assert all(parameter.ndim == 1 for parameter in spared)
    assert len(decayed) + len(spared) == len(list(model.parameters()))


def test_sgd_takes_the_step_of_its_formula():
    model = two_numbers()
    found = steps(SGD(name="sgd", lr=0.1, momentum=0.5).build(model), model, 2)
    # x1 = x0 - 0.1 x0; v2 = 0.5 x0 + x1; x2 = x1 - 0.1 v2
    torch.testing.assert_close(found, torch.tensor([[1.0, -2.0]]).double() * (0.9 - 0.1 * (0.5 + 0.9)))


def test_adamw_is_torchs():
    optimizer = AdamW(lr=1e-2).build(llama())
    assert optimizer.defaults["betas"] == (0.9, 0.95)
    assert optimizer.param_groups[0]["weight_decay"] == 0.1


def test_lion_takes_the_step_of_its_formula():
    model = two_numbers()
    found = steps(Lion(name="lion", lr=0.1, betas=(0.5, 0.75), weight_decay=0.2).build(model), model, 40)
    for column, start in enumerate((1.0, -2.0)):
        weight, momentum = start, 0.0
        for _ in range(40):
            gradient = weight
            direction = 0.5 * momentum + 0.5 * gradient
            weight = weight - 0.1 * ((direction > 0) - (direction < 0) + 0.2 * weight)
            momentum = 0.75 * momentum + 0.25 * gradient
        assert float(found[0, column]) == pytest.approx(weight, rel=1e-12)


@pytest.mark.parametrize(
    ("style", "left_out"),
    [
        ("llama", {"model.embed_tokens.weight", "lm_head.weight"}),
        ("gpt2", {"transformer.wte.weight", "transformer.wpe.weight", "lm_head.weight"}),
        ("gpt_neox", {"gpt_neox.embed_in.weight", "lm_head.weight"}),
        (
            "bert",
            {f"bert.embeddings.{kind}_embeddings.weight" for kind in ("word", "position", "token_type")}
            | {"cls.predictions.decoder.weight"},
        ),
    ],
)
def test_muon_leaves_embeddings_and_output_layers_out(style, left_out):
    model = build(style, tied=False)
    hidden = set(hidden_matrices(model))
    matrices = {name for name, parameter in model.named_parameters() if parameter.ndim == 2}
    assert {name for name, parameter in model.named_parameters() if parameter in hidden} == matrices - left_out


def test_muon_is_torchs_muon_and_torchs_adamw():
    ours, theirs = llama(), llama()
    optimizer = Muon(name="muon", lr=0.02, adamw_lr=0.003).build(ours)
    hidden = hidden_matrices(theirs)
    others = [parameter for parameter in theirs.parameters() if not any(parameter is each for each in hidden)]
    muon = torch.optim.Muon(hidden, lr=0.02, momentum=0.95, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    adamw = torch.optim.AdamW(decay_groups(others, 0.1), lr=0.003, betas=(0.9, 0.95), fused=True)
    ids = torch.arange(16).view(2, 8)
    for _ in range(3):
        for model in (ours, theirs):
            model.zero_grad()
            model(input_ids=ids, labels=ids).loss.backward()
        for each in (optimizer, muon, adamw):
            each.step()
    assert all(torch.equal(left, right) for left, right in zip(ours.parameters(), theirs.parameters(), strict=True))


def test_a_schedule_keeps_the_ratio_of_rates():
    model = llama()
    settings = {"objective": CausalLM(), "clip_norm": None, "bf16": False, "worker": Worker()}
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    engine = PlainEngine(
        model, optimizer=Muon(name="muon", lr=0.02, adamw_lr=0.003, weight_decay=0.0, eps=1e-20), **settings
    )
    ids = torch.arange(16).view(2, 8)
    engine.accumulate([{"input_ids": ids, "labels": ids}], num_tokens=14)
    engine.apply(0.5)
    moved = {name: (value.detach() - before[name]).abs() for name, value in model.named_parameters()}
    # AdamW's first step is its rate, for each element that has a gradient.
    assert float(moved["model.norm.weight"].max()) == pytest.approx(0.5 * 0.003, rel=1e-3)
    # Muon's has 0.2 of its rate as root mean square; its singular values are 0.7 to 1.2, not 1.
    rms = float(moved["model.layers.0.self_attn.q_proj.weight"].square().mean().sqrt())
    assert rms == pytest.approx(0.5 * 0.2 * 0.02, rel=0.3)


# Two matrices in a row, cut after 16 elements: rank 0 holds the first and the start of the second.
SHAPES = (torch.Size((3, 4)), torch.Size((4, 5)))
PLACES = [[(0, 0, 12), (0, 12, 4)], [(0, 0, 0), (4, 0, 16)]]
"""By rank, of each matrix: start, offset, numel."""


def gradients(step: int) -> list[torch.Tensor]:
    draw = torch.Generator().manual_seed(step)
    return [torch.randn(shape, generator=draw) for shape in SHAPES]


def partitioned_main(rank: int, port: int, folder: str) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    matrices = [torch.nn.Parameter(torch.ones(shape)) for shape in SHAPES]
    optimizer = MuonAdamW(torch.optim.Muon(matrices, lr=0.1), torch.optim.AdamW([torch.nn.Parameter(torch.ones(1))]))
    flat = torch.nn.Parameter(torch.ones(16))
    pieces = [
        Piece(flat, shape, *place, is_cut=is_cut)
        for shape, place, is_cut in zip(SHAPES, PLACES[rank], (False, True), strict=True)
    ]
    optimizer.partition(dict(zip(matrices, pieces, strict=True)))
    optimizer.param_groups[0]["params"] = [flat]
    for step in range(3):
        flat.grad = torch.zeros(16)
        for piece, gradient in zip(pieces, gradients(step), strict=True):
            piece.take(gradient, flat.grad)
        optimizer.step()
    joined = [piece.join(flat, optimizer.state[flat]["momentum_buffer"]) for piece in pieces]
    if rank == 0:
        torch.save(joined, f"{folder}/joined.pt")
    torch.distributed.destroy_process_group()


def test_muon_of_matrices_cut_over_ranks_is_torchs_to_the_bit(tmp_path):
    run_ranks(partitioned_main, (free_port(), str(tmp_path)))
    matrices = [torch.nn.Parameter(torch.ones(shape)) for shape in SHAPES]
    muon = torch.optim.Muon(matrices, lr=0.1)
    for step in range(3):
        for matrix, gradient in zip(matrices, gradients(step), strict=True):
            matrix.grad = gradient
        muon.step()
    for matrix, (weight, momentum) in zip(matrices, torch.load(tmp_path / "joined.pt"), strict=True):
        assert torch.equal(weight, matrix.detach())
        assert torch.equal(momentum, muon.state[matrix]["momentum_buffer"])
