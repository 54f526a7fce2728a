"""The module of `one_layer.OneLayer`, known to transformers' Auto classes once this file is imported.

`load_model` imports it. Elsewhere, `import raysweep.train.one_layer_model` lets AutoModelForMaskedLM.from_pretrained
open such checkpoints: no code of a checkpoint's own is run, so trust_remote_code is not needed.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForMaskedLM, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput, MaskedLMOutput

from raysweep.train.one_layer import NUM_SPECIAL

NEVER = -1e4
"""Logit of a token that is no word: of no probability, and finite, so that differences of logits are numbers."""


class OneLayerConfig(PreTrainedConfig):  # type: ignore[misc]
    """Sizes of a `OneLayerForMaskedLM`.

    Args:
        vocab_size: tokens, of which the first opens a sentence, the last is the mask, and all others are words.
        hidden_size: neurons.
        activation: "relu" or "linear".
        num_visible_words: K, by whose root counts are divided.
    """

    model_type = "raysweep_one_layer"

    def __init__(
        self,
        vocab_size: int = 26,
        hidden_size: int = 96,
        activation: str = "relu",
        num_visible_words: int = 5,
        **given: Any,
    ) -> None:
        self.vocab_size, self.hidden_size = vocab_size, hidden_size
        self.activation, self.num_visible_words = activation, num_visible_words
        given.setdefault("tie_word_embeddings", False)
        super().__init__(**given)

    @property
    def num_words(self) -> int:
        """Tokens that are counted and predicted."""
        return int(self.vocab_size - NUM_SPECIAL)


class OneLayerPreTrainedModel(PreTrainedModel):  # type: ignore[misc]
    """What both classes below share."""

    config_class = OneLayerConfig
    base_model_prefix = "model"

    def _init_weights(self, module: nn.Module) -> None:
        """None: `OneLayer.begin` sets them."""


class OneLayerModel(OneLayerPreTrainedModel):
    """h = relu(W z), z = counts / sqrt(K): attention with equal keys takes the mean of what it sees."""

    def __init__(self, config: OneLayerConfig) -> None:
        super().__init__(config)
        self.hidden = nn.Linear(config.num_words, config.hidden_size, bias=False)
        self.post_init()

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None, **given: Any
    ) -> BaseModelOutput:
        """States [n, L, neurons], the same at all places of a row, of ids [n, L]; 0 in the mask [n, L] is not read."""
        config = self.config
        dtype = self.hidden.weight.dtype
        ones = torch.ones_like(input_ids, dtype=dtype) if attention_mask is None else attention_mask.to(dtype)
        counts = ones.new_zeros(len(input_ids), config.vocab_size).scatter_add_(1, input_ids, ones)
        z = counts[:, 1:-1] / math.sqrt(config.num_visible_words)
        # With places as a dimension, of size one: curvature takes the first two as sequence and token.
        h = self.hidden(z[:, None])
        h = F.relu(h) if config.activation == "relu" else h
        return BaseModelOutput(last_hidden_state=h.expand(-1, input_ids.shape[1], -1))


class OneLayerForMaskedLM(OneLayerPreTrainedModel):
    """Logits A h over all tokens; those that are no words have NEVER."""

    def __init__(self, config: OneLayerConfig) -> None:
        super().__init__(config)
        self.model = OneLayerModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.num_words, bias=False)
        self.post_init()

    def get_output_embeddings(self) -> nn.Linear:
        """The output layer, A."""
        return self.lm_head

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None, **given: Any
    ) -> MaskedLMOutput:
        """Logits [n, L, tokens] of ids [n, L]; see `OneLayerModel`."""
        states = self.model(input_ids, attention_mask).last_hidden_state
        return MaskedLMOutput(logits=F.pad(self.lm_head(states), (1, 1), value=NEVER))


AutoConfig.register(OneLayerConfig.model_type, OneLayerConfig)
AutoModel.register(OneLayerConfig, OneLayerModel)
AutoModelForMaskedLM.register(OneLayerConfig, OneLayerForMaskedLM)
