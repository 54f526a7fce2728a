"""Shares: stages of a trial that another gang than its own makes."""

from tiny import TINY

from raysweep.runners.chain import run_chain, run_share
from raysweep.runners.gang import Gang
from raysweep.space import load


def test_a_share_is_what_is_ready_and_not_made_yet(sweep_file, store):
    space = load(sweep_file(TINY))
    trial = space.trial({"pretrain.optimizer.lr": 1e-2}, 0)
    gang, events = Gang(store, space.resources.default, report=lambda event: None), []
    first, _ = [stage.id for stage in trial.stages if stage.kind == "pretrain"]
    tuned, other, *late = [stage.id for stage in trial.stages if stage.kind == "sft"]
    next(run_chain(trial, gang, max_retries=0, report=lambda event: None))

    def share(*ids):
        events.clear()
        run_share(trial, ids, gang, report=events.append)
        return [(event.event, event.stage) for event in events]

    made = store.get(tuned)
    store.discard(tuned)
    assert share(tuned, other, *late) == [("started", tuned), ("finished", tuned)], "nothing twice, nothing too early"
    assert (store.get(tuned).metrics, store.get(tuned).files) == (made.metrics, made.files)

    store.discard(tuned)
    (store.folder(first) / "model.safetensors").unlink()
    assert share(tuned) == [], "a lost checkpoint is for the trial's own gang to make again"
    gang.close()


def test_nothing_is_made_of_a_checkpoint_that_diverged(sweep_file, store):
    text = TINY.replace("{name: adamw, lr: 1e-2}", "{name: sgd, lr: 1e30}\n  clip_norm: null")
    space = load(sweep_file(text[: text.index("sweep:")] + text[text.index("flatness:") :]))
    trial = space.trial({}, 0)
    gang, events = Gang(store, space.resources.default, report=lambda event: None), []
    for _leg in run_chain(trial, gang, max_retries=0, report=lambda event: None):
        run_share(trial, {stage.id for stage in trial.stages if stage.state_key is None}, gang, report=events.append)
    gang.close()
    assert store.get(next(stage.id for stage in trial.stages if stage.kind == "pretrain")).status == "diverged"
    assert not events
