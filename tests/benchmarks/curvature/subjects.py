"""What is measured: models of a few million parameters, and one trained on real text."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

import raysweep
from raysweep.data.sequences import sequences
from raysweep.data.tokenizers import load_tokenizer

VOCAB, HIDDEN, LAYERS, HEADS = 4096, 192, 4, 6
STORE = os.environ.get("STORE", "raysweep-store")
DATA = os.environ.get("RAYSWEEP_DATA", "")
LENGTH = 128

# About 20 minutes of training on two cores; it stays in the store.
SWEEP = """
name: subject
pretrain:
  data:
    name: text
    domains:
      wiki: {train: "${RAYSWEEP_DATA}/pretrain/wiki.train.jsonl.gz", valid: "${RAYSWEEP_DATA}/pretrain/wiki.valid.jsonl.gz"}
      news: {train: "${RAYSWEEP_DATA}/pretrain/news.train.jsonl.gz", valid: "${RAYSWEEP_DATA}/pretrain/news.valid.jsonl.gz"}
      stories: {train: "${RAYSWEEP_DATA}/pretrain/stories.train.jsonl.gz", valid: "${RAYSWEEP_DATA}/pretrain/stories.valid.jsonl.gz"}
    mix: {wiki: 0.5, news: 0.25, stories: 0.25}
    tokenizer: {name: bpe, vocab_size: 4096}
  model: {name: llama, hidden_size: 224, num_layers: 6, num_heads: 7}
  optimizer: {name: adamw, lr: 2e-3, weight_decay: 0.1}
  schedule: {name: cosine, warmup: 0.05}
  tokens: 2_400_000
  batch_sequences: 32
  sequence_length: 128
  checkpoints: [290, 585]
resources: {workers: 1, cpus_per_worker: 2}
"""  # noqa: E501


def gpt2() -> Any:
    torch.manual_seed(0)
    return GPT2LMHeadModel(
        GPT2Config(vocab_size=VOCAB, n_embd=HIDDEN, n_layer=LAYERS, n_head=HEADS, n_positions=256)
    ).eval()


def llama() -> Any:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCAB,
            hidden_size=HIDDEN,
            intermediate_size=512,
            num_hidden_layers=LAYERS,
            num_attention_heads=HEADS,
            tie_word_embeddings=True,
        )
    ).eval()


STYLES: dict[str, Callable[[], Any]] = {"GPT-2": gpt2, "Llama": llama}


def random_ids(num: int, length: int) -> torch.Tensor:
    return torch.randint(VOCAB, (num, length), generator=torch.Generator().manual_seed(1))


def trained() -> Path:
    """The checkpoint of the last step, trained now or taken from the store."""
    if not Path(DATA).is_dir():
        raise SystemExit("RAYSWEEP_DATA names no data pack: no model can be trained on real text")
    folder = Path(STORE).absolute()
    folder.mkdir(parents=True, exist_ok=True)
    sweep = folder / "subject.yaml"
    sweep.write_text(SWEEP)
    results = raysweep.run(raysweep.load(sweep), store=str(folder), runner="inline")
    return folder / "stages" / results.checkpoints["checkpoint"].iloc[-1]


def text_ids(checkpoint: Path) -> torch.Tensor:
    """Held-out text of the domains it was trained on: [n, LENGTH], in random order."""
    paths = [f"{DATA}/pretrain/{domain}.valid.jsonl.gz" for domain in ("wiki", "news")]
    return torch.from_numpy(sequences(load_tokenizer(checkpoint), paths, length=LENGTH, seed=0)["input_ids"])
