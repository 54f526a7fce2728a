"""Fine-tuning of answers, and greedy decoding: tokens and answers a second at 350M."""

from __future__ import annotations

import json
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from subjects import ON_GPU, SUBJECTS, device_name
from table import Numbers, Table, synchronize

from raysweep.data.tokenizers import Bpe
from raysweep.stages.sft import Hyperparameters, Sft
from raysweep.tasks.decoding import first_lines
from raysweep.tasks.qa import QA
from raysweep.worker import Reached, Worker

SUBJECT = SUBJECTS["350M"]
NUM_TRAIN, NUM_TEST = (2000, 500) if ON_GPU else (80, 20)
NUM_PROMPTS, NEW_TOKENS = (256, 64) if ON_GPU else (8, 4)


def main(table: Table) -> None:
    """Two rows."""
    with tempfile.TemporaryDirectory() as folder:
        task, tokenizer = _task(Path(folder))
        table.measure("fine-tuning 350M on made-up questions", lambda: _finetuning(task, tokenizer))
    table.measure(f"greedy decoding of 350M, {NEW_TOKENS} tokens behind 128", lambda: _decoding(tokenizer))


def _task(folder: Path) -> tuple[QA, Any]:
    """Questions of 20 to 80 words and answers of one to three, and a tokenizer of their words."""
    draw = np.random.default_rng(0)
    words = np.array(["".join(draw.choice(list("abcdefghij"), size=4)) for _ in range(400)])
    for split, num in (("train", NUM_TRAIN), ("test", NUM_TEST)):
        lines = [
            {
                "question": " ".join(draw.choice(words, size=draw.integers(20, 80))),
                "answers": [" ".join(draw.choice(words, size=draw.integers(1, 4)))],
            }
            for _ in range(num)
        ]
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    text = (folder / "train.jsonl").read_text()
    tokenizer = Bpe(vocab_size=max(300, min(8192, SUBJECT.vocab_size))).build(
        lambda num_bytes: iter([text[:num_bytes]])
    )
    task = QA(
        form="qa",
        train=("train.jsonl",),
        test=("test.jsonl",),
        max_train_examples=NUM_TRAIN,
        max_test_examples=NUM_TEST,
        max_new_tokens=8,
    )
    return task.pin(folder), tokenizer


def _model(tokenizer: Any) -> Any:
    return SUBJECT.model.build(vocab_size=len(tokenizer), sequence_length=1024, seed=0)


def _finetuning(task: QA, tokenizer: Any) -> tuple[str, Numbers]:
    model = _model(tokenizer)
    stage = Sft(task=task, lr=1e-5, seed=0, hyperparameters=Hyperparameters(epochs=1.0))
    read: list[float] = []

    def report(reached: Reached) -> None:
        if reached.tokens_per_second:
            read.append(reached.tokens_per_second)

    fit = partial(stage._train, worker=Worker(device=device_name(), report=report))
    fitted = task.fit(model, tokenizer, fit, seed=0)
    synchronize()
    began = time.perf_counter()
    answered = len(task.score(fitted.model, tokenizer, "test"))
    rate = answered / (time.perf_counter() - began)
    result = f"{read[-1]:,.0f} tokens/s trained on; {rate:,.0f} questions/s answered and scored"
    return result, {"tokens_per_second": read[-1], "answers_per_second": rate}


def _decoding(tokenizer: Any) -> tuple[str, Numbers]:
    model = _model(tokenizer).to(device_name()).eval()
    if ON_GPU:
        model = model.bfloat16()
    draw = np.random.default_rng(0)
    prompts = [draw.integers(0, len(tokenizer), size=128).tolist() for _ in range(NUM_PROMPTS)]

    def decode() -> float:
        began = time.perf_counter()
        first_lines(model, tokenizer, prompts, max_new_tokens=NEW_TOKENS)
        synchronize()
        return time.perf_counter() - began

    decode()
    seconds = decode()
    rate = NUM_PROMPTS * NEW_TOKENS / seconds
    result = f"{rate:,.0f} tokens/s at most ({NUM_PROMPTS} prompts in {seconds:.2f} s; lines may end sooner)"
    return result, {"tokens_per_second": rate}
