"""Models of four families, each trained on a text of its own, and text that they have not seen.

`python tests/benchmarks/curvature/family_models.py FOLDER --threads 4` makes what is not there: tokens, for which it
takes the data pack, and the models, which any machine can then train (a minute and a half on 12 cores, each family in
a process of its own).
"""

from __future__ import annotations

import argparse
import itertools
import math
import multiprocessing
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    BertConfig,
    BertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
)

from raysweep.data.formats import read_texts
from raysweep.data.sequences import MASKED
from raysweep.data.tokenizers import Bpe

Batch = dict[str, torch.Tensor]

LENGTHS = (64, 128, 256, 512)
STEP_TOKENS = 2048
RATE = 3e-3
# Of text that was not trained on.
UNSEEN_TOKENS = 2**20
IGNORED = -100


@dataclass(frozen=True)
class Family:
    """A model, and how it is trained."""

    domain: str
    vocab: int
    tokens: int
    build: Callable[[int], Any]
    masked: bool = False


def _built(model: Any, config: Any, **fields: Any) -> Callable[[int], Any]:
    """From a number of tokens to a new model of these fields."""
    return lambda vocab: model(config(vocab_size=vocab, **fields))


GPT2 = _built(
    GPT2LMHeadModel,
    GPT2Config,
    n_embd=128,
    n_layer=4,
    n_head=4,
    n_positions=512,
    resid_pdrop=0.0,
    embd_pdrop=0.0,
    attn_pdrop=0.0,
)
NEOX = _built(
    GPTNeoXForCausalLM,
    GPTNeoXConfig,
    hidden_size=160,
    intermediate_size=640,
    num_hidden_layers=4,
    num_attention_heads=5,
    max_position_embeddings=512,
)
LLAMA = _built(
    LlamaForCausalLM,
    LlamaConfig,
    hidden_size=192,
    intermediate_size=512,
    num_hidden_layers=5,
    num_attention_heads=6,
    max_position_embeddings=512,
    tie_word_embeddings=True,
)
BERT = _built(
    BertForMaskedLM,
    BertConfig,
    hidden_size=256,
    intermediate_size=1024,
    num_hidden_layers=4,
    num_attention_heads=4,
    hidden_dropout_prob=0,
    attention_probs_dropout_prob=0,
)

FAMILIES = {
    "GPT-2": Family("books", 2048, 1_000_000, GPT2),
    "GPT-NeoX": Family("wiki", 2048, 600_000, NEOX),
    "Llama": Family("latex", 4096, 600_000, LLAMA),
    "BERT": Family("medqa", 4096, 600_000, BERT, masked=True),
}


def tokenize(name: str, folder: Path) -> None:
    """A family's text as one stream of tokens: what is trained on, and then what is not."""
    family = FAMILIES[name]
    path = f"{os.environ['RAYSWEEP_DATA']}/pretrain/{family.domain}.train.jsonl.gz"
    tokenizer = Bpe(vocab_size=family.vocab - family.masked).build(lambda num: _first(path, num))
    stream = (token for text in read_texts([path]) for token in (*tokenizer(text)["input_ids"], tokenizer.eos_token_id))
    ids = np.fromiter(itertools.islice(stream, family.tokens + UNSEEN_TOKENS), dtype=np.int16)
    # The mask is the vocabulary's last token.
    inputs, labels = _hidden(ids, family.vocab - 1) if family.masked else (ids, ids)
    folder.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(folder / f"{name}.npz", inputs=inputs, labels=labels)


def train(name: str, folder: Path, threads: int) -> None:
    """Train a family's model on the first of its tokens."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    family = FAMILIES[name]
    model, streams = family.build(family.vocab), _streams(folder, name)
    _train(name, model, *(streams[key][: family.tokens] for key in ("input_ids", "labels")))
    # Half the bytes to send; what is measured is read from there.
    model.to(torch.bfloat16).save_pretrained(folder / name)


def _streams(folder: Path, name: str) -> Batch:
    with np.load(folder / f"{name}.npz") as kept:
        return {
            key: torch.from_numpy(kept[part].astype(np.int64))
            for key, part in (("input_ids", "inputs"), ("labels", "labels"))
        }


def _first(path: str, num: int) -> Iterator[str]:
    """Documents of about `num` bytes."""
    sizes = itertools.accumulate(len(text) for text in read_texts([path]))
    return (text for text, size in zip(read_texts([path]), sizes, strict=True) if size < num)


def _hidden(ids: Any, mask: int) -> tuple[Any, Any]:
    """Inputs and labels: some tokens hidden, one at least of those that make a shortest sequence."""
    draw = np.random.default_rng(0)
    hidden = draw.random(len(ids)) < MASKED
    hidden[:: LENGTHS[0]] |= np.add.reduceat(hidden, np.arange(0, len(ids), LENGTHS[0])) == 0
    return np.where(hidden, mask, ids), np.where(hidden, ids, IGNORED)


def _train(name: str, model: Any, inputs: torch.Tensor, labels: torch.Tensor) -> None:
    """AdamW, one pass, a cosine of the rate; lengths take turns, so that all positions are trained."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.1, betas=(0.9, 0.98))
    steps = len(inputs) // STEP_TOKENS
    for step in range(steps):
        part = slice(step * STEP_TOKENS, (step + 1) * STEP_TOKENS)
        length = LENGTHS[step % len(LENGTHS)]
        loss = model(input_ids=inputs[part].view(-1, length), labels=labels[part].view(-1, length)).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        share = step / steps
        optimizer.param_groups[0]["lr"] = RATE * min(20 * share, 0.55 + 0.45 * math.cos(math.pi * share))
        optimizer.step()
        optimizer.zero_grad()
        if step % 50 == 49:
            print(f"{name}: step {step + 1} of {steps}, {loss.item():.2f} nats", flush=True)


def load(folder: Path, name: str, attention: str) -> Any:
    """A family's trained model, in float32."""
    kind = AutoModelForMaskedLM if FAMILIES[name].masked else AutoModelForCausalLM
    return kind.from_pretrained(folder / name, attn_implementation=attention, dtype=torch.float32).eval()


def unseen(folder: Path, name: str, length: int, *, seed: int, num: int) -> Batch:
    """Sequences that were not trained on [num, length], drawn at random."""
    family, streams = FAMILIES[name], _streams(folder, name)
    rows = {key: ids[family.tokens :].view(-1, length) for key, ids in streams.items()}
    order = torch.randperm(len(rows["input_ids"]), generator=torch.Generator().manual_seed(seed))[:num]
    return {key: ids[order] for key, ids in rows.items() if key == "input_ids" or family.masked}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--threads", type=int, default=1)
    asked = parser.parse_args()
    for name in FAMILIES:
        if not (asked.folder / f"{name}.npz").exists():
            tokenize(name, asked.folder)
    missing = [name for name in FAMILIES if not (asked.folder / name).exists()]
    with ProcessPoolExecutor(len(FAMILIES), multiprocessing.get_context("spawn")) as pool:
        for future in [pool.submit(train, name, asked.folder, asked.threads) for name in missing]:
            future.result()


if __name__ == "__main__":
    main()
