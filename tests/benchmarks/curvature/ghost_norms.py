"""Bar 3: squared norms of every sequence's gradient, beside one backward for each. One thread.

A gradient, the unit of time, is by eager attention, as in all tables; all else is by the fused kernel.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from memory import peak_of_tensors
from subjects import STYLES, random_ids

from raysweep.curvature.ghost import GhostNorms
from raysweep.curvature.language import mean_token_loss, prepare, token_logits
from raysweep.curvature.operators import gradients_of, named_parameters
from raysweep.curvature.units import Unit, fisher_unit

Tensor = torch.Tensor
ROUNDS = 7


def per_sequence(model: Any, ids: Tensor, cotangents: Tensor) -> Tensor:
    """One backward for each sequence: [n]."""
    parameters = list(named_parameters(model).values())
    squares = []
    for row, cotangent in zip(ids, cotangents, strict=True):
        logits = token_logits(model, {"input_ids": row[None]})
        gradients = torch.autograd.grad(logits, parameters, grad_outputs=cotangent[None])
        squares.append(sum(gradient.double().square().sum() for gradient in gradients))
    return torch.stack(squares)


def medians(cases: dict[str, Callable[[], object]]) -> dict[str, float]:
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    for turn in range(ROUNDS + 1):
        for name, case in cases.items():
            began = time.perf_counter()
            case()
            if turn:
                seconds[name].append(time.perf_counter() - began)
    first = next(iter(cases))
    return {
        name: statistics.median(a / b for a, b in zip(seconds[name], seconds[first], strict=True)) for name in cases
    }


def main() -> list[tuple[str, str]]:
    rows = []
    for style, build in STYLES.items():
        model, eager = build(), build()
        prepare(model, twice_differentiable=False)
        prepare(eager)
        for num, length in ((8, 128), (64, 16)):
            batch = {"input_ids": random_ids(num, length)}
            parameters = named_parameters(eager)
            logits = token_logits(model, batch).detach()
            drawn = torch.randint(logits.shape[-1], logits.shape[:2], generator=torch.Generator().manual_seed(2))
            cotangents = logits.softmax(-1).scatter_add(-1, drawn[..., None], -torch.ones_like(logits[..., :1]))

            def ghost(model: Any = model, batch: Any = batch, cotangents: Tensor = cotangents) -> Tensor:
                found = GhostNorms(model, batch).squared_norms(cotangents, last=True)
                return torch.stack(list(found.values())).sum(dim=0)

            def gradient(eager: Any = eager, batch: Any = batch, parameters: Any = parameters) -> object:
                return gradients_of(mean_token_loss(eager, batch), parameters)

            def one_by_one(model: Any = model, batch: Any = batch, cotangents: Tensor = cotangents) -> Tensor:
                return per_sequence(model, batch["input_ids"], cotangents)

            def draw(model: Any = model, batch: Any = batch) -> object:
                return fisher_unit(model, batch, Unit("fisher", 0, 0), seed=0)

            found = medians({"gradient": gradient, "ghost": ghost, "one by one": one_by_one, "draw": draw})
            error = float(((ghost() - one_by_one()).abs() / one_by_one()).max())
            fused = partial(gradient, model, batch, named_parameters(model))
            memory = peak_of_tensors(ghost) / peak_of_tensors(fused)
            what = f"(3) {style}, {num} x {length} tokens"
            rows += [
                (
                    f"{what}: ghost norms, in gradients (with labels drawn)",
                    f"{found['ghost']:.2f} ({found['draw']:.2f})",
                ),
                (f"{what}: one backward a sequence / ghost norms", f"{found['one by one'] / found['ghost']:.1f}x"),
                (f"{what}: largest relative difference; peak memory, in backward passes", f"{error:.1e}; {memory:.2f}"),
            ]
    return rows


if __name__ == "__main__":
    torch.set_num_threads(1)
    for row in main():
        print(*row, sep=": ")
