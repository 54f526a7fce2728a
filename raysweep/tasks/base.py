"""What every downstream task owes: examples, fine-tuning on them, and scores from 0 to 1, higher is better.

Stages ask these methods alone; none of them knows a form of task. A member that leaves one out is refused as its
class is made.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple, Protocol

from raysweep.data.corpora import Corpus
from raysweep.errors import Finding, SpaceError
from raysweep.objectives.base import Arrays, Loss
from raysweep.objectives.heads import Head
from raysweep.spec import Spec

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Split = Literal["train", "valid", "test", "indicator", "ood"]
"""What indicators are scored on is a split of its own: on the target's test examples they would share its noise. "ood"
is a second test, of another domain, of tasks whose `Workload.num_ood` is not 0."""
TARGET_SPLITS: tuple[Split, ...] = ("train", "valid", "test")
OOD: Literal["ood"] = "ood"
"""The split of another domain, and how metrics of it begin."""


@dataclass(frozen=True)
class Answered:
    """What a model said to an example, and how good that is."""

    output: str | int
    """A text, the name of a class, or the number of a choice or class."""
    scores: Mapping[str, float]
    """Metric name -> value in [0, 1]; "score" is the one that counts. NaN where the model's numbers are none."""
    is_cut: bool = False
    """Whether the model could not read all that it was asked."""

    def __post_init__(self) -> None:
        for name, value in self.scores.items():
            if not (0 <= value <= 1 or math.isnan(value)):
                raise ValueError(f"score {name!r} is {value}; scores of all tasks lie in [0, 1], higher is better")


class Fitted(NamedTuple):
    """A model that was fine-tuned on a task, and how that went."""

    model: Any
    """Whatever `TaskSpec.score` of the same task takes."""
    losses: list[float]
    """Mean loss of each step, in nats per predicted token or class."""


class Guess(NamedTuple):
    """What a checkpoint that was not fine-tuned makes of an example."""

    score: float
    """The score that counts, in [0, 1]; NaN where the model's numbers are none."""
    log_likelihood: float
    """Of the right answer, in nats, as in `TaskSpec.log_likelihoods`; NaN where it has none."""
    is_cut: bool
    """Whether the prompt, with its solved examples and an answer, did not fit: it lost its beginning."""


class Features(NamedTuple):
    """What a linear probe is fitted to, or scored on."""

    states: torch.Tensor
    """[n, d], on the device of the model."""
    labels: torch.Tensor
    """[n], int64, in [0, `TaskSpec.num_classes`)."""


class Workload(NamedTuple):
    """How much a model reads for a task, as far as a plan can tell: no file is read for it."""

    num_train: int
    """Examples; below, too."""
    num_valid: int
    num_test: int
    num_indicator: int
    length: int
    """Tokens of an example that is trained on."""
    scored_length: int
    """Tokens read to score an example: those of all its choices, or of an answer that is decoded."""
    num_states: int = 1
    """States of an example that a linear probe reads."""
    num_ood: int = 0
    """Test examples of another domain; 0: none are scored."""


class Train(Protocol):
    """Trains a model in place as the hyperparameters of a fine-tuning stage say."""

    def __call__(
        self, model: torch.nn.Module, batch: Callable[[Sequence[int]], Arrays], *, loss: Loss, num_examples: int
    ) -> list[float]:
        """The mean loss of each step.

        Args:
            model: what `loss` is asked of.
            batch: arrays of the examples of these numbers, in [0, num_examples).
            loss: what is minimised.
            num_examples: how many there are.
        """


class TaskSpec(Spec):
    """A downstream task, on which checkpoints are fine-tuned, scored and compared."""

    form: str
    heads: ClassVar[tuple[Head, ...]]
    """The models that can be fine-tuned on it."""
    score_names: ClassVar[tuple[str, ...]] = ("score", "accuracy")
    """Of the scores that each test example gets."""

    @property
    def parts(self) -> Mapping[str, TaskSpec]:
        """What a model that is fine-tuned on it is scored on: itself, and of a `Mixture` each of its tasks, by name."""
        return {"": self}

    @property
    @abstractmethod
    def num_classes(self) -> int | None:
        """Classes that a linear probe can tell apart; None: the task has no labels, and `features` is not asked for."""

    @property
    def num_finetuned(self) -> int:
        """Training examples that fine-tuning sees, of those that a probe may be fitted to: the first so many."""
        return self.workload().num_train

    @property
    def needs_intercept(self) -> bool:
        """Whether a linear classifier of two classes needs more than a direction; only of tasks with labels."""
        return True

    @abstractmethod
    def pin(self, base: Path) -> Any:
        """With its data found, checked and fingerprinted: what is pinned has the same examples anywhere.

        Args:
            base: folder of the sweep file, which paths are relative to.

        Raises:
            DataError: with all that is missing or malformed.
        """

    @abstractmethod
    def bind(self, corpus: Corpus) -> Any:
        """With what it takes from the pretraining corpus, such as the law that labels follow from.

        Raises:
            SpaceError: if they do not go together; names what would.
        """

    @abstractmethod
    def ids(self, split: Split) -> list[str]:
        """A name for each example of a split, unique in it and the same for every checkpoint.

        Differences between checkpoints are paired by it, example by example.
        """

    @abstractmethod
    def check_indicator(self) -> None:
        """See that examples are left to score indicators on. Raises DataError."""

    @abstractmethod
    def chance(self) -> float:
        """The test score of who knows the task but no example's content: a score near it shows nothing learnt."""

    @abstractmethod
    def warnings(self) -> Iterator[Finding]:
        """What of its data can be used, and is hardly meant."""

    @abstractmethod
    def workload(self) -> Workload:
        """What a plan takes its cost from."""

    @abstractmethod
    def fit(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        train: Train,
        *,
        seed: int,
        max_examples: int | None = None,
    ) -> Fitted:
        """Fine-tune on the training split.

        Args:
            model: the checkpoint's; may be changed.
            tokenizer: the checkpoint's.
            train: does the steps.
            seed: of what is drawn beside their order, such as a new head.
            max_examples: the first so many of the split; None: `num_finetuned`.

        Returns:
            What `score` takes, in evaluation mode, and the loss of each step.

        Raises:
            StageError: if the checkpoint lacks what the task needs.
        """

    @abstractmethod
    def score(
        self, model: Any, tokenizer: PreTrainedTokenizerBase, split: Split, *, max_examples: int | None = None
    ) -> list[Answered]:
        """What a fine-tuned model says to each example of a split, in the order of `ids`, and how good that is.

        Args:
            model: `Fitted.model` of this task.
            tokenizer: the checkpoint's.
            split: whose examples are asked.
            max_examples: the first so many of them; None: all.
        """

    @abstractmethod
    def log_likelihoods(
        self, model: Any, tokenizer: PreTrainedTokenizerBase, split: Split, *, max_examples: int | None = None
    ) -> list[float]:
        """log p(right answer) of each example by a fine-tuned model, in nats: it tells more than hits do.

        Args:
            model: `Fitted.model` of this task.
            tokenizer: the checkpoint's.
            split: whose examples are asked, in the order of `ids`.
            max_examples: the first so many of them; None: all.

        Returns:
            Of a class, its logarithm of probability; of an answer in words that per token, of the likeliest right one.
        """

    @abstractmethod
    def score_untrained(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, num_shots: int, max_examples: int
    ) -> list[Guess]:
        """Scores of a checkpoint as it is, and likelihoods of right answers, on examples of the indicator split.

        Args:
            model: in evaluation mode.
            tokenizer: the checkpoint's.
            num_shots: solved training examples to go by: before the question, or of each class of a task with labels,
                which needs one at least.
            max_examples: at most.
        """

    @abstractmethod
    def features(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        split: Split,
        *,
        layers: Sequence[int | None] = (None,),
    ) -> list[Features]:
        """Frozen states of the examples of a split, and their labels, in the order of `ids`.

        Args:
            model: in evaluation mode.
            tokenizer: the checkpoint's.
            split: whose examples are read, once for all layers.
            layers: blocks that states have come through, 0 being the embeddings; None: all, and what follows them.

        Returns:
            Those of each layer.

        Raises:
            ValueError: if the task has no labels, or the model not so many blocks.
        """

    def check_head(self, head: Head) -> None:
        """See that a model can be fine-tuned on the task.

        Args:
            head: what the model predicts.

        Raises:
            SpaceError: if it cannot; names the models that can.
        """
        if head not in self.heads:
            raise SpaceError(
                f"form {self.form} needs a {' or '.join(self.heads)} model, and pretrain's is a {head} one; "
                "classification fits both"
            )


def numbered(names: Iterable[str]) -> list[str]:
    """Each name, "#2" behind the second of a kind, and so on.

    >>> numbered(["a", "b", "a"])
    ['a', 'b', 'a#2']
    """
    seen: Counter[str] = Counter()
    apart = []
    for name in names:
        seen[name] += 1
        apart.append(name if seen[name] == 1 else f"{name}#{seen[name]}")
    return apart
