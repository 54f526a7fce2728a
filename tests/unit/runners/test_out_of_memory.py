"""Which stages take less after a process of theirs was killed."""

import os

from ended import ended

from raysweep.events import StageFailed, StageStarted
from raysweep.runners import out_of_memory
from raysweep.runners.out_of_memory import AtWork, note_kills, times_out_of_memory, under_way_in
from raysweep.worker import StateDir


def test_what_a_trial_had_in_work_takes_less_the_next_time(tiny_space, store):
    trial, other = (tiny_space.trial({"pretrain.optimizer.lr": lr}, 0) for lr in (1e-2, 3e-3))
    trained = next(stage for stage in trial.stages if stage.state_key)
    tuned, given_up = [stage for stage in trial.stages if stage.kind == "sft"][:2]
    at_work = AtWork()
    for each in (trial, other):
        for stage in each.stages:
            at_work.take(StageStarted(trial=each.id, stage=stage.id, kind=stage.kind))
    for stage in trial.stages:
        if stage in (tuned, given_up):
            told = {"trial": trial.id, "stage": stage.id, "kind": stage.kind}
            at_work.take(StageFailed(**told, cause="c", log="l", retry=stage == tuned))
        elif stage != trained:
            at_work.take(ended(stage.id, trial=trial.id))
    for times in (1, 2):
        assert at_work.note_out_of_memory(trial, store)
        keys = {stage.state_key or stage.id for each in (trial, other) for stage in each.stages}
        noted = {key: number for key in keys if (number := times_out_of_memory(store.state_dir(key)))}
        assert noted == {trained.state_key: times, tuned.id: times}
    for stage in (trained, tuned):
        at_work.take(ended(stage.id, trial=trial.id))
    assert not at_work.note_out_of_memory(trial, store)


def test_only_a_try_that_never_ended_was_killed_for_memory(tmp_path, monkeypatch):
    states, num_kills, vanished = StateDir(tmp_path), 3, []
    monkeypatch.setattr(out_of_memory, "_kills", lambda: ("of-this-start", num_kills))

    def begin_and_vanish(rank: int) -> None:
        vanished.append(under_way_in(states, rank=rank, times=times_out_of_memory(states)))
        vanished[-1].__enter__()

    with under_way_in(states, rank=0, times=0):
        assert os.listdir(tmp_path) == ["begun-0-0-3-of-this-start"]
        num_kills = 4
    assert not note_kills(states)
    begin_and_vanish(0)
    assert not note_kills(states)  # Of something else.
    for times in (1, 2):
        begin_and_vanish(0)
        begin_and_vanish(1)
        num_kills += 1
        assert note_kills(states)
        assert times_out_of_memory(states) == times  # However many ranks were begun.
    begin_and_vanish(0)
    num_kills += 1
    monkeypatch.setattr(out_of_memory, "_kills", lambda: ("of-another", num_kills))
    assert not note_kills(states)
    assert sorted(os.listdir(tmp_path))[0].startswith("begun-0-2-6")  # Not this kernel's to tell.
