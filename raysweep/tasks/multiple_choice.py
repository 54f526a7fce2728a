"""Multiple choice: the choice with the highest log-likelihood per token."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import TYPE_CHECKING, Any, Literal

from raysweep.tasks.base import Example, Scores, TextTask, fit, in_batches, missing_text, pad

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class MultipleChoice(TextTask):
    """Lines with `question`, `choices` and `answer`, the index of the right choice."""

    form: Literal["multiple_choice"]
    """Which form of task."""

    def check(self, line: Mapping[str, Any]) -> str | None:
        """See `TextTask.check`."""
        choices, answer = line.get("choices"), line.get("answer")
        if problem := missing_text(line, "question"):
            return problem
        if not isinstance(choices, list) or len(choices) < 2 or not all(isinstance(c, str) and c for c in choices):
            return f"field 'choices' must be a list of two or more texts, not {choices!r}"
        if not isinstance(answer, int) or isinstance(answer, bool) or not 0 <= answer < len(choices):
            return f"field 'answer' must be an index from 0 to {len(choices) - 1}, not {answer!r}"
        return None

    def prompt(self, example: Example) -> str:
        """See `TextTask.prompt`."""
        return f"Question: {example['question']}\nAnswer:"

    def answer(self, example: Example) -> str:
        """See `TextTask.answer`."""
        return f" {example['choices'][example['answer']]}"

    def content(self, example: Example) -> str:
        """The question and the choices, in any order."""
        return "\n".join([self.prompt(example), *sorted(example["choices"])])

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
    ) -> Scores:
        """Accuracy of the choice whose tokens have the highest mean log-likelihood after the prompt."""
        before = self.shot_text(shots)
        prompts = [
            tokenizer(before + self.prompt(example), add_special_tokens=False)["input_ids"] for example in examples
        ]
        pairs = [
            fit(prompt, tokenizer(f" {choice}", add_special_tokens=False)["input_ids"], max_length)
            for prompt, example in zip(prompts, examples, strict=True)
            for choice in example["choices"]
        ]
        likelihoods = iter(mean_log_likelihoods(model, pairs))
        scores: Scores = []
        for example in examples:
            values = [next(likelihoods) for _ in example["choices"]]
            right = float(max(range(len(values)), key=values.__getitem__) == example["answer"])
            scores.append({"score": right, "accuracy": right})
        return scores


def mean_log_likelihoods(model: PreTrainedModel, pairs: Sequence[tuple[Sequence[int], int]]) -> list[float]:
    """Mean log-probability, in nats per token, of what follows the prompt in each (token ids, prompt length)."""
    import torch

    device = next(model.parameters()).device
    lengths = {id(ids): num_prompt for ids, num_prompt in pairs}

    def run(rows: list[Sequence[int]]) -> list[float]:
        values, mask = (torch.from_numpy(part).to(device) for part in pad(rows, value=0))
        logits = model(input_ids=values, attention_mask=mask, use_cache=False).logits[:, :-1]
        picked = torch.gather(logits, 2, values[:, 1:, None])[..., 0].float() - torch.logsumexp(logits.float(), dim=-1)
        return [
            float(picked[index, lengths[id(row)] - 1 : len(row) - 1].double().mean()) for index, row in enumerate(rows)
        ]

    with torch.inference_mode():
        return in_batches([ids for ids, _ in pairs], run)
