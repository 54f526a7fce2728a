"""Prediction of a text's end from its beginning (T5's prefix language model: Raffel et al., 2020, section 3.2)."""

from __future__ import annotations

from typing import Annotated, Literal, final

import numpy as np
from pydantic import Field, field_validator

from raysweep.objectives.base import IGNORED, Arrays, DecoderObjective, Ints, Specials

Part = Annotated[float, Field(ge=0, le=1)]


@final
class PrefixLM(DecoderObjective):
    """Each sequence is cut in two at random; the first part is given, the tokens of the second are predicted."""

    name: Literal["prefix_lm"]
    """Which objective."""
    prefix: tuple[Part, Part] = (0.0, 1.0)
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
        """See `ObjectiveSpec.predicts`."""
        seen = "seen both ways" if self.attention == "both_ways" else "seen causally"
        low, high = self.prefix
        return f"every token after a prefix of {low:.3g} to {high:.3g} of a sequence, {seen}, from those before it"

    def extra_tokens(self) -> tuple[str, ...]:
        """None."""
        return ()

    def input_length(self, sequence_length: int) -> int:
        """As many."""
        return sequence_length

    def prepare(self, ids: Ints, draw: np.random.Generator, specials: Specials) -> Arrays:
        """The first place that is predicted is drawn for each row; see `DecoderObjective.prepare`."""
        num, length = ids.shape
        shortest, longest = (int(np.clip(round(part * length), 1, length - 1)) for part in self.prefix)
        prefix_lengths = draw.integers(shortest, longest + 1, size=(num,))
        labels = np.where(np.arange(length) < prefix_lengths[:, None], IGNORED, ids)
        rows: Arrays = {"input_ids": ids, "labels": labels}
        return rows | {"prefix_lengths": prefix_lengths} if self.attention == "both_ways" else rows

    @property
    def has_optimum(self) -> bool:
        """Each token that is predicted has its conditional probability."""
        return True
