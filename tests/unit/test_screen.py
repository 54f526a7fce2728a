"""What the terminal shows of a run, and the doctor."""

import json
from dataclasses import replace
from io import StringIO

import pytest
from ended import ended
from rich.console import Console

from raysweep import cli
from raysweep.board import Board
from raysweep.doctor import checks
from raysweep.estimates import estimate
from raysweep.events import Event, StageEnded, StageFailed, StageProgress, StageStarted, TrialStarted
from raysweep.progress import Progress
from raysweep.runners import run_sweep
from raysweep.runners.journal import trial_row
from raysweep.screen import print_plan, print_status
from raysweep.space import load
from raysweep.store import Store
from raysweep.worker import Reached

EVIL = "[/] [red] :smile: \x1b]0;title\x07 \u202e"


def board(space, *, terminal: bool) -> tuple[Board, StringIO]:
    out = StringIO()
    return Board(space, console=Console(file=out, force_terminal=terminal, width=200, height=40)), out


def result(stage, trial, *, event: str = "finished", **metrics: float) -> StageEnded:
    """As `runners.chain.told` has it."""
    of_spec = {name: getattr(stage.spec, name, None) for name in ("lr", "seed")}
    of_stage = {"kind": stage.kind, "step": stage.step, "task": stage.task}
    return ended(stage.id, event=event, trial=trial.id, wall_seconds=2.0, metrics=metrics, **of_spec, **of_stage)


def events_of(space, *, point=None) -> list[Event]:
    """Of a trial that has fine-tuned its first checkpoint; the higher rate looks better, by the test score alone."""
    trial = space.trial(point or {"pretrain.optimizer.lr": 0.01}, 0)
    tuned = [stage for stage in trial.stages if stage.kind == "sft" and stage.step == 6]
    pretrain = {"trial": trial.id, "stage": trial.stages[1].id, "kind": "pretrain"}
    scored = [
        result(stage, trial, score=score, valid_score=valid, event=event)
        for stage, (score, valid, event) in zip(tuned, [(0.625, 0.7, "found"), (0.9, 0.6, "finished")], strict=True)
    ]
    return [
        TrialStarted(row=trial_row(trial)),
        result(trial.stages[0], trial, event="found"),
        StageStarted(**pretrain),
        StageProgress(**pretrain, at=Reached(3, tokens_per_second=1234.0)),
        *scored,
        StageFailed(trial=trial.id, stage="flatness-x", kind="flatness", cause=EVIL, log="", retry=False),
    ]


def test_plain_lines_where_there_is_no_terminal(tiny_space):
    shown, out = board(tiny_space, terminal=False)
    with shown:
        for event in events_of(tiny_space):
            shown.show(event)
    text = " ".join(out.getvalue().split())
    assert r"failed: flatness-x: [/] [red] :smile: \x1b]0;title\x07 \u202e" in text
    assert "tokenize 1/1, pretrain 0/4" in text
    assert "sft 2/8" in text
    assert "1 failed" in text
    assert "best so far 62.5 % lr 0.01 · step 6" in text
    assert "\x1b" not in text


def test_a_live_table_on_a_terminal(tiny_space):
    shown, out = board(tiny_space, terminal=True)
    with shown:
        for event in events_of(tiny_space):
            shown.show(event)
    text = out.getvalue()
    assert "1,234 tokens/s" in text
    assert "1. 62.5 %  lr 0.01 · step 6" in text
    assert "\x1b[" in text


@pytest.mark.parametrize("terminal", [True, False])
def test_markup_in_a_label_is_text(sweep_file, terminal):
    """A named value `[/]` was taken for markup and ended the run."""
    from tiny import TINY

    label = "[/] \\e]0;x\\a [bold]"
    text = TINY.replace(
        "pretrain.optimizer.lr: {grid: [1e-2, 3e-3]}", f'pretrain.optimizer.lr: {{grid: {{"{label}": 1e-2}}}}'
    )
    space = load(sweep_file(text))
    shown, out = board(space, terminal=terminal)
    value = space.values("pretrain.optimizer.lr")[0]
    with shown:
        for event in events_of(space, point={"pretrain.optimizer.lr": value}):
            shown.show(event)
    assert r"lr [/] \x1b]0;x\x07 [bold] · step 6" in out.getvalue()
    assert "\x1b]0" not in out.getvalue()


def test_a_score_counts_once_all_rates_are_known(tiny_space):
    progress = Progress(tiny_space)
    trial, *others = events_of(tiny_space)
    scored = [event for event in others if isinstance(event, StageEnded) and event.kind == "sft"]
    for event in (trial, scored[1]):
        progress.take(event)
    assert progress.best(1) == []
    progress.take(scored[0])
    (best,) = progress.best(3)
    assert (best.score, best.step) == (0.625, 6)  # Of the rate that validation picked, from an earlier run.


def test_stages_in_work_are_no_more_than_workers(tiny_space):
    progress = Progress(tiny_space)
    trial, *_ = events_of(tiny_space)
    progress.take(trial)
    split = [stage for stage in tiny_space.trial({"pretrain.optimizer.lr": 0.01}, 0).stages if stage.kind == "sft"]
    for stage in split:
        progress.take(StageStarted(trial=trial.row.trial, stage=stage.id, kind="sft"))
    assert progress.running("sft") == 1  # A gang of one.


def test_rest_is_known_when_each_kind_has_been_seen(tiny_space):
    progress = Progress(tiny_space)
    trial = tiny_space.trial({"pretrain.optimizer.lr": 0.01}, 0)
    progress.take(TrialStarted(row=trial_row(trial)))
    first = {stage.kind: stage for stage in trial.stages if stage.step in (None, 6)}
    for stage in first.values():
        assert progress.rest_seconds(10.0) is None
        progress.take(result(stage, trial, score=0.5, valid_score=0.5), at_seconds=10.0)
    # 7 kinds took 2 s each in 10 s; of 29 stages 22 are left.
    rest = sum(map(progress.total, progress.kinds)) * 2 * 10 / 14 - 10
    assert progress.rest_seconds(10.0) == pytest.approx(rest)
    assert progress.rest_seconds(13.0) == pytest.approx(rest - 3.0)  # It counts down between stages.


def test_totals_are_of_distinct_stages_of_all_variants(sweep_file):
    from tiny import TINY

    seeds = "pretrain.data.grammar_seed: {grid: [0, 1, 2]}"
    space = load(sweep_file(TINY.replace("pretrain.optimizer.lr: {grid: [1e-2, 3e-3]}", seeds)))
    assert Progress(space).total("tokenize") == 3  # Was "3/1".


def test_a_time_that_leaves_kinds_out_is_said_to_be_the_least(tiny_space, store, capsys):
    plan = replace(estimate(tiny_space, store, mfu=0.4, peak_flops=1e15), wall_seconds=28.0, num_measured=2)
    kinds = [kind for kind, total in plan.stages.items() if total]
    print_plan(replace(plan, seconds=dict.fromkeys(kinds, 1.0)))
    assert "wall-clock         about 0:28 with one gang" in capsys.readouterr().out
    print_plan(replace(plan, seconds=dict.fromkeys(kinds[1:], 1.0)))
    assert "wall-clock         at least 0:28 with one gang" in capsys.readouterr().out


def test_status_counts_what_is_not_started(tiny_space, store, capsys, monkeypatch):
    import raysweep.runners.inline as inline

    def stop(trial, *args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(inline, "run_chain", stop)
    with pytest.raises(KeyboardInterrupt):
        run_sweep(tiny_space, store, runner="inline", name="stopped")
    assert cli.main(["status", "stopped", "--store", store.url, "--json"]) == 0
    status = json.loads(capsys.readouterr().out)
    assert (status["num_trials"], status["num_trials_planned"]) == (1, 2)
    assert status["stages"]["sft"] == {"done": 0, "diverged": 0, "failed": 0, "pruned": 0, "to_do": 8}
    print_status(status | {"failures": [{"stage": "sft-1", "attempts": 1, "cause": EVIL}]})
    shown = capsys.readouterr().out
    assert "1 of 2 trials started" in shown
    assert r"[/] [red] :smile: \x1b]0;title\x07 \u202e" in " ".join(shown.split())


def test_errors_and_logs_do_not_steer_the_terminal(tmp_path, capsys):
    assert cli.main(["rank", EVIL, "--store", str(tmp_path)]) == 2
    text = capsys.readouterr().err
    assert r"\x1b]0;title" in text
    assert "\x1b" not in text


@pytest.mark.parametrize(
    ("command", "words"),
    [
        (["plan", "x.yaml", "--mfu", "0"], "argument --mfu: '0': must be a number above 0, and at most 1"),
        (["plan", "x.yaml", "--mfu", "45"], "argument --mfu: '45': must be a number above 0, and at most 1"),
        (["plan", "x.yaml", "--peak-tflops", "nan"], "argument --peak-tflops: 'nan': must be a finite number above 0"),
        (
            ["plan", "x.yaml", "--peak-tflops", "fast"],
            "argument --peak-tflops: 'fast': must be a finite number above 0",
        ),
        (["trace", "m", "--samples", "1e3"], "argument --samples: '1e3': must be a whole number"),
        (["rank", "r", "--budget", "lots"], "argument --budget: 'lots' is no number of hours; write 20gpuh, 20h or 20"),
        (["plan", "x.yaml", "--gpu", "V100"], "argument --gpu: 'V100' is not known; known are B200, H100 PCIe"),
        (["trace", "m", "--seed", "-1"], "argument --seed: -1: must be 0 or more"),
        (["status", "r", "--store", ""], "argument --store: is empty; name one, or leave the option out"),
        (["run", "x.yaml", "--run", ""], "argument --run: is empty"),
    ],
)
def test_options_are_checked_before_anything_else(command, words, capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main(command)
    assert ended.value.code == 2
    assert words in capsys.readouterr().err


def test_doctor_finds_this_machine_fit(tmp_path):
    found = {check.name: check for check in checks(Store(tmp_path))}
    assert {"python", "packages", "torch", "compiler", "deepspeed", "shared memory", "store"} == set(found)
    assert found["torch"].ok
    assert found["store"].ok


def test_doctor_tells_what_it_knows_while_it_looks_on(tmp_path, monkeypatch, capsys):
    told = []
    monkeypatch.setattr("raysweep.doctor._deepspeed", lambda: (True, told.append(capsys.readouterr().out) or "fit"))
    assert cli.main(["doctor", "--store", str(tmp_path)]) == 0
    assert [line.split(":")[0] for line in told[0].splitlines()] == [
        f"ok    {name}" for name in ("python", "packages", "torch", "compiler")
    ]
    assert capsys.readouterr().out.startswith("ok    deepspeed: fit\nok    shared memory: ")


def test_doctor_names_what_is_wrong(tmp_path):
    file = tmp_path / "file"
    file.write_text("")
    broken = {check.name: check for check in checks(Store(file / "store"))}["store"]
    assert not broken.ok
    assert "Not a directory" in broken.message
