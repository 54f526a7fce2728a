"""One training on several tasks that are answered in words, as instruction tuning and T5's multi-task training do."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Literal

from raysweep.spec import Spec
from raysweep.tasks.base import Fitted, Split, TaskSpec, Train
from raysweep.tasks.families import Task
from raysweep.tasks.text import TextTask, fit_answers

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class Mixture(Spec):
    """The training examples of all its tasks, put together, every one of them once in each epoch.

    So a task is drawn as often as it has examples: examples-proportional mixing (Raffel et al., 2020, section 3.5.2),
    whose limit on a task's examples is the task's `max_train_examples`, or `max_examples` of the hyperparameters.
    One training's chance is in the scores of all its tasks, which the errors of means over them allow for.
    """

    form: Literal["mixture"] = "mixture"
    tasks: dict[str, Task]
    """Name to task, each of which `can_be_mixed`; their order does not count."""

    @property
    def parts(self) -> Mapping[str, TaskSpec]:
        """What is scored, by name: see `TaskSpec.parts`."""
        return {name: self.tasks[name] for name in sorted(self.tasks)}

    def fit(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        train: Train,
        *,
        seed: int,
        max_examples: int | None = None,
    ) -> Fitted:
        """On the answers to the examples of all tasks; `max_examples`: of each. See `TaskSpec.fit`."""
        tasks = [task for task in self.parts.values() if isinstance(task, TextTask)]
        return fit_answers(
            model, [each for task in tasks for each in task.solved(model, tokenizer, max_examples=max_examples)], train
        )

    def warnings(self, contents: Callable[[str, Split], Sequence[str]]) -> Iterator[str]:
        """Examples that one task is scored on, or picks the rate by, and another trains on.

        Args:
            contents: of a task, by name, what the examples of a split ask: see `FileTask.contents`.
        """
        splits: dict[Split, str] = {"test": "test", "valid": "validation", "ood": "out-of-domain"}
        for split, words in splits.items():
            num, seen = 0, 0
            for name in self.tasks:
                known = {each for other in self.tasks if other != name for each in contents(other, "train")}
                own = contents(name, split)
                num, seen = num + len(own), seen + sum(each in known for each in own)
            if seen:
                yield (
                    f"of {num:,} {words} examples of its tasks, {seen:,} are also training examples of another of them:"
                    " scores on these are not of what is new to a model; remove them from either file"
                )


def can_be_mixed(task: Task) -> bool:
    """Whether it trains nothing but the model's own next tokens, as other tasks do: a class needs a new head."""
    return isinstance(task, TextTask)
