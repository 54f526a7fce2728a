"""Labels that a language of a known law gives of its own sentences: which hidden symbol stands above some words.

To add a form: a class with `bind`, `language` and `labelled`, in a file beside this one, and its name in
`families.py`.
"""

from __future__ import annotations

import hashlib
from abc import abstractmethod
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal, Self

import numpy as np
from pydantic import Field, ValidationError

from raysweep.data.exact import INDICATOR, MAX_NUMBERS, TASK, ExactCorpus
from raysweep.errors import DataError, Finding, SpaceError
from raysweep.objectives.base import Ints
from raysweep.spec import Neutral
from raysweep.tasks.base import TARGET_SPLITS, Split, Workload, numbered
from raysweep.tasks.labelled import Labelled, LabelledTask

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class SentenceTask(LabelledTask):
    """Classification of sentences that were never pretrained on, of the pretraining corpus's language."""

    pooling: ClassVar[Literal["all", "mean"]] = "all"

    num_train: int = Field(default=1000, ge=1)
    """Training sentences."""
    num_valid: int = Field(default=300, ge=1)
    """Sentences that pick the learning rate."""
    num_test: int = Field(default=1000, ge=1)
    """Test sentences."""
    seed: int = Field(default=0, ge=0)
    """Of the draw of sentences."""
    max_labels: Annotated[int | None, Neutral(None)] = Field(default=None, ge=1)
    """Training sentences that fine-tuning sees, the first so many; left out: all. Probes may be fitted to more."""
    test_temperature: Annotated[float, Neutral(1.0)] = Field(default=1.0, gt=0)
    """Out of distribution: test sentences, and those that indicators and probes are scored on, are of the same language
    at so many times its temperatures. Training and validation stay in distribution."""

    @property
    @abstractmethod
    def language(self) -> ExactCorpus:
        """What sentences are drawn from. Raises ValueError if the task is not bound to a corpus yet."""

    @abstractmethod
    def labelled(self, num: int, *, stream: int) -> tuple[Ints, Ints]:
        """Sentences of the language, by the task's own `seed`, and their classes.

        Args:
            num: sentences of the stream.
            stream: TASK or INDICATOR; see `ExactCorpus.sample`.

        Returns:
            Words [num, T] in [0, vocabulary), and classes [num] in [0, num_classes); both int64.
        """

    def pin(self, base: Path) -> Self:
        """As it is, as no file is read for it."""
        return self

    def check_size(self, numbers: int, by: str) -> None:
        """See that all sentences can be drawn at once. Raises SpaceError.

        Args:
            numbers: of 8 bytes that a sentence takes.
            by: how they are counted, in fields.
        """
        size = (self.num_train + self.num_valid + self.num_test) * numbers
        if size > MAX_NUMBERS:
            raise SpaceError(
                f"num_train, num_valid and num_test sentences take {size:,} numbers (sentences x {by}); at most "
                f"{MAX_NUMBERS:,} fit into memory"
            )

    def check_temperature(self) -> None:
        """See that there is the language that it is scored on. Raises SpaceError."""
        try:
            self.language.at_temperature(self.test_temperature)
        except ValidationError as error:
            why = error.errors()[0]["msg"]
            raise SpaceError(
                f"{self.test_temperature}: the language cannot have it ({why}); take one nearer to 1",
                at=("test_temperature",),
            ) from error

    @property
    def num_finetuned(self) -> int:
        """`max_labels`, if there are so many."""
        return min(self.num_train, self.max_labels or self.num_train)

    def examples(self, split: Split) -> tuple[Ints, Ints]:
        """(token ids [n, T + 1], labels [n]); for indicators up to `num_test` sentences that no other split holds."""
        if split == "indicator":
            return self._indicator_examples()
        counts = {"train": self.num_train, "valid": self.num_valid, "test": self.num_test}
        words, labels = (self._shifted if split == "test" else self)._target_sentences
        first = {"train": 0, "valid": self.num_train, "test": self.num_train + self.num_valid}[split]
        part = slice(first, first + counts[split])
        return self.language.rows(words[part]), labels[part]

    @cached_property
    def _shifted(self) -> Self:
        """The task on the sentences that it is scored on, where these are of other temperatures."""
        if self.test_temperature == 1:
            return self
        plain = self.with_(test_temperature=1.0)
        return plain.bind(self.language.at_temperature(self.test_temperature))  # type: ignore[no-any-return]

    @cached_property
    def _target_sentences(self) -> tuple[Ints, Ints]:
        # One draw, cut in three: no sentence's place is in two splits, though its words may be, of a small language.
        return self.labelled(self.num_train + self.num_valid + self.num_test, stream=TASK)

    def encoded(self, split: Split, tokenizer: PreTrainedTokenizerBase, *, max_length: int) -> Labelled:
        """Sentences, by the language's own token ids; of one length, whatever `max_length`."""
        return Labelled(*self.examples(split))

    def _indicator_examples(self) -> tuple[Ints, Ints]:
        words, labels = self._shifted.labelled(self.num_test, stream=INDICATOR)
        ids = self.language.rows(words)
        # Another stream shares no draw, but a small language has few sentences, and draws them again.
        known = {row.tobytes() for split in TARGET_SPLITS for row in self.examples(split)[0]}
        apart = np.array([row.tobytes() not in known for row in ids])
        return ids[apart], labels[apart]

    def ids(self, split: Split) -> list[str]:
        """A hash of each sentence and its label: those of another language are other examples."""
        ids, labels = self.examples(split)
        return numbered(
            hashlib.sha256(row.tobytes() + label.tobytes()).hexdigest()[:12]
            for row, label in zip(ids, labels, strict=True)
        )

    def check_indicator(self) -> None:
        """A language of few sentences may have none left."""
        if not len(self.examples("indicator")[0]):
            raise DataError(
                f"none is left to score indicators on of {self.num_test} sentences more, as all of "
                "them also train, validate or test; raise pretrain.data.sentence_length, or lower num_train"
            )

    def warnings(self) -> Iterator[Finding]:
        """None: of a small language, that sentences come twice is in its nature."""
        yield from ()

    def workload(self) -> Workload:
        """Exact numbers of examples and tokens: sentences are of one length and read whole."""
        length = self.language.row_length
        return Workload(self.num_train, self.num_valid, self.num_test, self.num_test, length, length, num_states=length)

    def chance(self) -> float:
        """Of always giving the commonest class of the training examples."""
        labels, right = self.examples("train")[1], self.examples("test")[1]
        return float((right == np.bincount(labels).argmax()).mean())
