"""The lowest loss that any model can have on the rows that an objective makes, where the law of the text is known.

A model can do no better than give every label its true probability under all that it sees. For next tokens and hidden
tokens these are conditionals of the law; of a row with pieces cut out, what is predicted is one event as a whole:
-log p(predicted | seen) = log p(seen) - log p(row), where p(seen) sums over all ways to place what is left.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import combinations
from typing import Literal, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

from raysweep.objectives.base import IGNORED, Arrays, Ints, Specials

Floats = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]

MAX_WAYS = 5_000
"""Of placing what is left of a row: of more, the optimum is not computed (some seconds of a core for 256 rows)."""


class Law(Protocol):
    """The true law of token rows of one length."""

    def token_losses(self, ids: Ints, *, seen: Literal["before", "around"], hidden: Bools | None = None) -> Floats:
        """-log of the probability of each token given those before it or around it, in nats, [n, L].

        Args:
            ids: [n, L], each row a sentence with the token that opens it, whose loss is 0.
            seen: what is given.
            hidden: [n, L], true where a token is given at no place; it has a loss all the same.
        """


@runtime_checkable
class TabledLaw(Law, Protocol):
    """A law of which the probability of every token is known at each place, not of the one that stands there alone."""

    def token_probabilities(
        self, ids: Ints, *, seen: Literal["before", "around"], hidden: Bools | None = None
    ) -> Floats:
        """Of each token given those before it or around it, [n, L, tokens]; see `token_losses`.

        Sums of 1 over tokens; 0 throughout for the token that opens a sentence.
        """


@runtime_checkable
class LabelledLaw(TabledLaw, Protocol):
    """A law of sentences with hidden symbols, which downstream labels are made of."""

    def label_probabilities(self, ids: Ints) -> Floats:
        """p(symbol | all words of a sentence) of every place where a symbol is hidden.

        Args:
            ids: [n, L], each row a sentence with the token that opens it.

        Returns:
            [n, places, symbols], sums of 1 over symbols.
        """


def hidden_optimum(law: Law, ids: Ints, rows: Arrays) -> Floats:
    """sum over hidden t of -log p(x_t | visible tokens), of rows whose labelled tokens, and no others, are hidden.

    Hidden tokens do not see each other: as a masked model predicts each by itself, a sum of marginals is the lowest it
    can have, not -log of their joint probability.

    Args:
        law: of the text.
        ids: [n, L] of text.
        rows: `input_ids` and `labels` [n, L]; where labels are not IGNORED, they are what the text is there.

    Returns:
        [n], in nats.

    Raises:
        ValueError: if rows are not the text but for what is hidden.

    >>> class Uniform:  # Over 4 words.
    ...     def token_losses(self, ids, *, seen, hidden=None):
    ...         return np.where(np.arange(ids.shape[1]) > 0, np.log(4), 0) * np.ones(ids.shape)
    >>> rows = {"input_ids": np.array([[0, 9, 9]]), "labels": np.array([[-100, 1, 2]])}
    >>> hidden_optimum(Uniform(), np.array([[0, 1, 2]]), rows) / np.log(4)
    array([2.])
    """
    hidden = rows["labels"] != IGNORED
    _check_text(np.where(hidden, rows["labels"], rows["input_ids"]), ids)
    return np.asarray(np.where(hidden, law.token_losses(ids, seen="around", hidden=hidden), 0.0).sum(axis=1))


def decoder_optimum(law: Law, ids: Ints, rows: Arrays, specials: Specials) -> Floats:
    """sum over labelled t of -log p(x_t | x_<t) of rows of text; -log p(pieces | kept) of rows with pieces cut out.

    -log p(pieces | kept) = log sum_w p(kept tokens at the places that w leaves) - log p(text), w being all ways to cut
    as many tokens in as many pieces that leave the same tokens with gaps at the same places among them. Whoever reads
    what is left knows how long the text was, and takes all w as equally likely, as `SpanCorruption` draws them.

    Args:
        law: of the text.
        ids: [n, L] of text.
        rows: `input_ids` and `labels` [n, M] that a `DecoderObjective` made of it. A row is cut where a label is one of
            `specials.ids`; else it begins with the text itself.
        specials: sentinels, and what announces the kind of a row.

    Returns:
        [n], in nats; NaN for a row that leaves more than `MAX_WAYS` to place what is left.

    Raises:
        ValueError: if a row that is not cut does not begin with the text.
    """
    # The rows tell by themselves what was cut out of which: a mixture does not say who made a row.
    extra = np.fromiter(specials.ids.values(), np.int64, len(specials.ids))
    is_cut: Bools = np.asarray(np.isin(rows["labels"], extra).any(axis=1))
    _check_text(rows["input_ids"][~is_cut, : ids.shape[1]], ids[~is_cut])
    optimum = _next_optimum(law, ids, rows["labels"], is_cut)
    noise = np.zeros(ids.shape, np.bool_)
    for row in np.flatnonzero(is_cut):
        noise[row] = _cut_out(rows["input_ids"][row], rows["labels"][row], set(extra.tolist()))
    # Rows of one shape have the same ways to be cut, and go through the law together.
    shapes = np.stack([noise.sum(axis=1), _starts(noise).sum(axis=1)], axis=1)
    for num_noise, num_pieces in np.unique(shapes[is_cut], axis=0).tolist():
        alike = is_cut & (shapes == (num_noise, num_pieces)).all(axis=1)
        optimum[alike] = _pieces_optimum(law, ids[alike], noise[alike], num_noise, num_pieces)
    return optimum


def _check_text(shown: Ints, ids: Ints) -> None:
    if not np.array_equal(shown, ids):
        raise ValueError(
            "these rows are not the text, so this is not their lowest loss; write `optimal_losses` for them"
        )


def _next_optimum(law: Law, ids: Ints, labels: Ints, is_cut: Bools) -> Floats:
    """Of the rows that are the text itself; 0 for others."""
    optimum = np.zeros(len(ids))
    if not is_cut.all():
        losses = law.token_losses(ids[~is_cut], seen="before")
        # A row may be longer than its text, by padding, which has no label; the first token is not predicted.
        optimum[~is_cut] = np.where(labels[~is_cut, : ids.shape[1]] != IGNORED, losses, 0.0)[:, 1:].sum(axis=1)
    return optimum


def _cut_out(inputs: Ints, labels: Ints, extra: set[int]) -> list[bool]:
    """Which tokens of the text are missing from what is left of it in a row, from the row itself."""
    lengths: list[int] = []  # Of the pieces, in order; the last mark has none behind it.
    for token in labels[labels != IGNORED].tolist():
        if token in extra:
            lengths.append(0)
        else:
            lengths[-1] += 1
    # Those of what is predicted: what announces the kind of a row has no label, so is none.
    marks = set(labels.tolist()) & extra
    pieces = iter(lengths)
    noise: list[bool] = []
    for token in inputs[: (labels != IGNORED).argmax()].tolist():
        if token in marks:
            noise += [True] * next(pieces)
        elif token not in extra:  # One that announces the kind of row stands for no text.
            noise.append(False)
    return noise


def _pieces_optimum(law: Law, ids: Ints, noise: Bools, num_noise: int, num_pieces: int) -> Floats:
    """log sum_w p(kept tokens at the places that w leaves) - log p(text), [n]; see `decoder_optimum`."""
    # Ways to write num_noise as a sum of num_pieces lengths of 1 or more.
    if math.comb(num_noise - 1, num_pieces - 1) > MAX_WAYS:
        return np.full(len(ids), np.nan)
    kept = ids[~noise]
    seen = np.full(len(ids), -np.inf)
    for placed in _placements(noise, num_noise, num_pieces):
        # A placement puts kept tokens elsewhere; any word of the vocabulary will do where none is seen.
        text = np.full_like(ids, ids.max())
        text[~placed] = kept
        losses = law.token_losses(text, seen="before", hidden=placed)
        seen = np.logaddexp(seen, -np.where(placed, 0.0, losses).sum(axis=1))
    return np.asarray(seen + law.token_losses(ids, seen="before").sum(axis=1))


def _placements(noise: Bools, num_noise: int, num_pieces: int) -> Iterator[Bools]:
    """All `noise` that leave the same text with gaps at the same places of it."""
    num, length = noise.shape
    # Lengths of the kept parts, which the gaps show: of a kept token, its part is the number of pieces before it.
    kept = np.zeros((num, num_pieces + 1), np.int64)
    np.add.at(kept, (np.nonzero(~noise)[0], np.cumsum(_starts(noise), axis=1)[~noise]), 1)
    is_noise = np.arange(2 * num_pieces + 1) % 2 == 1  # Kept parts and pieces take turns, from a kept one on.
    for cuts in combinations(range(1, num_noise), num_pieces - 1):
        lengths = np.empty((num, 2 * num_pieces + 1), np.int64)
        lengths[:, ::2] = kept
        lengths[:, 1::2] = np.diff([0, *cuts, num_noise])
        yield np.repeat(np.tile(is_noise, num), lengths.ravel()).reshape(num, length)


def _starts(noise: Bools) -> Bools:
    """Where a piece begins, [n, L]: at what is cut out, behind what is not."""
    return noise & ~np.pad(noise[:, :-1], ((0, 0), (1, 0)))
