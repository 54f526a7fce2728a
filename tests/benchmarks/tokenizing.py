"""(j) Real text to token ids on one core and on all there are, beside `datasets.map` of Hugging Face.

Wants the texts of RAYSWEEP_DATA; the peer is left out where `datasets` is not installed.
"""

import importlib.util
import multiprocessing
import os
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from raysweep.data.text import Domain, Text
from raysweep.data.tokenizers import Bpe, Pretrained, load_tokenizer
from raysweep.data.tokenizing import num_cores

DOMAINS = ("books", "latex", "medqa", "news", "wiki")
REPEATS = 3


def ours(text: Text) -> float:
    """Seconds of a tokens folder, whole."""
    with tempfile.TemporaryDirectory() as out:
        began = time.perf_counter()
        text.build(Path(out))
        return time.perf_counter() - began


def peer(files: list[str], tokenizer: str) -> float:
    """Seconds to read the files and map the tokenizer over them with a process a core, as its documentation says."""
    from datasets import load_dataset

    encode = load_tokenizer(Path(tokenizer))
    with tempfile.TemporaryDirectory() as cache:
        began = time.perf_counter()
        documents = load_dataset("json", data_files=files, split="train", cache_dir=cache)
        documents.map(
            lambda batch: {"ids": encode(batch["text"], add_special_tokens=False)["input_ids"]},
            batched=True,
            num_proc=num_cores(),
            remove_columns=documents.column_names,
        )
        return time.perf_counter() - began


def on_cores(cores: Iterable[int], work: Callable[..., float], *arguments: object) -> float:
    """What `work` returns in a new process that may use these cores only: threads that exist keep theirs."""
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, spawn, initializer=os.sched_setaffinity, initargs=(0, set(cores))) as pool:
        return pool.submit(work, *arguments).result()


def main() -> Iterator[tuple[str, str]]:
    if "RAYSWEEP_DATA" not in os.environ:
        return
    folder = Path(os.environ["RAYSWEEP_DATA"]) / "pretrain"
    files = [str(folder / f"{name}.{split}.jsonl.gz") for name in DOMAINS for split in ("train", "valid")]
    domains = {
        name: Domain(train=str(folder / f"{name}.train.jsonl.gz"), valid=str(folder / f"{name}.valid.jsonl.gz"))
        for name in DOMAINS
    }
    with tempfile.TemporaryDirectory() as out:
        num_tokens = Text(domains=domains, tokenizer=Bpe()).pin(folder).build(Path(out))["num_tokens"]
        trained = str(Path(out) / "tokenizer")
        # Trained once, outside of what is timed.
        vocab_size = len(load_tokenizer(Path(trained)))
        text = Text(domains=domains, tokenizer=Pretrained(name="pretrained", path=trained, vocab_size=vocab_size))
        text = text.pin(folder)
        cores = sorted(os.sched_getaffinity(0))
        works: dict[str, tuple[Callable[..., float], tuple[object, ...]]] = {"ours": (ours, (text,))}
        if importlib.util.find_spec("datasets"):
            works["datasets.map"] = (peer, (files, trained))
        seconds: dict[str, list[float]] = defaultdict(list)
        for _ in range(REPEATS):
            for name, (work, arguments) in works.items():
                for used in (cores[:1], cores):
                    seconds[f"{name}, {len(used)} core(s)"].append(on_cores(used, work, *arguments))
    one = statistics.median(seconds["ours, 1 core(s)"])
    for name, each in seconds.items():
        median = statistics.median(each)
        yield (
            f"(j) {num_tokens / 1e6:.1f} M tokens of text, {name}",
            f"{median:.1f} s, {num_tokens / median / 1e6:.2f} M tokens/s: {one / median:.2f}x",
        )


if __name__ == "__main__":
    for what, result in main():
        print(f"| {what} | {result} |", flush=True)
