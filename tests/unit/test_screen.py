"""What the terminal shows of a run, and the doctor."""

from io import StringIO

from rich.console import Console

from raysweep.doctor import checks
from raysweep.runners.journal import trial_row
from raysweep.screen import Board
from raysweep.store import Store


def board(space, *, terminal: bool) -> tuple[Board, StringIO]:
    out = StringIO()
    return Board(space, console=Console(file=out, force_terminal=terminal, width=100, height=40)), out


def events_of(space) -> list[dict]:
    trial = space.trial({"pretrain.optimizer.lr": 0.01}, 0)
    sft = next(stage for stage in trial.stages if stage.kind == "sft")
    common, scored = {"trial": trial.id}, {"score": 0.625}
    return [
        {"event": "trial", "row": trial_row(trial)},
        {"event": "found", "stage": trial.stages[0].id, "kind": "tokenize", **common},
        {"event": "started", "stage": trial.stages[1].id, "kind": "pretrain", **common},
        {"event": "progress", "stage": trial.stages[1].id, "kind": "pretrain", "tokens_per_second": 1234.0, **common},
        {
            "event": "finished",
            "stage": sft.id,
            "kind": "sft",
            "wall_seconds": 2.0,
            "metrics": scored,
            **common,
        },
        {"event": "failed", "stage": "flatness-x", "kind": "flatness", "cause": "no space", "retry": False, **common},
    ]


def test_plain_lines_where_there_is_no_terminal(tiny_space):
    shown, out = board(tiny_space, terminal=False)
    with shown:
        for event in events_of(tiny_space):
            shown.show(event)
    text = " ".join(out.getvalue().split())
    assert "failed: flatness-x: no space" in text
    assert "tokenize 1/1, pretrain 0/4" in text
    assert "sft 1/8" in text
    assert "1 failed" in text
    assert "best so far optimizer.lr=0.01, seed 0 (0.625)" in text
    assert "\x1b[" not in text


def test_a_live_table_on_a_terminal(tiny_space):
    shown, out = board(tiny_space, terminal=True)
    with shown:
        for event in events_of(tiny_space):
            shown.show(event)
    text = out.getvalue()
    assert "1,234 tokens/s" in text
    assert "1. 0.625  optimizer.lr=0.01, seed 0" in text
    assert "\x1b[" in text


def test_doctor_finds_this_machine_fit(tmp_path):
    found = {check.name: check for check in checks(Store(tmp_path))}
    assert {"python", "packages", "torch", "compiler", "deepspeed", "shared memory", "store"} == set(found)
    assert found["torch"].ok
    assert found["store"].ok


def test_doctor_names_what_is_wrong(tmp_path):
    file = tmp_path / "file"
    file.write_text("")
    broken = {check.name: check for check in checks(Store(file / "store"))}["store"]
    assert not broken.ok
    assert "NotADirectoryError" in broken.message
