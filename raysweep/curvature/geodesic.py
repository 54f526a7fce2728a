"""Balls on the quotient by attention's symmetries, for a sharpness that sees the function and not how it is written.

Of values G and the output's matrix H attention needs the product alone, head by head: with an invertible A of a head's
size, G A and H A^-T give the same function, and so for queries and keys where positions do not turn them.
Scale alone, which `rescaling` changes, is the A that are diagonal. da Silva, Dangel and Oore (2025, arXiv 2505.05409)
measure on the quotient by all of them, with the metric (their eq. 15)

    <x, y> = tr (G'G)^-1 x_G' y_G + tr (H'H)^-1 x_H' y_H

A ball of its geodesics is the same however a head is written. Rotary positions leave, of queries and keys, one complex
number for each pair of dimensions that they turn: (G'G) is then that pair's squared norm. Norms' gains in front of an
attention belong to its G, so that scaling these leaves the ball alone, too. All other weights are measured in their own
size, as in the adaptive forms.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from raysweep.curvature.probes import Tensors
from raysweep.curvature.rescaling import layers_of

Tensor = torch.Tensor
View = Callable[[Tensor], Tensor]
"""Of a parameter's tensor, the part [a, b, ..., h] that is of a factor: a x b factors of h columns, as a view."""


@dataclass(frozen=True)
class Piece:
    """A part of one parameter, and the gain [..., 1] beside it of the norm that its inputs come through.

    The gain is a copy: a ball is of the weights that it was made at, while the norm's own moves with all others.
    """

    parameter: Tensor
    view: View
    gain: Tensor | None = None

    def matrix(self) -> Tensor:
        """[a, b, rows, h]: its rows of the factor, behind the gain."""
        part = self.view(self.parameter.detach())
        return (part if self.gain is None else part * self.gain).flatten(2, -2)

    def slope(self, gradient: Tensor) -> Tensor:
        """[a, b, rows, h]: of a gradient with respect to the parameter, that with respect to these rows."""
        return self._over_gain(self.view(gradient)).flatten(2, -2)

    def move(self, rows: Tensor, displacement: Tensor) -> None:
        """Put into a displacement of the parameter what moves these rows by [a, b, rows, h]."""
        place = self.view(displacement)
        place.copy_(self._over_gain(rows.reshape(place.shape)))

    def _over_gain(self, part: Tensor) -> Tensor:
        """0 where the gain is 0, and hides the weight."""
        return part if self.gain is None else torch.where(self.gain == 0, 0.0, part / self.gain)


class Factor:
    """One matrix G [a, b, rows, h] of a product, in coordinates e in which the ball is round.

    With S = G'G, R its root and U = G R^-1, whose columns are orthonormal, G moves along the geodesic by

        (e + (e e'U + e U'e - U e'e) / 2) R

    to second order: for speed V = e R the Euler-Lagrange equation of the metric has the acceleration
    V S^-1 (V'G + G'V) - G S^-1 V'V.
    """

    def __init__(self, pieces: Sequence[tuple[str, Piece]]) -> None:
        self.pieces = pieces
        matrix = torch.cat([piece.matrix() for _, piece in pieces], dim=2)
        values, vectors = torch.linalg.eigh((matrix.mT @ matrix).double())
        largest = values.amax(dim=-1, keepdim=True)
        roots = torch.maximum(values, 1e-12 * largest).sqrt()
        # A matrix of zeros, as an enlarged or expanded model has them, has no size to move by: it stays.
        over = torch.where(largest > 0, 1 / roots, 0.0)
        self._root = ((vectors * roots[..., None, :]) @ vectors.mT).to(matrix)
        self._frame = matrix @ ((vectors * over[..., None, :]) @ vectors.mT).to(matrix)

    def to_coordinates(self, gradient: Tensors) -> None:
        """In place: the gradient with respect to weights, of its own part of them, becomes that with respect to e."""
        for name, piece in self.pieces:
            place = piece.view(gradient[name])
            place.copy_((piece.slope(gradient[name]) @ self._root).reshape(place.shape))

    def to_weights(self, place: Tensors) -> None:
        """In place: coordinates e, standing where its weights do, become a displacement of these."""
        parts = [piece.view(place[name]).flatten(2, -2) for name, piece in self.pieces]
        e, frame = torch.cat(parts, dim=2), self._frame
        moved = (e + (e @ (e.mT @ frame) + e @ (frame.mT @ e) - frame @ (e.mT @ e)) / 2) @ self._root
        for (name, piece), rows in zip(self.pieces, moved.split([part.shape[2] for part in parts], dim=2), strict=True):
            piece.move(rows, place[name])


def factors_of(model: Any, parameters: Tensors) -> tuple[list[Factor], set[str]]:
    """Those of all attentions, and the names of the parameters that they are made of.

    Args:
        model: of a class that `kinds` knows.
        parameters: that are measured.

    Raises:
        ValueError: if its symmetries are not known, or a part of an attention is not among the parameters.
    """
    kind, layers = layers_of(model)
    pieces_of = {"llama": _llama, "gpt2": _gpt2, "bert": _bert}[kind]
    names = {id(parameter): name for name, parameter in parameters.items()}
    found = []
    for layer in layers:
        for pieces in pieces_of(layer, model.config):
            if any(id(piece.parameter) not in names for piece in pieces):
                raise ValueError("a geodesic ball needs all parameters of attention: measure *, or leave it out")
            found.append([(names[id(piece.parameter)], piece) for piece in pieces])
    return [Factor(each) for each in found], {name for each in found for name, _ in each}


def _llama(layer: Any, config: Any) -> Iterator[list[Piece]]:
    attention, gain = layer.self_attn, layer.input_layernorm.weight.detach().clone()
    groups, size = config.num_key_value_heads, attention.head_dim
    heads = config.num_attention_heads // groups

    def turned(rows: Tensor) -> Tensor:
        """Queries or keys [group head half pair, ...], turned by positions: dimension i with i + half the head."""
        split = torch.unflatten(rows, 0, (groups, -1, 2, size // 2))
        return split.movedim(3, 1).unsqueeze(-1)

    def values(rows: Tensor) -> Tensor:
        return torch.unflatten(rows, 0, (groups, 1, size)).movedim(2, -1)

    def output(columns: Tensor) -> Tensor:
        return torch.unflatten(columns, 1, (groups, 1, heads, size)).movedim(0, -2)

    for linear, view in ((attention.q_proj, turned), (attention.k_proj, turned), (attention.v_proj, values)):
        yield list(_linear(linear, view, gain[:, None]))
    yield [Piece(attention.o_proj.weight, output)]


def _gpt2(layer: Any, config: Any) -> Iterator[list[Piece]]:
    # Its matrices stand as [in, out], with queries, keys and values side by side.
    attention, gain, heads = layer.attn, layer.ln_1.weight.detach().clone(), config.n_head
    for place in range(3):

        def part(columns: Tensor, place: int = place) -> Tensor:
            split = torch.unflatten(columns, -1, (3, heads, 1, -1)).select(-4, place)
            return split.movedim(0, 2) if split.dim() == 4 else split.unsqueeze(-2)

        yield [Piece(attention.c_attn.weight, part, gain[:, None]), Piece(attention.c_attn.bias, part)]
    yield [Piece(attention.c_proj.weight, lambda rows: torch.unflatten(rows, 0, (heads, 1, -1)).movedim(-1, 2))]


def _bert(layer: Any, config: Any) -> Iterator[list[Piece]]:
    # Its norms stand behind the sums that blocks add to: attention reads what they give without a symmetry.
    attention, heads = layer.attention.self, config.num_attention_heads

    def part(rows: Tensor) -> Tensor:
        return torch.unflatten(rows, 0, (heads, 1, -1)).movedim(2, -1)

    for linear in (attention.query, attention.key, attention.value):
        yield list(_linear(linear, part))
    yield [
        Piece(
            layer.attention.output.dense.weight,
            lambda columns: torch.unflatten(columns, 1, (heads, 1, -1)).movedim(0, 2),
        )
    ]


def _linear(linear: Any, view: View, gain: Tensor | None = None) -> Iterator[Piece]:
    """Of what a layer gives, its weight and, as one more row, its bias."""
    yield Piece(linear.weight, view, gain)
    if linear.bias is not None:
        yield Piece(linear.bias, lambda bias: view(bias[:, None]))
