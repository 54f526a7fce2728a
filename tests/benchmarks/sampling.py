"""Text that a model writes: tokens a second, beside `generate` of transformers and beside no cache."""

import statistics
import time
from collections.abc import Callable, Iterator

import numpy as np
import torch

from raysweep.data.sampled import draw
from raysweep.train.models import Llama

VOCAB, ROWS, LENGTH = 8192, 64, 128


def main() -> Iterator[tuple[str, str]]:
    torch.set_num_threads(1)
    for spec in (
        Llama(hidden_size=256, num_layers=4, num_heads=4),
        Llama(hidden_size=512, num_layers=8, num_heads=8),
    ):
        model = spec.build(vocab_size=VOCAB, sequence_length=LENGTH, seed=0).eval()
        uniform = np.random.default_rng(0).random((ROWS, LENGTH - 1))
        first = torch.zeros(ROWS, 1, dtype=torch.int64)
        num = {"min_new_tokens": LENGTH - 1, "max_new_tokens": LENGTH - 1}
        ways: dict[str, Callable[[], object]] = {
            "ours": lambda model=model, uniform=uniform: draw(model, 0, uniform),
            "generate": lambda model=model, first=first, num=num: model.generate(
                first, attention_mask=torch.ones_like(first), do_sample=True, top_k=0, **num
            ),
        }
        seconds: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(3):
            for name, way in ways.items():
                began = time.perf_counter()
                way()
                seconds[name].append(time.perf_counter() - began)
        rates = {name: ROWS * (LENGTH - 1) / statistics.median(each) for name, each in seconds.items()}
        millions = model.num_parameters() / 1e6
        yield (
            f"tokens/s that a model of {millions:.1f} M parameters writes, {ROWS} x {LENGTH}, ours / generate",
            f"{rates['ours']:,.0f} / {rates['generate']:,.0f}: {rates['ours'] / rates['generate']:.2f}x",
        )


if __name__ == "__main__":
    for what, result in main():
        print(f"| {what} | {result} |", flush=True)
