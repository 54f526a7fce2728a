"""What is pretrained. To add a model: a spec with `build` and `num_parameters`, and its name in the last line."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field, model_validator

from raysweep.spec import Spec

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Llama(Spec):
    """A Llama-style decoder (Touvron et al., 2023): RMSNorm, rotary positions, SwiGLU, no biases."""

    head: ClassVar[Literal["causal", "masked"]] = "causal"
    """Predicts next tokens, from those before; masked: tokens in place, from both sides."""

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
        """Width of the feed-forward layers."""
        return self.intermediate_size or -(-8 * self.hidden_size // 3 // 16) * 16

    def num_parameters(self, vocab_size: int) -> int:
        """Tied weights counted once."""
        hidden = self.hidden_size
        layer = 4 * hidden**2 + 3 * hidden * self.inner_size + 2 * hidden
        return (1 if self.tie_embeddings else 2) * vocab_size * hidden + self.num_layers * layer + hidden

    def build(self, *, vocab_size: int, sequence_length: int, seed: int) -> PreTrainedModel:
        """A model with weights drawn from `seed`, in float32 on the CPU: the same on every rank."""
        import torch
        from transformers import LlamaConfig, LlamaForCausalLM

        config = LlamaConfig(
            vocab_size=vocab_size,
            hidden_size=self.hidden_size,
            intermediate_size=self.inner_size,
            num_hidden_layers=self.num_layers,
            num_attention_heads=self.num_heads,
            num_key_value_heads=self.num_heads,
            max_position_embeddings=max(2048, sequence_length),
            tie_word_embeddings=self.tie_embeddings,
            use_cache=True,
            bos_token_id=0,
            eos_token_id=0,
            pad_token_id=None,
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return LlamaForCausalLM(config)


def fuse_norms(model: PreTrainedModel) -> None:
    """Have torch compute Llama's norms: the same function, in one operation where the device has one for it."""
    import torch.nn.functional as F
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    for module in model.modules():
        if type(module) is LlamaRMSNorm:  # Not what derives from it: some add 1 to their weights.
            size, eps = tuple(module.weight.shape), module.variance_epsilon
            module.forward = partial(F.rms_norm, normalized_shape=size, weight=module.weight, eps=eps)


Model = Llama
