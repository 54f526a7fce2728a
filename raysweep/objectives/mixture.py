"""Mixtures: each row of text by one objective of several, drawn by weight."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Annotated, Literal, final

import numpy as np
from pydantic import Field, model_validator

from raysweep.objectives.base import IGNORED, Arrays, DecoderObjective, Ints, Specials
from raysweep.spec import check_name

if TYPE_CHECKING:
    from raysweep.objectives.families import Objective

Maker = Callable[[Ints, np.random.Generator], Arrays]
"""Text [n, L] -> rows of it."""


@final
class Mixture(DecoderObjective):
    """Objectives of causal models, by weight; the loss is over all that is predicted, whichever of them asked."""

    name: Literal["mixture"]
    """Which objective."""
    objectives: dict[str, Objective] = Field(min_length=1)
    """Name to an objective."""
    mix: dict[str, Annotated[float, Field(ge=0)]] | None = None
    """Weight of each in the rows of text (not in the tokens predicted); left out: equal."""

    @model_validator(mode="after")
    def _known(self) -> Mixture:
        for name, objective in self.objectives.items():
            check_name("objective", name)
            if objective.head != self.head:
                raise ValueError(
                    f"objectives: {name!r} is {objective.name}, of {objective.head} models; mix those of causal ones"
                )
        unknown = sorted((self.mix or {}).keys() - self.objectives.keys())
        if unknown:
            raise ValueError(
                f"mix names {unknown[0]!r}, which is no objective; objectives: {', '.join(self.objectives)}"
            )
        if sum(self._weights) <= 0:
            raise ValueError(f"mix {self.mix}: at least one weight must be above 0")
        return self

    @property
    def _weights(self) -> tuple[float, ...]:
        """In the order of `objectives`; one that `mix` leaves out has none."""
        return tuple(1.0 if self.mix is None else self.mix.get(name, 0.0) for name in self.objectives)

    def predicts(self) -> str:
        """What each objective predicts, with its name and its share of the rows, joined by semicolons."""
        parts = zip(self.objectives.items(), self._weights, strict=True)
        total = sum(self._weights)
        return "; ".join(f"{name}, {weight / total:.3g} of rows: {each.predicts()}" for (name, each), weight in parts)

    def extra_tokens(self) -> tuple[str, ...]:
        """Those of all objectives in order, each token once, whatever weight its objective has."""
        return tuple(dict.fromkeys(token for each in self.objectives.values() for token in each.extra_tokens()))

    def input_length(self, sequence_length: int) -> int:
        """The longest of any of the objectives, those without weight among them.

        Raises:
            ValueError: if one of them cannot make rows of so many tokens.
        """
        return max(each.input_length(sequence_length) for each in self.objectives.values())

    def mean_predicted(self, sequence_length: int) -> float:
        """Mean over the objectives by their weights, which rows are drawn by."""
        counts = [each.mean_predicted(sequence_length) for each in self.objectives.values()]
        return float(np.average(counts, weights=self._weights))

    def prepare(self, ids: Ints, draw: np.random.Generator, specials: Specials) -> Arrays:
        """Each row as by its objective, then padded on the right; see `mixed`."""
        makers = [partial(each.prepare, specials=specials) for each in self.objectives.values()]
        return mixed(ids, makers, self._weights, draw, pad=specials.pad)

    @property
    def has_optimum(self) -> bool:
        """Where that of each is known: what is left of a text tells of its own which of them made the row."""
        return all(each.has_optimum for each in self.objectives.values())


def mixed(
    ids: Ints, makers: Sequence[Maker], weights: Sequence[float], draw: np.random.Generator, *, pad: int
) -> Arrays:
    """Each row of text made by one of `makers`, drawn by weight, independently of the others.

    Args:
        ids: [n, L].
        makers: give rows in the order of the text they are given, of one or of several lengths.
        weights: one for each, of any sum.
        draw: of who makes a row, and then of each maker in turn.
        pad: token to fill up shorter rows with.

    Returns:
        input_ids and labels [n, longest] with IGNORED at padding, and lengths [n], in the order of `ids`. If any maker
        gives them, prefix_lengths [n], 0 for the rows of the others.

    >>> twice = lambda ids, draw: {"input_ids": np.tile(ids, 2), "labels": np.tile(ids, 2)}
    >>> once = lambda ids, draw: {"input_ids": ids, "labels": ids}
    >>> rows = mixed(np.array([[5, 6], [7, 8]]), [once, twice], [1, 1], np.random.default_rng(0), pad=0)
    >>> rows["input_ids"], rows["lengths"]
    (array([[5, 6, 5, 6],
           [7, 8, 0, 0]]), array([4, 2]))
    """
    shares = np.asarray(weights) / sum(weights)
    chosen = draw.choice(len(makers), size=len(ids), p=shares)
    # All rows of a maker at once: a few large calls in place of one for each row.
    rows_of = [np.flatnonzero(chosen == index) for index in range(len(makers))]
    parts = [(rows, make(ids[rows], draw)) for rows, make in zip(rows_of, makers, strict=True) if len(rows)]
    shape = len(ids), max(part["input_ids"].shape[1] for _, part in parts)
    out = {"input_ids": np.full(shape, pad), "labels": np.full(shape, IGNORED), "lengths": np.empty(len(ids), np.int64)}
    if any("prefix_lengths" in part for _, part in parts):
        out["prefix_lengths"] = np.zeros(len(ids), np.int64)
    for rows, part in parts:
        width = part["input_ids"].shape[1]
        for name in ("input_ids", "labels"):
            out[name][rows, :width] = part[name]
        out["lengths"][rows] = part.get("lengths", width)
        if "prefix_lengths" in part:
            out["prefix_lengths"][rows] = part["prefix_lengths"]
    return out
