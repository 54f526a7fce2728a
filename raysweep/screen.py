"""What the terminal shows: a plan, a status, traces."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from raysweep.estimates import Plan
from raysweep.flatter import Change, changes, verdict
from raysweep.printable import duration, printable
from raysweep.scores import Column


def print_plan(plan: Plan) -> None:
    """Print a plan on stdout: stages by kind, metrics to ask for, costs and warnings."""
    console = _console()
    table = Table(
        title=f"{printable(plan.name)}: {plan.num_variants} variants, {plan.num_trials} trials", title_justify="left"
    )
    for name in ("stage", "all", "done", "to do", "memory", "time to do"):
        table.add_column(name, justify="left" if name == "stage" else "right")
    for kind, total in plan.stages.items():
        done = plan.stages_done.get(kind, 0)
        spent = duration(plan.seconds[kind]) if kind in plan.seconds and total > done else ""
        memory = _size(plan.memory_bytes[kind]) if kind in plan.memory_bytes else ""
        table.add_row(kind, str(total), str(done), str(total - done), memory, spent)
    console.print(table)
    if plan.num_parameters:
        least, most = plan.num_parameters
        span = f"{least:,}" if least == most else f"{least:,} to {most:,}"
        console.print(f"parameters         {span}")
    if plan.memory_bytes_per_worker:
        of = f" of a GPU's {_size(plan.gpu_memory_bytes)}" if plan.gpu_memory_bytes else ""
        host = f", and {_size(plan.host_bytes_per_worker)} of the host's" if plan.host_bytes_per_worker else ""
        console.print(f"memory per worker  about {_size(plan.memory_bytes_per_worker)} at most{of}{host}")
    console.print(
        f"disk to take       about {_size(plan.disk_bytes)}, and {_size(plan.state_bytes)} a gang while training"
    )
    console.print(f"tokens to compute  {plan.tokens:,}, of {plan.tokens_seen:,} seen by all trials")
    console.print(f"FLOPs to do        {plan.flops:.3g}")
    at = f"{plan.mfu:.0%} MFU of {plan.peak_flops / 1e12:g} TFLOP/s"
    console.print(f"GPU-hours          {plan.gpu_hours:.3g} at {at}")
    if plan.flatness_rse is not None:
        console.print(
            f"Hessian traces     to about {plan.flatness_rse:.1%} relative standard error, if they vary as those of "
            "Llamas of 2 to 5 M parameters do"
        )
    if plan.wall_seconds is not None:
        unknown = [
            kind
            for kind, total in plan.stages.items()
            if kind not in plan.seconds and total > plan.stages_done.get(kind, 0)
        ]
        but = f", without {', '.join(unknown)}" if unknown else ""
        about = "at least" if unknown else "about"
        console.print(
            f"wall-clock         {about} {duration(plan.wall_seconds)} with one gang, by {plan.num_measured} stages "
            f"measured in this store{but}"
        )
    for choice in plan.choices:
        console.print(printable(choice), soft_wrap=True)
    console.print(f"run                {plan.run}")
    console.print(_metrics(plan.columns))
    if plan.note:
        console.print(printable(plan.note))
    for warning in plan.warnings:
        console.print(Text(f"warning: {printable(warning)}", style="yellow"), soft_wrap=True)


def _metrics(columns: Sequence[Column]) -> Table:
    """By kind, without errors and counts, which the JSON document has."""
    shown = [column for column in columns if column.metric.direction]
    table = Table(box=None, pad_edge=False, show_header=False)
    for kind in dict.fromkeys(column.kind for column in shown):
        of_kind = [column for column in shown if column.kind == kind]
        names = ["/".join(filter(None, (column.task, column.metric.name))) for column in of_kind]
        table.add_row(f"{kind}/", ", ".join(map(printable, names)))
    table.title, table.title_justify = "metrics for search.objectives and its scheduler (all of them: --json)", "left"
    return table


def _size(num_bytes: float) -> str:
    for unit in ("KiB", "MiB", "GiB"):
        num_bytes /= 1024
        if num_bytes < 1000:
            return f"{num_bytes:.3g} {unit}"
    return f"{num_bytes / 1024:,.1f} TiB"


def print_status(status: Mapping[str, Any]) -> None:
    """Print on stdout what `runs.status` counts: stages by kind, and what failed."""
    console = _console()
    title = f"run {status['run']}: {status['num_trials']} of {status['num_trials_planned']} trials started"
    table = Table(title=printable(title), title_justify="left")
    names = [name for name in ("done", "diverged", "failed", "pruned", "to_do") if name != "pruned" or status["pruned"]]
    for name in ("stage", *names):
        table.add_column(name.replace("_", " "), justify="left" if name == "stage" else "right")
    for kind, counts in status["stages"].items():
        table.add_row(printable(kind), *(str(counts[name]) for name in names))
    console.print(table)
    for failure in status["failures"]:
        text = f"failed: {failure['stage']} ({failure['attempts']} tries): {failure['cause']}"
        console.print(Text(printable(text), style="red"))


def print_runs(runs: Sequence[Mapping[str, Any]]) -> None:
    """Runs of a store, on stdout."""
    table = _numbers("run", "state", "trials", "last active (UTC)", "size")
    for run in runs:
        trials = f"{run['num_trials_done']}/{run['num_trials']}"
        when = run["last_active"].removesuffix("+00:00").replace("T", " ")
        table.add_row(printable(run["name"]), run["state"], trials, when, _size(run["num_bytes"]))
    _console().print(table if runs else "no runs yet")


def print_garbage(garbage: Sequence[Mapping[str, Any]], *, deleted: bool) -> None:
    """What may go, or went, on stdout."""
    console = _console(soft_wrap=True)
    for each in garbage:
        text = f"{each['kind']:8} {_size(each['num_bytes']):>9}  {each['name']}: {each['reason']}"
        console.print(Text(printable(text)))
    total = _size(sum(each["num_bytes"] for each in garbage))
    console.print(
        f"{total} in {len(garbage)} {'deleted' if deleted else 'can be deleted'}" if garbage else "nothing to free"
    )


def print_traces(measured: Sequence[Mapping[str, Any]], differences: Sequence[Mapping[str, Any]]) -> None:
    """What `raysweep trace` has measured, on stdout."""
    console = _console(soft_wrap=True)
    for each in measured:
        share = (
            ""
            if each["num_parameters_measured"] == each["num_parameters"]
            else (f", {each['num_parameters_measured']:,} of them measured")
        )
        console.print(f"{printable(each['model'])}: {each['num_parameters']:,} parameters{share}", style="bold")
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
            f"of {each['objective']}, {each['reduction']}; {each['num_tokens']:,} tokens in sequences of "
            f"{each['sequence_length']}, {each['num_probes']} probes, {each['num_fisher_draws']} label draws: "
            f"{each['seconds']:.1f} s, "
            f"{each['gradient_equivalents']:.0f} gradients of a batch",
            style="dim",
        )
        for on, text, where in (
            ("", "text", each),
            (" on its own samples", "samples (--samples)", each.get("samples")),
        ):
            if where and not where["target_reached"]:
                more = text if where["stopped_by"] == "text" else "units (--max-units)"
                console.print(f"the target error was not reached{on}: it takes more {more}", style="yellow")
        if "loss" in each:
            console.print(
                f"loss on the first {each['num_loss_sequences']} sequences: "
                f"{each['loss']:.4f} ± {each['loss_stderr']:.2g} nats per token"
            )
    by_model = {each["model"]: each for each in measured}
    for each in differences:
        console.print(
            f"loss of {printable(each['model'])} less that of {printable(each['less'])}, sequence by sequence: "
            f"{each['loss_difference']:+.4f} ± {each['loss_difference_stderr']:.2g} nats per token (standard error)"
        )
        low, high = each["hessian_trace_difference_interval"]
        console.print(
            f"Hessian trace of {printable(each['model'])} less that of {printable(each['less'])}: "
            f"{each['hessian_trace_difference']:.4g} "
            f"± {each['hessian_trace_difference_stderr']:.2g} (95 %: {low:.4g} to {high:.4g})"
        )
        found = changes(by_model[each["model"]], by_model[each["less"]], each)
        console.print(_changes(found, model=printable(each["model"]), less=printable(each["less"])))
        num = by_model[each["model"]].get("num_shape_sequences")
        said = verdict(
            found,
            printable(each["model"]),
            printable(each["less"]),
            num_sequences=num,
            loss_difference=(each["loss_difference"], each["loss_difference_stderr"]),
        )
        console.print(said, style="bold")
    if differences:
        console.print(
            "intervals of traces hold the chance of probe vectors and of the text; those of other measures, all of the "
            "same few sequences, that of probe vectors alone. ?: by chance it may be the other",
            style="dim",
        )


def _changes(found: Sequence[Change], *, model: str, less: str) -> Table:
    table = _numbers("measure", model, less, "difference", "95 %", "flatter", "survives rescaling")
    for each in found:
        between = "" if each.low is None or each.high is None else f"{each.low:.3g} to {each.high:.3g}"
        flatter = (model if each.difference < 0 else less) + ("" if each.is_sure else "?")
        if each.is_equal:
            flatter = "equal"
        numbers = (f"{value:.4g}" for value in (each.value, each.of_other, each.difference))
        survives = "yes" if each.survives_rescaling else "no"
        table.add_row(each.measure.replace("_", " "), *numbers, between, flatter, survives)
    for column in table.columns:
        # Whole numbers even where the line is longer than a narrow screen or a pipe's 80 columns.
        column.no_wrap = True
        column.min_width = max(len(str(cell)) for cell in (column.header, *column.cells))
    return table


def _shape(shape: Mapping[str, float]) -> Table:
    # What the Lanczos process has converged to says nothing of other text, nor of other random vectors.
    table = _numbers("on a few sequences", "", "stderr", "converged to")
    for name, value in shape.items():
        if not name.endswith(("_error", "_stderr")):
            errors = (shape.get(f"{name}{suffix}") for suffix in ("_stderr", "_error"))
            cells = ("" if error is None else f"{error:.2g}" for error in errors)
            table.add_row(name.replace("_", " "), f"{value:.4g}", *cells)
    return table


def _blocks(blocks: Mapping[str, Mapping[str, float | None]]) -> Table:
    table = _numbers("block", "Hessian", "stderr", "Fisher", "stderr")
    for name, part in blocks.items():
        keys = ("hessian_trace", "hessian_trace_stderr", "fisher_trace", "fisher_trace_stderr")
        table.add_row(printable(name), *("" if (value := part[key]) is None else f"{value:.4g}" for key in keys))
    return table


def _numbers(first: str, *others: str) -> Table:
    """A bare table: names on the left, numbers right-aligned after them."""
    table = Table(box=None, pad_edge=False)
    table.add_column(first)
    for name in others:
        table.add_column(name, justify="right")
    return table


def _console(**more: Any) -> Console:
    """Of stdout. What is in brackets or between colons is text here, no markup."""
    return Console(file=sys.stdout, highlight=False, markup=False, emoji=False, **more)
