"""Which stages take less after their gang was killed."""

from ended import ended

from raysweep.events import StageFailed, StageStarted
from raysweep.runners.out_of_memory import AtWork, times_out_of_memory


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
