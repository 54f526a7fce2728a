"""What the rows of `families.py` amount to: the cost of a trace at equal error, as a Markdown table.

    python tests/benchmarks/curvature/family_table.py ROWS

Ours is the runs for real: their root mean square error about their mean, the one that they state, their seconds. Plain
Hutchinson is told the N sequences and K probes that make the same error at the lowest cost: it is
between / N + (common + rest / N) / K  with the variances of the recorded values, the cost that of the measured
products. PyHessian stops by its own rule, and is told the fewest sequences that make the error where that stops. In
brackets what resamplings of our runs, and of the rows that the variances are from, leave between their 2.5 and 97.5 %:
an error of 30 runs is known to an eighth, theirs costs as its inverse square, and rare sequences make most of a
variance.
"""

from __future__ import annotations

import json
import math
import sys
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, median
from typing import Any

import numpy as np

Row = Mapping[str, Any]
Cell = tuple[str, int]
"""Family and length."""

MOST_SEQUENCES, MOST_PROBES = 4096, 1024
# PyHessian's defaults.
RULE_PROBES, RULE_CHANGE = 100, 1e-3
SIMULATED = 2000
RESAMPLED = 60


@dataclass(frozen=True)
class Variances:
    """Of v'H_s v relative to the trace: between sequences s, between probes v common to all, and of the rest."""

    between: float
    common: float
    rest: float

    @staticmethod
    def of(rows: Sequence[Row]) -> Variances:
        """Two-way random effects, nested in rows, of deviations from the ratio of all sums over that of tokens."""
        sums = [np.array(row["values"]) for row in rows]
        tokens = [np.array(row["tokens"], dtype=float)[:, None] for row in rows]
        size = float(np.concatenate(tokens).mean())
        trace = float(np.concatenate(sums).mean()) / size
        tables = [(each - trace * counts) / (trace * size) for each, counts in zip(sums, tokens, strict=True)]
        num, probes = tables[0].shape
        text, along, off = [], [], []
        for table in tables:
            of_text, of_probe = table.mean(1, keepdims=True), table.mean(0, keepdims=True)
            text.append(of_text - table.mean())
            along.append(of_probe - table.mean())
            off.append(table - of_text - of_probe + table.mean())
        rest = _squares(off) / (len(tables) * (num - 1) * (probes - 1))
        between = _squares(text) / (len(tables) * (num - 1)) - rest / probes
        common = _squares(along) / (len(tables) * (probes - 1)) - rest / num
        return Variances(max(0.0, between), max(0.0, common), rest)

    def error(self, sequences: int, probes: int) -> float:
        """Relative root mean square error of their mean."""
        return math.sqrt(self.between / sequences + (self.common + self.rest / sequences) / probes)


def _squares(parts: Sequence[Any]) -> float:
    return math.fsum(float((part**2).sum()) for part in parts)


@dataclass(frozen=True)
class Seconds:
    """Of CPU: of a sequence's part in a graph, of its part in a product, and of a probe beside these."""

    graph: float
    product: float
    probe: float

    def of(self, sequences: int, probes: float) -> float:
        """Of so many sequences, each with all probes."""
        return sequences * (self.graph + self.product * probes) + self.probe * probes

    @staticmethod
    def told(rows: Sequence[Row]) -> list[Seconds]:
        """Of plain Hutchinson, by sequences of a graph; which is best depends on the number of probes."""
        probe = median(row["probe"] for row in rows)
        return [
            Seconds(*(median(row["graphs"][num][part] for row in rows) for part in (0, 1)), probe)
            for num in rows[0]["graphs"]
        ]

    @staticmethod
    def rule(rows: Sequence[Row]) -> Seconds:
        """Of PyHessian, from two numbers of sequences, each with two numbers of probes."""
        times: dict[int, dict[int, float]] = defaultdict(dict)
        for key in rows[0]["pyhessian"]:
            sequences, probes = map(int, key.split("/"))
            times[sequences][probes] = median(row["pyhessian"][key] for row in rows)
        (few, of_few), (many, of_many) = ((num, _line(times[num])) for num in sorted(times))
        (graph, _), (product, probe) = (_line({few: of_few[part], many: of_many[part]})[::-1] for part in (0, 1))
        return Seconds(graph, product, max(0.0, probe))


def _line(points: Mapping[int, float]) -> tuple[float, float]:
    """Value at 0, and slope, through two points."""
    (left, low), (right, high) = sorted(points.items())
    slope = (high - low) / (right - left)
    return low - slope * left, slope


@dataclass(frozen=True)
class Plan:
    """What plain Hutchinson is told for an error, and what that costs in seconds."""

    told_sequences: int
    told_probes: int
    told_seconds: float
    rule_sequences: int
    rule_probes: float
    rule_seconds: float

    @staticmethod
    def of(variances: Variances, told: Sequence[Seconds], rule: Seconds, error: float) -> Plan:
        """The N and K of least cost, and the fewest N for PyHessian's rule."""
        pairs = [(num, probes) for probes in range(1, MOST_PROBES) if (num := _fewest(variances, probes, error))]
        cost, best = min((min(each.of(*pair) for each in told), pair) for pair in pairs)
        low, high = 1, MOST_SEQUENCES
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if _by_rule(variances, middle)[0] <= error else (middle, high)
        probes = _by_rule(variances, high)[1]
        return Plan(*best, cost, high, probes, rule.of(high, probes))


def _fewest(variances: Variances, probes: int, error: float) -> int | None:
    """Sequences with which so many probes make the error."""
    room = error**2 - variances.common / probes
    return math.ceil((variances.between + variances.rest / probes) / room) if room > 0 else None


def _by_rule(variances: Variances, sequences: int) -> tuple[float, float]:
    """Error of PyHessian's trace, and its mean number of probes, simulated with normal estimates."""
    draw = np.random.default_rng(0)
    spread = math.sqrt(variances.common + variances.rest / sequences)
    text = draw.normal(0, math.sqrt(variances.between / sequences), SIMULATED)
    probes = draw.normal(0, spread, (SIMULATED, RULE_PROBES))
    means = 1 + text[:, None] + probes.cumsum(1) / np.arange(1, RULE_PROBES + 1)
    before = np.pad(means[:, :-1], ((0, 0), (1, 0)))
    still = np.abs(means - before) / (before + 1e-6) < RULE_CHANGE
    stops = np.where(still.any(1), still.argmax(1), RULE_PROBES - 1)
    errors = means[np.arange(SIMULATED), stops] - 1
    return float(np.sqrt((errors**2).mean())), float(stops.mean() + 1)


def read_rows(folder: Path) -> list[Row]:
    """All rows of a folder, each once."""
    rows = (json.loads(line) for path in sorted(folder.glob("*.jsonl")) for line in path.read_text().splitlines())
    return list({row["key"]: row for row in rows}.values())


def by_cell(rows: Sequence[Row]) -> dict[Cell, dict[str, list[Row]]]:
    """Rows of each cell by kind; of cells that have what a plan takes."""
    cells: dict[Cell, dict[str, list[Row]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        cells[row["family"], row["length"]][row["kind"]].append(row)
    return {cell: kinds for cell, kinds in sorted(cells.items()) if kinds["table"] and kinds["seconds"]}


def plan_of(rows: Sequence[Row], error: float) -> dict[Cell, Plan]:
    """What plain Hutchinson is told in each cell."""
    return {cell: _plan(kinds, error) for cell, kinds in by_cell(rows).items()}


def _plan(kinds: Mapping[str, Sequence[Row]], error: float) -> Plan:
    seconds = kinds["seconds"]
    return Plan.of(Variances.of(kinds["table"]), Seconds.told(seconds), Seconds.rule(seconds), error)


def main() -> None:
    print("| family, tokens | target | ours: runs, error, stated | cost | told N x K | ours | by its rule | ours |")
    print("| --- " * 8 + "|")
    for cell, kinds in by_cell(read_rows(Path(sys.argv[1]))).items():
        for target in sorted({row["rse"] for row in kinds["ours"]}):
            print(_line_of(cell, target, kinds), flush=True)
        for kind in ("told", "rule"):
            if len(kinds[kind]) > 1:
                print(_check(cell, kind, kinds), flush=True)


def _line_of(cell: Cell, target: float, kinds: Mapping[str, Sequence[Row]]) -> str:
    runs = [row for row in kinds["ours"] if row["rse"] == target]
    traces, seconds = (np.array([row[name] for row in runs]) for name in ("trace", "seconds_of_run"))
    stated = math.sqrt(fmean((row["stderr"] / row["trace"]) ** 2 for row in runs))
    plan, cost = _plan(kinds, _spread(traces)), float(seconds.mean())
    ratios = (plan.told_seconds / cost, plan.rule_seconds / cost)
    resampled, draw = [], np.random.default_rng(0)
    for _ in range(RESAMPLED):
        chosen, rows = (draw.integers(num, size=num) for num in (len(runs), len(kinds["table"])))
        other = _plan({**kinds, "table": [kinds["table"][row] for row in rows]}, _spread(traces[chosen]))
        resampled.append([each / seconds[chosen].mean() for each in (other.told_seconds, other.rule_seconds)])
    low, high = np.quantile(resampled, [0.025, 0.975], axis=0)
    told, rule = (f"1/{each:.2f} [{low[at]:.1f}, {high[at]:.1f}]" for at, each in enumerate(ratios))
    by_rule = f"{plan.rule_sequences} x {plan.rule_probes:.0f}: {plan.rule_seconds:.1f} s | {rule}"
    return (
        f"| {cell[0]}, {cell[1]} | {target:.0%} | {len(runs)}: {_spread(traces):.1%}, {stated:.1%} | {cost:.2f} s | "
        f"{plan.told_sequences} x {plan.told_probes}: {plan.told_seconds:.2f} s | {told} | "
        + (by_rule if plan.rule_sequences < MOST_SEQUENCES else "out of its reach | ")
        + " |"
    )


def _spread(traces: Any) -> float:
    """Relative standard deviation."""
    return float(traces.std(ddof=1) / traces.mean())


def _check(cell: Cell, kind: str, kinds: Mapping[str, Sequence[Row]]) -> str:
    """What was run for real, beside what was expected, and how far its mean is from that of ours."""
    runs, ours = kinds[kind], np.array([row["trace"] for row in kinds["ours"]])
    plan, seconds = _plan(kinds, runs[0]["rse"]), fmean(row["seconds_of_run"] for row in runs)
    expected = plan.told_seconds if kind == "told" else plan.rule_seconds
    probes = runs[0]["probes"] or round(fmean(row["stopped"] for row in runs))
    traces = np.array([row["trace"] for row in runs])
    return (
        f"{cell} {kind} {runs[0]['sequences']} x {probes}: error {_spread(traces):.1%} of {len(runs)} runs, "
        f"{runs[0]['rse']:.1%} expected; {seconds:.2f} s, {expected:.2f} expected; "
        f"mean {traces.mean() / ours.mean() - 1:+.1%} of ours"
    )


if __name__ == "__main__":
    main()
