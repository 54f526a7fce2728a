"""(c) Tokens/s of pretraining against Hugging Face's Trainer: same model, data, batch, precision and optimizer."""

from __future__ import annotations

import statistics
import tempfile
import time
from typing import Any

import numpy as np
import torch

from raysweep.objectives.causal_lm import CausalLM
from raysweep.train.loop import train
from raysweep.train.models import Llama
from raysweep.train.optimizers import AdamW
from raysweep.train.schedules import Constant
from raysweep.worker import Worker

VOCAB = 2048
SMALL = Llama(hidden_size=128, num_layers=4, num_heads=4)
LARGE = Llama(hidden_size=448, num_layers=8, num_heads=8)
# Model, sequences of a step, their length, steps, bar.
CASES = (
    (SMALL, 32, 17, 80, 1.1),  # The quickstart's batch.
    (SMALL, 4, 64, 100, 1.1),
    (SMALL, 16, 128, 30, 1.1),
    (LARGE, 4, 128, 8, 1.0),
)
ROUNDS = 5


def ours(spec: Llama, ids: np.ndarray[Any, Any], batch: int, steps: int) -> float:
    model = spec.build(vocab_size=VOCAB, sequence_length=ids.shape[1], seed=0)

    def batch_at(step: int) -> dict[str, Any]:
        rows = ids[step * batch : (step + 1) * batch]
        return {"input_ids": rows, "labels": rows}

    began = time.perf_counter()
    train(
        model,
        batch_at,
        objective=CausalLM(),
        optimizer=AdamW(lr=1e-3),
        schedule=Constant(name="constant"),
        num_steps=steps,
        seed=0,
        clip_norm=1.0,
        worker=Worker(),
    )
    return steps * batch * ids.shape[1] / (time.perf_counter() - began)


def peer(spec: Llama, ids: np.ndarray[Any, Any], batch: int, steps: int) -> float:
    from transformers import Trainer, TrainingArguments

    model = spec.build(vocab_size=VOCAB, sequence_length=ids.shape[1], seed=0)
    rows = [{"input_ids": torch.from_numpy(row), "labels": torch.from_numpy(row)} for row in ids]
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder, per_device_train_batch_size=batch, max_steps=steps, optim="adamw_torch_fused",
            learning_rate=1e-3, lr_scheduler_type="constant_with_warmup", weight_decay=0.1, adam_beta2=0.95,
            max_grad_norm=1.0, save_strategy="no", logging_strategy="no", report_to=[], disable_tqdm=True, use_cpu=True,
        )  # fmt: skip
        trainer = Trainer(model=model, args=arguments, train_dataset=rows)
        began = time.perf_counter()
        trainer.train()
    return steps * batch * ids.shape[1] / (time.perf_counter() - began)


def main() -> list[tuple[str, str]]:
    rows = []
    for spec, batch, length, steps, bar in CASES:
        ids = np.random.default_rng(0).integers(0, VOCAB, size=(batch * steps, length))
        for run in (ours, peer):
            run(spec, ids, batch, 2)
        pairs = [(ours(spec, ids, batch, steps), peer(spec, ids, batch, steps)) for _ in range(ROUNDS)]
        mine, theirs = (statistics.median(column) for column in zip(*pairs, strict=True))
        ratio = statistics.median(left / right for left, right in pairs)
        size = f"{spec.num_parameters(VOCAB) / 1e6:.1f} M parameters, {batch} x {length} tokens a step"
        what = f"(c) tokens/s at {size}, ours / HF Trainer"
        rows.append((what, f"{mine:,.0f} / {theirs:,.0f}: {ratio:.2f}x (bar {bar}x)"))
    return rows


if __name__ == "__main__":
    for row in main():
        print(*row, sep=": ")
