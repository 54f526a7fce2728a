"""Question answering: greedy decoding, scored by exact match and token F1 as in SQuAD (Rajpurkar et al., 2016)."""

from __future__ import annotations

import math
import re
import string
from collections import Counter
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from raysweep.tasks.base import Answered
from raysweep.tasks.files import Example, missing_text
from raysweep.tasks.rows import fit, prompt_ids
from raysweep.tasks.text import TextTask

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class QA(TextTask):
    """Lines with `question`, `answers` (any is right) and, if any, `context`, read before the question."""

    score_names: ClassVar[tuple[str, ...]] = ("score", "exact_match", "f1")

    form: Literal["qa"]
    """Which form of task."""
    primary: Literal["exact_match", "f1"] = "f1"
    """Which of the two is the score."""
    max_new_tokens: int = Field(default=24, ge=1)
    """Of the answer; at most half of what prompt and answer may have together."""

    def check(self, line: Mapping[str, Any]) -> str | None:
        """A `question`, one or more `answers`, and a `context` that is not empty, if any; see `FileTask.check`."""
        answers = line.get("answers")
        if problem := missing_text(line, "question"):
            return problem
        if "context" in line and (problem := missing_text(line, "context")):
            return problem
        if not isinstance(answers, list) or not answers or not all(isinstance(a, str) and a.strip() for a in answers):
            return f"field 'answers' must be a list of one or more texts, not {answers!r}"
        return None

    def prompt(self, example: Example) -> str:
        """The context, if any, the question, and what an answer follows."""
        context = f"Context: {example['context']}\n" if "context" in example else ""
        return f"{context}Question: {example['question']}\nAnswer:"

    def answer(self, example: Example) -> str:
        """The first of the right answers, behind a blank: what is trained on, though any is right."""
        return f" {example['answers'][0]}"

    def right_answers(self, example: Example) -> list[str]:
        """Any of its `answers`."""
        return list(example["answers"])

    @property
    def typical_scored_length(self) -> int:
        """The prompt and a whole answer."""
        return self.typical_length + self.max_new_tokens

    def chance(self) -> float:
        """Of always giving the commonest answer of the training examples."""
        (answer, _), *_ = Counter(example["answers"][0] for example in self.examples("train")).most_common(1)
        return fmean(self._score(answer, example)["score"] for example in self.examples("test"))

    def _score(self, answer: str | None, example: Example) -> dict[str, float]:
        if answer is None:
            return dict.fromkeys(self.score_names, math.nan)
        # Any right answer will do: the best over them, as in SQuAD's own script.
        match = max(float(normalise(answer) == normalise(right)) for right in example["answers"])
        f1 = max(token_f1(answer, right) for right in example["answers"])
        return {"score": f1 if self.primary == "f1" else match, "exact_match": match, "f1": f1}

    def evaluate(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        examples: Sequence[Example],
        *,
        max_length: int,
        shots: Sequence[Example] = (),
    ) -> list[Answered]:
        """Exact match and F1 of the first line of the greedy answer, the best over the right answers.

        Prompts are cut so that a whole answer fits behind them. See `TextTask.evaluate`.
        """
        from raysweep.tasks.decoding import first_lines

        before = self.shot_text(shots)
        num_new = min(self.max_new_tokens, max_length // 2)  # A model of few positions must see some of the question.
        texts = [before + self.prompt(example) for example in examples]
        prompts = prompt_ids(tokenizer, texts)
        room = max_length - num_new
        answers = first_lines(model, tokenizer, [fit(ids, room) for ids in prompts], max_new_tokens=num_new)
        return [
            Answered(answer or "", self._score(answer, example), is_cut=len(ids) > room)
            for ids, example, answer in zip(prompts, examples, answers, strict=True)
        ]


def normalise(text: str) -> str:
    """Lower case, without punctuation, articles and spare blanks: SQuAD's normalisation (Rajpurkar et al., 2016).

    >>> normalise("The  Eiffel Tower!")
    'eiffel tower'
    """
    text = "".join(char for char in text.lower() if char not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def token_f1(answer: str, right: str) -> float:
    """2 shared / (words of one + words of the other), after normalisation: F1 of precision and recall, in [0, 1].

    A word counts as often as it stands in both. Of an answer without words 1 if the other has none either, else 0.

    >>> token_f1("the red house", "a house")  # 1 of 2 words is right, and 1 of 1 is there.
    0.6666666666666666
    """
    ours, theirs = normalise(answer).split(), normalise(right).split()
    if not ours or not theirs:
        return float(ours == theirs)
    shared = sum((Counter(ours) & Counter(theirs)).values())
    return 2 * shared / (len(ours) + len(theirs))
