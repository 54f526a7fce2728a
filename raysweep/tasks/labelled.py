"""Tasks whose answer is one of a few classes, read out of a model's states by a linear head."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np

from raysweep.objectives.base import Arrays, Ints
from raysweep.objectives.heads import Head
from raysweep.tasks.base import Answered, Features, Fitted, Guess, Split, TaskSpec, Train
from raysweep.tasks.rows import context_length

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class Labelled:
    """Examples as token rows of one width, each with its class."""

    ids: Ints
    """[n, L]."""
    labels: Ints
    """The class of each, [n]."""
    lengths: Ints | None = None
    """[n]: tokens of each before its padding, which stands on the right; None: all rows are whole."""

    def batch(self, rows: Sequence[int] | slice) -> Arrays:
        """What a classifier reads of some rows, and their classes as `labels` [n].

        Args:
            rows: indices of examples, in any order, or a slice of them.

        Returns:
            `input_ids` [n, L], and where rows are padded `lengths` [n] and `attention_mask` [n, L], 1 at what is read.
        """
        arrays = {"input_ids": self.ids[rows], "labels": self.labels[rows]}
        if self.lengths is not None:
            lengths = self.lengths[rows]
            mask = (np.arange(self.ids.shape[1]) < lengths[:, None]).astype(np.int64)
            arrays |= {"lengths": lengths, "attention_mask": mask}
        return arrays

    def __getitem__(self, rows: Any) -> Labelled:
        return Labelled(self.ids[rows], self.labels[rows], None if self.lengths is None else self.lengths[rows])


class LabelledTask(TaskSpec):
    """Classification, by a model that predicts next tokens or one that predicts in place."""

    heads: ClassVar[tuple[Head, ...]] = ("causal", "masked")
    pooling: ClassVar[Literal["all", "mean"]]
    """What a head reads: the states of all tokens, for rows of one length; or their mean, for others."""

    @property
    @abstractmethod
    def num_classes(self) -> int:
        """Number of classes that a head tells apart: labels are in [0, num_classes)."""

    @abstractmethod
    def encoded(self, split: Split, tokenizer: PreTrainedTokenizerBase, *, max_length: int) -> Labelled:
        """The examples of a split, in the order of `ids`.

        Args:
            split: which examples.
            tokenizer: the checkpoint's.
            max_length: tokens that rows are cut to, special ones included.
        """

    def fit(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        train: Train,
        *,
        seed: int,
        max_examples: int | None = None,
    ) -> Fitted:
        """With a new linear head on the last layer's states, drawn from `seed`; see `TaskSpec.fit`."""
        from raysweep.train.classifier import Classifier, LabelLoss

        examples = self.encoded("train", tokenizer, max_length=context_length(model))
        length = examples.ids.shape[1] if self.pooling == "all" else None
        classifier = Classifier(model, length=length, num_classes=self.num_classes, seed=seed)
        num_examples = len(examples.ids[: self.num_finetuned][:max_examples])
        losses = train(classifier, examples.batch, loss=LabelLoss(), num_examples=num_examples)
        classifier.eval()
        return Fitted(classifier, losses)

    def class_name(self, label: int) -> str | int:
        """What predictions call a class: its number, where it has no name."""
        return label

    def score(
        self, model: Any, tokenizer: PreTrainedTokenizerBase, split: Split, *, max_examples: int | None = None
    ) -> list[Answered]:
        """The likeliest class of each example: 1 if it is the right one, else 0, NaN where no logit is a number."""
        examples = self.encoded(split, tokenizer, max_length=context_length(model.base))[:max_examples]
        said = model.predict(examples.batch(slice(None)))
        hits = np.where(said < 0, np.nan, said == examples.labels).tolist()
        return [
            Answered(self.class_name(label) if label >= 0 else label, {"score": hit, "accuracy": hit})
            for label, hit in zip(said.tolist(), hits, strict=True)
        ]

    def log_likelihoods(
        self, model: Any, tokenizer: PreTrainedTokenizerBase, split: Split, *, max_examples: int | None = None
    ) -> list[float]:
        """Of the right class, by the head's softmax."""
        examples = self.encoded(split, tokenizer, max_length=context_length(model.base))[:max_examples]
        found = model.log_probabilities(examples.batch(slice(None)))
        return found[np.arange(len(examples.labels)), examples.labels].tolist()  # type: ignore[no-any-return]

    def score_untrained(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, num_shots: int, max_examples: int
    ) -> list[Guess]:
        """Hits of the class whose `num_shots` examples' mean state is nearest (Snell et al., 2017).

        Near is by Euclidean distance d, of one state for each example: see `_summaries`. A class without an example in
        the training split is never predicted. Likelihoods are p ~ exp(-t d^2), t being what foretells the examples
        themselves best, each by others: see `fitted_temperature`. Another scale of states changes none. Of one example
        a class no t is known, and of a class without one no likelihood.
        """
        import torch

        from raysweep.tasks.prototypes import fitted_temperature

        max_length = context_length(model)
        train = self.encoded("train", tokenizer, max_length=max_length)
        # The first of each class in the order of the split, which no checkpoint has a say in.
        chosen = train[
            np.concatenate([np.flatnonzero(train.labels == label)[:num_shots] for label in np.unique(train.labels)])
        ]
        states = self._summaries(model, chosen)
        classes, place = np.unique(chosen.labels, return_inverse=True)
        given = torch.from_numpy(place).to(states.device)
        centroids = torch.stack([states[given == label].mean(dim=0) for label in range(len(classes))])
        asked = self.encoded("indicator", tokenizer, max_length=max_length)[:max_examples]
        # By differences, as the temperature is: products of states that are far from 0 lose them.
        distances = torch.cdist(
            self._summaries(model, asked).cpu().double(),
            centroids.cpu().double(),
            compute_mode="donot_use_mm_for_euclid_dist",
        )
        hits = np.where(
            distances.isnan().any(dim=1).numpy(), np.nan, classes[distances.argmin(dim=1).numpy()] == asked.labels
        )
        by_class = (-fitted_temperature(states, given) * distances.square()).log_softmax(dim=1).numpy()
        right = dict(zip(classes.tolist(), by_class.T, strict=True))
        unseen = np.full(len(asked.labels), math.nan)
        return [
            Guess(float(hit), float(right.get(label, unseen)[row]), is_cut=False)
            for row, (hit, label) in enumerate(zip(hits, asked.labels.tolist(), strict=True))
        ]

    def features(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        split: Split,
        *,
        layers: Sequence[int | None] = (None,),
    ) -> list[Features]:
        """What a head reads, flat: all states [n, L x hidden], or their means [n, hidden]; see `TaskSpec.features`."""
        import torch

        examples = self.encoded(split, tokenizer, max_length=context_length(model))
        batches = list(self._pooled(model, examples, layers=layers))
        # Layer by layer taken out of the batches, so that there is a copy of one at a time.
        states = [torch.cat([batch.pop(0).flatten(1) for batch in batches]) for _ in layers]
        labels = torch.from_numpy(np.ascontiguousarray(examples.labels)).to(states[0].device)
        return [Features(each, labels) for each in states]

    def _summaries(self, model: PreTrainedModel, examples: Labelled) -> torch.Tensor:
        """One state of each example [n, hidden]: that of the last token, which has read all, where there is no mean."""
        import torch

        parts = self._pooled(model, examples)
        return torch.cat([part[:, -1] if self.pooling == "all" else part for (part,) in parts])

    def _pooled(
        self, model: PreTrainedModel, examples: Labelled, *, layers: Sequence[int | None] = (None,)
    ) -> Iterator[list[torch.Tensor]]:
        """Batch by batch, without gradients: each layer's states [batch, L, hidden], or their means [batch, hidden]."""
        import torch

        from raysweep.train.classifier import batches, pooled_states

        with torch.no_grad():
            for ids, mask in batches(examples.batch(slice(None)), device=next(model.parameters()).device):
                states = pooled_states(model.base_model, ids, mask, pooling=self.pooling, layers=layers)
                yield [each.float() for each in states]
