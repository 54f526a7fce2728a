"""A model small enough for a theory: attention with equal keys, one layer of neurons, an output layer.

That of paper 1's theorem on flatness (Liu et al., 2022, arXiv 2210.14199, section 6): of a sentence it sees how often
each word comes, z = counts / sqrt(K), K the words that a masked one sees; h = relu(W z), logits A h. Its module is in
`one_layer_model.py`. Of the bracket language it has many exact solutions, which differ in what they transfer: `Start`.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt
from pydantic import Field, model_validator

from raysweep.objectives.heads import Head
from raysweep.spec import Spec
from raysweep.train.model_spec import Dimensions, ModelSpec

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

Floats = npt.NDArray[np.float64]
Activation = Literal["relu", "linear"]

NUM_SPECIAL = 2
"""Tokens that are no words: the first, which opens a sentence, and the last, the mask."""


@runtime_checkable
class TwoTypes(Protocol):
    """The language that exact starts solve: logit p(word is of the first half | others) = -beta (#first - #second)."""

    beta: float
    sentence_length: int


class StartSpec(Spec):
    """Weights to begin with."""

    name: str
    solves: ClassVar[bool]
    """Whether it is an exact minimiser, of a `TwoTypes` language alone."""
    perturbation: float = Field(default=0.0, ge=0)
    """Standard deviation of normal numbers that are added to all weights, relative to the root mean square of their
    matrix. In float32 an exact minimiser stays where it is without any noise, whatever the training would do to it."""

    @abstractmethod
    def least_neurons(self, num_words: int, activation: Activation) -> int:
        """Neurons that it takes."""

    @abstractmethod
    def weights(self, model: OneLayer, num_words: int, law: TwoTypes | None, draw: np.random.Generator) -> _Weights:
        """W [neurons, words] and A [words, neurons], float64, without the perturbation."""


_Weights = tuple[Floats, Floats]


class Random(StartSpec):
    """Normal numbers of variance 1 / inputs."""

    name: Literal["random"] = "random"
    """Which start."""
    solves: ClassVar[bool] = False

    def least_neurons(self, num_words: int, activation: Activation) -> int:
        """One."""
        return 1

    def weights(self, model: OneLayer, num_words: int, law: TwoTypes | None, draw: np.random.Generator) -> _Weights:
        """See `StartSpec.weights`."""
        num = model.num_neurons
        hidden = draw.standard_normal((num, num_words)) / math.sqrt(num_words)
        return hidden, draw.standard_normal((num_words, num)) / math.sqrt(num)


class Transferable(StartSpec):
    """The exact solution whose features are those of the language: relu(±u.z), u = 1 for opening words, else -1.

    The other neurons are 0. Its scale is that of the least Hessian trace.
    """

    name: Literal["transferable"]
    """Which start."""
    solves: ClassVar[bool] = True

    def least_neurons(self, num_words: int, activation: Activation) -> int:
        """Two, or one without an activation."""
        return 2 if activation == "relu" else 1

    def weights(self, model: OneLayer, num_words: int, law: TwoTypes | None, draw: np.random.Generator) -> _Weights:
        """See `StartSpec.weights`; nothing is drawn."""
        assert law is not None
        types = _types(num_words)
        signs = np.array([1.0, -1.0]) if model.activation == "relu" else np.ones(1)
        scale = least_trace_scale(num_words, law)
        hidden, output = np.zeros((model.num_neurons, num_words)), np.zeros((num_words, model.num_neurons))
        hidden[: len(signs)] = scale * np.outer(signs, types)
        output[:, : len(signs)] = -_slope(law) / scale * np.outer(types, signs)
        return hidden, output


class LookUp(StartSpec):
    """An exact solution by features that know nothing of types: h = relu(±w.z) of Gaussian directions w.

    Each direction has a neuron of either sign, so that the sums of both hold all of z, and the output layer is solved
    for the exact logits, with the least norm. A neuron's weights of both layers have one norm: by mere rescaling the
    trace is not inflated.
    """

    name: Literal["look_up"]
    """Which start."""
    type_share: float = Field(default=1.0, gt=0, le=1)
    """What is left of the directions' part along the types u: of little, the features are nearly blind to types."""
    solves: ClassVar[bool] = True

    def least_neurons(self, num_words: int, activation: Activation) -> int:
        """As many directions as words."""
        return 2 * num_words if activation == "relu" else num_words

    def weights(self, model: OneLayer, num_words: int, law: TwoTypes | None, draw: np.random.Generator) -> _Weights:
        """See `StartSpec.weights`; directions are standard normal numbers."""
        assert law is not None
        types = _types(num_words)
        num = model.num_neurons // 2 if model.activation == "relu" else model.num_neurons
        directions = draw.standard_normal((num, num_words))
        directions -= (1 - self.type_share) * np.outer(directions @ types, types) / num_words
        output = -_slope(law) * np.outer(types, types) @ np.linalg.pinv(directions)
        balance = np.sqrt(np.linalg.norm(output, axis=0) / np.linalg.norm(directions, axis=1))
        directions, output = directions * balance[:, None], output / balance
        if model.activation == "linear":
            return directions, output
        return np.concatenate([directions, -directions]), np.concatenate([output, -output], axis=1)


Start = Annotated[Random | Transferable | LookUp, Field(discriminator="name")]


class OneLayer(ModelSpec):
    """A masked model of the bag of the visible words, without biases: see the module."""

    name: Literal["one_layer"]
    """Which model."""
    num_neurons: int = Field(default=96, ge=2)
    """Of the hidden layer; an even number."""
    activation: Activation = "relu"
    """What the hidden layer does to its sums."""
    start: Start = Random()
    """The weights to begin with."""

    @model_validator(mode="after")
    def _even(self) -> OneLayer:
        if self.num_neurons % 2:
            raise ValueError(f"num_neurons {self.num_neurons}: neurons of a start come in pairs; make it even")
        return self

    @property
    def head(self) -> Head:
        """Masked: it predicts the word that it does not see."""
        return "masked"

    @property
    def max_length(self) -> int | None:
        """None: it knows no positions."""
        return None

    @property
    def is_tied(self) -> bool:
        """No: W reads words, and A predicts them."""
        return False

    def dimensions(self) -> Dimensions:
        """One block, with its neurons alone to keep for the backward pass."""
        return Dimensions(1, self.num_neurons, 1, self.num_neurons)

    def num_parameters(self, vocab_size: int) -> int:
        """W and A, of the words alone."""
        return 2 * self.num_neurons * (vocab_size - NUM_SPECIAL)

    def corpus_problem(self, corpus: object) -> str | None:
        """Exact starts solve bracket languages, in so many neurons as these have words for."""
        if not self.start.solves:
            return None
        if not isinstance(corpus, TwoTypes):
            return f"start {self.start.name} is a solution of data brackets alone; set name: random"
        num_words = getattr(corpus, "num_words_total", 0)
        least = self.start.least_neurons(num_words, self.activation)
        if self.num_neurons < least:
            return (
                f"num_neurons {self.num_neurons}: start {self.start.name} takes {least} for {num_words} words; raise it"
            )
        return None

    def configure(self, *, vocab_size: int, sequence_length: int) -> tuple[type[PreTrainedModel], PreTrainedConfig]:
        """A `OneLayerForMaskedLM`; see `ModelSpec.configure`."""
        from raysweep.train.one_layer_model import OneLayerConfig, OneLayerForMaskedLM

        return OneLayerForMaskedLM, OneLayerConfig(
            vocab_size=vocab_size,
            hidden_size=self.num_neurons,
            activation=self.activation,
            # All tokens of a row but the one that opens it and the mask.
            num_visible_words=sequence_length - NUM_SPECIAL,
        )

    def begin(self, model: PreTrainedModel, *, corpus: Any, seed: int) -> None:
        """Puts the weights of `start` in, drawn from `seed`."""
        import torch

        draw = np.random.default_rng([seed, 6])
        law = corpus if isinstance(corpus, TwoTypes) else None
        weights = self.start.weights(self, model.config.num_words, law, draw)
        with torch.no_grad():
            for layer, values in zip((model.model.hidden, model.lm_head), weights, strict=True):
                noise = draw.standard_normal(values.shape) * math.sqrt(float((values**2).mean()))
                layer.weight.copy_(torch.from_numpy(values + self.start.perturbation * noise))


def _types(num_words: int) -> Floats:
    return np.where(np.arange(num_words) < num_words // 2, 1.0, -1.0)


def _slope(law: TwoTypes) -> float:
    """Logits of the truth are -slope u (u.z): of z = counts / sqrt(K), that is -beta s / 2 for an opening word."""
    return law.beta / 2 * math.sqrt(law.sentence_length - 1)


def least_trace_scale(num_words: int, law: TwoTypes) -> float:
    """c of relu(±c u.z) at which the Hessian's trace at the transferable solution is least.

    Tr H = c^2 E (u.z)^2 (1 - sum p^2) + slope^2 / c^2 E |z|^2 var_p(u), the parts of A and W (as at any solution);
    the expectation is over the opening words of the K visible ones, exactly.
    """
    num, half = law.sentence_length - 1, num_words // 2
    opening = np.arange(num + 1)
    s = 2 * opening - num
    weight = np.array([math.comb(num, k) for k in opening]) * (
        np.exp(-law.beta * (s + 1) ** 2 / 4) + np.exp(-law.beta * (s - 1) ** 2 / 4)
    )
    weight = weight / weight.sum()
    opens = 1 / (1 + np.exp(law.beta * s))
    # |counts|^2 is K, and 2 for each pair of equal words.
    pairs = (opening * (opening - 1) + (num - opening) * (num - opening - 1)) / half
    of_output = weight @ (s**2 / num * (1 - (opens**2 + (1 - opens) ** 2) / half))
    of_hidden = weight @ ((1 + pairs / num) * (1 - (2 * opens - 1) ** 2)) * _slope(law) ** 2
    return float((of_hidden / of_output) ** 0.25)
