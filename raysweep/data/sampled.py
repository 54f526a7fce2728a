"""Text drawn from a causal language model, whose own conditionals are its exact law.

Liu et al. (2022, arXiv 2210.14199) pretrain on such text, as the lowest loss that a model can have on it is known:
that of the model it was drawn from.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

import numpy as np
from pydantic import Field

from raysweep.data.base import LAW, CorpusSpec
from raysweep.data.draws import Floats, Ints, uniforms
from raysweep.data.packing import DomainMeta, TokensMeta, dtype_of
from raysweep.data.sources import AS_SOURCE, Source
from raysweep.data.tokenizers import load_tokenizer, start_of_text
from raysweep.errors import DataError, Finding, Place, collect
from raysweep.objectives.heads import read_config

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from raysweep.objectives.base import ObjectiveSpec
    from raysweep.objectives.optimum import Bools

# Streams of sequences that share no draw.
STREAMS = {"train": 0, "valid": 1}

LOSSES = "losses.valid.npy"
"""In a tokens folder: -log of each held-out token's probability when it was drawn, in nats, float64 [n, L]."""

# Tokens that are drawn side by side, which bounds the memory of keys and values; and rows, that of probabilities.
_BATCH_TOKENS = 2**14
_BATCH_ROWS = 256


class Sampled(CorpusSpec):
    """Sequences of one length that a causal language model writes, each from the token that opens a text.

    Every token is drawn from the model's whole distribution: no temperature, no truncation. After an end of text the
    model goes on with the next, as it would in packed text.
    """

    is_natural_language: ClassVar[bool] = True
    takes_tokenizer: ClassVar[bool] = False
    counts_bytes: ClassVar[bool] = False
    label_form: ClassVar[str | None] = None

    name: Literal["sampled"]
    """Which corpus."""
    model: Annotated[Source, AS_SOURCE]
    """The model that writes: a folder, relative to the sweep file, such as a checkpoint of a store, or a hub id with an
    optional @commit. Its tokenizer is the corpus's."""
    vocab_size_: int | None = Field(default=None, alias="vocab_size", ge=2)
    """Rows of the embedding of what is pretrained; left out: as many as those of the model that writes, of a folder."""
    sequence_length: int = Field(ge=2)
    """Tokens of a sequence, with the one that opens it; pretrain.sequence_length is the same."""
    num_train_sequences: int = Field(ge=1)
    """Sequences to train on."""
    num_valid_sequences: int = Field(default=1000, ge=1)
    """Held-out sequences."""
    seed: int = Field(default=0, ge=0)
    """Of the draws."""

    @property
    def vocab_size(self) -> int:
        """Rows of the embedding of what is pretrained; DataError until `pin` has seen a model that is to say it."""
        if self.vocab_size_ is None:
            raise DataError(f"the vocabulary of its data is known once {self.model.source} is found")
        return self.vocab_size_

    @property
    def domains(self) -> tuple[str, ...]:
        """A single one, which bears the corpus's name."""
        return (self.name,)

    @property
    def mix(self) -> dict[str, float]:
        """The one domain has all training sequences."""
        return {self.name: 1.0}

    @property
    def row_length(self) -> int:
        """Tokens of a sequence: all are of one length, and open with the same token."""
        return self.sequence_length

    @property
    def sampler(self) -> Source:
        """The model that writes, which the stage that builds the corpus loads and hands to `build`."""
        return self.model

    def pin(self, base: Path) -> Sampled:
        """With the model's content and the size of its vocabulary.

        Raises:
            DataError: if it is not there, predicts no next tokens, or reads fewer tokens than a sequence has.
        """
        [model] = collect([(("model",), lambda: self.model.pin(base))])
        if model.head == "masked":
            raise DataError(f"{model.source}: a masked model writes no text; name a causal one", ("model",))
        config: Mapping[str, Any] = read_config(Path(model.source)) if model.digests else {}
        # Where a model reads more than text, its language model is described apart.
        config = config.get("text_config", config)
        vocab_size = self.vocab_size_ or config.get("vocab_size")
        if vocab_size is None:
            raise DataError(f"missing: it cannot be told of {model.source}; write what its config.json says", _VOCAB)
        if vocab_size < config.get("vocab_size", 0):
            raise DataError(f"{vocab_size} is less than the {config['vocab_size']} tokens that it may write", _VOCAB)
        longest = config.get("max_position_embeddings", config.get("n_positions"))
        if longest is not None and longest < self.sequence_length:
            raise DataError(f"{self.sequence_length} tokens are more than the model's {longest}", ("sequence_length",))
        return self.with_(model=model, vocab_size_=vocab_size)  # type: ignore[no-any-return]

    def source(self) -> Sampled:
        """What its tokens depend on: all of it."""
        return self

    def build(
        self, out: Path, *, tokenizer_dir: Path | None = None, sampler: PreTrainedModel | None = None
    ) -> dict[str, float]:
        """Draw all sequences; of the held-out ones also LOSSES, which are the law of next tokens.

        Sequence i of a split is drawn by numbers that depend on `seed`, the split and i alone.

        Returns:
            `num_tokens`; and `optimal_loss_nats_per_token`, the mean of LOSSES over all tokens but the first of each.

        Raises:
            ValueError: if the model or its tokenizer is not given.
            DataError: if the tokenizer has no token to begin with, or the model may write more tokens than declared.
        """
        if sampler is None or tokenizer_dir is None:
            raise ValueError("sampled text needs the model that writes it, and its tokenizer")
        tokenizer = load_tokenizer(tokenizer_dir)
        if (start := start_of_text(tokenizer)) is None:
            raise DataError(
                f"{self.model.source}: its tokenizer has no bos_token or eos_token for a text to begin with"
            )
        if (num := max(len(tokenizer), sampler.config.get_text_config().vocab_size)) > self.vocab_size:
            raise DataError(f"{self.model.source} may write {num} tokens: pretrain.data.vocab_size is at least that")
        dtype = dtype_of(self.vocab_size)
        losses = np.empty((self.num_valid_sequences, self.sequence_length))
        for split, num in self._counts.items():
            with (out / f"{self.name}.{split}.bin").open("wb") as file:
                for rows, ids, lost in self._draw(sampler, start, num, stream=STREAMS[split]):
                    ids.astype(dtype).tofile(file)
                    if split == "valid":
                        losses[rows] = lost
        np.save(out / LOSSES, losses)
        tokens = {f"num_{split}_tokens": num * self.sequence_length for split, num in self._counts.items()}
        TokensMeta(
            vocab_size=self.vocab_size,
            dtype=dtype,
            sentence_length=self.sequence_length - 1,
            domains={self.name: DomainMeta(**tokens)},
        ).write(out)
        (out / LAW).write_text(self.model_dump_json(by_alias=True, indent=1))
        tokenizer.save_pretrained(out / "tokenizer")
        return {
            "num_tokens": float(sum(tokens.values())),
            "optimal_loss_nats_per_token": float(losses[:, 1:].mean()),
        }

    def tokens_bytes(self) -> int:
        """Of all sequences, to the byte: 2 or 4 bytes a token, by `dtype_of`. LOSSES are not counted."""
        return np.dtype(dtype_of(self.vocab_size)).itemsize * sum(self._counts.values()) * self.sequence_length

    def knows_optimum(self, objective: ObjectiveSpec) -> bool:
        """Of next tokens of the text as it stands: the model tells no other conditionals."""
        return objective.is_likelihood and objective.has_optimum

    def law(self, tokens: Path) -> SampledLaw:
        """What was written down as the held-out sequences were drawn."""
        # By the sequence itself, so that whoever asks need not know which rows of the file were picked.
        ids = np.fromfile(tokens / f"{self.name}.valid.bin", dtype_of(self.vocab_size))
        rows = ids.astype(np.int64).reshape(-1, self.sequence_length)
        return SampledLaw(dict(zip((row.tobytes() for row in rows), np.load(tokens / LOSSES), strict=True)))

    def length_findings(self, place: Place, lengths: Mapping[Place, int]) -> Iterator[Finding]:
        """None: its sequences are of one length, which a recipe is checked for by itself."""
        yield from ()

    @property
    def _counts(self) -> dict[str, int]:
        return {"train": self.num_train_sequences, "valid": self.num_valid_sequences}

    def _draw(
        self, model: PreTrainedModel, start: int, num: int, *, stream: int
    ) -> Iterator[tuple[slice, Ints, Floats]]:
        """Rows, their tokens and the loss of each token, some rows at a time."""
        width = self.sequence_length - 1
        # The same for every machine: what is drawn side by side may round otherwise.
        step = min(_BATCH_ROWS, max(1, _BATCH_TOKENS // self.sequence_length))
        for first in range(0, num, step):
            rows = slice(first, min(num, first + step))
            uniform = uniforms([self.seed, stream], first * width, (rows.stop - first, width))
            yield rows, *draw(model, start, uniform)


_VOCAB: Place = ("vocab_size",)


@dataclass(frozen=True)
class SampledLaw:
    """The law of text that a model wrote, as far as it was noted: next tokens of the held-out sequences."""

    losses: Mapping[bytes, Floats]
    """A sequence's ids as bytes of int64 -> -log of each token's probability, in nats, [L]."""

    def token_losses(self, ids: Ints, *, seen: Literal["before", "around"], hidden: Bools | None = None) -> Floats:
        """See `optimum.Law`; of whole held-out sequences, each token given all those before it.

        Raises:
            ValueError: if anything else is asked for.
            KeyError: if a sequence is none of the held-out ones.
        """
        if seen != "before" or hidden is not None:
            raise ValueError(f"sampled text knows its next tokens alone, not what is seen {seen} with tokens hidden")
        return np.stack([self.losses[np.ascontiguousarray(row, np.int64).tobytes()] for row in ids])


def draw(model: PreTrainedModel, start: int, uniform: Floats) -> tuple[Ints, Floats]:
    """Sequences that a model writes.

    Args:
        model: a causal one, in evaluation mode; what it keeps of a row's tokens is read again, where it keeps any.
        start: the token that opens every sequence.
        uniform: numbers in [0, 1) that the tokens are drawn by, [n, L - 1], by inversion: the first token up to which
            the probabilities sum to more.

    Returns:
        ids [n, L], and -log of the probability of each token but the first, whose loss is 0, in nats, [n, L].

    >>> ids, losses = draw(model, 1, np.random.default_rng(0).random((2, 3)))
    >>> log_p = model(input_ids=torch.from_numpy(ids)).logits[:, :-1].log_softmax(dim=-1).detach().numpy()
    >>> np.allclose(-losses[:, 1:], np.take_along_axis(log_p, ids[:, 1:, None], axis=2)[..., 0], atol=1e-5)
    True
    """
    import torch

    ids = torch.full((len(uniform), uniform.shape[1] + 1), start, dtype=torch.int64, device=model.device)
    losses = torch.zeros(ids.shape, dtype=torch.float64, device=model.device)
    numbers = torch.from_numpy(uniform).to(model.device)
    cache = None
    with torch.inference_mode():
        for place in range(1, ids.shape[1]):
            # Without a cache all is read anew.
            given = ids[:, :place] if cache is None else ids[:, place - 1 : place]
            output = model(input_ids=given, past_key_values=cache, use_cache=True)
            cache = getattr(output, "past_key_values", None)
            # In float64, that a sum over a large vocabulary loses no token's share.
            log_probabilities = output.logits[:, -1].double().log_softmax(dim=-1)
            sums = log_probabilities.exp().cumsum(dim=-1)
            scaled = numbers[:, place - 1, None] * sums[:, -1:]
            token = torch.searchsorted(sums, scaled, right=True).clamp(max=sums.shape[1] - 1)
            ids[:, place : place + 1] = token
            losses[:, place : place + 1] = -log_probabilities.gather(1, token)
    return ids.cpu().numpy(), losses.cpu().numpy()
