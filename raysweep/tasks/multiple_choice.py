"""Multiple choice: the choice with the highest log-likelihood per token."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import TYPE_CHECKING, Any, Literal

from raysweep.tasks.base import Answered
from raysweep.tasks.files import Example, missing_text
from raysweep.tasks.rows import ask
from raysweep.tasks.text import TextTask

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


TYPICAL_CHOICES = 4
"""Of an example, assumed for a plan."""


class MultipleChoice(TextTask):
    """Lines with `question`, `choices` and `answer`, the index of the right choice."""

    form: Literal["multiple_choice"]
    """Which form of task."""

    def check(self, line: Mapping[str, Any]) -> str | None:
        """A `question`, two `choices` or more, and in `answer` the index of one, from 0; see `FileTask.check`."""
        choices, answer = line.get("choices"), line.get("answer")
        if problem := missing_text(line, "question"):
            return problem
        if (
            not isinstance(choices, list)
            or len(choices) < 2
            or not all(isinstance(c, str) and c.strip() for c in choices)
        ):
            return f"field 'choices' must be a list of two or more texts, not {choices!r}"
        if not isinstance(answer, int) or isinstance(answer, bool) or not 0 <= answer < len(choices):
            return f"field 'answer' must be an index from 0 to {len(choices) - 1}, not {answer!r}"
        return None

    def prompt(self, example: Example) -> str:
        """The question, and what an answer follows; the choices are not shown."""
        return f"Question: {example['question']}\nAnswer:"

    def answer(self, example: Example) -> str:
        """The right choice, behind a blank."""
        return f" {example['choices'][example['answer']]}"

    def right_answers(self, example: Example) -> list[str]:
        """The right choice."""
        return [example["choices"][example["answer"]]]

    def content(self, example: Example) -> str:
        """The question and the choices, in any order."""
        return "\n".join([self.prompt(example), *sorted(example["choices"])])

    @property
    def typical_scored_length(self) -> int:
        """Tokens read to score an example, assumed for a plan: as if each choice were read behind its own prompt."""
        return self.typical_length * TYPICAL_CHOICES

    def chance(self) -> float:
        """Of picking a choice at random: mean of 1 / number of choices over the test examples."""
        return fmean(1 / len(example["choices"]) for example in self.examples("test"))

    def evaluate(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        examples: Sequence[Example],
        *,
        max_length: int,
        shots: Sequence[Example] = (),
    ) -> list[Answered]:
        """Accuracy of the choice whose tokens have the highest mean log-likelihood after the prompt.

        log p(choice | prompt) / tokens of the choice, so that its length does not count; of equal ones the first;
        NaN where it is no number.
        A prompt is cut for its longest choice, so that all choices are read behind the same. See `TextTask.evaluate`.
        """
        from raysweep.tasks.likelihoods import mean_log_likelihoods

        before = self.shot_text(shots)
        asked = ask(
            tokenizer,
            [before + self.prompt(example) for example in examples],
            # With the blank before them, which most tokenizers make part of a word, as in what is trained on.
            [[f" {choice}" for choice in example["choices"]] for example in examples],
            max_length=max_length,
        )
        likelihoods = mean_log_likelihoods(model, [each.prompt for each in asked], [each.answers for each in asked])
        answered = []
        for example, each, values in zip(examples, asked, likelihoods, strict=True):
            picked = max(range(len(values)), key=values.__getitem__)
            # Of what is no number nothing is the largest: the first choice would be picked.
            is_known = math.isfinite(values[picked]) and not any(map(math.isnan, values))
            right = float(picked == example["answer"]) if is_known else math.nan
            answered.append(Answered(picked, {"score": right, "accuracy": right}, each.is_cut))
        return answered
