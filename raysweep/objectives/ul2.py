"""UL2: span corruption of several kinds, each announced by a token of its own."""

from __future__ import annotations

from functools import partial
from typing import Literal, final

import numpy as np
from pydantic import Field, model_validator

from raysweep.objectives.base import Arrays, DecoderObjective, Ints, Specials
from raysweep.objectives.mixture import mixed
from raysweep.objectives.span_corruption import (
    SEEN,
    Bools,
    check_sentinels,
    corrupted,
    count_noise,
    random_spans,
    sentinel_names,
)
from raysweep.spec import Spec

MODES = {"R": "[NLU]", "S": "[S2S]", "X": "[NLG]"}
"""Kind of denoiser -> the token that announces it, by the names in the released models' vocabulary."""


@final
class Denoiser(Spec):
    """One way to corrupt a text; see `UL2`."""

    mode: Literal["R", "S", "X"]
    """Regular, sequential or extreme: which token announces it. S cuts off the end, in one span."""
    density: float = Field(gt=0, lt=1)
    """Part of the tokens that is cut out."""
    mean_span_length: float | None = Field(default=None, ge=1)
    """Tokens of a span, on average over those of a row; of R and X."""
    weight: float = Field(default=1.0, gt=0)
    """In the rows of text, beside the other denoisers'."""

    @model_validator(mode="after")
    def _has_what_its_mode_takes(self) -> Denoiser:
        if self.mode == "S" and self.mean_span_length is not None:
            raise ValueError(f"mean_span_length {self.mean_span_length}: S is one span at the end; leave it out")
        if self.mode != "S" and self.mean_span_length is None:
            raise ValueError(f"mean_span_length is missing; {self.mode} takes one, such as 3.0")
        return self

    def count_noise(self, length: int) -> tuple[int, int]:
        """Tokens of a row that are cut out, and spans; see `span_corruption.count_noise`."""
        longest = float(length)  # Never more than one span.
        return count_noise(length, density=self.density, mean_span_length=self.mean_span_length or longest)

    def in_words(self) -> str:
        """Mode, part of the tokens and mean span, such as `R 0.15 in 3s`."""
        spans = f" in {self.mean_span_length:.3g}s" if self.mean_span_length else ""
        return f"{self.mode} {self.density:.3g}{spans}"

    def noise(self, num: int, length: int, draw: np.random.Generator) -> Bools:
        """What is cut out of `num` rows, [num, length]: of S, where nothing is drawn, the end; else `random_spans`."""
        num_noise, num_spans = self.count_noise(length)
        if self.mode == "S":
            return np.broadcast_to(np.arange(length) >= length - num_noise, (num, length))
        return random_spans(num, length, num_noise=num_noise, num_spans=num_spans, draw=draw)


PAPER = (
    Denoiser(mode="R", density=0.15, mean_span_length=3.0),
    Denoiser(mode="R", density=0.15, mean_span_length=8.0),
    Denoiser(mode="S", density=0.25),
    Denoiser(mode="X", density=0.5, mean_span_length=3.0),
    Denoiser(mode="X", density=0.5, mean_span_length=8.0),
    Denoiser(mode="X", density=0.15, mean_span_length=64.0),
    Denoiser(mode="X", density=0.5, mean_span_length=64.0),
)
"""Tay et al. (2022), Table 1: seven denoisers, equally often."""


@final
class UL2(DecoderObjective):
    """UL2's mixture of denoisers (Tay et al., 2022) in one decoder: mode token, corrupted text, what was cut out.

    R is span corruption as T5's, X cuts out more or longer spans, S the end of the text, as a prefix LM. Each row is
    made by one denoiser, drawn by weight.
    """

    name: Literal["ul2"]
    """Which objective."""
    denoisers: tuple[Denoiser, ...] = Field(default=PAPER, min_length=1)
    """By default the paper's seven, equally often."""
    num_sentinels: int = Field(default=100, ge=2)
    """Tokens <extra_id_0>, <extra_id_1> … of the vocabulary: one more than a row has spans is needed."""
    attention: Literal["both_ways", "causal"] = "both_ways"
    """Whether the tokens of the corrupted text all see each other, as in an encoder, or each those before it."""

    def predicts(self) -> str:
        """What each denoiser cuts out, of which share of the rows if unlike, and how the rest is seen, in words."""
        total = sum(each.weight for each in self.denoisers)
        is_even = len({each.weight for each in self.denoisers}) == 1
        kinds = ", ".join(
            each.in_words() if is_even else f"{each.weight / total:.3g} of rows {each.in_words()}"
            for each in self.denoisers
        )
        cut_out = f"what {len(self.denoisers)} denoisers cut out ({kinds})"
        return f"{cut_out}, and its sentinels, from what is left of a sequence, {SEEN[self.attention]}"

    def extra_tokens(self) -> tuple[str, ...]:
        """The sentinels, and the three modes' tokens, whichever are used: checkpoints of one size compare."""
        return (*sentinel_names(self.num_sentinels), *MODES.values())

    def input_length(self, sequence_length: int) -> int:
        """The text, its mode, and the most sentinels of any denoiser.

        Raises:
            ValueError: if `num_sentinels` are too few.
        """
        num_spans = max(each.count_noise(sequence_length)[1] for each in self.denoisers)
        check_sentinels(self.num_sentinels, num_spans, sequence_length)
        return 1 + sequence_length + 2 * num_spans + 1

    def mean_predicted(self, sequence_length: int) -> float:
        """By the weights of the denoisers; of each as by `SpanCorruption`."""
        return float(
            np.average(
                [sum(each.count_noise(sequence_length)) + 1 for each in self.denoisers],
                weights=[each.weight for each in self.denoisers],
            )
        )

    def prepare(self, ids: Ints, draw: np.random.Generator, specials: Specials) -> Arrays:
        """Each row as by its denoiser, then padded on the right.

        Args:
            ids: [n, L], L at least 2.
            draw: of each row's denoiser, by weight, and then of what each denoiser cuts out.
            specials: the sentinels and the modes' tokens, one of which opens each row.

        Returns:
            input_ids and labels [n, M], M at most `input_length(L)`; lengths [n]; prefix_lengths [n] where the kept
            text is seen both ways.

        >>> objective = UL2(name="ul2", denoisers=(Denoiser(mode="S", density=0.5),), num_sentinels=2)
        >>> specials = Specials(dict(zip(objective.extra_tokens(), range(100, 200))), num_text_tokens=100)
        >>> objective.extra_tokens()
        ('<extra_id_0>', '<extra_id_1>', '[NLU]', '[S2S]', '[NLG]')
        >>> objective.prepare(np.array([[1, 2, 3, 4]]), np.random.default_rng(0), specials)["input_ids"]
        array([[103,   1,   2, 100, 100,   3,   4, 101]])
        """
        makers = [partial(self._denoising, each, specials) for each in self.denoisers]
        return mixed(ids, makers, [each.weight for each in self.denoisers], draw, pad=specials.pad)

    @property
    def has_optimum(self) -> bool:
        """The mode and what is left tell which ways to cut it there are, all equally likely."""
        return True

    def _denoising(self, denoiser: Denoiser, specials: Specials, ids: Ints, draw: np.random.Generator) -> Arrays:
        num, length = ids.shape
        noise = denoiser.noise(num, length, draw)
        return corrupted(ids, noise, specials, attention=self.attention, mode=MODES[denoiser.mode])
