"""`raysweep compare` as a new user walks it: a comparer of the committed study, and two models made without raysweep.

    RAYSWEEP_DATA=shared/data python tests/benchmarks/compare_walk.py FOLDER

Learns from `tests/data/indicators_cpu.parquet`, trains two small Llamas by transformers alone on the data pack's text,
with a tokenizer of their own, one of them on more of it, and compares them by the commands that a user would give,
which it prints. Then it fine-tunes both on the study's tasks, to see which is better. FOLDER keeps all of it: a second
walk trains and measures nothing anew.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import random
from collections.abc import Mapping
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, get_cosine_schedule_with_warmup

from raysweep.cli import main as raysweep
from raysweep.document import read_document
from raysweep.results import Results

ROOT = Path(__file__).parents[2]
STUDY = ROOT / "tests" / "data" / "indicators_cpu.parquet"
SWEEP = ROOT / "search_spaces" / "indicators_cpu.yaml"
MIX = {"news": 0.52, "medqa": 0.27, "peps": 0.05, "books": 0.04, "latex": 0.05, "wiki": 0.04, "stackexchange": 0.03}
"""Characters of each domain, as shares: about the study's."""
NUM_CHARACTERS = 10_000_000
STEPS = {"long": 550, "short": 275}
BATCH, SEQUENCE = 32, 128
END = "<|endoftext|>"


def texts() -> list[str]:
    """Of each domain the first ones, shuffled."""
    found = []
    for domain, share in MIX.items():
        left = share * NUM_CHARACTERS
        path = Path(os.environ["RAYSWEEP_DATA"]) / "pretrain" / f"{domain}.train.jsonl.gz"
        with gzip.open(path, "rt", encoding="utf-8") as lines:
            for line in lines:
                if left <= 0:
                    break
                found.append(json.loads(line)["text"])
                left -= len(found[-1])
    random.Random(0).shuffle(found)
    return found


def tokenizer_of(found: list[str], vocab_size: int = 2048) -> Tokenizer:
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
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3)
    schedule = get_cosine_schedule_with_warmup(optimizer, num_warmup_steps=20, num_training_steps=steps)
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        batch = rows[torch.randint(len(rows), (BATCH,), generator=generator)]
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        optimizer.step()
        schedule.step()
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
    fine_tune(places, folder / "store")


def fine_tune(places: Mapping[str, Path], store: Path) -> None:
    """As the study does; prints the mean log-likelihood of right test answers of each task."""
    recipe = read_document(SWEEP).data["pretrain"]
    data = {name: value for name, value in recipe["data"].items() if name != "later_tags"}
    changes = {
        "pretrain": {"from": str(places["long"]), "data": data, "sequence_length": recipe["sequence_length"]},
        "sweep": {"pretrain.from": {"grid": list(map(str, places.values()))}},
        "replicates": None,
    }
    overrides = [f"{key}={json.dumps(value)}" for key, value in changes.items()]
    raysweep(["run", str(SWEEP), *overrides, "--runner", "inline", "--store", str(store)])
    found = Results.open(SWEEP, store=store, overrides=overrides).checkpoints.set_index("point.pretrain.from")
    names = [name for name in found if name.startswith("sft/") and name.endswith("log_likelihood")]
    print(found[names].T.to_string(), flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    walk(parser.parse_args().folder)
