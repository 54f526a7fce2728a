"""Finished work that is deleted or damaged while a run goes on, or behind a URL: made again, in the same run."""

import shutil
from pathlib import Path

import pytest
from tiny import results_of

from raysweep.results import Results
from raysweep.runners import run_sweep
from raysweep.runs import Run


def cut_short(folder: Path) -> None:
    next(folder.glob("*.*")).write_text("")


@pytest.mark.parametrize("damage", [shutil.rmtree, cut_short])
@pytest.mark.parametrize("kind", ["tokenize", "pretrain"])
def test_what_is_lost_while_a_run_goes_on_is_made_again(kind, damage, lone_space, store, untouched):
    """The first of a kind is lost as soon as it is finished, before anything reads it."""
    lost: list[Path] = []

    def lose(event) -> None:
        if event.event == "finished" and event.kind == kind and not lost:
            lost.append(store.root / "stages" / event.stage)
            damage(lost[0])

    run = run_sweep(lone_space, store, runner="inline", show=lose)
    assert lost
    assert run.failures() == []
    assert results_of(run) == untouched(lone_space)


def test_what_is_lost_behind_a_url_while_a_run_goes_on_is_made_again(lone_space, machine, url, untouched):
    store = machine("one")
    lost: list[str] = []

    def lose(event) -> None:
        if event.event == "finished" and event.kind == "tokenize" and not lost:
            lost.append(event.stage)
            corrupt(url, f"stages/{lost[0]}/meta.json")
            shutil.rmtree(store.root / "stages" / lost[0])

    run = run_sweep(lone_space, store, runner="inline", show=lose)
    assert lost
    assert run.failures() == []
    assert results_of(run) == untouched(lone_space)


def test_corrupt_objects_are_made_again_and_a_report_does_without(lone_space, machine, url, untouched, caplog):
    run = run_sweep(lone_space, machine("one"), runner="inline")
    [folder] = {record.id for record in run.store.records() if record.kind == "tokenize"}
    finetuned = next(record.id for record in run.store.records() if record.kind == "sft")
    corrupt(url, f"stages/{folder}/meta.json")
    corrupt(url, f"stages/{finetuned}/predictions.jsonl")
    trained = [record.id for record in run.store.records() if record.kind == "pretrain"]
    for stage_id in trained:
        corrupt(url, f"stages/{stage_id}/curve.jsonl")
    report = Results(Run.find(machine("two"), run.name)).write_report()
    assert report.read_text().startswith("<!doctype html>")
    assert "predictions.jsonl has 7 bytes" in caplog.text
    assert not list(report.parents[2].rglob("*.safetensors"))  # Nothing is downloaded that is not shown.
    again = run_sweep(lone_space, machine("three"), runner="inline")
    assert again.failures() == []
    assert results_of(again) == untouched(lone_space)


def corrupt(url: str, name: str) -> None:
    import fsspec

    fs, root = fsspec.core.url_to_fs(url)
    assert fs.exists(f"{root}/{name}")
    fs.pipe_file(f"{root}/{name}", b"corrupt")
