"""Ours against PyHessian and curvlinops on shared models, where they are installed (`make bench-curvature`)."""

import copy
import sys
from pathlib import Path

import pytest
import torch
from tiny_models import build

from raysweep.curvature import curvature_operator, prepare, top_eigenpairs

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks/curvature"))
pytest.importorskip("pyhessian", reason="the extra `bench` is not installed")
pytest.importorskip("curvlinops", reason="the extra `bench` is not installed")

import peers
from curvlinops import GGNLinearOperator


@pytest.mark.parametrize("style", ["gpt2", "llama"])
def test_products_eigenvalues_and_traces_agree(style):
    model = build(style, hidden=8, vocab=11, layers=1).double()
    composed = peers.with_right_norms(peers.with_forward_mode(copy.deepcopy(model)))
    for each in (model, composed):
        prepare(each)
    ids = torch.randint(11, (4, 7), generator=torch.Generator().manual_seed(0))
    operator = curvature_operator(model, [{"input_ids": ids}])
    block = torch.randn(operator.size, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    ours = operator.columns(block)
    theirs = peers.Curvlinops(composed, [ids])
    # Llama computes its norms in float32.
    torch.testing.assert_close(theirs @ block, ours, rtol=0, atol=1e-5 * float(ours.abs().max()))
    parameters = [parameter for parameter in composed.parameters() if parameter.requires_grad]
    ggn = GGNLinearOperator(
        peers.Logits(composed), peers.TokenLoss(), parameters, [(ids, ids)], check_deterministic=False
    )
    found = curvature_operator(model, [{"input_ids": ids}], matrix="gauss_newton").columns(block)
    torch.testing.assert_close(ggn @ block, found, rtol=0, atol=1e-5 * float(found.abs().max()))

    peer = peers.PyHessian(model, ids)
    columns = [_parts(column, parameters) for column in block.T]
    forms = peer.forms(columns)
    assert forms == pytest.approx([float(left @ right) for left, right in zip(block.T, ours.T, strict=True)], rel=1e-4)
    (largest,) = peer._hessian.eigenvalues(maxIter=500, tol=1e-9, top_n=1)[0]
    assert float(top_eigenpairs(operator, 1, num_steps=60).values[0]) == pytest.approx(largest, rel=1e-3)
    peer.close()


def _parts(row, parameters):
    pieces = row.split([parameter.numel() for parameter in parameters])
    return [piece.view_as(parameter) for piece, parameter in zip(pieces, parameters, strict=True)]
