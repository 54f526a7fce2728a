"""Classification of texts: any number of classes, read out of the mean of a model's last states by a linear head."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np

from raysweep.data.files import listed
from raysweep.errors import DataError
from raysweep.tasks.base import Split
from raysweep.tasks.files import Example, FileTask, missing_text
from raysweep.tasks.labelled import Labelled, LabelledTask
from raysweep.tasks.rows import pad

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Classification(FileTask, LabelledTask):
    """Lines with `text` and `label`, a text or a whole number; of causal and of masked models."""

    VERSION: ClassVar[int] = 1
    pooling: ClassVar[Literal["all", "mean"]] = "mean"

    form: Literal["classification"]
    """Which form of task."""
    classes: tuple[str, ...] = ()
    """Labels of the training file; filled when the sweep file is loaded."""

    @property
    def num_classes(self) -> int:
        """Number of labels of the training file; 0 before it is pinned."""
        return len(self.classes)

    def check(self, line: Mapping[str, Any]) -> str | None:
        """A `text` that is not empty, and a `label`, a text or a whole number; see `FileTask.check`."""
        label = line.get("label")
        if problem := missing_text(line, "text"):
            return problem
        is_text = isinstance(label, str) and label.strip()
        if not is_text and (not isinstance(label, int) or isinstance(label, bool)):
            return f"field 'label' must be a text that is not empty or a whole number, not {label!r}"
        return None

    def pin(self, base: Path) -> Any:
        """With its classes, too; see `TaskSpec.pin`.

        Raises:
            DataError: also if there is but one class, or a test example is of none.
        """
        pinned: Classification = super().pin(base)
        train, test, ood = (
            Counter(map(pinned.answer, pinned._read(listed(paths))))
            for paths in (pinned.train, pinned.test, pinned.ood_test)
        )
        if len(train) < 2:
            raise DataError(f"all {train.total():,} examples have the label {next(iter(train))!r}", at=("train",))
        for field, labels in {"test": test, "ood_test": ood}.items():
            if unknown := sorted(labels.keys() - train.keys()):
                raise DataError(
                    f"label {unknown[0]!r} is of no training example; labels there: {', '.join(sorted(train))}",
                    at=(field,),
                )
        return pinned.with_(classes=tuple(sorted(train)))

    def prompt(self, example: Example) -> str:
        """The text as it is: no question stands around it."""
        return str(example["text"])

    def answer(self, example: Example) -> str:
        """The label: 1 and "1" are the same."""
        return str(example["label"])

    def class_name(self, label: int) -> str:
        """The label as it stands in the file, as a text; `label` is its index in `classes`."""
        return self.classes[label]

    def chance(self) -> float:
        """Of always giving the commonest class of the training examples."""
        (commonest, _), *_ = Counter(map(self.answer, self.examples("train"))).most_common(1)
        return fmean(self.answer(example) == commonest for example in self.examples("test"))

    def encoded(self, split: Split, tokenizer: PreTrainedTokenizerBase, *, max_length: int) -> Labelled:
        """Texts framed as the tokenizer frames one, such as by [CLS] and [SEP]; long ones lose their end.

        Classes are numbered in the order of `classes`.
        """
        examples = self.examples(split)
        texts = [self.prompt(example) for example in examples]
        rows = tokenizer(texts, truncation=True, max_length=max_length)["input_ids"] if texts else []
        # A tokenizer may make nothing of a text; its mean state would be none.
        ids, mask = pad([row or [0] for row in rows], value=0)
        # Sorted names, not the order in which labels come: the same numbers whatever the files' order.
        number = {name: index for index, name in enumerate(self.classes)}
        labels = np.array([number[self.answer(example)] for example in examples], np.int64)
        return Labelled(ids, labels, mask.sum(axis=1))
