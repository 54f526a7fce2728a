"""Texts of others that would steer a terminal, turn what stands beside them, or run in a page: shown as their codes."""

import unicodedata
from dataclasses import replace

import pytest
from tiny import EMPTY, TINY, put

from raysweep.cli import main
from raysweep.printable import printable
from raysweep.run_files import StageRow, TrialRow
from raysweep.runs import Run
from raysweep.store import Store

STEERS = "\x1b]0;title\x07\x1b[2J\x9b31m\r\b"
TURNS = "\u202e\u2066\u200b\u2028"
MARKS = "<img src=x onerror=alert(1)>[bold red]{{7*7}}</script>"
HOSTILE = STEERS + TURNS + MARKS


def inert(text: str) -> bool:
    """Whether nothing but what can be seen, and line breaks, is in a text."""
    return all(
        letter in "\n\t" or unicodedata.category(letter) not in ("Cc", "Cf", "Cs", "Zl", "Zp") for letter in text
    )


@pytest.fixture
def hostile(store: Store) -> Store:
    """A store of one run in which every text of others is hostile."""
    run = Run.create(store, "r", sweep_text=f"# {HOSTILE}", identity="{}")
    put(store, "pretrain-1")
    with store.claim("sft-1"):
        record = replace(EMPTY, id="sft-1", kind="sft", metrics={"score": 0.5, "valid_score": 0.5, HOSTILE: 1.0})
        known = {"started": HOSTILE, "host": HOSTILE, "device": HOSTILE, "git_commit": HOSTILE}
        known |= {"wall_seconds": 1.0, "versions": {HOSTILE: HOSTILE}}
        store.commit(replace(record, spec={"lr": 0.1, "seed": 0}, provenance=known), store.work_dir("sft-1"))
    stages = (
        StageRow("pretrain-1", "pretrain", 1, "pretrain-1", None, {}),
        StageRow("sft-1", "sft", 1, "pretrain-1", HOSTILE, {HOSTILE: "pretrain-1"}),
        StageRow("probe-1", HOSTILE, 1, "pretrain-1", HOSTILE, {}),
    )
    run.add_trial(TrialRow(HOSTILE, HOSTILE, {f"pretrain.{HOSTILE}": HOSTILE}, 0, stages))
    run.add_failure("probe-1", kind=HOSTILE, trial=HOSTILE, cause=HOSTILE, log=HOSTILE)
    run.note_planned({"num_trials": 1, "stages": {HOSTILE: 1}})
    return store


def test_no_command_lets_it_through(hostile, capsys, tmp_path):
    commands = [[name, "r", *more] for name in ("status", "rank", "report") for more in ([], ["--json"])]
    commands += [["status", HOSTILE], ["export", "r", "--to", str(tmp_path / "out"), "--checkpoint", HOSTILE]]
    said = ""
    for command in commands:
        assert main([*command, "--store", str(hostile.root)]) in (0, 1, 2)
        said += (now := "".join(capsys.readouterr()))
        assert inert(now), command
    assert printable(STEERS[:3]) in said
    page = (hostile.root / "runs" / "r" / "report.html").read_text()
    assert "<img src=x" not in page
    body = page[: page.index("<script")]
    assert inert(body)
    assert "[bold red]" in body


@pytest.mark.parametrize(
    "text", [f"name: '{MARKS}'\n", f"{HOSTILE}: 1\n", TINY + f'seeds: ["{MARKS}"]\n', STEERS, TURNS]
)
def test_nor_does_an_error_about_a_sweep_file(text, tmp_path, capsys):
    path = tmp_path / "x.yaml"
    path.write_text(text)
    assert main(["plan", str(path), "--store", str(tmp_path / "store")]) == 2
    said = "".join(capsys.readouterr())
    assert inert(said)
    assert said.count("\n") >= 1
