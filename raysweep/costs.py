"""What stages reckon their cost by: the size of a model, and the FLOPs and bytes that follow from it.

All of it is known before anything runs: no weight is loaded, and no tensor made.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

from raysweep.data.sources import checkpoint_files
from raysweep.train.architectures import inner_numbers
from raysweep.train.methods import Adapters
from raysweep.weights import num_stored


@dataclass(frozen=True)
class Size:
    """What the costs of a stage are reckoned by: the size of its model, and of the checkpoint that it leaves."""

    num_parameters: int
    """Tied ones counted once."""
    num_layers: int
    hidden_size: int
    num_heads: int
    inner_numbers: int
    """Of a token, that the feed-forward layers of a block keep for their backward pass; see `inner_numbers`."""
    inner_float32: int = 0
    """Of these, those that are in float32 under CUDA's autocast to bfloat16."""
    vocab_size: int = field(kw_only=True)
    """Rows of its output layer."""
    num_bytes: int = field(kw_only=True)
    """Of its checkpoint's files."""

    @property
    def weights_bytes(self) -> int:
        """Of its weights in 32 bits, as every stage but training holds them."""
        return 4 * self.num_parameters

    @property
    def block_parameters(self) -> int:
        """Those of all blocks, if one matrix embeds tokens and predicts them; else some more."""
        return max(0, self.num_parameters - self.vocab_size * self.hidden_size)

    def adapter_parameters(self, rank: int) -> int:
        """Those of matrices of this rank beside all linear layers but the output's: rank (in + out) of each.

        Of a block of a Llama that is rank (7 h + P / h), with P its parameters; of other blocks, and where fewer layers
        have such matrices, it is more than there are.

        >>> Size(110, 1, 2, 1, 0, vocab_size=5, num_bytes=0).adapter_parameters(3)  # P = 100
        192
        """
        if not self.hidden_size:
            return 0
        return rank * (7 * self.hidden_size * self.num_layers + self.block_parameters // self.hidden_size)

    @property
    def forward_bytes(self) -> int:
        """Of a token in a forward pass that keeps nothing, in 32 bits and without logits: a block is widest in its
        feed-forward layer, where about 10 h numbers are at hand. Attention is fused."""
        return 4 * 10 * self.hidden_size

    @property
    def prompt_bytes(self) -> int:
        """Of a token of a prompt that is gone on from, in 32 bits and without logits: keys and values of all layers
        beside a forward pass, or else beside their copy for each choice. Fewer where heads share them."""
        kept = 4 * 2 * self.num_layers * self.hidden_size
        return kept + max(kept, self.forward_bytes)

    def gradient_flops(self, num_tokens: float, sequence_length: int, *, adapters: Adapters | None = None) -> float:
        """Forward and backward: 6 N + 12 L h s a token (Chowdhery et al., 2022, appendix B).

        Of the 6 N, 2 N are the gradients of weights, which frozen ones have not: beside M parameters of adapters it is
        4 N + 6 M.

        Args:
            num_tokens: that are read.
            sequence_length: tokens that attend to each other.
            adapters: that are trained; None: all weights are.
        """
        attention = 12.0 * self.num_layers * self.hidden_size * sequence_length
        weights = 6.0 * self.num_parameters
        if adapters:
            weights = 4.0 * self.num_parameters + 6.0 * self.adapter_parameters(adapters.rank)
        return (weights + attention) * num_tokens

    def forward_flops(self, num_tokens: float, sequence_length: int) -> float:
        """A third of a gradient's: a backward pass takes two products where a forward pass takes one."""
        return self.gradient_flops(num_tokens, sequence_length) / 3


UNKNOWN = Size(num_parameters=0, num_layers=0, hidden_size=0, num_heads=0, inner_numbers=0, vocab_size=0, num_bytes=0)
"""Of a model at the hub, or of a kind that is not known here: nothing is counted for it."""


@cache
def size_of_folder(folder: Path) -> Size | None:
    """From config.json and the headers of the weights' files; None if it is no folder, or they do not tell."""
    if not folder.is_dir():
        return None
    files = checkpoint_files(folder)
    try:
        config = json.loads((folder / "config.json").read_text())
        _, num = num_stored(folder)
        # By the names of Llama and BERT, of GPT-2, and of T5 and its kin.
        layers = next(config[name] for name in ("num_hidden_layers", "n_layer", "num_layers") if name in config)
        hidden = next(config[name] for name in ("hidden_size", "n_embd", "d_model") if name in config)
        heads = next(config[name] for name in ("num_attention_heads", "n_head", "num_heads") if name in config)
        num_bytes = sum(path.stat().st_size for path in files)
        dimensions = (int(layers), int(hidden), int(heads), *inner_numbers(config))
        return Size(num, *dimensions, vocab_size=int(config["vocab_size"]), num_bytes=num_bytes)
    except (OSError, ValueError, TypeError, KeyError, StopIteration):
        return None  # Some other kind of model, or a damaged file: to load it is the stage's to try.
