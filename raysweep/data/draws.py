"""Fast draws, each a function of a key and its place alone, so that any part of a corpus can be made by itself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]


def uniforms(key: Sequence[int], first: int, shape: tuple[int, ...]) -> Floats:
    """Numbers in [0, 1) of `np.random.default_rng(key)`, in `shape`, without the `first` ones.

    Args:
        key: whole numbers, not negative; equal keys give equal numbers.
        first: numbers that are passed over, in no time.
        shape: of the result, float64.

    >>> bool((uniforms([1, 2], 3, (2, 2)).ravel() == np.random.default_rng([1, 2]).random(7)[3:]).all())
    True
    """
    # One number in [0, 1) takes one step of PCG64, and `advance` makes any number of steps in microseconds.
    bits = np.random.PCG64(np.random.SeedSequence(list(key)))
    bits.advance(first)
    return np.random.Generator(bits).random(shape)


def softmax(logits: Floats) -> Floats:
    """e^z_i / sum_j e^z_j over the last axis, without overflow."""
    exp = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return np.asarray(exp / exp.sum(axis=-1, keepdims=True))


@dataclass(frozen=True)
class Choices:
    """Laws over few or many outcomes, one a row, to draw from by inversion: the first whose cumulative sum is above.

    A draw is a binary search over the row, done for all draws at once, a bit of the outcome at a time.
    """

    cumulative: Floats
    """[rows, 2^b]; infinite from the last outcome on, so that rounding never goes beyond it."""
    totals: Floats
    """[rows]: 1 but for rounding."""

    @classmethod
    def of(cls, probabilities: Floats) -> Choices:
        """Of probabilities [rows, outcomes], each row of which sums to 1 but for rounding."""
        sums = np.cumsum(probabilities, axis=-1)
        num = sums.shape[1]
        # A power of two of them, so that each step of `draw` decides a bit of the outcome.
        cumulative = np.full((len(sums), 1 << (num - 1).bit_length()), np.inf)
        cumulative[:, : num - 1] = sums[:, :-1]
        return cls(cumulative, sums[:, -1].copy())

    def draw(self, rows: Ints, uniform: Floats) -> Ints:
        """An outcome for each of `rows`.

        Args:
            rows: which law each is drawn from, of any shape.
            uniform: a number in [0, 1) each, of the same shape.

        Returns:
            Outcomes of that shape, int64: an outcome of probability 0 never comes.

        >>> Choices.of(np.array([[0.25, 0.0, 0.75]])).draw(np.zeros(3, np.int64), np.array([0.0, 0.24, 0.25]))
        array([0, 0, 2])
        """
        scaled = uniform * self.totals[rows]
        flat, size = self.cumulative.ravel(), self.cumulative.shape[1]
        place = rows * size
        step = size // 2
        while step:
            # Beyond the first `step` of the outcomes that are left, or among them.
            place += step * (scaled >= flat[place + step - 1])
            step //= 2
        return np.asarray(place - rows * size)
