"""A language of brackets without order, in which what transfers is known: how many brackets stay open.

That of paper 1's theorem on flatness (Liu et al., 2022, arXiv 2210.14199, section 6), which leaves the law open. Ours:
every word is an opening or a closing bracket of one of many kinds, and the types of a sentence of T words have the
probability p(types) ~ exp(-beta S^2 / 4), S = #open - #close: unbalanced sentences are rare. Kinds are uniform within a
type. Of one word, given the sum s of the K = T - 1 others: logit p(open | others) = -beta s, exactly.
"""

from __future__ import annotations

import math
from functools import cached_property
from typing import ClassVar, Literal

import numpy as np
from pydantic import Field, model_validator

from raysweep.data.draws import Bools, Floats, Ints, uniforms
from raysweep.data.exact import ExactCorpus, Seen, normalised

OPEN, CLOSE = 0, 1
"""Hidden symbols: the type of a word."""

# Of beta S^2 / 4 at S = T: e^-700 is still a float.
_MAX_EXPONENT = 700.0


class Brackets(ExactCorpus):
    """A corpus of sentences of brackets: the first half of the words open, the others close."""

    # 2: conditionals of a word by counts, which differ by rounding.
    VERSION: ClassVar[int] = 2
    label_form: ClassVar[str | None] = "bracket_balance"

    name: Literal["brackets"]
    """Which corpus."""
    num_words_total: int = Field(default=24, ge=2, le=1_000_000, alias="vocabulary")
    """Words there are, half of them opening, half closing."""
    sentence_length: int = Field(default=6, ge=2, le=256)
    """Words of a sentence; an even number, so that a sentence can be balanced."""
    beta: float = Field(default=0.5, ge=0)
    """How rare unbalanced sentences are: p(types) ~ exp(-beta S^2 / 4); 0: all types are as likely."""

    @model_validator(mode="after")
    def _possible(self) -> Brackets:
        if self.num_words_total % 2:
            raise ValueError(f"vocabulary {self.num_words_total}: half of the words open, half close; make it even")
        if self.sentence_length % 2:
            raise ValueError(f"sentence_length {self.sentence_length}: no odd number of brackets is balanced")
        if (exponent := self.beta * self.sentence_length**2 / 4) > _MAX_EXPONENT:
            raise ValueError(
                f"beta x sentence_length^2 / 4 is {exponent:.4g}: sentences of one type would have no probability "
                f"that a float holds; at most {_MAX_EXPONENT:g}"
            )
        return self

    def at_temperature(self, factor: float) -> Brackets:
        """See `ExactCorpus.at_temperature`, beta being the inverse of one; kinds are uniform at any."""
        return self.with_(beta=self.beta / factor)  # type: ignore[no-any-return]

    @cached_property
    def emissions(self) -> Floats:
        """p(word | type), [2, words]: uniform over the half that is of the type."""
        table = np.zeros((2, self.num_words_total))
        half = self.num_words_total // 2
        table[OPEN, :half] = table[CLOSE, half:] = 1 / half
        return table

    @cached_property
    def _weights(self) -> Floats:
        """exp(-beta S^2 / 4) of sentences with k = 0 ... T opening words, [T + 1]."""
        balance = 2 * np.arange(self.sentence_length + 1) - self.sentence_length
        return np.asarray(np.exp(-self.beta * balance**2 / 4))

    def contexts(self, evidence: Floats, *, seen: Seen) -> Floats:
        """See `ExactCorpus.contexts`: forwards and backwards over the number k of opening words so far.

        p(type at t | seen) is proportional to sum_k f_t(k) g_t+1(k + [type opens]): f_t(k) is the probability of what
        is seen before t under types with k opening words there, summed over these; g_t(k) that of what is seen from t
        on, with k opening words before it and the law's weight at the end.

        >>> unseen = np.ones((2, 4, 1))
        >>> Brackets(name="brackets", sentence_length=4).contexts(unseen, seen="around")[:, :, 0]
        array([[0.5, 0.5, 0.5, 0.5],
               [0.5, 0.5, 0.5, 0.5]])
        """
        after = self._after(evidence if seen == "around" else np.ones_like(evidence))
        contexts = np.empty_like(evidence)
        before = np.zeros((self.sentence_length + 1, evidence.shape[2]))
        before[0] = 1.0
        for place in range(self.sentence_length):
            opening, closing = evidence[OPEN, place], evidence[CLOSE, place]
            contexts[OPEN, place] = (before[:-1] * after[place + 1][1:]).sum(axis=0)
            contexts[CLOSE, place] = (before[:-1] * after[place + 1][:-1]).sum(axis=0)
            moved = before * closing
            moved[1:] += before[:-1] * opening
            before = normalised(moved)
        return normalised(contexts)

    def _after(self, evidence: Floats) -> list[Floats]:
        """g_t of `contexts` for t = 0 ... T, each [T + 1, n], up to a factor."""
        after = [np.repeat(self._weights[:, None], evidence.shape[2], axis=1)]
        for place in reversed(range(self.sentence_length)):
            here = after[-1] * evidence[CLOSE, place]
            here[:-1] += after[-1][1:] * evidence[OPEN, place]
            after.append(normalised(here))
        return after[::-1]

    def word_probabilities(self, words: Ints, *, seen: Seen, hidden: Bools | None = None) -> Floats:
        """See `ExactCorpus.word_probabilities`; by counts alone, as the law does not change with the order of words."""
        half = self.num_words_total // 2
        is_seen = np.ones(words.shape, np.int64) if hidden is None else 1 - hidden.astype(np.int64)
        opens = is_seen * (words < half)
        # Of the places before each one; and of all but itself.
        num, num_open = (
            (each.cumsum(axis=1) if seen == "before" else each.sum(axis=1, keepdims=True)) - each
            for each in (is_seen, opens)
        )
        return np.asarray(self._word_table[num, num_open])

    @cached_property
    def _word_table(self) -> Floats:
        """p(word | so many others, so many of them opening), [T, T + 1, words]."""
        types = np.stack([self._opening, 1 - self._opening], axis=-1)
        return np.asarray(types @ self.emissions)

    @cached_property
    def _opening(self) -> Floats:
        """p(open | v other words, k of them opening), [T, T + 1]; 0 where k is above v.

        Proportional to g_h(k + 1) against g_h(k), where g_h(k) sums the law's weights over the types of the other h =
        T - 1 - v words: g_0 are the weights themselves, and g_h+1(k) = g_h(k) + g_h(k + 1).
        """
        table = np.zeros((self.sentence_length, self.sentence_length + 1))
        weights = self._weights
        for num in reversed(range(self.sentence_length)):
            table[num, : num + 1] = weights[1:] / (weights[:-1] + weights[1:])
            weights = weights[:-1] + weights[1:]
        return table

    def sample(self, num: int, *, seed: int, stream: int, part: slice = slice(None)) -> tuple[Ints, Ints]:
        """Sentences and their types [num, T], OPEN or CLOSE: see `ExactCorpus.sample`."""
        first, last, _ = part.indices(num)
        length, half = self.sentence_length, self.num_words_total // 2
        # Of each sentence the first half of its numbers draws types, the second words.
        uniform = uniforms([2718, seed, stream], first * 2 * length, (last - first, 2, length))
        opened = np.zeros(last - first, np.int64)
        types = np.empty((last - first, length), np.int64)
        for place in range(length):
            opens = uniform[:, 0, place] < self._opening[place, opened]
            types[:, place] = np.where(opens, OPEN, CLOSE)
            opened += opens
        return types * half + (uniform[:, 1] * half).astype(np.int64), types

    def balance_law(self, num_words: int) -> dict[int, float]:
        """p(s), s = #open - #close of the first `num_words` words of a sentence; exact, sums to 1.

        >>> law = Brackets(name="brackets", sentence_length=2, beta=0.0).balance_law(1)
        >>> {s: round(p, 12) for s, p in law.items()}
        {-1: 0.5, 1: 0.5}
        """
        rest = self.sentence_length - num_words
        weights = np.array(
            [
                math.comb(num_words, k) * sum(math.comb(rest, j) * self._weights[k + j] for j in range(rest + 1))
                for k in range(num_words + 1)
            ]
        )
        return {2 * k - num_words: float(weight) for k, weight in enumerate(weights / weights.sum())}
