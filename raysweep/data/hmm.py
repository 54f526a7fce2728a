"""A hidden Markov model: text whose true probabilities are known exactly by the forward-backward algorithm.

The hidden state at a position says which words are likely there and which states come next (paper 1's second
language: Liu et al., 2022, arXiv 2210.14199, which leaves the laws open). Ours: the next state is drawn by one of
`num_permutations` random permutations of the states, taken with probabilities softmax(z / transition_temperature);
a state's words have probabilities softmax(z / emission_temperature), z standard normal. A sum of permutations keeps
the uniform law of states, which the first state is drawn from: so all positions are alike.
"""

from __future__ import annotations

from functools import cached_property
from typing import ClassVar, Literal

import numpy as np
from pydantic import Field, model_validator

from raysweep.data.draws import Choices, Floats, Ints, softmax, uniforms
from raysweep.data.exact import ExactCorpus, Seen, check_table, normalised


class HMM(ExactCorpus):
    """A corpus of sentences of one random hidden Markov model."""

    label_form: ClassVar[str | None] = "hmm_state"

    name: Literal["hmm"] = "hmm"
    """Which corpus."""
    num_states: int = Field(default=100, ge=2, le=1000)
    """Hidden states there are."""
    num_permutations: int = Field(default=10, ge=1, le=1000)
    """Permutations of the states that the next one is drawn by: at most so many states may come next."""
    transition_temperature: float = Field(default=0.5, gt=0)
    """Below 1 makes the next state more predictable."""
    emission_temperature: float = Field(default=0.35, gt=0)
    """Below 1 makes a state's words more predictable."""
    sentence_length: int = Field(default=16, ge=2, le=4096)
    """Words of a sentence."""
    law_seed: int = Field(default=0, ge=0)
    """Of transitions and emissions; another seed is another language."""

    @model_validator(mode="after")
    def _possible(self) -> HMM:
        check_table("num_states", self.num_states, self.num_words_total)
        return self

    def at_temperature(self, factor: float) -> HMM:
        """See `ExactCorpus.at_temperature`: of transitions and emissions."""
        return self.with_(  # type: ignore[no-any-return]
            transition_temperature=self.transition_temperature * factor,
            emission_temperature=self.emission_temperature * factor,
        )

    @cached_property
    def _moves(self) -> tuple[Floats, Ints]:
        """Probability of each permutation [k], and the state that it makes of each state [k, states]."""
        draw = np.random.default_rng([self.law_seed, 3141])
        weights = softmax(draw.standard_normal(self.num_permutations) / self.transition_temperature)
        return weights, np.stack([draw.permutation(self.num_states) for _ in weights])

    @cached_property
    def transitions(self) -> Floats:
        """p(s_t+1 = j | s_t = i), [i, j]: a sum of weighted permutations, so rows and columns sum to 1."""
        matrix = np.zeros((self.num_states, self.num_states))
        for weight, permutation in zip(*self._moves, strict=True):
            matrix[np.arange(self.num_states), permutation] += weight
        return matrix

    @cached_property
    def emissions(self) -> Floats:
        """p(x_t = w | s_t = s), [s, w]."""
        draw = np.random.default_rng([self.law_seed, 5926])
        return softmax(draw.standard_normal((self.num_states, self.num_words_total)) / self.emission_temperature)

    @cached_property
    def _choices(self) -> tuple[Choices, Choices]:
        """Of a permutation, and of a word in each state."""
        return Choices.of(self._moves[0][None]), Choices.of(self.emissions)

    def sample(self, num: int, *, seed: int, stream: int, part: slice = slice(None)) -> tuple[Ints, Ints]:
        """See `ExactCorpus.sample`: words [sentences, T], and the state above each, in [0, num_states)."""
        first, last, _ = part.indices(num)
        length = self.sentence_length
        # Of each sentence the first half of its numbers moves the state, the second draws words.
        uniform = uniforms([self.law_seed, seed, stream], first * 2 * length, (last - first, 2, length))
        permutation, word = self._choices
        moves = permutation.draw(np.zeros((last - first, length - 1), np.int64), uniform[:, 0, 1:])
        states = np.empty((last - first, length), np.int64)
        states[:, 0] = uniform[:, 0, 0] * self.num_states  # Cut to whole numbers: all states are as likely.
        for place, move in enumerate(moves.T):
            states[:, place + 1] = self._moves[1][move, states[:, place]]
        return word.draw(states, uniform[:, 1]), states

    def contexts(self, evidence: Floats, *, seen: Seen) -> Floats:
        """See `ExactCorpus.contexts`: the forward algorithm, and for "around" the backward one (Rabiner, 1989, III).

        p(s_t | x_<t) = sum_s p(s_t | s) p(s_t-1 = s | x_<t-1) p(x_t-1 | s) / c; and p(s_t | x_<t, x_>t) is proportional
        to p(s_t | x_<t) p(x_>t | s_t). The work is states x states x T, for each sentence.

        >>> unseen = np.ones((4, 3, 1))
        >>> HMM(num_states=4).contexts(unseen, seen="around")[:, :, 0]  # All states are as likely at every place.
        array([[0.25, 0.25, 0.25],
               [0.25, 0.25, 0.25],
               [0.25, 0.25, 0.25],
               [0.25, 0.25, 0.25]])
        """
        # Normalised at every place: of a long sentence the probabilities themselves are below the least float.
        contexts = np.empty_like(evidence)
        state = np.full_like(evidence[:, 0], 1 / self.num_states)
        for place in range(evidence.shape[1]):
            contexts[:, place] = state
            state = self.transitions.T @ normalised(state * evidence[:, place])
        if seen == "before":
            return contexts
        after = np.ones_like(evidence[:, 0])
        for place in reversed(range(evidence.shape[1])):
            contexts[:, place] = normalised(contexts[:, place] * after)
            after = self.transitions @ normalised(after * evidence[:, place])
        return contexts
