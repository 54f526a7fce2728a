"""Span corruption: pieces of a text are cut out, and written down in order behind what is left of it."""

from __future__ import annotations

from typing import Literal, final

import numpy as np
import numpy.typing as npt
from pydantic import Field

from raysweep.objectives.base import IGNORED, Arrays, DecoderObjective, Ints, Specials

Bools = npt.NDArray[np.bool_]

SEEN = {"both_ways": "seen both ways", "causal": "seen causally"}
"""Attention within the corrupted text, in words."""


@final
class SpanCorruption(DecoderObjective):
    """Span corruption (Raffel et al., 2020, section 3.3.4) in one decoder: corrupted text, then what was cut out.

    Of "thank you for inviting me to your party last week", the row is "thank you <extra_id_0> me to your party
    <extra_id_1> week <extra_id_0> for inviting <extra_id_1> last <extra_id_2>", of which all from the second
    <extra_id_0> on is predicted.
    """

    name: Literal["span_corruption"]
    """Which objective."""
    density: float = Field(default=0.15, gt=0, lt=1)
    """Part of the tokens that is cut out."""
    mean_span_length: float = Field(default=3.0, ge=1)
    """Tokens of a span, on average over those of a row."""
    num_sentinels: int = Field(default=100, ge=2)
    """Tokens <extra_id_0>, <extra_id_1> … of the vocabulary: one more than a row has spans is needed."""
    attention: Literal["both_ways", "causal"] = "both_ways"
    """Whether the tokens of the corrupted text all see each other, as in an encoder, or each those before it."""

    def predicts(self) -> str:
        """What part is cut out in spans of what length, and how the rest is seen, in words."""
        cut_out = f"{self.density:.3g} of the tokens, cut out in spans of {self.mean_span_length:.3g} on average"
        return f"{cut_out}, and their sentinels, from what is left of a sequence, {SEEN[self.attention]}"

    def extra_tokens(self) -> tuple[str, ...]:
        """The sentinels, by the names of T5's."""
        return sentinel_names(self.num_sentinels)

    def input_length(self, sequence_length: int) -> int:
        """The text, two sentinels for each span, and the last one.

        Raises:
            ValueError: if `num_sentinels` are too few.
        """
        _, num_spans = count_noise(sequence_length, density=self.density, mean_span_length=self.mean_span_length)
        check_sentinels(self.num_sentinels, num_spans, sequence_length)
        return sequence_length + 2 * num_spans + 1

    def mean_predicted(self, sequence_length: int) -> float:
        """What was cut out, a sentinel before each span, and the last one: as many in every row."""
        return sum(count_noise(sequence_length, density=self.density, mean_span_length=self.mean_span_length)) + 1

    def prepare(self, ids: Ints, draw: np.random.Generator, specials: Specials) -> Arrays:
        """Rows of one length, with as many spans and as many tokens cut out in each; see `corrupted`.

        Args:
            ids: [n, L], L at least 2.
            draw: of the places and the lengths of spans, for each row by itself; see `random_spans`.
            specials: the sentinels.

        Returns:
            input_ids and labels [n, `input_length(L)`]; prefix_lengths [n] where the kept text is seen both ways.

        >>> objective = SpanCorruption(name="span_corruption", density=0.4, mean_span_length=2)
        >>> specials = Specials(dict(zip(objective.extra_tokens(), range(100, 200))), num_text_tokens=100)
        >>> rows = objective.prepare(np.array([[1, 2, 3, 4, 5]]), np.random.default_rng(0), specials)
        >>> rows["input_ids"]  # 100 stands for the one span, of 2 tokens, and again before it; 101 ends it.
        array([[  1,   2, 100,   5, 100,   3,   4, 101]])
        >>> rows["labels"], rows["prefix_lengths"]
        (array([[-100, -100, -100, -100,  100,    3,    4,  101]]), array([4]))
        """
        num, length = ids.shape
        num_noise, num_spans = count_noise(length, density=self.density, mean_span_length=self.mean_span_length)
        noise = random_spans(num, length, num_noise=num_noise, num_spans=num_spans, draw=draw)
        return corrupted(ids, noise, specials, attention=self.attention)

    @property
    def has_optimum(self) -> bool:
        """All ways to cut out so many spans of so many tokens are equally likely."""
        return True


def sentinel_names(num: int) -> tuple[str, ...]:
    """T5's names of the tokens that stand for spans: <extra_id_0>, <extra_id_1> …"""
    return tuple(f"<extra_id_{index}>" for index in range(num))


def check_sentinels(num_sentinels: int, num_spans: int, sequence_length: int) -> None:
    """See that there is a sentinel for each span of a row, and one more that ends it. Raises ValueError."""
    if num_spans >= num_sentinels:
        raise ValueError(
            f"num_sentinels {num_sentinels} are too few for sequence_length {sequence_length}: {num_spans} spans and "
            f"an end need {num_spans + 1}; raise num_sentinels or mean_span_length"
        )


def count_noise(length: int, *, density: float, mean_span_length: float) -> tuple[int, int]:
    """Tokens of a row that are cut out, and the number of spans that they make.

    As in T5's own code: `length * density` tokens and a `mean_span_length`-th as many spans, rounded to the nearest
    (halves to the even), at least one of either; at least one token is kept, and one before every span.

    Args:
        length: tokens of the row, at least 2.
        density: part that is cut out.
        mean_span_length: tokens of a span, on average.

    >>> count_noise(512, density=0.15, mean_span_length=3.0)
    (77, 26)
    """
    num_noise = min(max(round(length * density), 1), length - 1)
    num_spans = min(max(round(num_noise / mean_span_length), 1), length - num_noise)
    return num_noise, num_spans


def random_spans(num: int, length: int, *, num_noise: int, num_spans: int, draw: np.random.Generator) -> Bools:
    """Where tokens are cut out, [num, length]: in each row one of all ways to do it, all equally likely.

    A way keeps the first token, which may open a sentence, and keeps spans apart. In T5's code the last span also
    reaches the end of the row. That is nearly the same for rows of many spans; in a short row, of one span or two, it
    would hide the end, and nothing else, nearly every time.

    Args:
        num: rows.
        length: tokens of a row.
        num_noise: tokens that are cut out of each row, at least `num_spans`.
        num_spans: spans of each row; at most `length - num_noise`, as a kept token stands before each.
        draw: of all rows at once, which are independent.
    """
    kept = _segments(num, length - num_noise + 1, num_spans + 1, draw)
    kept[:, -1] -= 1  # Behind the last span there may be nothing.
    hidden = _segments(num, num_noise, num_spans, draw)
    lengths = np.zeros((num, 2 * num_spans + 1), np.int64)
    lengths[:, ::2], lengths[:, 1::2] = kept, hidden
    is_noise = np.zeros(lengths.shape, np.bool_)
    is_noise[:, 1::2] = True
    return np.repeat(is_noise.ravel(), lengths.ravel()).reshape(num, length)


def _segments(num: int, length: int, num_segments: int, draw: np.random.Generator) -> Ints:
    """Lengths [num, num_segments], all at least 1, that add up to `length`: all ways equally likely, in each row."""
    is_first = np.zeros((num, length), np.bool_)
    # Stars and bars: of the places but the first, any num_segments - 1 may open a segment.
    is_first[:, :num_segments] = True
    is_first[:, 1:] = draw.permuted(is_first[:, 1:], axis=1)
    # A row begins with a segment, so the last one of the row before ends there.
    return np.diff(np.flatnonzero(is_first), append=num * length).reshape(num, num_segments)


def corrupted(
    ids: Ints, noise: Bools, specials: Specials, *, attention: Literal["both_ways", "causal"], mode: str | None = None
) -> Arrays:
    """Rows of the kept text with a sentinel for each span, then each sentinel with its span, then one more sentinel.

    Args:
        ids: [n, L].
        noise: [n, L], what is cut out: in every row as many tokens and as many spans, none of which comes first.
        specials: ids of the sentinels, and of `mode`.
        attention: whether the tokens of the kept text all see each other, as `prefix_lengths` say.
        mode: a token to stand before all others.

    Returns:
        input_ids and labels [n, M], M = L + 2 * spans + 1, and 1 more for a mode; prefix_lengths [n] if both_ways.
    """
    num, length = ids.shape
    is_start = np.zeros_like(noise)
    is_start[:, 1:] = noise[:, 1:] & ~noise[:, :-1]
    is_before = np.zeros_like(noise)  # A span: each has a kept token before it, whose place a sentinel can take.
    is_before[:, :-1] = is_start[:, 1:]
    num_spans = int(is_start[0].sum())  # As many in every row, so that all rows have one length.
    *sentinels, end = (specials[name] for name in sentinel_names(num_spans + 1))
    opening = [] if mode is None else [specials[mode]]
    num_prefix = len(opening) + length - int(noise[0].sum()) + num_spans

    inputs = np.empty((num, len(opening) + length + 2 * num_spans + 1), np.int64)
    inputs[:, : len(opening)] = opening
    inputs[:, len(opening) : num_prefix] = _picked(ids, ~noise | is_start, is_start, sentinels)
    inputs[:, num_prefix:-1] = _picked(ids, noise | is_before, is_before, sentinels)
    inputs[:, -1] = end
    labels = np.full_like(inputs, IGNORED)
    labels[:, num_prefix:] = inputs[:, num_prefix:]
    rows = {"input_ids": inputs, "labels": labels}
    return rows if attention == "causal" else rows | {"prefix_lengths": np.full(num, num_prefix)}


def _picked(ids: Ints, is_picked: Bools, is_sentinel: Bools, sentinels: list[int]) -> Ints:
    """[n, tokens that are picked in each row]; `sentinels`, in order, where `is_sentinel`."""
    marked = ids.copy()
    marked[is_sentinel] = np.tile(sentinels, len(ids))
    return marked[is_picked].reshape(len(ids), -1)
