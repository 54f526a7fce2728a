"""torch's Muon and AdamW as one optimizer, whose weights DeepSpeed may put into flat partitions."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from raysweep.train.partitions import PartitionedOptimizer, Piece


class MuonAdamW(PartitionedOptimizer):
    """`torch.optim.Muon` on its matrices, `torch.optim.AdamW` on its weights.

    With gradient G, momentum M, rate lr and decay w of a matrix W [rows, columns] (Jordan et al., 2024):
    M = mu M + (1 - mu) G;  W = (1 - lr w) W - lr 0.2 sqrt(max(rows, columns)) O((1 - mu) G + mu M), where O(USV') is
    about UV', by five Newton-Schulz steps in bfloat16. 0.2 and the root give a step the size of AdamW's (Liu et al.,
    2025).

    Muon steps a matrix by its momentum, orthogonalised as a whole. Where ranks hold flat partitions, each matrix is put
    together, on the ranks that hold some of it, for the time of its own step: the same bits as without partitions, and
    the state stays sharded. Those that lie within a partition are stepped by their rank alone; of the cut ones, few
    under ZeRO 1 and 2 and all under 3, gradient and momentum are summed over ranks.

    Args:
        muon, adamw: with their settings; their groups become this one's.
    """

    def __init__(self, muon: torch.optim.Muon, adamw: torch.optim.AdamW) -> None:
        self._muon, self._adamw = muon, adamw
        self._pieces: dict[torch.Tensor, list[Piece]] = {}
        parts = ((muon, True), (adamw, False))
        super().__init__([{**group, "is_muon": own} for part, own in parts for group in part.param_groups], {})

        # DeepSpeed puts its partitions in their place.
        self._matrices = [matrix for group in muon.param_groups for matrix in group["params"]]

    def partition(self, pieces: Mapping[torch.Tensor, Piece]) -> None:
        """See `PartitionedOptimizer.partition`."""
        for matrix in self._matrices:
            self._pieces.setdefault(pieces[matrix].master, []).append(pieces[matrix])

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Step all weights that its groups hold now: DeepSpeed takes groups and partitions in and out.

        Under ZeRO to be called by every rank: cut matrices are put together in the same order on all.
        """
        assert closure is None, "losses are computed before"
        self._run(self._adamw, [group for group in self.param_groups if not group["is_muon"]], self.state)
        for group in self.param_groups:
            if not group["is_muon"]:
                continue
            if not self._pieces:
                self._run(self._muon, [group], self.state)
            for flat in group["params"] if self._pieces else ():
                for piece in self._pieces[flat]:
                    self._step_piece(piece, group)

    def _step_piece(self, piece: Piece, group: dict[str, Any]) -> None:
        flat = piece.master
        assert flat.grad is not None
        state = self.state[flat]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(flat)
        whole = (piece.join if piece.is_cut else piece.place)(flat.grad, state["momentum_buffer"])
        if piece.numel == 0:  # It only took part in the sum.
            return
        # Of the matrix itself each element is stepped by itself: what others hold of it is not needed.
        matrix = torch.nn.Parameter(piece.place(flat)[0])
        matrix.grad, momentum = whole
        self._run(self._muon, [{**group, "params": [matrix]}], {matrix: {"momentum_buffer": momentum}})
        piece.take(matrix, flat)
        piece.take(momentum, state["momentum_buffer"])

    @staticmethod
    def _run(part: torch.optim.Optimizer, groups: list[dict[str, Any]], state: Any) -> None:
        part.param_groups, part.state = groups, state
        part.step()


def hidden_matrices(model: torch.nn.Module) -> list[torch.nn.Parameter]:
    """The matrices of a language model but for those that embed tokens or positions, or predict tokens.

    >>> len(hidden_matrices(model))  # A Llama of 2 layers: 4 matrices of attention and 3 of feed-forward in each.
    14
    """
    output = getattr(model, "get_output_embeddings", lambda: None)()
    outer = [module for module in model.modules() if isinstance(module, torch.nn.Embedding) or module is output]
    # By identity: an output layer that is tied to the embedding is the same parameter.
    left_out = {id(parameter) for module in outer for parameter in module.parameters()}
    return [
        parameter
        for parameter in model.parameters()
        if parameter.requires_grad and parameter.ndim == 2 and id(parameter) not in left_out
    ]
