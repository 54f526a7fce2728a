"""What every downstream task can do, and the reading of task files.

A task gives examples, trains on (prompt, answer) pairs, and scores: each example from 0 to 1, higher is better.
"""

from __future__ import annotations

import hashlib
from abc import abstractmethod
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field

from raysweep.data.corpora import Corpus
from raysweep.data.files import Globs, listed, read_jsonl, resolve
from raysweep.data.pcfg import PCFG
from raysweep.data.pinned import Digests, content_fingerprint, digest
from raysweep.errors import DataError, SpaceError, collect
from raysweep.spec import Provenance, Spec

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Split = Literal["train", "valid", "test", "indicator"]
"""What indicators are scored on is a split of its own: on the target's test examples they would share its noise."""
TARGET_SPLITS: tuple[Split, ...] = ("train", "valid", "test")
Example = Mapping[str, Any]


@dataclass(frozen=True)
class Answered:
    """What a model said to an example, and how good that is."""

    output: str | int
    """A text, or the index of a choice or class."""
    scores: Mapping[str, float]
    """Metric name -> value in [0, 1]; "score" is the one that counts."""


class TaskSpec(Spec):
    """What a fine-tuning stage and the indicators ask of a task."""

    is_classification: ClassVar[bool] = False
    """Whether it has labels that a linear probe can be fitted to."""
    score_names: ClassVar[tuple[str, ...]] = ("score", "accuracy")
    """Of the scores that each test example gets."""

    @abstractmethod
    def pin(self, base: Path) -> Any:
        """With its data found, checked and fingerprinted. Raises DataError."""

    @abstractmethod
    def bind(self, corpus: Corpus) -> Any:
        """With what it takes from the pretraining corpus. Raises SpaceError if they do not go together."""

    @abstractmethod
    def ids(self, split: Split) -> list[str]:
        """A name for each example of a split, unique in it and the same for every checkpoint."""

    @abstractmethod
    def check_indicator(self) -> None:
        """See that examples are left to score indicators on. Raises DataError."""

    @abstractmethod
    def chance(self) -> float:
        """The test score of who knows the task but no example's content: a score near it shows nothing learnt."""


class TextTask(TaskSpec):
    """A task of JSON lines, trained by next-token prediction of the answer after the prompt."""

    train: Annotated[Globs, Provenance()]
    """Files or globs of .jsonl or .jsonl.gz, relative to the sweep file."""
    test: Annotated[Globs, Provenance()]
    """Files or globs of examples that are only scored."""
    fingerprint: str = ""
    """Of the files' contents; filled when the sweep file is loaded."""
    digests: Annotated[Digests, Provenance()] = Field(default_factory=dict)
    """Of each file; filled when the sweep file is loaded."""
    VERSION: ClassVar[int] = 2

    max_train_examples: int = Field(default=1000, ge=1)
    """Training examples at most."""
    max_valid_examples: int = Field(default=200, ge=1)
    """Examples at most that pick the learning rate."""
    max_test_examples: int = Field(default=500, ge=1)
    """Test examples at most."""
    valid_fraction: float = Field(default=0.1, gt=0, lt=1)
    """Of the training examples, held out to pick the learning rate; as many again are left for the indicators."""

    @abstractmethod
    def check(self, line: Mapping[str, Any]) -> str | None:
        """What is wrong with a line of the file; None if nothing is."""

    @abstractmethod
    def prompt(self, example: Example) -> str:
        """The text before the answer."""

    @abstractmethod
    def answer(self, example: Example) -> str:
        """The right answer, with the blank that sets it off."""

    def content(self, example: Example) -> str:
        """All that is given to answer it: of two examples of equal content the scores go together."""
        return self.prompt(example)

    @abstractmethod
    def evaluate(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        examples: Sequence[Example],
        *,
        max_length: int,
        shots: Sequence[Example] = (),
    ) -> list[Answered]:
        """Answer and score examples, with `shots` solved before each; prompts longer than fits lose their beginning."""

    def pin(self, base: Path) -> Any:
        """With absolute paths and fingerprint; every line is checked. Raises DataError with all files' findings."""
        splits: tuple[Split, ...] = ("train", "test")
        train, test = collect(((split,), partial(self._checked, split, base)) for split in splits)
        digests = {path: digest(path) for path in (*train, *test)}
        # Examples are ordered by their content, so the files' order is no part of it.
        whole = ":".join(content_fingerprint(sorted(digests[path] for path in paths)) for paths in (train, test))
        return self.with_(train=train, test=test, fingerprint=whole, digests=digests)

    def bind(self, corpus: Corpus) -> Any:
        """Itself; a grammar's made-up words cannot spell its text."""
        if isinstance(corpus, PCFG):
            raise SpaceError("a task in English needs pretrain.data text, not a pcfg (pcfg_span fits)")
        return self

    def examples(self, split: Split) -> Sequence[Example]:
        """Examples, at most as many as the spec says, in an order that depends on their content alone.

        Those for indicators are what training and validation leave of the training file, at least as many as validate,
        but for those whose content also stands in another split or anywhere in the test file.
        """
        if split == "test":
            return self._read(listed(self.test))[: self.max_test_examples]
        every = self._read(listed(self.train))
        num_valid = min(self.max_valid_examples, max(1, round(self.valid_fraction * len(every))))
        num_left = max(0, min(num_valid, len(every) - num_valid - 1))
        end = min(num_valid + self.max_train_examples, len(every) - num_left)
        if split != "indicator":
            return every[:num_valid] if split == "valid" else every[num_valid:end]
        known = {self._content_key(example) for example in [*every[:end], *self._read(listed(self.test))]}
        return [example for example in every[end:] if self._content_key(example) not in known]

    def ids(self, split: Split) -> list[str]:
        """Each example's own `id` where it has one, else a hash of its content; "#2" marks the second of a name."""
        own = ((example.get("id"), example) for example in self.examples(split))
        return numbered(
            str(name) if isinstance(name, str | int) and name != "" else self._digest(example)[:12]
            for name, example in own
        )

    def check_indicator(self) -> None:
        """At least one example is needed, else DataError says why there is none."""
        if not self.examples("indicator"):
            num = len(self._read(listed(self.train)))
            text = (
                f"of its {num} examples none is left to score indicators on: all either train, validate, or ask what "
                "another example or the test file asks; add examples, or leave out indicators"
            )
            raise DataError(text, at=("train",))

    def num_seen(self) -> int:
        """Test examples whose content is also trained or validated on: their scores are of what was learnt by heart."""
        seen = {self._content_key(example) for split in ("train", "valid") for example in self.examples(split)}
        return sum(self._content_key(example) in seen for example in self.examples("test"))

    def _content_key(self, example: Example) -> str:
        return " ".join(self.content(example).casefold().split())

    def _checked(self, split: Split, base: Path) -> tuple[str, ...]:
        """The files of "train" or "test", every line of them checked."""
        paths = resolve(self.train if split == "train" else self.test, base)
        num = len(self._read(paths))
        if num == 0:
            raise DataError(f"{paths[0]}: no examples in it")
        if num == 1 and split == "train":
            raise DataError(f"{paths[0]}: one example; give two or more: some are held out to pick the learning rate")
        return paths

    def _read(self, paths: Sequence[str]) -> Sequence[Example]:
        digests = tuple(self.digests.get(path, "") for path in paths)
        are_as_pinned = all(Path(path).is_file() and digest(path) == self.digests.get(path) for path in paths)
        if not are_as_pinned:  # Or not pinned yet; reading says what is wrong.
            return self._parse(paths)
        return _read_pinned(_Files(type(self), tuple(paths), digests, reader=self._parse))

    def _parse(self, paths: Sequence[str]) -> Sequence[Example]:
        found: list[tuple[str, Example]] = []
        for path in paths:
            for number, line in read_jsonl(path, self.digests.get(path)):
                if problem := self.check(line):
                    raise DataError(f"{path}:{number}: {problem}")
                found.append((self._digest(line), line))
        return tuple(line for _, line in sorted(found, key=lambda pair: pair[0]))

    def _digest(self, example: Example) -> str:
        text = f"{example.get('id', '')}{self.prompt(example)}{self.answer(example)}"
        return hashlib.sha256(text.encode()).hexdigest()

    def shot_text(self, shots: Sequence[Example]) -> str:
        """Solved examples, to stand before a prompt."""
        return "".join(f"{self.prompt(shot)}{self.answer(shot)}\n\n" for shot in shots)


@dataclass(frozen=True)
class _Files:
    """Files of examples: equal ones hold the same."""

    form: type[TextTask]
    paths: tuple[str, ...]
    digests: tuple[str, ...]
    reader: Callable[[Sequence[str]], Sequence[Example]] = field(compare=False)


@lru_cache(maxsize=4)
def _read_pinned(files: _Files) -> Sequence[Example]:
    """A stage asks for its splits one by one, and the next stage in a process often has the same task."""
    return files.reader(files.paths)


def numbered(names: Iterable[str]) -> list[str]:
    """Each name, "#2" behind the second of a kind, and so on."""
    seen: Counter[str] = Counter()
    apart = []
    for name in names:
        seen[name] += 1
        apart.append(name if seen[name] == 1 else f"{name}#{seen[name]}")
    return apart


def missing_text(line: Mapping[str, Any], *names: str) -> str | None:
    """Which of these fields is not there, or is not a string with something in it."""
    for name in names:
        if not isinstance(line.get(name), str) or not line[name].strip():
            return f"field {name!r} must be a text that is not empty, not {line.get(name)!r}; fields: {', '.join(line)}"
    return None


def token_ids(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
    """Each text's tokens, without those that a tokenizer adds at its ends."""
    return tokenizer(list(texts), add_special_tokens=False)["input_ids"] if texts else []


def fit(prompt: Sequence[int], answer: Sequence[int], max_length: int) -> tuple[list[int], int]:
    """(token ids, how many of them are prompt): the prompt loses its beginning where both are too long."""
    room = max(1, max_length - len(answer))
    kept = list(prompt)[-room:]
    return [*kept, *answer][:max_length], len(kept)


def pad(rows: Sequence[Sequence[int]], *, value: int, left: bool = False) -> tuple[Any, Any]:
    """(values [n, longest], mask of what is no padding [n, longest]), both int64 numpy arrays."""
    import numpy as np

    width = max(len(row) for row in rows)
    values = np.full((len(rows), width), value, np.int64)
    mask = np.zeros((len(rows), width), np.int64)
    for index, row in enumerate(rows):
        place = slice(width - len(row), width) if left else slice(0, len(row))
        values[index, place] = row
        mask[index, place] = 1
    return values, mask


def in_batches(lengths: Sequence[int], run: Callable[[list[int]], list[Any]], *, max_tokens: int = 4096) -> list[Any]:
    """`run` over batches of rows of like length, each of about `max_tokens`; results in the order of the rows.

    Args:
        lengths: tokens of each row.
        run: takes the indices of a batch's rows, and gives a result for each.
        max_tokens: of a batch, padding included; a row alone may have more.
    """
    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    results: dict[int, Any] = {}
    start = 0
    while start < len(order):
        stop = start + 1
        while stop < len(order) and (stop - start + 1) * lengths[order[stop]] <= max_tokens:
            stop += 1
        results |= zip(order[start:stop], run(order[start:stop]), strict=True)
        start = stop
    return [results[index] for index in range(len(lengths))]
