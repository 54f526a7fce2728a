"""What is pretrained. To add a model: a spec that does what `ModelSpec` asks for, and its name in the last line."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, model_validator

from raysweep.errors import DataError
from raysweep.objectives.heads import Head
from raysweep.train import architectures
from raysweep.train.architectures import GATED, PLAIN
from raysweep.train.model_spec import Dimensions, ModelSpec
from raysweep.train.one_layer import OneLayer

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel


class Llama(ModelSpec):
    """A Llama-style decoder (Touvron et al., 2023): RMSNorm, rotary positions, SwiGLU, no biases."""

    name: Literal["llama"] = "llama"
    """Which model."""
    hidden_size: int = Field(default=256, ge=2)
    """Width; a multiple of twice num_heads."""
    num_layers: int = Field(default=4, ge=1)
    """Transformer blocks."""
    num_heads: int = Field(default=4, ge=1)
    """Attention heads."""
    intermediate_size: int | None = Field(default=None, ge=1)
    """None: 8/3 of the hidden size, rounded up to a multiple of 16."""
    tie_embeddings: bool = True
    """Whether one matrix embeds tokens and predicts them."""

    @model_validator(mode="after")
    def _divisible(self) -> Llama:
        if self.hidden_size % (2 * self.num_heads):
            raise ValueError(
                f"hidden_size {self.hidden_size} must be a multiple of twice num_heads {self.num_heads}: "
                "rotary positions turn pairs of a head's dimensions"
            )
        return self

    @property
    def inner_size(self) -> int:
        """Width of the feed-forward layers, as declared or by the default ratio."""
        return self.intermediate_size or -(-8 * self.hidden_size // 3 // 16) * 16

    @property
    def head(self) -> Head:
        """Causal: a decoder predicts next tokens."""
        return "causal"

    @property
    def max_length(self) -> int | None:
        """None: rotary positions have no end."""
        return None

    @property
    def is_tied(self) -> bool:
        """As declared."""
        return self.tie_embeddings

    def named_positions(self, longest: int) -> int:
        """As many as other programs find room for, or more where it is trained on more."""
        return max(2048, longest)

    def dimensions(self) -> Dimensions:
        """As they are declared; see `ModelSpec.dimensions`."""
        return Dimensions(self.num_layers, self.hidden_size, self.num_heads, GATED * self.inner_size)

    def num_parameters(self, vocab_size: int) -> int:
        """By a formula for this architecture; see `ModelSpec.num_parameters`."""
        hidden = self.hidden_size
        # Attention's four matrices, SwiGLU's three, two norms.
        layer = 4 * hidden**2 + 3 * hidden * self.inner_size + 2 * hidden
        return (1 if self.tie_embeddings else 2) * vocab_size * hidden + self.num_layers * layer + hidden

    def configure(self, *, vocab_size: int, sequence_length: int) -> tuple[type[PreTrainedModel], PreTrainedConfig]:
        """A `LlamaForCausalLM`, each head with keys and values of its own; see `ModelSpec.configure`."""
        from transformers import LlamaConfig, LlamaForCausalLM

        return LlamaForCausalLM, LlamaConfig(
            vocab_size=vocab_size,
            hidden_size=self.hidden_size,
            intermediate_size=self.inner_size,
            num_hidden_layers=self.num_layers,
            num_attention_heads=self.num_heads,
            num_key_value_heads=self.num_heads,
            max_position_embeddings=self.named_positions(sequence_length),
            tie_word_embeddings=self.tie_embeddings,
            use_cache=True,
            bos_token_id=0,
            eos_token_id=0,
            pad_token_id=None,
        )


class Bert(ModelSpec):
    """A BERT-style encoder (Devlin et al., 2019) without its second objective: learned positions, GELU, post-norm.

    One matrix embeds tokens and predicts them, as in the paper's own: transformers' untied one has a bias that nothing
    reads.
    """

    name: Literal["bert"]
    """Which model."""
    hidden_size: int = Field(default=256, ge=2)
    """Width; a multiple of num_heads."""
    num_layers: int = Field(default=4, ge=1)
    """Transformer blocks."""
    num_heads: int = Field(default=4, ge=1)
    """Attention heads."""
    intermediate_size: int | None = Field(default=None, ge=1)
    """None: 4 times the hidden size."""
    num_positions: int = Field(default=512, ge=2)
    """Tokens of the longest input."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Part of hidden values and of attention weights that a training step leaves out."""

    @model_validator(mode="after")
    def _divisible(self) -> Bert:
        if self.hidden_size % self.num_heads:
            raise ValueError(f"hidden_size {self.hidden_size} must be a multiple of num_heads {self.num_heads}")
        return self

    @property
    def head(self) -> Head:
        """Masked: it predicts tokens in place."""
        return "masked"

    @property
    def max_length(self) -> int | None:
        """As many tokens as it has learned positions."""
        return self.num_positions

    @property
    def is_tied(self) -> bool:
        """Always."""
        return True

    @property
    def inner_size(self) -> int:
        """Width of the feed-forward layers, as declared or by the default ratio."""
        return self.intermediate_size or 4 * self.hidden_size

    def dimensions(self) -> Dimensions:
        """As they are declared; see `ModelSpec.dimensions`."""
        return Dimensions(self.num_layers, self.hidden_size, self.num_heads, PLAIN * self.inner_size)

    def num_parameters(self, vocab_size: int) -> int:
        """By a formula for this architecture; see `ModelSpec.num_parameters`."""
        hidden, inner = self.hidden_size, self.inner_size
        # Tokens, positions, one kind of segment; a norm.
        embeddings = (vocab_size + self.num_positions + 1) * hidden + 2 * hidden
        attention = 4 * (hidden**2 + hidden) + 2 * hidden
        feed_forward = 2 * hidden * inner + inner + hidden + 2 * hidden
        # A dense layer and a norm before the output layer, which has a bias.
        output = hidden**2 + 3 * hidden + vocab_size
        return embeddings + self.num_layers * (attention + feed_forward) + output

    def configure(self, *, vocab_size: int, sequence_length: int) -> tuple[type[PreTrainedModel], PreTrainedConfig]:
        """A `BertForMaskedLM` of one kind of segment, whatever the input's length; see `ModelSpec.configure`."""
        from transformers import BertConfig, BertForMaskedLM

        return BertForMaskedLM, BertConfig(
            vocab_size=vocab_size,
            hidden_size=self.hidden_size,
            intermediate_size=self.inner_size,
            num_hidden_layers=self.num_layers,
            num_attention_heads=self.num_heads,
            max_position_embeddings=self.num_positions,
            type_vocab_size=1,
            hidden_dropout_prob=self.dropout,
            attention_probs_dropout_prob=self.dropout,
            # A padding token would get no gradient: in packed text every token is read.
            pad_token_id=None,
        )


class Transformers(ModelSpec):
    """Any causal or masked language model of Hugging Face's transformers, by its configuration, with new weights.

    The vocabulary is that of the text, whatever the configuration says.
    """

    name: Literal["transformers"]
    """Which model."""
    config: str | None = None
    """Folder, relative to the sweep file, or hub id, whose config.json gives architecture and fields: they take its
    place when the sweep file is loaded. No weight of it is read."""
    architecture: str = ""
    """Name of the class, such as GPT2LMHeadModel; taken from config, where that is given."""
    fields: dict[str, Any] = Field(default_factory=dict)
    """Fields of its configuration that differ from transformers' defaults; they go before those of config."""

    @model_validator(mode="after")
    def _known(self) -> Transformers:
        if self.config is not None:
            raise ValueError("config is read as a sweep file is loaded; give architecture and fields in its place")
        if not self.architecture:
            raise ValueError("config or architecture is missing: which model shall it be?")
        self._sketch  # noqa: B018 - raises what is wrong with them.
        return self

    @property
    def head(self) -> Head:
        """What its class predicts: next tokens of ...ForCausalLM, tokens in place of ...ForMaskedLM; see `head_of`."""
        return self._sketch.head

    @property
    def max_length(self) -> int | None:
        """Its positions, where its configuration names their number."""
        return self._sketch.max_length

    @property
    def is_tied(self) -> bool:
        """As its configuration says, or that of its class does."""
        return self._sketch.is_tied

    def dimensions(self) -> Dimensions:
        """As its configuration says; see `ModelSpec.dimensions`."""
        sketch = self._sketch
        return Dimensions(
            sketch.num_layers, sketch.hidden_size, sketch.num_heads, sketch.inner_numbers, sketch.inner_float32
        )

    def num_parameters(self, vocab_size: int) -> int:
        """See `ModelSpec.num_parameters`; counted without making weights."""
        return architectures.num_parameters(self.architecture, self._written, vocab_size)

    def configure(self, *, vocab_size: int, sequence_length: int) -> tuple[type[PreTrainedModel], PreTrainedConfig]:
        """Its class, with its fields and this vocabulary; see `ModelSpec.configure`.

        Raises:
            ValueError: if the class takes no such fields.
        """
        return architectures.configured(self.architecture, self.fields, vocab_size)

    @property
    def _sketch(self) -> architectures.Sketch:
        return architectures.sketch(self.architecture, self._written)

    @property
    def _written(self) -> str:
        return json.dumps(self.fields, sort_keys=True)


def with_config_read(model: Mapping[str, Any], read: Callable[[str], Mapping[str, Any]]) -> dict[str, Any]:
    """A declared model, as plain values, with what its `config` says in the place of that.

    Args:
        model: as a sweep file has it; whatever is no `Transformers` with a config stays as it is.
        read: gives the content of a config.json by folder or hub id.

    Raises:
        DataError: if it is the configuration of no language model, or cannot be read.
    """
    where = model.get("config")
    if model.get("name") != "transformers" or not isinstance(where, str):
        return dict(model)
    try:
        architecture, fields = architectures.described(read(where))
    except ValueError as error:
        raise DataError(f"{where!r}: config.json: {error}", ("config",)) from error
    given = model.get("fields")
    fields |= given if isinstance(given, dict) else {}
    return {**model, "config": None, "architecture": model.get("architecture") or architecture, "fields": fields}


def fuse_norms(model: PreTrainedModel) -> None:
    """Have torch compute Llama's norms: the same function, in one operation where the device has one for it.

    Args:
        model: changed in place; one without such norms is left as it is.
    """
    import torch.nn.functional as F
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    for module in model.modules():
        if type(module) is LlamaRMSNorm:  # Not what derives from it: some add 1 to their weights.
            size, eps = tuple(module.weight.shape), module.variance_epsilon
            module.forward = partial(F.rms_norm, normalized_shape=size, weight=module.weight, eps=eps)


Model = Annotated[Llama | Bert | OneLayer | Transformers, Field(discriminator="name")]
