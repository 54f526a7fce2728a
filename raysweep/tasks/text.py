"""Tasks that are answered in words: trained by next-token prediction of the answer after the prompt."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

import numpy as np
from pydantic import Field

from raysweep.errors import StageError
from raysweep.objectives.base import IGNORED, Arrays
from raysweep.objectives.causal_lm import AnswerLM
from raysweep.objectives.heads import Head
from raysweep.spec import Neutral
from raysweep.tasks.base import Answered, Features, Fitted, Guess, Split, Train, Workload
from raysweep.tasks.files import Example, FileTask
from raysweep.tasks.rows import MAX_LENGTH, Asked, ask, context_length, pad

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class TextTask(FileTask):
    """Examples of a prompt and its answer; a model says what it takes for the answer."""

    # 3: prompt and answer are split into tokens as one text, which begins as the tokenizer begins one.
    VERSION: ClassVar[int] = 3
    heads: ClassVar[tuple[Head, ...]] = ("causal",)

    max_length: Annotated[int | None, Neutral(None)] = Field(default=None, ge=16)
    """Tokens of a prompt and its answer at most: a longer prompt loses its beginning; left out: 512, or as many as the
    model has positions."""

    def workload(self) -> Workload:
        """As many examples as there may be, none longer than may be."""
        load = super().workload()
        part = min(1.0, (self.max_length or load.length) / load.length)
        return load._replace(length=round(part * load.length), scored_length=round(part * load.scored_length))

    def typical_prompt_length(self, num_shots: int) -> int:
        """Tokens of an example behind so many solved ones, with an answer, assumed for a plan."""
        return min(self.max_length or MAX_LENGTH, (2 + num_shots) * self.typical_length)

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
        """Answer and score examples.

        Args:
            model: a causal one, in evaluation mode.
            tokenizer: the checkpoint's.
            examples: of a file of the task.
            max_length: tokens of a prompt and its answer; a longer prompt loses its beginning.
            shots: solved examples that stand before each prompt.

        Returns:
            In the order of the examples.
        """

    @abstractmethod
    def right_answers(self, example: Example) -> list[str]:
        """All texts that are right, without a blank before them."""

    @property
    def num_classes(self) -> None:
        """None: an answer is any text, so there is no class for a linear probe."""

    def fit(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        train: Train,
        *,
        seed: int,
        max_examples: int | None = None,
    ) -> Fitted:
        """On the answers and the token that ends them, each behind its prompt; see `TaskSpec.fit`.

        Nothing is drawn here, so `seed` is not used.
        """
        return fit_answers(model, self.solved(model, tokenizer, max_examples=max_examples), train)

    def solved(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, max_examples: int | None = None
    ) -> list[Asked]:
        """Training examples, each with the answer that is trained on and the token that ends it; see `fit`."""
        if tokenizer.eos_token_id is None:
            raise StageError("the checkpoint's tokenizer has no eos_token, which ends an answer; set it in the folder")
        examples = self.examples("train")[:max_examples]
        return ask(
            tokenizer,
            [self.prompt(example) for example in examples],
            [[self.answer(example)] for example in examples],
            max_length=self._longest(model),
            end=[tokenizer.eos_token_id],
        )

    def score(
        self, model: Any, tokenizer: PreTrainedTokenizerBase, split: Split, *, max_examples: int | None = None
    ) -> list[Answered]:
        """Answers without solved examples before them, as in fine-tuning; see `evaluate`."""
        return self.evaluate(model, tokenizer, self.examples(split)[:max_examples], max_length=self._longest(model))

    def log_likelihoods(
        self, model: Any, tokenizer: PreTrainedTokenizerBase, split: Split, *, max_examples: int | None = None
    ) -> list[float]:
        """Of the likeliest right answer behind its prompt, per token; without the token that ends it."""
        return self._likelihoods(model, self._asked(model, tokenizer, self.examples(split)[:max_examples]))

    def score_untrained(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, num_shots: int, max_examples: int
    ) -> list[Guess]:
        """The same with the first `num_shots` training examples, solved, before each prompt; 0: with none."""
        examples, shots = self.examples("indicator")[:max_examples], self.examples("train")[:num_shots]
        rows = self.evaluate(model, tokenizer, examples, max_length=self._longest(model), shots=shots)
        asked = self._asked(model, tokenizer, examples, shots=shots)
        return [
            Guess(row.scores["score"], likelihood, is_cut=row.is_cut or each.is_cut)
            for row, likelihood, each in zip(rows, self._likelihoods(model, asked), asked, strict=True)
        ]

    def _longest(self, model: PreTrainedModel) -> int:
        return context_length(model, at_most=self.max_length or MAX_LENGTH)

    def _asked(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        examples: Sequence[Example],
        *,
        shots: Sequence[Example] = (),
    ) -> list[Asked]:
        """Examples with all their right answers."""
        before = self.shot_text(shots)
        return ask(
            tokenizer,
            [before + self.prompt(example) for example in examples],
            [[f" {text}" for text in self.right_answers(example)] for example in examples],
            max_length=self._longest(model),
        )

    def _likelihoods(self, model: PreTrainedModel, asked: Sequence[Asked]) -> list[float]:
        """Of each example's likeliest right answer."""
        from raysweep.tasks.likelihoods import mean_log_likelihoods

        found = mean_log_likelihoods(model, [each.prompt for each in asked], [each.answers for each in asked])
        return [max(of_example) for of_example in found]

    def features(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        split: Split,
        *,
        layers: Sequence[int | None] = (None,),
    ) -> list[Features]:
        """There are none of answers in words: ValueError."""
        raise ValueError(f"a task of form {self.form} has no labels to fit a linear probe to")

    def shot_text(self, shots: Sequence[Example]) -> str:
        """Solved examples, to stand before a prompt: an empty line follows each."""
        return "".join(f"{self.prompt(shot)}{self.answer(shot)}\n\n" for shot in shots)


def fit_answers(model: PreTrainedModel, solved: Sequence[Asked], train: Train) -> Fitted:
    """Fine-tune on the first answer of each example, behind its prompt; see `TaskSpec.fit`."""
    pairs = [([*each.prompt, *each.answers[0]], len(each.prompt)) for each in solved]

    def batch(rows: Sequence[int]) -> Arrays:
        # Any token will do as padding: behind a row, nothing that has a label attends to it.
        ids, mask = pad([pairs[row][0] for row in rows], value=0)
        labels = np.where(mask == 1, ids, IGNORED)
        for index, row in enumerate(rows):
            labels[index, : pairs[row][1]] = IGNORED
        return {"input_ids": ids, "labels": labels, "lengths": mask.sum(axis=1)}

    losses = train(model, batch, loss=AnswerLM(), num_examples=len(pairs))
    model.eval()
    return Fitted(model, losses)
