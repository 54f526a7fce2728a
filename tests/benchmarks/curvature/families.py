"""The trace's cost on four families and four lengths, beside plain Hutchinson: rows first, then a table.

    python tests/benchmarks/curvature/family_models.py INPUTS
    python tests/benchmarks/curvature/families.py INPUTS --out ROWS --workers 2
    python tests/benchmarks/curvature/family_table.py ROWS

Each row is one process's CPU seconds with one thread; what is compared takes turns in the same processes, all with our
setting of the allocator. Rows are appended as they come, and those that are there are not made again. Kinds of rows:

- ours: a measurement to a target as `raysweep trace` makes it, with its own stop.
- table: v'H_s v of some sequences s with probes v common to them, whence the variances between sequences, between
  probes, and of the rest; they say what plain Hutchinson with N sequences and K probes is wrong by.
- seconds: of its products, exact ones by double backward from a graph that is kept, and of PyHessian's.
- told, rule: plain Hutchinson with the N and K of least cost, and PyHessian with the fewest sequences with which its
  own rule makes the target, for real.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from family_models import FAMILIES, LENGTHS, Batch, load, unseen
from family_table import plan_of, read_rows

from raysweep.curvature.differences import logit_response, quadratic_forms, step_for
from raysweep.curvature.language import IGNORED, equal_batches, is_causal, mean_token_loss, prepare, targets
from raysweep.curvature.measure import measure_traces
from raysweep.curvature.operators import MovableParameters, hessian_vector_products, inner, named_parameters
from raysweep.curvature.probes import probe_vector
from raysweep.curvature.settings import TraceSettings
from raysweep.trace import TOKENS_OF_BATCH

# Sequences of a measurement's text; far more than any takes.
POOL = 4096
# Tokens and common probes of one row of the table, and rows by length.
TABLE_TOKENS, TABLE_PROBES = 2048, 6
TABLE_ROWS = {64: 10, 128: 14, 256: 18, 512: 24}
# What exact products of one graph read: more tokens gain nothing, and fall out of cache.
GRAPH_TOKENS = (256, 1024)
# Runs after which products are timed again.
TIMED_EVERY = 15
TOLD_RSE = 0.1


@dataclass(frozen=True)
class Task:
    """One row."""

    kind: str
    family: str
    length: int
    seed: int
    rse: float = 0.0
    sequences: int = 0
    probes: int = 0

    @property
    def key(self) -> str:
        return f"{self.kind}/{self.family}/{self.length}/{self.rse}/{self.seed}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("inputs", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--families", nargs="+", default=list(FAMILIES))
    parser.add_argument("--lengths", nargs="+", type=int, default=list(LENGTHS))
    parser.add_argument("--targets", nargs="+", type=float, default=[0.1, 0.05])
    parser.add_argument("--kinds", nargs="+", choices=list(KINDS), default=list(KINDS))
    parser.add_argument("--runs", type=int, default=30)
    parser.add_argument("--first", type=int, default=0, help="seed of the first run")
    parser.add_argument("--tables", type=float, default=1.0, help="part of the table's rows that is made")
    parser.add_argument("--seconds", type=float, default=math.inf, help="begin no row after that many")
    asked = parser.parse_args()
    asked.out.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + asked.seconds
    with ProcessPoolExecutor(
        asked.workers, multiprocessing.get_context("spawn"), initializer=_begin, initargs=(asked.inputs, end)
    ) as pool:
        for tasks in (_first_tasks(asked), _second_tasks(asked)):
            _run(pool, tasks, asked.kinds, asked.out)


def _cells(asked: argparse.Namespace) -> list[tuple[str, int]]:
    return [(family, length) for length in asked.lengths for family in asked.families]


def _first_tasks(asked: argparse.Namespace) -> Iterator[Task]:
    """What says what is best to tell."""
    for family, length in _cells(asked):
        yield Task("seconds", family, length, -1)
        for seed in range(max(2, round(TABLE_ROWS[length] * asked.tables))):
            yield Task("table", family, length, seed)


def _second_tasks(asked: argparse.Namespace) -> Iterator[Task]:
    """Run by run, so that all cells get on alike, and what is compared takes turns."""
    plans = plan_of(read_rows(asked.out), TOLD_RSE)
    for seed in range(asked.first, asked.first + asked.runs):
        for cell, plan in ((each, plans[each]) for each in _cells(asked) if each in plans):
            if seed % TIMED_EVERY == 0:
                yield Task("seconds", *cell, seed)
            for rse in asked.targets:
                yield Task("ours", *cell, seed, rse)
            yield Task("told", *cell, seed, TOLD_RSE, plan.told_sequences, plan.told_probes)
            yield Task("rule", *cell, seed, TOLD_RSE, plan.rule_sequences)


def _run(pool: ProcessPoolExecutor, tasks: Iterator[Task], kinds: Sequence[str], out: Path) -> None:
    done = {row["key"] for row in read_rows(out)}
    missing = [task for task in tasks if task.key not in done and task.kind in kinds]
    began, num = time.monotonic(), 0
    with (out / "rows.jsonl").open("a") as file:
        for future in as_completed([pool.submit(_row, task) for task in missing]):
            if (row := future.result()) is not None:
                num += 1
                file.write(json.dumps(row) + "\n")
                file.flush()
    print(f"{num} of {len(missing)} rows in {time.monotonic() - began:.0f} s", flush=True)


_inputs: Path
_end: float


def _begin(inputs: Path, end: float) -> None:
    global _inputs, _end
    torch.set_num_threads(1)
    _inputs, _end = inputs, end


def _row(task: Task) -> dict[str, Any] | None:
    if time.monotonic() > _end:
        return None
    return {"key": task.key, **asdict(task), **KINDS[task.kind](task)}


@cache
def _model(family: str, attention: str) -> Any:
    model = load(_inputs, family, attention)
    prepare(model, twice_differentiable=attention == "eager")
    return model


def _text(task: Task, num: int) -> Batch:
    """Each kind of row has its own text of a seed."""
    seed = sum(map(ord, task.kind)) * 10_000 + task.seed
    return unseen(_inputs, task.family, task.length, seed=seed, num=num)


def _ours(task: Task) -> Mapping[str, Any]:
    model, batches = _model(task.family, "sdpa"), equal_batches(_text(task, POOL), TOKENS_OF_BATCH // task.length)
    settings = TraceSettings(rse=task.rse, max_units=POOL, head="closed_form", seed=task.seed)
    found, seconds = _timed(lambda: measure_traces(model, batches, settings))
    trace = found.traces.hessian
    return {
        "trace": trace.mean,
        "stderr": trace.stderr,
        "seconds_of_run": seconds,
        "probes": found.traces.num_probes,
        "unit_batches": found.unit_batches,
        "reason": found.reason,
    }


def _table(task: Task) -> Mapping[str, Any]:
    """v'Hv [sequences][probes] of the summed loss, by differences of logits, and tokens [sequences]."""
    model = _model(task.family, "sdpa")
    movable = MovableParameters(named_parameters(model), math.nan)
    num = TABLE_TOKENS // task.length
    rows = equal_batches(_text(task, num), 1)
    vectors = [movable.probe(seed=-1 - task.seed, probe=probe) for probe in range(TABLE_PROBES)]
    tokens = [int((targets(model, row) != IGNORED).sum()) for row in rows]
    movable.step = step_for(logit_response(model, rows[0], vectors[0], movable) / tokens[0], movable.rms) / 2
    values = []
    for row in rows:
        forms = [quadratic_forms(model, row, vector, movable)[0] for vector in vectors]
        values.append([each.gauss_newton + each.residual for each in forms])
    return {"values": values, "tokens": tokens}


def _seconds(task: Task) -> Mapping[str, Any]:
    """Of a probe vector; of a graph and of each product for a sequence, by sequences of a graph; of PyHessian's."""
    model = _model(task.family, "eager")
    parameters = named_parameters(model)
    probe = _timed(lambda: probe_vector(parameters, seed=0, probe=0))[1]
    vectors = [probe_vector(parameters, seed=0, probe=index) for index in range(3)]
    text = _text(task, max(GRAPH_TOKENS) // task.length)
    graphs = {}
    for tokens in GRAPH_TOKENS:
        num = max(1, tokens // task.length)
        batch = {name: rows[:num] for name, rows in text.items()}
        one, three = (_timed(partial(_products, model, batch, vectors[:count]))[1] for count in (1, 3))
        each = (three - one) / 2
        graphs[num] = ((one - each) / num, each / num)
    most = len(text["input_ids"])
    few, many = ({name: rows[:num] for name, rows in text.items()} for num in (max(1, most // 4), most))
    theirs = {
        f"{len(batch['input_ids'])}/{count}": _timed(partial(_pyhessian, model, batch, count))[1]
        for batch in (few, many)
        for count in (1, 4)
    }
    return {"probe": probe, "graphs": graphs, "pyhessian": theirs}


def _products(model: Any, batch: Batch, vectors: Sequence[Any]) -> list[float]:
    products = hessian_vector_products(partial(mean_token_loss, model, batch), named_parameters(model), vectors)
    return [inner(vector, product) for vector, product in zip(vectors, products, strict=True)]


def _told(task: Task) -> Mapping[str, Any]:
    """The mean over K probes of v'Hv on N sequences, exact, in graphs of a size that is cheap at all lengths."""
    model, text = _model(task.family, "eager"), _text(task, task.sequences)
    parameters = named_parameters(model)

    def trace() -> float:
        vectors = [probe_vector(parameters, seed=task.seed, probe=index) for index in range(task.probes)]
        sums = tokens = 0.0
        for batch in _graphs(text, GRAPH_TOKENS[1] // task.length):
            num = float((targets(model, batch) != IGNORED).sum())
            sums += num * math.fsum(_products(model, batch, vectors)) / len(vectors)
            tokens += num
        return sums / tokens

    found, seconds = _timed(trace)
    return {"trace": found, "seconds_of_run": seconds}


def _graphs(text: Batch, num: int) -> Iterator[Batch]:
    for start in range(0, len(text["input_ids"]), max(1, num)):
        yield {name: rows[start : start + max(1, num)] for name, rows in text.items()}


def _rule(task: Task) -> Mapping[str, Any]:
    model, text = _model(task.family, "eager"), _text(task, task.sequences)
    torch.manual_seed(task.seed)
    values, seconds = _timed(lambda: _pyhessian(model, text, None))
    return {"trace": sum(values) / len(values), "seconds_of_run": seconds, "stopped": len(values)}


class _Logits(torch.nn.Module):
    """PyHessian takes a model from inputs to outputs, and a loss of outputs and targets."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model
        self._without_cache = {"use_cache": False} if is_causal(model) else {}

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.model(input_ids=ids, **self._without_cache).logits
        return logits


def _pyhessian(model: Any, batch: Batch, num: int | None) -> list[float]:
    """Its own `trace`, of one batch: each probe's estimate; with None by its own rule."""
    from pyhessian import hessian

    wanted = targets(model, batch)

    def loss(logits: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(logits[:, : wanted.shape[1]].flatten(0, 1), wanted.flatten(), ignore_index=IGNORED)

    model.zero_grad()
    theirs = hessian(_Logits(model), loss, data=(batch["input_ids"], wanted), cuda=False)
    values: list[float] = theirs.trace() if num is None else theirs.trace(maxIter=num, tol=-1.0)
    model.zero_grad()
    return values


def _timed(function: Callable[[], Any]) -> tuple[Any, float]:
    began = time.process_time()
    value = function()
    return value, time.process_time() - began


KINDS: Mapping[str, Callable[[Task], Mapping[str, Any]]] = {
    "ours": _ours,
    "table": _table,
    "seconds": _seconds,
    "told": _told,
    "rule": _rule,
}


if __name__ == "__main__":
    main()
