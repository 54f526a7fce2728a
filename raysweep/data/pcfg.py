"""A probabilistic context-free grammar: text whose true probabilities, so the optimal loss, are known exactly.

Sentences are the leaves of balanced binary trees: a sentence of 2^d words has d levels of binary rules, the same
rules on every level, and one emission per leaf. Paper 1 (Liu et al., 2022, arXiv 2210.14199) leaves the laws open;
ours: every non-terminal has `num_rules` distinct pairs of children and `num_words` distinct words, both drawn
uniformly, with probabilities softmax(z / temperature), z standard normal. A low temperature makes it predictable.
"""

from __future__ import annotations

from functools import cached_property
from typing import ClassVar, Literal, NamedTuple

import numpy as np
from pydantic import Field, model_validator

from raysweep.data.draws import Choices, Floats, Ints, softmax, uniforms
from raysweep.data.exact import ExactCorpus, Seen, check_table, normalised


class _Laws(NamedTuple):
    """What is drawn once from `grammar_seed`."""

    root: Floats
    """Probability of each non-terminal at the top, [A]."""
    children: Ints
    """Left and right, [A, rule, 2]."""
    rule_probs: Floats
    """[A, rule]."""
    words: Ints
    """A non-terminal's own, rising, [A, num_words]."""
    word_probs: Floats
    """[A, num_words]."""


class PCFG(ExactCorpus):
    """A corpus of sentences of one random grammar."""

    label_form: ClassVar[str | None] = "pcfg_span"
    # 2: `entropy_gap` is of the objective, on the rows that its held-out loss is of, and has an error.
    VERSION: ClassVar[int] = 2

    name: Literal["pcfg"] = "pcfg"
    """Which corpus."""
    num_nonterminals: int = Field(default=50, ge=2, le=1000)
    """Non-terminals there are."""
    num_rules: int = Field(default=4, ge=1, le=1000)
    """Binary rules of a non-terminal."""
    num_words: int = Field(default=8, ge=1)
    """Words a non-terminal may stand for."""
    temperature: float = Field(default=1.0, gt=0)
    """Below 1 makes the grammar more predictable."""
    sentence_length: int = Field(default=32, ge=2, le=4096)
    """Words of a sentence; a power of two."""
    grammar_seed: int = Field(default=0, ge=0)
    """Of the grammar's rules; another seed is another language."""

    @model_validator(mode="after")
    def _possible(self) -> PCFG:
        if self.sentence_length & (self.sentence_length - 1):
            raise ValueError(f"sentence_length {self.sentence_length} must be a power of two: trees are balanced")
        if self.num_words > self.num_words_total:
            raise ValueError(f"num_words {self.num_words} is more than the vocabulary of {self.num_words_total}")
        check_table("num_nonterminals", self.num_nonterminals, self.num_words_total)
        if self.num_rules > self.num_nonterminals**2:
            raise ValueError(f"num_rules {self.num_rules}: there are only {self.num_nonterminals**2} pairs")
        return self

    def at_temperature(self, factor: float) -> PCFG:
        """See `ExactCorpus.at_temperature`: of rules, words and roots."""
        return self.with_(temperature=self.temperature * factor)  # type: ignore[no-any-return]

    @cached_property
    def _laws(self) -> _Laws:
        draw = np.random.default_rng([self.grammar_seed, 2718])
        num, rules = self.num_nonterminals, self.num_rules
        # The order of the draws is the language: any other makes another one of the same seed.
        pairs = np.stack([draw.choice(num * num, size=rules, replace=False) for _ in range(num)])
        children = np.stack([pairs // num, pairs % num], axis=-1)
        rule_probs = softmax(draw.standard_normal((num, rules)) / self.temperature)
        words, word_probs = np.empty((num, self.num_words), np.int64), np.empty((num, self.num_words))
        for nonterminal in range(num):
            chosen = draw.choice(self.num_words_total, size=self.num_words, replace=False)
            order = chosen.argsort()
            words[nonterminal] = chosen[order]
            word_probs[nonterminal] = softmax(draw.standard_normal(self.num_words) / self.temperature)[order]
        root = softmax(draw.standard_normal(num) / self.temperature)
        return _Laws(root, children, rule_probs, words, word_probs)

    @cached_property
    def emissions(self) -> Floats:
        """p(word | non-terminal above it), [non-terminal, vocabulary]; 0 but for its own `num_words`."""
        table = np.zeros((self.num_nonterminals, self.num_words_total))
        np.put_along_axis(table, self._laws.words, self._laws.word_probs, axis=1)
        return table

    @cached_property
    def _rules(self) -> list[tuple[int, int, int, float]]:
        """(parent, left child, right child, probability) of every rule."""
        laws = self._laws
        return [
            (parent, *laws.children[parent, rule].tolist(), float(laws.rule_probs[parent, rule]))
            for parent, rule in np.ndindex(*laws.rule_probs.shape)
        ]

    @cached_property
    def _choices(self) -> tuple[Choices, Choices, Choices]:
        """Of the root, of a rule of each non-terminal, and of one of its words."""
        laws = self._laws
        return Choices.of(laws.root[None]), Choices.of(laws.rule_probs), Choices.of(laws.word_probs)

    def sample(self, num: int, *, seed: int, stream: int, part: slice = slice(None)) -> tuple[Ints, dict[int, Ints]]:
        """Sentences and the non-terminals above their spans.

        Returns:
            words [num, T] in [0, vocabulary), and span length -> non-terminals [num, T / span], from T down to 1;
            of `part` alone, if it is given.
        """
        root, rule, word = self._choices
        first, last, _ = part.indices(num)
        key = [self.grammar_seed, seed, stream]
        # A number a sentence for the root; then level by level one for each node of every sentence, so that the
        # numbers of a level of k nodes begin behind num k others.
        nodes = root.draw(np.zeros((last - first, 1), np.int64), uniforms(key, first, (last - first, 1)))
        spans = {self.sentence_length: nodes}
        while (width := nodes.shape[1]) < self.sentence_length:
            chosen = rule.draw(nodes, uniforms(key, (num + first) * width, nodes.shape))
            nodes = self._laws.children[nodes, chosen].reshape(len(nodes), -1)
            spans[self.sentence_length // nodes.shape[1]] = nodes
        chosen = word.draw(nodes, uniforms(key, (num + first) * self.sentence_length, nodes.shape))
        return self._laws.words[nodes, chosen], spans

    def contexts(self, evidence: Floats, *, seen: Seen) -> Floats:
        """See `ExactCorpus.contexts`: the inside-outside algorithm (Baker, 1979; Lari and Young, 1990).

        Down the tree, p(B at a left child | seen) = sum over rules A -> B C of p(A above | seen) p(A -> B C) inside(C),
        up to a factor, and alike for a right child. What is yet to come is summed over by leaving out its inside
        probabilities, which are then 1: so the words before each place take one pass down the tree, too, not one for
        each place. The work is the number of rules times T, for each sentence.

        >>> corpus = PCFG(vocabulary=9, num_nonterminals=3, num_rules=2, num_words=2, sentence_length=4)
        >>> words, spans = corpus.sample(1000, seed=0, stream=0)
        >>> sure = corpus.contexts(np.eye(3)[:, spans[1].T], seen="around")  # All other leaves' non-terminals known.
        >>> sure.shape, bool(np.allclose(sure.sum(axis=0), 1))
        ((3, 4, 1000), True)
        """
        return self._outside(self._inside(evidence), seen)[-1]

    def posteriors(self, evidence: Floats) -> list[Floats]:
        """See `ExactCorpus.posteriors`: of spans of T words, T / 2, ..., 1; p(A | seen) ~ outside(A) inside(A)."""
        levels = self._inside(evidence)
        return [
            normalised(outside * inside)
            for outside, inside in zip(self._outside(levels, "around"), levels[::-1], strict=True)
        ]

    def _outside(self, levels: list[Floats], seen: Seen) -> list[Floats]:
        """p(non-terminal | what is seen elsewhere), [A, nodes, n], of `_inside`'s levels from the root down."""
        above = np.repeat(self._laws.root[:, None, None], levels[0].shape[2], axis=2)
        down = [above]
        # From the level below the root down to the words.
        for inside in levels[-2::-1]:
            left, right = inside[:, 0::2], inside[:, 1::2]
            below = np.zeros_like(inside)
            for parent, first, second, probability in self._rules:
                weight = probability * down[-1][parent]
                below[first, 0::2] += weight * right[second] if seen == "around" else weight
                below[second, 1::2] += weight * left[first]
            down.append(normalised(below))
        return down

    def _inside(self, evidence: Floats) -> list[Floats]:
        """For each level from the words up: p(what is seen below | non-terminal), up to a factor, [A, nodes, n]."""
        # Normalised at every level: of a long sentence the probabilities themselves are below the least float.
        levels = [normalised(evidence)]
        while levels[-1].shape[1] > 1:
            left, right = levels[-1][:, 0::2], levels[-1][:, 1::2]
            level = np.zeros_like(left)
            for parent, first, second, probability in self._rules:
                level[parent] += probability * left[first] * right[second]
            levels.append(normalised(level))
        return levels
