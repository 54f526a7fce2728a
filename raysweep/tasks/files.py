"""Tasks whose examples stand in files, one JSON object a line: found, checked, and split by their content."""

from __future__ import annotations

import hashlib
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, ClassVar

from pydantic import Field

from raysweep.data.corpora import Corpus
from raysweep.data.digests import Digests, content_fingerprint, kept_digests
from raysweep.data.files import Globs, listed, resolve
from raysweep.data.formats import read_jsonl
from raysweep.durable import file_sha256
from raysweep.errors import DataError, Finding, SpaceError, collect
from raysweep.spec import Provenance
from raysweep.tasks.base import Split, TaskSpec, Workload, numbered

TYPICAL_LENGTH = 128
"""Tokens of an example, assumed for a plan."""

Example = Mapping[str, Any]
"""A line of a file."""

MAX_KEPT_EXAMPLES = 100_000
"""That stay in memory, of some 100 MB; but for those of the MIN_KEPT files that were read last, of any size."""
MIN_KEPT = 4


class FileTask(TaskSpec):
    """A task of JSON lines: examples in files, split by their content."""

    train: Annotated[Globs, Provenance()]
    """Files or globs of .jsonl, .jsonl.gz or .jsonl.zst, relative to the sweep file."""
    test: Annotated[Globs, Provenance()]
    """Files or globs of examples that are only scored."""
    ood_test: Annotated[Globs | None, Provenance()] = None
    """Files or globs of examples of another domain, which the same fine-tuned models are scored on, too: a second
    target, ood_score. Left out: none."""
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
        """What is wrong with a line of the file, in words that name the field and its value; None if nothing is."""

    @abstractmethod
    def prompt(self, example: Example) -> str:
        """The text that a model reads before it answers."""

    @abstractmethod
    def answer(self, example: Example) -> str:
        """The right answer as a text, with the blank, if any, that sets it off."""

    @property
    def typical_length(self) -> int:
        """Tokens of an example, assumed for a plan, which reads no file."""
        return TYPICAL_LENGTH

    @property
    def typical_scored_length(self) -> int:
        """Tokens read to score an example, likewise."""
        return self.typical_length

    def workload(self) -> Workload:
        """As many examples as there may be."""
        return Workload(
            num_train=self.max_train_examples,
            num_valid=self.max_valid_examples,
            num_test=self.max_test_examples,
            num_indicator=self.max_valid_examples,
            num_ood=self.max_test_examples if self.ood_test else 0,
            length=self.typical_length,
            scored_length=self.typical_scored_length,
        )

    def content(self, example: Example) -> str:
        """All that is given to answer it: of two examples of equal content the scores go together."""
        return self.prompt(example)

    def pin(self, base: Path) -> Any:
        """With absolute paths and fingerprint; every line is checked. See `TaskSpec.pin`.

        Raises:
            DataError: with the first finding of each of train, test and ood_test; names file and line.
        """
        names = ["train", "test", *(["ood_test"] if self.ood_test else [])]
        paths = collect(((name,), partial(self._checked, name, base)) for name in names)
        digests = kept_digests([path for own in paths for path in own])
        # Examples are ordered by their content, so the files' order is no part of it.
        whole = ":".join(content_fingerprint(sorted(digests[path] for path in own)) for own in paths)
        return self.with_(**dict(zip(names, paths, strict=True)), fingerprint=whole, digests=digests)

    def bind(self, corpus: Corpus) -> Any:
        """As it is: it takes nothing from the corpus.

        Raises:
            SpaceError: if the corpus is no natural language, whose made-up words cannot spell the task's text.
        """
        if not corpus.is_natural_language:
            fits = f" ({corpus.label_form} fits)" if corpus.label_form else ""
            raise SpaceError(f"a task in English needs pretrain.data text, not a {corpus.name}{fits}")
        return self

    def examples(self, split: Split) -> Sequence[Example]:
        """Examples, at most as many as the spec says, in an order that depends on their content alone.

        Of the training file the first are "valid", the next "train", the last "indicator": no line is in two splits,
        and neither the order nor the number of files moves one across. Those for indicators are what training and
        validation leave, at least as many as validate, but for those whose content also stands in another split or
        anywhere in a test file.
        """
        if split in ("test", "ood"):
            return self._read(listed(self.test if split == "test" else self.ood_test))[: self.max_test_examples]
        every = self._read(listed(self.train))
        num_valid = min(self.max_valid_examples, max(1, round(self.valid_fraction * len(every))))
        # As many for the indicators as validate, but one is left to train on.
        num_left = max(0, min(num_valid, len(every) - num_valid - 1))
        end = min(num_valid + self.max_train_examples, len(every) - num_left)
        if split != "indicator":
            return every[:num_valid] if split == "valid" else every[num_valid:end]
        tests = [*self._read(listed(self.test)), *self._read(listed(self.ood_test))]
        known = {self._content_key(example) for example in [*every[:end], *tests]}
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

    def warnings(self) -> Iterator[Finding]:
        """Test examples whose content is also trained or validated on: their scores are of what was learnt by heart."""
        known = {*self.contents("train"), *self.contents("valid")}
        splits: dict[str, Split] = {"test": "test", "ood_test": "ood"}
        for name, split in splits.items():
            test = self.contents(split)
            if seen := sum(content in known for content in test):
                yield (
                    (name,),
                    f"of {len(test):,} test examples, {seen:,} are also in train, and fine-tuned on or used to pick "
                    "the rate: the score is not of what is new to a model; remove them from either file",
                )

    def contents(self, split: Split) -> list[str]:
        """What each example of a split asks, the same where only case and blanks differ."""
        return [self._content_key(example) for example in self.examples(split)]

    def _content_key(self, example: Example) -> str:
        return " ".join(self.content(example).casefold().split())

    def _checked(self, name: str, base: Path) -> tuple[str, ...]:
        """The files of "train", "test" or "ood_test", every line of them checked."""
        paths = resolve(getattr(self, name), base)
        num = len(self._read(paths))
        if num == 0:
            raise DataError(f"{paths[0]}: no examples in it")
        if num == 1 and name == "train":
            raise DataError(f"{paths[0]}: one example; give two or more: some are held out to pick the learning rate")
        return paths

    def _read(self, paths: Sequence[str]) -> Sequence[Example]:
        # A changed file must not be answered from memory, so what is there now is what it is found by.
        there = {path: digest for path in paths if (digest := _sha256(path))}
        if any(path not in there or there[path] != self.digests.get(path, there[path]) for path in paths):
            return self._parse(paths, self.digests)  # Which says what is wrong, or reads what is of a hub.
        files = _Files(type(self), tuple((path, there[path]) for path in paths))
        return _kept(files, partial(self._parse, paths, there))

    def _parse(self, paths: Sequence[str], digests: Digests) -> Sequence[Example]:
        lines: list[tuple[str, Example]] = []
        for path in paths:
            for number, line in read_jsonl(path, digests.get(path)):
                if problem := self.check(line):
                    raise DataError(f"{path}:{number}: {problem}")
                lines.append((self._digest(line), line))
        # By a hash: an order as good as shuffled, whatever that of lines and files.
        return tuple(line for _, line in sorted(lines, key=lambda pair: pair[0]))

    def _digest(self, example: Example) -> str:
        text = f"{example.get('id', '')}{self.prompt(example)}{self.answer(example)}"
        return hashlib.sha256(text.encode()).hexdigest()


@dataclass(frozen=True)
class _Files:
    """Files of examples: equal ones hold the same."""

    form: type[FileTask]
    digests: tuple[tuple[str, str], ...]
    """(path, SHA-256) of each, in the order of the task."""


def _sha256(path: str) -> str | None:
    """None where there is no such file here, or none that can be read."""
    try:
        return file_sha256(path)
    except OSError:
        return None


_KEPT: dict[_Files, Sequence[Example]] = {}
"""The last used is the last."""


def _kept(files: _Files, read: Callable[[], Sequence[Example]]) -> Sequence[Example]:
    """What `read` gives, or gave before: a sweep file and a stage ask for a task's splits one by one, and again."""
    examples = _KEPT.pop(files, None) or read()
    _KEPT[files] = examples
    while len(_KEPT) > MIN_KEPT and sum(map(len, _KEPT.values())) > MAX_KEPT_EXAMPLES:
        del _KEPT[next(iter(_KEPT))]
    return examples


def missing_text(line: Mapping[str, Any], *names: str) -> str | None:
    """What is wrong with the first of these fields that is missing or holds no text; None if nothing is."""
    for name in names:
        if not isinstance(line.get(name), str) or not line[name].strip():
            return f"field {name!r} must be a text that is not empty, not {line.get(name)!r}; fields: {', '.join(line)}"
    return None
