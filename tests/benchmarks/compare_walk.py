"""`raysweep compare` as a new user walks it: a comparer of the committed study, and two models made without raysweep.

    RAYSWEEP_DATA=shared/data python tests/benchmarks/compare_walk.py FOLDER

Learns from `tests/data/indicators_cpu.parquet`, trains two small Llamas by transformers alone on the data pack's text,
with a tokenizer of their own, one of them five times as long, and compares them by the commands that a user would give,
which it prints. FOLDER keeps all of it: a second walk trains and measures nothing anew.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import random
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from raysweep.cli import main as raysweep

ROOT = Path(__file__).parents[2]
STUDY = ROOT / "tests" / "data" / "indicators_cpu.parquet"
SWEEP = ROOT / "search_spaces" / "indicators_cpu.yaml"
DOMAINS = ("news", "medqa", "books", "wiki")
STEPS = {"long": 300, "short": 60}
SEQUENCE = 128
END = "<|endoftext|>"


def texts(num: int = 1500) -> list[str]:
    """So many of each domain, shuffled."""
    found = []
    for domain in DOMAINS:
        path = Path(os.environ["RAYSWEEP_DATA"]) / "pretrain" / f"{domain}.train.jsonl.gz"
        with gzip.open(path, "rt", encoding="utf-8") as lines:
            found += [json.loads(line)["text"] for _, line in zip(range(num), lines, strict=False)]
    random.Random(0).shuffle(found)
    return found


def tokenizer_of(found: list[str], vocab_size: int = 2000) -> Tokenizer:
    """Byte pairs of these texts."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=[END], initial_alphabet=alphabet)
    tokenizer.train_from_iterator(found, trainer)
    return tokenizer


def train(folder: Path, steps: int, rows: torch.Tensor, tokenizer: Tokenizer) -> None:
    """A Llama of 0.5 M parameters into a folder, as Hugging Face has it."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=tokenizer.get_vocab_size(), hidden_size=96, intermediate_size=256, num_hidden_layers=3,
        num_attention_heads=3, max_position_embeddings=256, bos_token_id=0, eos_token_id=0, tie_word_embeddings=True,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        batch = rows[torch.randint(len(rows), (16,), generator=generator)]
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    print(f"{folder.name}: {steps} steps, loss {loss.item():.2f}", flush=True)
    model.save_pretrained(folder)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, bos_token=END).save_pretrained(folder)


def walk(folder: Path) -> None:
    """The commands, one after another."""
    places = {name: folder / name for name in STEPS}
    if not all(place.exists() for place in places.values()):
        found = texts()
        tokenizer = tokenizer_of(found)
        ids = torch.tensor([each for text in found for each in (*tokenizer.encode(text).ids, 0)])
        rows = ids[: len(ids) // SEQUENCE * SEQUENCE].view(-1, SEQUENCE)
        for name, place in places.items():
            train(place, STEPS[name], rows, tokenizer)
    comparer, measured = str(folder / "comparer"), ["--measure", str(SWEEP), "--store", str(folder / "store")]
    pair = [str(place) for place in places.values()]
    commands = [
        ["rank", "--table", str(STUDY), "--learn", comparer],
        ["compare", *pair],
        ["compare", *pair, "--with", comparer, *measured],
        ["compare", *pair, *measured],
    ]
    if (folder / "comparer").exists():
        commands = commands[1:]
    for command in commands:
        print(f"\n$ raysweep {' '.join(command)}", flush=True)
        print(f"exit status {raysweep(command)}", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    walk(parser.parse_args().folder)
