"""The bracket language's own labels: how far from balanced the words of a sentence are that a masked word sees."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Literal

import numpy as np

from raysweep.data.brackets import OPEN, Brackets
from raysweep.data.corpora import Corpus
from raysweep.errors import SpaceError
from raysweep.objectives.base import Ints
from raysweep.tasks.base import Split
from raysweep.tasks.labelled import Labelled
from raysweep.tasks.sentences import SentenceTask

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class BracketBalance(SentenceTask):
    """Classification of the K = T - 1 first words of a sentence by s = #open - #close of them.

    Where a tokenizer has a mask, it stands for the last word, so that a masked model reads what it was pretrained on.
    """

    form: Literal["bracket_balance"]
    """Which form of task."""
    label: Literal["unbalanced", "majority"]
    """unbalanced: |s| of 3 or more against 1, as many of each; p(next word | these) does not tell it from chance by a
    linear head. majority: the sign of s, which the next word's most likely type gives away."""
    brackets: Brackets | None = None
    """Filled from pretrain.data."""

    def bind(self, corpus: Corpus) -> BracketBalance:
        """With the corpus's language, which the labels follow from.

        Raises:
            SpaceError: if the corpus is another language, its sentences are too short, or they take too much memory.
        """
        if corpus.label_form != self.form:
            raise SpaceError(f"form bracket_balance needs pretrain.data brackets, not {corpus.name}")
        bound: BracketBalance = self.with_(brackets=corpus)
        if bound.language.sentence_length < 4:
            raise SpaceError("no single bracket is unbalanced; raise pretrain.data.sentence_length", at=("label",))
        bound.check_temperature()
        share = min(bound._shares)
        self.check_size(math.ceil(2 * bound.language.sentence_length / share), "2 x sentence_length / rarer label")
        return bound

    @property
    def num_classes(self) -> int:
        """Two."""
        return 2

    @property
    def language(self) -> Brackets:
        """The pretraining corpus's language; ValueError before `bind`."""
        if self.brackets is None:
            raise ValueError("the task is not bound to a corpus yet: call bind")
        return self.brackets

    @property
    def needs_intercept(self) -> bool:
        """Not for majority, whose classes change places when all brackets do."""
        return self.label == "unbalanced"

    def labelled(self, num: int, *, stream: int) -> tuple[Ints, Ints]:
        """As many of either class, in a random order; see `SentenceTask.labelled`."""
        language, each = self.language, -(-num // 2)
        rows: list[Ints] = [np.empty(0, np.int64)] * 2
        drawn = 0
        while min(map(len, rows)) < each:
            # Half as many again as are needed on average, and some more for small numbers.
            drawn += math.ceil(1.5 * each / min(self._shares)) + 100
            words, types = language.sample(drawn, seed=self.seed, stream=stream)
            labels = self._labels(types)
            rows = [np.flatnonzero(labels == label)[:each] for label in range(2)]
        # Not by turns: of a part that takes every n-th example, all would be of one class.
        order = np.random.default_rng([self.seed, stream, 577]).permutation(np.concatenate(rows))[:num]
        return words[order], labels[order]

    def encoded(self, split: Split, tokenizer: PreTrainedTokenizerBase, *, max_length: int) -> Labelled:
        """The first K words, and a mask if the tokenizer has one; of one length, whatever `max_length`."""
        ids, labels = self.examples(split)
        if tokenizer.mask_token_id is None:
            return Labelled(ids[:, :-1], labels)
        return Labelled(np.concatenate([ids[:, :-1], np.full((len(ids), 1), tokenizer.mask_token_id)], axis=1), labels)

    def _labels(self, types: Ints) -> Ints:
        balance = np.where(types[:, :-1] == OPEN, 1, -1).sum(axis=1)
        is_second = np.abs(balance) > 1 if self.label == "unbalanced" else balance > 0
        return np.asarray(is_second, np.int64)

    @property
    def _shares(self) -> tuple[float, float]:
        """Of the two classes, among sentences of the language."""
        law = self.language.balance_law(self.language.sentence_length - 1)
        ones = sum(p for s, p in law.items() if (abs(s) > 1 if self.label == "unbalanced" else s > 0))
        return 1 - ones, ones
