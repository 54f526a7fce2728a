"""What the terminal shows: the live board of a run, a plan, a status."""

from __future__ import annotations

import sys
import threading
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from raysweep.estimates import Plan
from raysweep.plan import chain
from raysweep.space import SearchSpace

# Seconds between plain lines where stderr is no terminal.
PLAIN_EVERY = 10.0


class Board:
    """The live board: a table on a terminal, else a line for every change of the counts, at most every 10 seconds.

    `show` takes the events of a run, from any thread.
    """

    def __init__(self, space: SearchSpace, *, console: Console | None = None) -> None:
        self._console = console or Console(stderr=True)
        search, seeds = space.declared.search, space.declared.seeds
        num_points = sum(1 for _ in space.points()) if search.name != "optuna" else search.num_trials or 0
        self._num_trials = num_points * len(seeds)
        base = chain(
            space.declared.pretrain,
            flatness=space.declared.flatness,
            indicators=space.declared.indicators,
            sft=space.declared.sft,
            seed=seeds[0],
        )
        self._per_trial = Counter(stage.kind for stage in base)
        self._done: dict[str, set[str]] = {}
        self._running: dict[str, str] = {}
        self._failed: dict[str, str] = {}
        self._seconds: Counter[str] = Counter()
        self._speeds: dict[str, tuple[float, float]] = {}
        self._scores: dict[str, tuple[float, str]] = {}
        self._points: dict[str, str] = {}
        self._began = self._last_line = time.monotonic()
        self._num_found = 0
        self._lock = threading.Lock()
        self._live: Live | None = None

    def __enter__(self) -> Board:
        if self._console.is_terminal:
            self._live = Live(
                console=self._console, get_renderable=self._render, refresh_per_second=4, redirect_stdout=False
            )
            self._live.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self._live:
            self._live.stop()
        else:
            self._console.print(self._line(), highlight=False, soft_wrap=True)

    def show(self, event: Mapping[str, Any]) -> None:
        """Take one event of the run."""
        with self._lock:
            self._take(event)
            if not self._live and self._is_worth_a_line(event):
                self._last_line = time.monotonic()
                self._console.print(self._line(), highlight=False, soft_wrap=True)

    def _take(self, event: Mapping[str, Any]) -> None:
        stage, kind = event.get("stage", ""), event.get("kind", "")
        match event["event"]:
            case "trial":
                row = event["row"]
                point = ", ".join(f"{path.removeprefix('pretrain.')}={value}" for path, value in row.point.items())
                self._points[row.trial] = f"{point or 'base'}, seed {row.seed}"
            case "started":
                self._running[stage] = kind
            case "progress" if event.get("tokens_per_second"):
                self._speeds[event["trial"]] = (time.monotonic(), event["tokens_per_second"])
            case "found" | "finished":
                self._running.pop(stage, None)
                self._failed.pop(stage, None)
                self._done.setdefault(kind, set()).add(stage)
                self._num_found += event["event"] == "found"
                if event["event"] == "finished":
                    self._seconds[kind] += event["wall_seconds"]
                    if "score" in event["metrics"]:
                        point = self._points.get(event["trial"], event["trial"])
                        self._scores[stage] = (event["metrics"]["score"], point)
            case "failed":
                self._running.pop(stage, None)
                if not event["retry"]:
                    self._failed[stage] = event["cause"]

    def _is_worth_a_line(self, event: Mapping[str, Any]) -> bool:
        if event["event"] == "failed" and not event["retry"]:
            self._console.print(f"failed: {event['stage']}: {event['cause']}", style="red", highlight=False)
        return time.monotonic() - self._last_line >= PLAIN_EVERY and event["event"] in ("finished", "found", "progress")

    def _total(self, kind: str) -> int:
        # What all trials share, such as one tokenizing, is counted as it turns up.
        return 1 if kind == "tokenize" else self._per_trial[kind] * self._num_trials

    def _eta(self) -> str:
        total = sum(map(self._total, self._per_trial))
        done = sum(map(len, self._done.values()))
        made = done - self._num_found
        if made <= 0 or done >= total:
            return "-"
        return _duration((time.monotonic() - self._began) / made * (total - done))

    def _speed(self) -> str:
        fresh = [speed for seen, speed in self._speeds.values() if time.monotonic() - seen < 10]
        return f"{sum(fresh):,.0f} tokens/s" if fresh else "-"

    def _best(self, most: int) -> list[tuple[float, str]]:
        by_point: dict[str, list[float]] = {}
        for score, point in self._scores.values():
            by_point.setdefault(point, []).append(score)
        means = [(sum(scores) / len(scores), point) for point, scores in by_point.items()]
        return sorted(means, reverse=True)[:most]

    def _line(self) -> str:
        kinds = (f"{kind} {len(self._done.get(kind, ()))}/{self._total(kind)}" for kind in self._per_trial)
        best = self._best(1)
        leader = f"; best so far {best[0][1]} ({best[0][0]:.3f})" if best else ""
        failed = f"; {len(self._failed)} failed" if self._failed else ""
        spent = _duration(time.monotonic() - self._began)
        return f"[{spent}] {', '.join(kinds)}{failed}; {self._speed()}; ETA {self._eta()}{leader}"

    def _render(self) -> Group:
        with self._lock:
            table = Table(box=None, pad_edge=False)
            for name in ("stage", "done", "of", "running", "failed", "seconds each"):
                table.add_column(name, justify="left" if name == "stage" else "right")
            running = Counter(self._running.values())
            failed = Counter(stage.rsplit("-", 1)[0] for stage in self._failed)
            for kind in self._per_trial:
                done = len(self._done.get(kind, ()))
                each = f"{self._seconds[kind] / done:.1f}" if done and self._seconds[kind] else ""
                cells = [
                    kind,
                    str(done),
                    str(self._total(kind)),
                    str(running[kind] or ""),
                    str(failed[kind] or ""),
                    each,
                ]
                table.add_row(*cells)
            spent = _duration(time.monotonic() - self._began)
            lines: list[Any] = [table, Text(f"{spent} · {self._speed()} · ETA {self._eta()}", style="dim")]
            lines += [Text(f"{place}. {score:.3f}  {point}") for place, (score, point) in enumerate(self._best(3), 1)]
            return Group(*lines)


def print_plan(plan: Plan) -> None:
    """A plan, on stdout."""
    console = Console(file=sys.stdout, highlight=False)
    table = Table(title=f"{plan.name}: {plan.num_variants} variants, {plan.num_trials} trials", title_justify="left")
    for name in ("stage", "all", "done", "to do"):
        table.add_column(name, justify="left" if name == "stage" else "right")
    for kind, total in plan.stages.items():
        done = plan.stages_done.get(kind, 0)
        table.add_row(kind, str(total), str(done), str(total - done))
    console.print(table)
    if plan.num_parameters:
        least, most = plan.num_parameters
        span = f"{least:,}" if least == most else f"{least:,} to {most:,}"
        console.print(f"parameters         {span}")
        console.print(f"memory per worker  about {plan.memory_bytes_per_worker / 2**30:.2f} GiB in pretraining")
    console.print(f"tokens to train    {plan.tokens:,}")
    console.print(f"FLOPs to do        {plan.flops:.3g}")
    at = f"{plan.mfu:.0%} MFU of {plan.peak_flops / 1e12:g} TFLOP/s"
    console.print(f"GPU-hours          {plan.gpu_hours:.3g} at {at}")
    if plan.flatness_rse is not None:
        console.print(
            f"Hessian traces     to about {plan.flatness_rse:.1%} relative standard error, as others have been"
        )
    if plan.note:
        console.print(plan.note)
    console.print(f"run                {plan.run}")


def print_status(status: Mapping[str, Any]) -> None:
    """A status, on stdout."""
    console = Console(file=sys.stdout, highlight=False)
    table = Table(title=f"run {status['run']}: {status['num_trials']} trials started", title_justify="left")
    for name in ("stage", "done", "diverged", "failed", "to do"):
        table.add_column(name, justify="left" if name == "stage" else "right")
    for kind, counts in status["stages"].items():
        table.add_row(kind, *(str(counts[name]) for name in ("done", "diverged", "failed", "to_do")))
    console.print(table)
    for failure in status["failures"]:
        console.print(
            Text(f"failed: {failure['stage']} ({failure['attempts']} tries): {failure['cause']}", style="red")
        )


def print_traces(found: Sequence[Mapping[str, Any]], differences: Sequence[Mapping[str, Any]]) -> None:
    """What `raysweep trace` has measured, on stdout."""
    console = Console(file=sys.stdout, highlight=False, soft_wrap=True)
    for each in found:
        share = (
            ""
            if each["num_parameters_measured"] == each["num_parameters"]
            else (f", {each['num_parameters_measured']:,} of them measured")
        )
        console.print(f"{each['model']}: {each['num_parameters']:,} parameters{share}", style="bold")
        # In expectation the two are one; without label draws so are their estimates.
        with_draws = any(where["num_fisher_draws"] for where in (each, each.get("samples")) if where)
        names = {"hessian": "Hessian", "gauss_newton": "Gauss-Newton" if with_draws else "Gauss-Newton = Fisher"}
        names |= ({"fisher": "Fisher"} if with_draws else {}) | {"residual": "residual (Hessian - Gauss-Newton)"}
        table = _numbers(
            "trace of", each["measured_on"], "stderr", *(("samples", "stderr") if "samples" in each else ())
        )
        for name, shown in names.items():
            cells = [
                f"{where[f'{name}_trace{suffix}']:.4g}"
                for where in (each, each.get("samples"))
                if where
                for suffix in ("", "_stderr")
            ]
            table.add_row(shown, *cells)
        console.print(table)
        if (samples := each.get("samples")) is not None:
            off, error = samples["relative_distance"], samples["relative_distance_stderr"]
            console.print(f"its own samples give a Hessian trace {off:+.1%} ± {error:.1%} off that on the text")
        if "shape" in each:
            console.print(_shape(each["shape"]))
        if "blocks" in each:
            console.print(_blocks(each["blocks"]))
            console.print(
                "Fisher traces of blocks are from label draws, Hessian traces from probes; the whole's are from both",
                style="dim",
            )
        console.print(
            f"of the {each['reduction']}; {each['num_tokens']:,} tokens in sequences of {each['sequence_length']}, "
            f"{each['num_probes']} probes, {each['num_fisher_draws']} label draws: {each['seconds']:.1f} s, "
            f"{each['gradient_equivalents']:.0f} gradients of a batch",
            style="dim",
        )
        for where in (each, each.get("samples")):
            if where and not where["target_reached"]:
                more = "text" if where["stopped_by"] == "text" else "units (--max-units)"
                console.print(f"the target error was not reached: it takes more {more}", style="yellow")
    for each in differences:
        low, high = each["hessian_trace_difference_interval"]
        console.print(
            f"Hessian trace of {each['model']} less that of {each['less']}: {each['hessian_trace_difference']:.4g} "
            f"± {each['hessian_trace_difference_stderr']:.2g} (95 %: {low:.4g} to {high:.4g})"
        )


def _shape(shape: Mapping[str, float]) -> Table:
    table = _numbers("on a few sequences", "", "error")
    for name, value in shape.items():
        if not name.endswith(("_error", "_stderr")):
            error = shape.get(f"{name}_error", shape.get(f"{name}_stderr"))
            table.add_row(name.replace("_", " "), f"{value:.4g}", "" if error is None else f"{error:.2g}")
    return table


def _blocks(blocks: Mapping[str, Mapping[str, float | None]]) -> Table:
    table = _numbers("block", "Hessian", "stderr", "Fisher", "stderr")
    for name, part in blocks.items():
        keys = ("hessian_trace", "hessian_trace_stderr", "fisher_trace", "fisher_trace_stderr")
        table.add_row(name, *("" if (value := part[key]) is None else f"{value:.4g}" for key in keys))
    return table


def _numbers(first: str, *others: str) -> Table:
    """A bare table: names on the left, numbers right-aligned after them."""
    table = Table(box=None, pad_edge=False)
    table.add_column(first)
    for name in others:
        table.add_column(name, justify="right")
    return table


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
