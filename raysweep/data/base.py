"""What every corpus states about itself, so that nothing outside a member's own file asks which one it is."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Self

from raysweep.errors import Finding, Place
from raysweep.spec import Spec

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from raysweep.data.sources import Source
    from raysweep.objectives.base import ObjectiveSpec
    from raysweep.objectives.optimum import Law

LAW = "law.json"
"""In a tokens folder: the corpus itself, by which whoever measures a model knows the lowest loss."""


class CorpusSpec(Spec):
    """A text to pretrain on: what it is, and how it becomes tokens."""

    is_natural_language: ClassVar[bool]
    """Whether downstream tasks in a natural language can be spelt in its tokens."""
    takes_tokenizer: ClassVar[bool]
    """Whether another tokenizer than its own can read it, such as that of a checkpoint that exists already."""
    counts_bytes: ClassVar[bool]
    """Whether a tokens folder says of how many bytes of text its tokens are, so that a loss makes bits per byte."""
    label_form: ClassVar[str | None]
    """The form of the downstream tasks that ask for labels of its sentences; None if it has none."""

    name: str

    @property
    @abstractmethod
    def vocab_size(self) -> int:
        """Rows of the embedding of a model of its tokens."""

    @property
    @abstractmethod
    def domains(self) -> tuple[str, ...]:
        """Names of the kinds of text in it."""

    @property
    @abstractmethod
    def mix(self) -> dict[str, float]:
        """Domain -> share of the training sequences, above 0; sums to 1."""

    @property
    @abstractmethod
    def row_length(self) -> int | None:
        """Tokens of a sentence with the token that opens it, where all are of one length; None for running text."""

    @property
    @abstractmethod
    def sampler(self) -> Source | None:
        """A causal language model that its text is drawn from, which `build` is given; None: it needs none."""

    @abstractmethod
    def pin(self, base: Path) -> Self:
        """With all that it reads found and fingerprinted: what is pinned has the same tokens anywhere.

        Args:
            base: folder of the sweep file, which paths are relative to.

        Raises:
            DataError: with all that is missing or malformed.
        """

    @abstractmethod
    def source(self) -> Self:
        """What of it its tokens depend on: variants of equal sources share them."""

    @abstractmethod
    def build(
        self, out: Path, *, tokenizer_dir: Path | None = None, sampler: PreTrainedModel | None = None
    ) -> dict[str, float]:
        """Write a tokens folder; see `packing`, and LAW.

        Args:
            out: an empty folder.
            tokenizer_dir: a tokenizer to use in place of its own, or the sampler's.
            sampler: the model of `sampler`, in evaluation mode, on the device to use.

        Returns:
            `num_tokens`, and `optimal_loss_nats_per_token` of next tokens on the held-out rows,
            where it `knows_optimum`.

        Raises:
            DataError: if what it reads is malformed, or was changed since it was pinned.
        """

    @abstractmethod
    def tokens_bytes(self) -> int:
        """Bytes of its tokens folder, by the declaration and the sizes of files: for a plan, nothing is read."""

    @abstractmethod
    def knows_optimum(self, objective: ObjectiveSpec) -> bool:
        """Whether the lowest loss that any model can have by an objective is known, so that `entropy_gap` is."""

    @abstractmethod
    def law(self, tokens: Path) -> Law | None:
        """The true law of the rows of a tokens folder that it built; None if nobody knows it.

        Args:
            tokens: the folder, as `build` has left it.
        """

    @abstractmethod
    def length_findings(self, place: Place, lengths: Mapping[Place, int]) -> Iterator[Finding]:
        """Whether it holds a sequence of training and of held-out text.

        Args:
            place: its own, in the sweep file.
            lengths: place -> tokens of a sequence that is asked for there.
        """
