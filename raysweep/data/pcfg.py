"""A probabilistic context-free grammar: text whose true probabilities, so the optimal loss, are known exactly.

Sentences are the leaves of balanced binary trees: a sentence of 2^d words has d levels of binary rules, the same
rules on every level, and one emission per leaf. Paper 1 (Liu et al., 2022, arXiv 2210.14199) leaves the laws open;
ours: every non-terminal has `num_rules` distinct pairs of children and `num_words` distinct words, both drawn
uniformly, with probabilities softmax(z / temperature), z standard normal. A low temperature makes it predictable.
"""

from __future__ import annotations

import json
import math
from functools import cached_property
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
from pydantic import Field, model_validator

from raysweep.spec import Spec

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]

TRAIN, VALID, TASK, INDICATOR = 0, 1, 2, 3
"""Streams of sentences that share no draw."""

MAX_NUMBERS = 10**8
"""Of a grammar's table of words, and of the sentences that are drawn at once, in numbers of 8 bytes."""


class PCFG(Spec):
    """A corpus of sentences of one random grammar."""

    name: Literal["pcfg"] = "pcfg"
    """Which corpus."""
    num_words_total: int = Field(default=200, ge=2, le=1_000_000, alias="vocabulary")
    """Words there are."""
    num_nonterminals: int = Field(default=50, ge=2, le=1000)
    """Non-terminals there are."""
    num_rules: int = Field(default=4, ge=1, le=1000)
    """Binary rules of a non-terminal."""
    num_words: int = Field(default=8, ge=1)
    """Words a non-terminal may stand for."""
    temperature: float = Field(default=1.0, gt=0)
    """Below 1 makes the grammar more predictable."""
    sentence_length: int = Field(default=32, ge=2, le=4096)
    """Words of a sentence; a power of two."""
    num_train_sentences: int = Field(default=100_000, ge=1)
    """Sentences to train on."""
    num_valid_sentences: int = Field(default=2_000, ge=1)
    """Held-out sentences."""
    grammar_seed: int = Field(default=0, ge=0)
    """Of the grammar's rules; another seed is another language."""

    @model_validator(mode="after")
    def _possible(self) -> PCFG:
        if self.sentence_length & (self.sentence_length - 1):
            raise ValueError(f"sentence_length {self.sentence_length} must be a power of two: trees are balanced")
        if self.num_words > self.num_words_total:
            raise ValueError(f"num_words {self.num_words} is more than the vocabulary of {self.num_words_total}")
        if (size := self.num_nonterminals * self.num_words_total) > MAX_NUMBERS:
            raise ValueError(f"num_nonterminals x vocabulary is {size:,}; at most {MAX_NUMBERS:,} fit into memory")
        if self.num_rules > self.num_nonterminals**2:
            raise ValueError(f"num_rules {self.num_rules}: there are only {self.num_nonterminals**2} pairs")
        return self

    @property
    def vocab_size(self) -> int:
        """Words, and the token that opens every sentence."""
        return self.num_words_total + 1

    @property
    def domains(self) -> tuple[str, ...]:
        """One."""
        return ("pcfg",)

    @property
    def mix(self) -> dict[str, float]:
        """All of it."""
        return {"pcfg": 1.0}

    def pin(self, base: Path) -> PCFG:
        """Itself: it names no file."""
        return self

    def source(self) -> PCFG:
        """What its tokens depend on: all of it."""
        return self

    @cached_property
    def _laws(self) -> tuple[Floats, Ints, Floats, Floats]:
        """Root [A], children [A, rule, 2], rule probabilities [A, rule], emissions [A, word]."""
        draw = np.random.default_rng([self.grammar_seed, 2718])
        num, rules = self.num_nonterminals, self.num_rules
        pairs = np.stack([draw.choice(num * num, size=rules, replace=False) for _ in range(num)])
        children = np.stack([pairs // num, pairs % num], axis=-1)
        rule_probs = _softmax(draw.standard_normal((num, rules)) / self.temperature)
        emissions = np.zeros((num, self.num_words_total))
        for row in emissions:
            words = draw.choice(self.num_words_total, size=self.num_words, replace=False)
            row[words] = _softmax(draw.standard_normal(self.num_words) / self.temperature)
        root = _softmax(draw.standard_normal(num) / self.temperature)
        return root, children, rule_probs, emissions

    def sample(self, num: int, *, seed: int, stream: int) -> tuple[Ints, dict[int, Ints]]:
        """Sentences and the non-terminals above their spans.

        Returns:
            words [num, T] in [0, vocabulary), and span length -> non-terminals [num, T / span], from T down to 1.
        """
        root, children, rule_probs, emissions = self._laws
        draw = np.random.default_rng([self.grammar_seed, seed, stream])
        nodes = _choose(np.broadcast_to(root, (num, 1, root.size)), draw)
        spans = {self.sentence_length: nodes}
        while nodes.shape[1] < self.sentence_length:
            rule = _choose(rule_probs[nodes], draw)
            nodes = children[nodes, rule].reshape(num, -1)
            spans[self.sentence_length // nodes.shape[1]] = nodes
        words = np.empty_like(nodes)
        cumulative = np.cumsum(emissions, axis=1)
        uniform = draw.random(nodes.shape)
        for nonterminal in range(self.num_nonterminals):
            here = nodes == nonterminal
            scaled = uniform[here] * cumulative[nonterminal, -1]
            words[here] = np.searchsorted(cumulative[nonterminal], scaled, side="right")
        return words, spans

    def log_probability(self, words: Ints) -> Floats:
        """Exact log-probability of each sentence, in nats, by the inside algorithm.

        Args:
            words: [num, T].
        """
        root, children, rule_probs, emissions = self._laws
        inside = emissions[:, words].transpose(1, 2, 0)  # [num, node, A]
        scale = np.zeros(len(words))
        while True:
            # Each node is brought to a maximum of 1, so that long sentences do not underflow.
            top = inside.max(axis=-1, keepdims=True)
            with np.errstate(divide="ignore"):
                scale += np.log(top).sum(axis=(1, 2))
            inside = inside / np.maximum(top, np.finfo(np.float64).tiny)
            if inside.shape[1] == 1:
                with np.errstate(divide="ignore"):
                    return np.asarray(np.log(inside[:, 0] @ root) + scale)
            left, right = inside[:, 0::2], inside[:, 1::2]
            inside = np.einsum(
                "nsar,nsar,ar->nsa", left[..., children[..., 0]], right[..., children[..., 1]], rule_probs
            )

    def build(self, out: Path, *, tokenizer_dir: Path | None = None) -> dict[str, float]:
        """Write the tokens folder (see packing.py): one sentence a row, opened by <s>, token 0."""
        if tokenizer_dir is not None:
            raise ValueError("a PCFG has its own tokenizer")
        counts = {"train": self.num_train_sentences, "valid": self.num_valid_sentences}
        words, _ = self.sample(counts["valid"], seed=0, stream=VALID)
        log_probs = np.concatenate(
            [self.log_probability(part) for part in np.array_split(words, -(-len(words) // 512))]
        )
        loss = -log_probs / self.sentence_length
        dtype = np.uint16 if self.vocab_size <= 2**16 else np.uint32
        for split, stream in (("train", TRAIN), ("valid", VALID)):
            words, _ = self.sample(counts[split], seed=0, stream=stream)
            self.rows(words).astype(dtype).tofile(out / f"pcfg.{split}.bin")
        row = self.sentence_length + 1
        meta = {
            "vocab_size": self.vocab_size,
            "dtype": np.dtype(dtype).name,
            "sentence_length": self.sentence_length,
            "domains": {
                "pcfg": {
                    "num_train_tokens": counts["train"] * row,
                    "num_valid_tokens": counts["valid"] * row,
                    "valid_bytes": None,
                }
            },
            "optimal_loss_nats_per_token": float(loss.mean()),
            "optimal_loss_stderr": float(loss.std(ddof=1) / math.sqrt(len(loss))) if len(loss) > 1 else None,
        }
        (out / "meta.json").write_text(json.dumps(meta, indent=1))
        self._write_tokenizer(out / "tokenizer")
        return {"optimal_loss_nats_per_token": float(loss.mean()), "num_tokens": float(sum(counts.values()) * row)}

    def rows(self, words: Ints) -> Ints:
        """Words [num, T] as token rows [num, T + 1]: <s> is 0, word w is w + 1."""
        return np.concatenate([np.zeros((len(words), 1), np.int64), words + 1], axis=1)

    def _write_tokenizer(self, folder: Path) -> None:
        from tokenizers import Tokenizer
        from tokenizers.models import WordLevel
        from tokenizers.pre_tokenizers import WhitespaceSplit
        from transformers import PreTrainedTokenizerFast

        vocabulary = {"<s>": 0} | {f"w{word}": word + 1 for word in range(self.num_words_total)}
        tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="<s>"))
        tokenizer.pre_tokenizer = WhitespaceSplit()
        fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="<s>", pad_token="<s>")
        fast.save_pretrained(folder)


def _softmax(logits: Floats) -> Floats:
    exp = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return np.asarray(exp / exp.sum(axis=-1, keepdims=True))


def _choose(probs: Floats, draw: np.random.Generator) -> Ints:
    """One index for each leading place of `probs` [..., k]."""
    cumulative = np.cumsum(probs, axis=-1)
    uniform = draw.random(probs.shape[:-1])[..., None] * cumulative[..., -1:]
    return np.asarray((uniform >= cumulative).sum(axis=-1).clip(max=probs.shape[-1] - 1))
