"""What Tune is made to do otherwise: gangs that Ray kills for their memory, and nodes that gangs are asked for on."""

from functools import partial
from types import SimpleNamespace

import pytest
from ray.air.execution._internal import RayActorManager
from ray.exceptions import OutOfMemoryError, RayActorError
from ray.tune.experiment import Trial
from ray.tune.utils.object_cache import _ObjectCache

from raysweep.errors import StoreError
from raysweep.runners.out_of_memory import TRIED_WITH_LESS
from raysweep.runners.room import Shape
from raysweep.runners.trainable import SHARE
from raysweep.runners.tune import _Ends, _GangRequest, _InOrder, _outliving_kills_for_memory

KILLED = "1 worker(s) were killed due to the node running low on memory. Memory on the node was 1.6GB"


def test_a_kill_for_memory_is_a_death_to_tune():
    taken = []
    manager = object.__new__(RayActorManager)
    manager._failed_actor_ids, manager._cleanup_actor = set(), lambda tracked_actor: None
    actor = SimpleNamespace(actor_id=1, _on_error=lambda actor, error: taken.append(error))
    task = SimpleNamespace(_tracked_actor=actor, _on_error=None)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="Caught unexpected exception"):
            manager._actor_task_failed(tracked_actor_task=task, exception=OutOfMemoryError(KILLED))
        with _outliving_kills_for_memory():
            manager._actor_task_failed(tracked_actor_task=task, exception=OutOfMemoryError(KILLED))
            with pytest.raises(RuntimeError, match="another"):
                manager._actor_task_failed(tracked_actor_task=task, exception=ValueError("another"))
    assert [(type(error), str(error)) for error in taken] == [(RayActorError, KILLED)] * 2


def _raise(config):
    raise StoreError("no bucket")


@pytest.mark.parametrize(
    ("cause", "take_less", "said"),
    [
        (KILLED, lambda config: True, f"{KILLED}; {TRIED_WITH_LESS}"),
        (KILLED, lambda config: False, KILLED),
        (KILLED, _raise, KILLED),
        ("its node has died", _raise, "its node has died"),
    ],
)
def test_a_lost_gang_says_whether_the_next_one_takes_less(cause, take_less, said, tmp_path, caplog):
    (tmp_path / "error").write_text(f"Failure # 1 (occurred at 2026-11-27_08-00-00)\n{cause}\nmore")
    trial = SimpleNamespace(error_file=str(tmp_path / "error"), config={"seed": 0}, trial_id="t")
    told = []
    ends = _Ends(None, told.append, None, prunes=False, take_less=take_less)
    ends.on_trial_recover(0, [], trial)
    ends.on_trial_error(0, [], trial)
    assert f"a trial goes on in another gang: {said}" in caplog.messages
    assert [event.cause for event in told] == [said]
    assert ("as much memory: no bucket" in caplog.text) == (cause == KILLED and take_less is _raise)


def trial_of(config, status="PENDING"):
    """As Tune has it."""
    return SimpleNamespace(
        trial_id="t", config=config, status=status, max_failures=2, placement_group_factory=SimpleNamespace()
    )


def test_a_gang_is_asked_for_on_the_node_that_has_room_for_it():
    scheduler, trial, share = _InOrder(), trial_of({"seed": 0}), trial_of({"seed": 0, SHARE: ("sft-1",)})
    scheduler.gangs = SimpleNamespace(node_of=lambda trial_id: f"node of {trial_id}")
    for each in (trial, share):
        scheduler.on_trial_add(None, each)
    assert trial.placement_group_factory.node == "node of t"
    assert (trial.max_failures, share.max_failures) == (2, 0), "what a share fails at is left to the trial's own gang"


def test_shares_that_wait_for_a_gang_end_with_the_last_trial():
    stopped, share = [], trial_of({SHARE: ("sft-1",)})
    for beside, wanted in (
        (trial_of({}, "RUNNING"), []),
        (trial_of({}), []),
        (trial_of({SHARE: ("sft-2",)}, "RUNNING"), []),
        (trial_of({SHARE: ("sft-2",)}), [share]),
    ):
        live = [share, beside]
        controller = SimpleNamespace(
            get_live_trials=lambda live=live: live, stop_trial=stopped.append, _tune_controller=tunes_controller([])
        )
        assert _InOrder().choose_trial_to_run(controller) is None
        assert stopped[:1] == wanted


def tunes_controller(without_room):
    """What the scheduler looks at: trials whose gangs wait for room, as these were asked for."""
    actors = {f"gang of {trial.trial_id}": trial for trial in without_room}
    return SimpleNamespace(
        _actor_cache=_ObjectCache(may_keep_one=True),
        _actor_manager=SimpleNamespace(pending_actors=[*actors, "one that is being removed"]),
        _actor_to_trial=actors | {"one that starts": Trial("stub", stub=True)},
    )


def test_a_gang_that_gets_free_takes_the_first_trial_that_waits_for_room():
    trials = [Trial("stub", stub=True, trial_id=key) for key in ("large", "first", "second")]
    for trial, workers in zip(trials, (8, 1, 1), strict=True):
        trial.placement_group_factory = _GangRequest(Shape(workers, 1, 0))
    tunes = tunes_controller(trials)
    controller = SimpleNamespace(get_live_trials=lambda: trials, _tune_controller=tunes)
    choose = partial(_InOrder().choose_trial_to_run, controller)
    assert choose() is None, "no gang is free"
    tunes._actor_cache.increase_max(_GangRequest(Shape(1, 1, 0)))
    assert tunes._actor_cache.cache_object(_GangRequest(Shape(1, 1, 0)), "gang")
    assert choose() is trials[1]
    tunes._actor_manager.pending_actors.clear()
    assert choose() is None, "a gang that starts is not thrown away"


def test_a_share_whose_gang_is_lost_is_no_failure(tmp_path, caplog):
    (tmp_path / "error").write_text("Failure # 1 (occurred at 2026-11-27_08-00-00)\nits node has died")
    trial, told = trial_of({SHARE: ("sft-1",)}), []
    trial.error_file = str(tmp_path / "error")
    _Ends(None, told.append, None, prunes=False, take_less=None).on_trial_error(0, [], trial)
    assert not told
    assert "another failed: its node has died" in caplog.text
