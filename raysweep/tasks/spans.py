"""The grammar's own labels: which non-terminal spans the last `span` words of a sentence (paper 1's tasks A, B, C)."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

import numpy as np
from pydantic import Field

from raysweep.data.corpora import Corpus
from raysweep.data.exact import INDICATOR, MAX_NUMBERS, TASK
from raysweep.data.pcfg import PCFG
from raysweep.errors import DataError, Finding, SpaceError
from raysweep.objectives.base import Ints
from raysweep.tasks.base import TARGET_SPLITS, Split, Workload, numbered
from raysweep.tasks.labelled import Labelled, LabelledTask

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class PCFGSpan(LabelledTask):
    """Classification of sentences that were never pretrained on. The grammar is the pretraining corpus's."""

    pooling: ClassVar[Literal["all", "mean"]] = "all"
    VERSION: ClassVar[int] = 2

    form: Literal["pcfg_span"]
    """Which form of task."""
    span: int = Field(ge=1)
    """Words at a sentence's end whose non-terminal is asked for; a power of two."""
    num_train: int = Field(default=1000, ge=1)
    """Training sentences."""
    num_valid: int = Field(default=300, ge=1)
    """Sentences that pick the learning rate."""
    num_test: int = Field(default=1000, ge=1)
    """Test sentences."""
    seed: int = Field(default=0, ge=0)
    """Of the draw of sentences."""
    grammar: PCFG | None = None
    """Filled from pretrain.data."""

    def pin(self, base: Path) -> PCFGSpan:
        """Itself: it names no file."""
        return self

    def bind(self, corpus: Corpus) -> PCFGSpan:
        """With the corpus's grammar."""
        if corpus.label_form != self.form:
            raise SpaceError(f"form pcfg_span needs pretrain.data pcfg, not {corpus.name}")
        bound: PCFGSpan = self.with_(grammar=corpus)
        grammar = bound._grammar
        if self.span not in (spans := [2**power for power in range(grammar.sentence_length.bit_length())]):
            raise SpaceError(f"{self.span} is no span of the grammar; spans: {spans}", at=("span",))
        size = (self.num_train + self.num_valid + self.num_test) * grammar.sentence_length * grammar.num_rules
        if size > MAX_NUMBERS:
            raise SpaceError(
                f"num_train, num_valid and num_test sentences take {size:,} numbers (sentences x sentence_length x "
                f"num_rules); at most {MAX_NUMBERS:,} fit into memory"
            )
        return bound

    @property
    def num_classes(self) -> int:
        """Non-terminals of the grammar."""
        return self._grammar.num_nonterminals

    def examples(self, split: Split) -> tuple[Ints, Ints]:
        """(token ids [n, T + 1], labels [n]); for indicators up to `num_test` sentences that no other split holds."""
        if split == "indicator":
            return self._indicator_examples()
        counts = {"train": self.num_train, "valid": self.num_valid, "test": self.num_test}
        words, spans = self._grammar.sample(sum(counts.values()), seed=self.seed, stream=TASK)
        first = {"train": 0, "valid": self.num_train, "test": self.num_train + self.num_valid}[split]
        part = slice(first, first + counts[split])
        return self._grammar.rows(words[part]), spans[self.span][part, -1]

    def encoded(self, split: Split, tokenizer: PreTrainedTokenizerBase, *, max_length: int) -> Labelled:
        """Sentences, by the grammar's own token ids; of one length, whatever `max_length`."""
        return Labelled(*self.examples(split))

    def _indicator_examples(self) -> tuple[Ints, Ints]:
        words, spans = self._grammar.sample(self.num_test, seed=self.seed, stream=INDICATOR)
        ids, labels = self._grammar.rows(words), spans[self.span][:, -1]
        known = {row.tobytes() for split in TARGET_SPLITS for row in self.examples(split)[0]}
        apart = np.array([row.tobytes() not in known for row in ids])
        return ids[apart], labels[apart]

    def ids(self, split: Split) -> list[str]:
        """A hash of each sentence and its label: those of another grammar are other examples."""
        ids, labels = self.examples(split)
        return numbered(
            hashlib.sha256(row.tobytes() + label.tobytes()).hexdigest()[:12]
            for row, label in zip(ids, labels, strict=True)
        )

    def check_indicator(self) -> None:
        """A grammar of few sentences may have none left."""
        if not len(self.examples("indicator")[0]):
            raise DataError(
                f"none is left to score indicators on of {self.num_test} sentences more, as all of "
                "them also train, validate or test; raise pretrain.data.sentence_length, or lower num_train"
            )

    def warnings(self) -> Iterator[Finding]:
        """None: of a small grammar, that sentences come twice is in its nature."""
        yield from ()

    def workload(self) -> Workload:
        """Sentences are read whole."""
        length = self._grammar.row_length
        return Workload(self.num_train, self.num_valid, self.num_test, self.num_test, length, length, num_states=length)

    def chance(self) -> float:
        """Of always giving the commonest class of the training examples."""
        labels, right = self.examples("train")[1], self.examples("test")[1]
        return float((right == np.bincount(labels).argmax()).mean())

    @property
    def _grammar(self) -> PCFG:
        if self.grammar is None:
            raise ValueError("the task is not bound to a corpus yet: call bind")
        return self.grammar
