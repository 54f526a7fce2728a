"""The grammar's own labels: which non-terminal spans some words, as the last (paper 1's tasks A, B, C)."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from raysweep.data.corpora import Corpus
from raysweep.data.pcfg import PCFG
from raysweep.errors import SpaceError
from raysweep.objectives.base import Ints
from raysweep.spec import Neutral
from raysweep.tasks.sentences import SentenceTask


class PCFGSpan(SentenceTask):
    """Classification of sentences that were never pretrained on. The grammar is the pretraining corpus's."""

    VERSION: ClassVar[int] = 2

    form: Literal["pcfg_span"]
    """Which form of task."""
    span: int = Field(ge=1)
    """Words whose non-terminal is asked for; a power of two."""
    place: Annotated[int | None, Neutral(None)] = Field(default=None, ge=0)
    """Which of a sentence's spans of so many words, from 0; left out: the last."""
    grammar: PCFG | None = None
    """Filled from pretrain.data."""

    def bind(self, corpus: Corpus) -> PCFGSpan:
        """With the corpus's grammar, which the labels follow from.

        Raises:
            SpaceError: if the corpus is no grammar, its trees have no such span, or the sentences take too much memory.
        """
        if corpus.label_form != self.form:
            raise SpaceError(f"form pcfg_span needs pretrain.data pcfg, not {corpus.name}")
        bound: PCFGSpan = self.with_(grammar=corpus)
        grammar = bound.language
        if self.span not in (spans := [2**power for power in range(grammar.sentence_length.bit_length())]):
            raise SpaceError(f"{self.span} is no span of the grammar; spans: {spans}", at=("span",))
        if self.place is not None and self.place >= (num := grammar.sentence_length // self.span):
            raise SpaceError(f"{self.place}: a sentence has {num} spans of {self.span} words, from 0", at=("place",))
        bound.check_temperature()
        self.check_size(grammar.sentence_length * grammar.num_rules, "sentence_length x num_rules")
        return bound

    @property
    def num_classes(self) -> int:
        """As many as the grammar has non-terminals, whichever of them stand there."""
        return self.language.num_nonterminals

    @property
    def language(self) -> PCFG:
        """The pretraining corpus's grammar; ValueError before `bind`."""
        if self.grammar is None:
            raise ValueError("the task is not bound to a corpus yet: call bind")
        return self.grammar

    def labelled(self, num: int, *, stream: int) -> tuple[Ints, Ints]:
        """Classes are the non-terminals above a span of each sentence; see `SentenceTask.labelled`."""
        words, spans = self.language.sample(num, seed=self.seed, stream=stream)
        return words, spans[self.span][:, -1 if self.place is None else self.place]
