"""What every objective owes: the model it trains, the batches it makes of text, the loss, and what that is a sum over.

Nothing else knows what is predicted: the training loop, the held-out loss, flatness and the cost of a plan ask the
objective. A member that leaves one of the abstract methods out is refused as its class is made.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
import numpy.typing as npt

from raysweep.spec import Spec

if TYPE_CHECKING:
    import torch

    from raysweep.objectives.optimum import LabelledLaw, Law, TabledLaw

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]
Arrays = dict[str, npt.NDArray[Any]]
"""A global batch on the host: `input_ids` and `labels` [n, M], and optionally `lengths` and `prefix_lengths` [n].

`labels` are what is predicted, -100 where nothing is; as in Hugging Face's models, a causal model predicts label t
from what stands before t, a masked one in place. `lengths` are the tokens of each row before its padding, which stands
on the right. Of a row's first `prefix_lengths` tokens, all see each other; any other token sees those before it.
All are int64, but for what `ObjectiveSpec.from_law` adds.
"""

IGNORED = -100
"""Label of a token that is not predicted."""

LOGIT_CHUNK_BYTES = 2**30
"""Of the logits that a loss within the output layer has at a time, in 32 bits; see `output_loss`."""

MASK = "<mask>"
"""The extra token that stands where a token is hidden: the tokenizer's own mask token, where it has one."""


@dataclass(frozen=True)
class Specials:
    """Ids of the tokens that are no text, by which an objective writes its own."""

    ids: Mapping[str, int]
    """Of `ObjectiveSpec.extra_tokens`, by token."""
    num_text_tokens: int
    """Size of the text's own vocabulary: its ids are below this."""
    reserved: tuple[int, ...] = ()
    """What is never hidden or drawn: the tokenizer's special tokens, such as the end of a document, and `ids`."""
    eos: int | None = None
    """The end of a document."""
    pad: int = 0
    """What fills rows up; any will do, as nothing attends to it."""

    def __getitem__(self, token: str) -> int:
        """Id of one of `ObjectiveSpec.extra_tokens`; KeyError for any other token, the tokenizer's own too."""
        return self.ids[token]

    @cached_property
    def is_reserved(self) -> npt.NDArray[np.bool_]:
        """Whether each id is one of `reserved`, [ids]: of all that a text may hold."""
        table = np.zeros(max(self.num_text_tokens, *(number + 1 for number in (0, *self.reserved))), np.bool_)
        table[list(self.reserved)] = True
        return table

    @cached_property
    def words(self) -> Ints:
        """All ids of the text's vocabulary that are not reserved, rising."""
        return np.setdiff1d(np.arange(self.num_text_tokens), self.reserved)


class Loss(Spec):
    """What a training loop minimises: a sum over predicted tokens, and their number."""

    @abstractmethod
    def num_predicted(self, batch: Mapping[str, Any]) -> int:
        """Number of tokens that `loss_sum` is a sum over.

        Like `loss_sum` it adds up over rows: a step's mean loss is the sum over its global batch divided by this
        number of it, however the batch is cut over ranks and micro-batches.

        Args:
            batch: see `Arrays`; of numpy or of torch.
        """

    @abstractmethod
    def loss_sum(self, model: torch.nn.Module, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Loss in nats, summed (not averaged) over the predicted tokens.

        Args:
            model: takes `input_ids` (and `attention_mask`) and gives `.logits` [n, M, vocabulary].
            batch: see `Arrays`, without `lengths`; on the device of the model.

        Returns:
            A scalar to call `backward` on: in float32 whatever narrower type the logits have.
        """

    def learning(self) -> LearningLoss | None:
        """What is minimised in place of `loss_sum` where that depends on earlier steps; None: it does not."""
        return None


class LearningLoss(ABC):
    """A loss that learns from the steps of a training; `train.loop` keeps what it has learnt with the saved state."""

    @abstractmethod
    def loss_sum(self, model: torch.nn.Module, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """See `Loss.loss_sum`; what it sees counts from the next step on, once `end_step` was called."""

    @abstractmethod
    def end_step(self, sum_over_ranks: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Take in what was seen since the last call; to be called by every rank after each step's gradient.

        Args:
            sum_over_ranks: gives the sum of every rank's tensor, the same on all.
        """

    @abstractmethod
    def state(self) -> dict[str, torch.Tensor]:
        """All that later steps depend on, the same on every rank; empty before the first step."""

    @abstractmethod
    def load_state(self, state: Mapping[str, torch.Tensor], device: str) -> None:
        """Go on, to the bit, from what `state` gave; what is computed is put on `device`."""


class ObjectiveSpec(Loss):
    """An objective of pretraining. What it measures on held-out text is its own loss: see `train.evaluate`."""

    name: str
    head: ClassVar[Literal["causal", "masked"]]
    """What the model has to predict: next tokens, or tokens in place."""
    is_likelihood: ClassVar[bool] = False
    """Whether the loss, summed over a text, is minus the log of its probability, so that it makes bits per byte."""

    @abstractmethod
    def predicts(self) -> str:
        """What is predicted from what, in words, such as `every token but the first, from those before it`.

        A report says by it what a perplexity is of.
        """

    @abstractmethod
    def extra_tokens(self) -> tuple[str, ...]:
        """Tokens that it needs beside the text's own, such as MASK; a tokenizer that lacks them gets them."""

    @abstractmethod
    def input_length(self, sequence_length: int) -> int:
        """Tokens M of the longest row that `prepare` makes of `sequence_length` tokens of text.

        Known before any text is read, for a model's positions and for the memory that a plan predicts.

        Raises:
            ValueError: if no row can be made of so many; names the field to change.
        """

    @abstractmethod
    def mean_predicted(self, sequence_length: int) -> float:
        """Tokens of a row that are predicted, on average over what `prepare` draws.

        A plan goes by it: the error of a measurement falls with the tokens that it predicts, not with those it reads.

        Args:
            sequence_length: tokens L of a text without reserved tokens.
        """

    @abstractmethod
    def prepare(self, ids: Ints, draw: np.random.Generator, specials: Specials) -> Arrays:
        """Inputs and labels from text; what is drawn comes from `draw` alone.

        Every rank prepares the whole global batch and takes its rows from it, so that what is hidden depends on the
        seed and the step alone, not on the number of ranks, a resumption or the batches before.

        Args:
            ids: [n, L] of text, int64; not to be changed, and may be returned as it is.
            draw: made from the seed and the step by the caller; for held-out text from a constant.
            specials: ids of `extra_tokens`, and of those that are never hidden.

        Returns:
            A row for each of text, in order: see `Arrays`. int64 throughout; M is at most `input_length(L)`.
        """

    reads_labels: ClassVar[bool] = False
    """Whether training by it takes labels that the law of the text gives; see `from_law`."""

    @property
    def measured(self) -> Any:
        """The objective whose loss is measured on held-out text: itself, or that which it adds a penalty to."""
        return self

    def from_law(self, law: LabelledLaw, ids: Ints, rows: Arrays) -> Arrays:
        """What a batch of training holds beside what `prepare` makes, if it `reads_labels`.

        Args:
            law: of the text.
            ids: [n, L] of text.
            rows: what `prepare` made of it.
        """
        return {}

    @property
    def has_optimum(self) -> bool:
        """Whether `optimal_losses` is known, so that where the text's law is known the loss has a distance to it."""
        return False

    def optimal_losses(self, law: Law, ids: Ints, rows: Arrays, specials: Specials) -> Floats:
        """The lowest loss of each row that any model can have on average, in nats, summed over what is predicted, [n].

        Args:
            law: of the text; see `optimum.py`, which has what an objective needs to write this.
            ids: [n, L] of text.
            rows: what `prepare` made of it.
            specials: as for `prepare`.

        Returns:
            NaN for a row of which it is not known.

        Raises:
            ValueError: if `has_optimum` is false.
        """
        raise ValueError(f"objective {self.name}: no lowest loss is known; see has_optimum")

    def conditionals(self, law: TabledLaw, ids: Ints, rows: Arrays) -> Floats | None:
        """The true probabilities of all tokens at every place of a row, [n, M, tokens]: of what is predicted there.

        With them a loss above the lowest is a Kullback-Leibler divergence, without the chance of which labels came.

        Args:
            law: of the text.
            ids: [n, L] of text.
            rows: what `prepare` made of it.

        Returns:
            None where what is predicted is no single token of the law.
        """
        return None


class DecoderObjective(ObjectiveSpec):
    """Next-token prediction of the labelled places: what all objectives of a causal model share but for the batch."""

    head: ClassVar[Literal["causal", "masked"]] = "causal"

    @abstractmethod
    def prepare(self, ids: Ints, draw: np.random.Generator, specials: Specials) -> Arrays:
        """See `ObjectiveSpec.prepare`; label t is predicted from the inputs before t."""

    def num_predicted(self, batch: Mapping[str, Any]) -> int:
        """Number of labelled tokens, but for a first one, which nothing stands before."""
        return int((batch["labels"][:, 1:] != IGNORED).sum())

    def loss_sum(self, model: torch.nn.Module, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """-sum over labelled t > 1 of log p(label t | inputs before t), in nats; see `Loss.loss_sum`."""
        return labelled_loss_sum(model, batch, batch["labels"][:, 1:], use_cache=False)

    def optimal_losses(self, law: Law, ids: Ints, rows: Arrays, specials: Specials) -> Floats:
        """Of rows of the text itself, and of those of `SpanCorruption`; for those whose `has_optimum` says so."""
        from raysweep.objectives.optimum import decoder_optimum

        return decoder_optimum(law, ids, rows, specials)


class MaskedObjective(ObjectiveSpec):
    """Prediction in place: what all objectives of a masked model share but for the batch."""

    head: ClassVar[Literal["causal", "masked"]] = "masked"

    @abstractmethod
    def prepare(self, ids: Ints, draw: np.random.Generator, specials: Specials) -> Arrays:
        """See `ObjectiveSpec.prepare`; label t is predicted at t."""

    def num_predicted(self, batch: Mapping[str, Any]) -> int:
        """Number of labelled tokens: each is predicted in its place."""
        return int((batch["labels"] != IGNORED).sum())

    def loss_sum(self, model: torch.nn.Module, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """-sum over labelled t of log p(label t | all inputs), in nats; see `Loss.loss_sum`."""
        return labelled_loss_sum(model, batch, batch["labels"])

    def optimal_losses(self, law: Law, ids: Ints, rows: Arrays, specials: Specials) -> Floats:
        """Of rows whose labelled tokens, and no others, are masked; for those whose `has_optimum` says so."""
        from raysweep.objectives.optimum import hidden_optimum

        return hidden_optimum(law, ids, rows)


def labelled_loss_sum(
    model: torch.nn.Module, batch: Mapping[str, torch.Tensor], labels: torch.Tensor, **given: bool
) -> torch.Tensor:
    """Cross-entropy in nats, summed over the labelled tokens: the output layer sees no others.

    Args:
        model: see `Loss.loss_sum`.
        batch: what it reads, [n, M].
        labels: [n, M or fewer]; what the logits of each place of the batch predict, or IGNORED. For a causal model they
            are already shifted: labels[:, t] is the token at t + 1.
        given: further arguments of the model.

    Returns:
        See `Loss.loss_sum`; of a batch without labels 0, with zeros as gradients.
    """
    from raysweep.objectives.cross_entropy import cross_entropy_sum
    from raysweep.objectives.inputs import model_inputs
    from raysweep.objectives.logits import logits_at

    rows, columns = (labels != IGNORED).nonzero(as_tuple=True)
    # Most tokens of prompts and of masked text have no label: their logits would be most of the work of a small model.
    logits, _ = logits_at(model, rows, columns, **model_inputs(model, batch), **given)
    return cross_entropy_sum(logits, labels[rows, columns], ignored=IGNORED)


def add_extra_tokens(tokenizer: Any, objective: ObjectiveSpec) -> Specials:
    """The ids that an objective works with; what a tokenizer lacks of them is added to it, behind all others.

    Args:
        tokenizer: of the text, of the Hugging Face kind; may be changed.
        objective: whose `extra_tokens` are looked up.

    Returns:
        Among `reserved` is every special token that the tokenizer has by then.
    """
    # Before anything is added: words drawn in the place of hidden ones are words of the text.
    num_text_tokens = len(tokenizer)
    ids = {token: _id_of(tokenizer, token) for token in objective.extra_tokens()}
    # Among them those that another objective has added before.
    added = [number for number, token in tokenizer.added_tokens_decoder.items() if token.special]
    reserved = tuple(sorted({*tokenizer.all_special_ids, *added, *ids.values()}))
    pad = next((each for each in (tokenizer.pad_token_id, tokenizer.eos_token_id) if each is not None), 0)
    return Specials(ids, num_text_tokens, reserved, eos=tokenizer.eos_token_id, pad=pad)


def _id_of(tokenizer: Any, token: str) -> int:
    if token == MASK:
        if tokenizer.mask_token is None:
            tokenizer.add_special_tokens({"mask_token": MASK})
        return int(tokenizer.mask_token_id)
    if token not in tokenizer.get_vocab():
        tokenizer.add_tokens([token], special_tokens=True)
    return int(tokenizer.convert_tokens_to_ids(token))
