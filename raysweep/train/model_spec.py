"""What every model to pretrain owes: its weights, their number, and what FLOPs and memory are reckoned by."""

from __future__ import annotations

import os
from abc import abstractmethod
from typing import TYPE_CHECKING, Any, NamedTuple

from raysweep.errors import StageError
from raysweep.objectives.heads import Head
from raysweep.spec import Spec
from raysweep.train.checkpoints import reads_ahead

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel


class Dimensions(NamedTuple):
    """What a model's FLOPs and activations are reckoned by, beside its number of parameters."""

    num_layers: int
    hidden_size: int
    num_heads: int
    inner_numbers: int
    """Of a token, that a block's feed-forward layers keep for their backward pass; see `architectures`."""
    inner_float32: int = 0
    """Of these, as `inner_numbers` there."""


class ModelSpec(Spec):
    """A language model of a vocabulary that comes with the text, whose weights are drawn anew."""

    name: str

    @property
    @abstractmethod
    def head(self) -> Head:
        """What it predicts; an objective needs one or the other."""

    @property
    @abstractmethod
    def max_length(self) -> int | None:
        """Tokens of the longest input that it can read; None: any."""

    @property
    @abstractmethod
    def is_tied(self) -> bool:
        """Whether one matrix embeds tokens and predicts them."""

    def named_positions(self, longest: int) -> int | None:
        """Those that its configuration names, by which programs that know no more of it go; None: it names none.

        Args:
            longest: tokens of the longest input that it is trained on.
        """
        return self.max_length

    @abstractmethod
    def dimensions(self) -> Dimensions:
        """Number, width and attention heads of its blocks, and what their feed-forward layers keep."""

    @abstractmethod
    def num_parameters(self, vocab_size: int) -> int:
        """Exact number of weights of a model of this vocabulary, tied ones counted once; none is made for it."""

    @abstractmethod
    def configure(self, *, vocab_size: int, sequence_length: int) -> tuple[type[PreTrainedModel], PreTrainedConfig]:
        """The class of transformers, and the configuration that a model of it is built by.

        Args:
            vocab_size: rows of its embedding.
            sequence_length: tokens of the longest input.
        """

    def corpus_problem(self, corpus: object) -> str | None:
        """Why it cannot be trained on a corpus, and what would be right; None: it can."""
        return None

    def begin(self, model: PreTrainedModel, *, corpus: Any, seed: int) -> None:
        """Set the weights to begin with, where they are others than transformers draws.

        Args:
            model: of this spec, just made; changed in place.
            corpus: what it will be trained on, of which `corpus_problem` is None.
            seed: of what is drawn.
        """

    def build(self, *, vocab_size: int, sequence_length: int, seed: int, corpus: Any = None) -> PreTrainedModel:
        """A model with weights drawn from `seed`, in float32 on the CPU and evaluation mode: the same on every rank.

        torch's own random numbers go on afterwards as if none had been drawn.

        Args:
            vocab_size: rows of its embedding.
            sequence_length: tokens of the longest input.
            seed: of the weights.
            corpus: what it will be trained on; see `begin`.

        Raises:
            StageError: if a causal model sees the tokens that it is to predict, it has not `num_parameters`,
                or its weights alone are more than this machine's memory.
        """
        import torch

        num_parameters = self.num_parameters(vocab_size)
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        if 4 * num_parameters > memory:
            raise StageError(
                f"pretrain.model: {num_parameters:,} parameters take {4 * num_parameters / 2**30:,.0f} GiB in float32, "
                f"and this machine has {memory / 2**30:,.0f} GiB: make the model smaller"
            )
        model_class, config = self.configure(vocab_size=vocab_size, sequence_length=sequence_length)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model: PreTrainedModel = model_class(config).eval()
        self.begin(model, corpus=corpus, seed=seed)
        if (num := model.num_parameters()) != num_parameters:
            raise StageError(
                f"model {self.name}: it has {num:,} parameters, and num_parameters, which plans go by, says "
                f"{num_parameters:,}"
            )
        if self.head == "causal" and reads_ahead(model):
            raise StageError(
                f"pretrain.model: what follows a token changes what {model_class.__name__} predicts; if its fields "
                "have is_decoder, set it to true"
            )
        return model
