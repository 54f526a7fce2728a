"""Bar 2: cost of the Hessian's trace to a relative standard error of 5 %, on a model trained on real text. One thread.

Truth is the mean over much held-out text. A peer measures a batch of N sequences with K probe vectors, each through the
whole batch. PyHessian as it comes stops by its own rule; it is given the fewest sequences that suffice at the K where
that stops. No peer tells N or K: their best come from the variances between sequences, between probes, and of the rest,
which a user does not have. Ours stops by itself, at an error bar of its own.
"""

from __future__ import annotations

import itertools
import math
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from curvlinops import hutchinson_trace, hutchpp_trace, xtrace
from peers import Curvlinops, PyHessian, with_forward_mode
from subjects import text_ids, trained
from transformers import AutoModelForCausalLM

from raysweep.curvature.adaptive import Budget
from raysweep.curvature.language import mean_token_loss, prepare
from raysweep.curvature.measure import measure_traces
from raysweep.curvature.operators import gradients_of, hessian_vector_products, inner, named_parameters
from raysweep.curvature.probes import probe_vector

TARGET = 0.05
SEQUENCES_OF_BATCH = 1
RUNS_OF_OURS, RUNS_OF_PEERS = 20, 8
# Sequences and common probes of the table of single products from which the peers' best N and K are chosen.
TABLE = (40, 12)
TRUTH = 0.008


def main() -> list[tuple[str, str]]:
    checkpoint = trained()
    ids = text_ids(checkpoint)
    model, exact, composed = (AutoModelForCausalLM.from_pretrained(checkpoint).float() for _ in range(3))
    prepare(model, twice_differentiable=False)
    prepare(exact)
    prepare(with_forward_mode(composed))
    parameters = named_parameters(exact)
    size = sum(parameter.numel() for parameter in parameters.values())

    def gradient() -> object:
        return gradients_of(mean_token_loss(exact, {"input_ids": ids[:8]}), parameters)

    gradient()
    unit = statistics.median(_timed(gradient)[1] for _ in range(7)) / 8
    truth = _ours(model, ids, seed=10**6, budget=Budget(rse=TRUTH, max_units=10**4))[0]
    print(
        f"truth {truth.mean:.1f} ± {truth.stderr:.1f}; a gradient of one sequence takes {unit * 1e3:.0f} ms", flush=True
    )
    rows = [(f"(2) Llama of {size / 1e6:.1f} M parameters", f"Tr H = {truth.mean:.1f} ± {truth.stderr:.1f} nats")]

    errors, costs = [], []
    for run in range(RUNS_OF_OURS):
        found, seconds = _ours(model, _shuffled(ids, run), seed=run, budget=Budget(rse=TARGET, max_units=10**4))
        errors.append(found.mean / truth.mean - 1)
        costs.append(seconds)
    mine = statistics.mean(costs)
    rows.append(("(2) ours, to its own stop at 5 %", _row(errors, mine, unit)))
    print(rows[-1], flush=True)

    between, common, rest = _variances(exact, ids, parameters)
    per_probe = _cost_of_pyhessian(exact, ids)
    best = None
    for num, probes in itertools.product(range(2, 65), range(1, 41)):
        spread = between / num + (common + rest / num) / probes
        cost = num * (per_probe[0] + per_probe[1] * probes)
        if spread <= (TARGET * truth.mean) ** 2 and (best is None or cost < best[0]):
            best = cost, num, probes
    assert best is not None
    _, num, probes = best
    text = f"relative standard deviations: text {math.sqrt(between) / truth.mean:.1%} a sequence, "
    text += f"probe {math.sqrt(common) / truth.mean:.1%}, both {math.sqrt(rest) / truth.mean:.1%}"
    print(text, "; PyHessian's best", best, flush=True)

    def variance(num: int, probes: float) -> float:
        return between / num + (common + rest / num) / probes

    stops = []

    def as_it_comes(batch: torch.Tensor) -> float:
        peer = PyHessian(exact, batch)
        value, count = peer.trace_by_its_rule()
        peer.close()
        stops.append(count)
        return value

    def pyhessian(batch: torch.Tensor) -> float:
        peer = PyHessian(exact, batch)
        trace = peer.trace(probes)
        peer.close()
        return trace

    for run in range(RUNS_OF_PEERS):
        as_it_comes(_shuffled(ids, 200 + run)[:num])
    goal = (TARGET * truth.mean) ** 2
    fewest = next(each for each in range(2, 65) if variance(each, statistics.mean(stops)) <= goal)
    print("PyHessian's rule stops after", stops, "probes", flush=True)
    threes, twos = 3 * math.ceil(probes / 3), 2 * math.ceil(probes / 2)
    peers: dict[str, Callable[[torch.Tensor], float]] = {
        f"PyHessian as it comes, {fewest} sequences": as_it_comes,
        f"PyHessian, {num} sequences x {probes} probes": pyhessian,
        f"curvlinops, {num} x {probes}, Hutchinson": lambda b: float(
            hutchinson_trace(Curvlinops(composed, [b]), probes)
        ),
        f"curvlinops, {num} x {threes}, Hutch++": lambda b: float(hutchpp_trace(Curvlinops(composed, [b]), threes)),
        f"curvlinops, {num} x {twos}, XTrace": lambda b: float(xtrace(Curvlinops(composed, [b]), twos)),
    }
    for name, peer in peers.items():
        errors, costs = [], []
        for run in range(RUNS_OF_PEERS):
            torch.manual_seed(run)
            batch = _shuffled(ids, 100 + run)[: fewest if peer is as_it_comes else num]
            value, seconds = _timed(lambda peer=peer, batch=batch: peer(batch))
            errors.append(value / truth.mean - 1)
            costs.append(seconds)
        cost = statistics.mean(costs)
        rows.append((f"(2) {name}", f"{_row(errors, cost, unit)}: {cost / mine:.1f} times ours"))
        print(rows[-1], flush=True)
    return rows


def _ours(model: Any, ids: torch.Tensor, *, seed: int, budget: Budget) -> tuple[Any, float]:
    size = SEQUENCES_OF_BATCH
    batches = [{"input_ids": ids[start : start + size]} for start in range(0, len(ids) - size + 1, size)]
    measured, seconds = _timed(lambda: measure_traces(model, batches, budget=budget, seed=seed))
    return measured.traces.hessian, seconds


def _variances(model: Any, ids: torch.Tensor, parameters: Any) -> tuple[float, float, float]:
    """Of v'H_s v: between sequences s, between probes v common to all, and of the rest (two-way random effects)."""
    num, probes = TABLE
    vectors = [probe_vector(parameters, seed=1, probe=index) for index in range(probes)]
    table = np.empty(TABLE)
    for row in range(num):
        loss = partial(mean_token_loss, model, {"input_ids": ids[row : row + 1]})
        products = hessian_vector_products(loss, parameters, vectors)
        table[row] = [inner(vector, product) for vector, product in zip(vectors, products, strict=True)]
    off = table - table.mean(0) - table.mean(1)[:, None] + table.mean()
    rest = (off**2).sum() / ((num - 1) * (probes - 1))
    between = max(0.0, table.mean(1).var(ddof=1) - rest / probes)
    common = max(0.0, table.mean(0).var(ddof=1) - rest / num)
    return between, common, rest


def _cost_of_pyhessian(model: Any, ids: torch.Tensor) -> tuple[float, float]:
    """Seconds for each sequence: of the gradient's graph, and of each probe."""
    few, many = (
        statistics.median(_timed(lambda n=n: _close(PyHessian(model, ids[:8]), n))[1] for _ in range(3)) for n in (1, 5)
    )
    slope = (many - few) / 4
    return (few - slope) / 8, slope / 8


def _close(peer: PyHessian, probes: int) -> None:
    peer.trace(probes)
    peer.close()


def _shuffled(ids: torch.Tensor, seed: int) -> torch.Tensor:
    return ids[torch.randperm(len(ids), generator=torch.Generator().manual_seed(seed))]


def _timed(function: Callable[[], Any]) -> tuple[Any, float]:
    began = time.perf_counter()
    value = function()
    return value, time.perf_counter() - began


def _row(errors: list[float], seconds: float, unit: float) -> str:
    rms = math.sqrt(statistics.mean(error**2 for error in errors))
    return f"error {rms:.1%} (rms of {len(errors)} runs), {seconds:.1f} s, {seconds / unit:.0f} gradients of a sequence"


if __name__ == "__main__":
    torch.set_num_threads(1)
    for row in main():
        print(*row, sep=": ")
