"""The hidden Markov model's own labels: its state at one position of a sentence (paper 1's task-6 and task-10)."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from raysweep.data.corpora import Corpus
from raysweep.data.hmm import HMM
from raysweep.errors import SpaceError
from raysweep.objectives.base import Ints
from raysweep.tasks.sentences import SentenceTask


class HMMState(SentenceTask):
    """Classification of sentences that were never pretrained on. The chain is the pretraining corpus's."""

    form: Literal["hmm_state"]
    """Which form of task."""
    position: int = Field(ge=1)
    """Of the word whose hidden state is asked for, from 1."""
    chain: HMM | None = None
    """Filled from pretrain.data."""

    def bind(self, corpus: Corpus) -> HMMState:
        """With the corpus's chain, which the labels follow from.

        Raises:
            SpaceError: if the corpus is no chain, its sentences are too short, or they take too much memory.
        """
        if corpus.label_form != self.form:
            raise SpaceError(f"form hmm_state needs pretrain.data hmm, not {corpus.name}")
        bound: HMMState = self.with_(chain=corpus)
        length = bound.language.sentence_length
        if self.position > length:
            raise SpaceError(f"{self.position} is no position of a sentence of {length} words", at=("position",))
        bound.check_temperature()
        self.check_size(2 * length, "2 x sentence_length")
        return bound

    @property
    def num_classes(self) -> int:
        """As many as the chain has states, whichever of them come."""
        return self.language.num_states

    @property
    def language(self) -> HMM:
        """The pretraining corpus's chain; ValueError before `bind`."""
        if self.chain is None:
            raise ValueError("the task is not bound to a corpus yet: call bind")
        return self.chain

    def labelled(self, num: int, *, stream: int) -> tuple[Ints, Ints]:
        """Classes are the hidden states at `position`; see `SentenceTask.labelled`."""
        words, states = self.language.sample(num, seed=self.seed, stream=stream)
        return words, states[:, self.position - 1]
