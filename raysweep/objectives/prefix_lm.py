"""Prediction of a text's end from its beginning (T5's prefix language model: Raffel et al., 2020, section 3.2)."""

from __future__ import annotations

from typing import Annotated, Literal, final

import numpy as np
from pydantic import Field, field_validator

from raysweep.objectives.base import IGNORED, Arrays, DecoderObjective, Ints, Specials

Fraction = Annotated[float, Field(ge=0, le=1)]


@final
class PrefixLM(DecoderObjective):
    """Each sequence is cut in two at random: the loss is -sum over t >= cut of log p(x_t | x_<t), the prefix given.

    Cuts are drawn evenly between the shortest and the longest prefix, for each row by itself.
    """

    name: Literal["prefix_lm"]
    """Which objective."""
    prefix: tuple[Fraction, Fraction] = (0.0, 1.0)
    """Shortest and longest prefix, as parts of a sequence; every length between is as likely, and at least one token
    is given and one predicted."""
    attention: Literal["both_ways", "causal"] = "both_ways"
    """Whether the tokens of a prefix all see each other, or each those before it."""

    @field_validator("prefix")
    @classmethod
    def _rising(cls, prefix: tuple[float, float]) -> tuple[float, float]:
        if prefix[0] > prefix[1]:
            raise ValueError(f"{list(prefix)}: the shortest part is above the longest; swap them")
        return prefix

    def predicts(self) -> str:
        """The tokens after a prefix, and how it is seen, in words; see `ObjectiveSpec.predicts`."""
        seen = "seen both ways" if self.attention == "both_ways" else "seen causally"
        low, high = self.prefix
        return f"every token after a prefix of {low:.3g} to {high:.3g} of a sequence, {seen}, from those before it"

    def extra_tokens(self) -> tuple[str, ...]:
        """None: a prefix ends where labels begin."""
        return ()

    def input_length(self, sequence_length: int) -> int:
        """As many: a row is the text."""
        return sequence_length

    def mean_predicted(self, sequence_length: int) -> float:
        """What a prefix leaves, whose lengths are all as likely."""
        return sequence_length - sum(self._prefix_lengths(sequence_length)) / 2

    def prepare(self, ids: Ints, draw: np.random.Generator, specials: Specials) -> Arrays:
        """The text, with labels from a cut on.

        Args:
            ids: [n, L], L at least 2.
            draw: of the cuts.
            specials: not used.

        Returns:
            input_ids and labels [n, L]; prefix_lengths [n] where a prefix is seen both ways.

        >>> half = PrefixLM(name="prefix_lm", prefix=(0.5, 0.5))
        >>> rows = half.prepare(np.array([[5, 6, 7, 8]]), np.random.default_rng(0), Specials({}, 10))
        >>> rows["labels"], rows["prefix_lengths"]
        (array([[-100, -100,    7,    8]]), array([2]))
        """
        num, length = ids.shape
        shortest, longest = self._prefix_lengths(length)
        prefix_lengths = draw.integers(shortest, longest + 1, size=(num,))
        labels = np.where(np.arange(length) < prefix_lengths[:, None], IGNORED, ids)
        rows: Arrays = {"input_ids": ids, "labels": labels}
        return rows | {"prefix_lengths": prefix_lengths} if self.attention == "both_ways" else rows

    @property
    def has_optimum(self) -> bool:
        """Each token that is predicted has its conditional probability."""
        return True

    def _prefix_lengths(self, length: int) -> tuple[int, int]:
        """Tokens of the shortest and of the longest prefix of a row."""
        shortest, longest = (int(np.clip(round(part * length), 1, length - 1)) for part in self.prefix)
        return shortest, longest
