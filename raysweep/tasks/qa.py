"""Question answering: greedy decoding, scored by exact match and token F1 as in SQuAD (Rajpurkar et al., 2016)."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from raysweep.tasks.base import Example, Scores, TextTask, fit, in_batches, missing_text, pad

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
        """See `TextTask.check`."""
        answers = line.get("answers")
        if problem := missing_text(line, "question"):
            return problem
        if "context" in line and (problem := missing_text(line, "context")):
            return problem
        if not isinstance(answers, list) or not answers or not all(isinstance(a, str) and a.strip() for a in answers):
            return f"field 'answers' must be a list of one or more texts, not {answers!r}"
        return None

    def prompt(self, example: Example) -> str:
        """See `TextTask.prompt`."""
        context = f"Context: {example['context']}\n" if "context" in example else ""
        return f"{context}Question: {example['question']}\nAnswer:"

    def answer(self, example: Example) -> str:
        """See `TextTask.answer`."""
        return f" {example['answers'][0]}"

    def chance(self) -> float:
        """Of always giving the commonest answer of the training examples."""
        (answer, _), *_ = Counter(example["answers"][0] for example in self.examples("train")).most_common(1)
        return fmean(self._score(answer, example)["score"] for example in self.examples("test"))

    def _score(self, answer: str, example: Example) -> dict[str, float]:
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
    ) -> Scores:
        """Exact match and F1 of the first line of the greedy answer, the best over the right answers."""
        before = self.shot_text(shots)
        texts = [before + self.prompt(example) for example in examples]
        num_new = min(self.max_new_tokens, max_length // 2)
        room = max_length - num_new
        prompts = [fit(tokenizer(text, add_special_tokens=False)["input_ids"], [], room)[0] for text in texts]
        answers = generate(model, tokenizer, prompts, max_new_tokens=num_new)
        return [self._score(answer, example) for example, answer in zip(examples, answers, strict=True)]


def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
) -> list[str]:
    """The first line of the greedy continuation of each prompt, in batches with a KV cache."""
    import torch

    device = next(model.parameters()).device

    def run(rows: list[Sequence[int]]) -> list[str]:
        # Padding goes to the left, so that all prompts end where the answer begins; the mask keeps it unseen.
        values, mask = (torch.from_numpy(part).to(device) for part in pad(rows, value=0, left=True))
        made = model.generate(
            input_ids=values,
            attention_mask=mask,
            max_new_tokens=max_new_tokens,
            do_sample=False,
            num_beams=1,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.eos_token_id,
        )
        texts = tokenizer.batch_decode(made[:, values.shape[1] :], skip_special_tokens=True)
        return [text.strip().split("\n")[0] for text in texts]

    with torch.inference_mode():
        return in_batches(prompts, run)


def normalise(text: str) -> str:
    """Lower case, without punctuation, articles and spare blanks: SQuAD's normalisation."""
    text = "".join(char for char in text.lower() if char not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def token_f1(answer: str, right: str) -> float:
    """F1 of the words two answers share, after normalisation."""
    ours, theirs = normalise(answer).split(), normalise(right).split()
    if not ours or not theirs:
        return float(ours == theirs)
    shared = sum((Counter(ours) & Counter(theirs)).values())
    return 2 * shared / (len(ours) + len(theirs))
