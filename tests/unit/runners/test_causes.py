"""Why a gang was lost, from what Tune writes down."""

import pytest
from ray.core.generated.common_pb2 import ActorDiedErrorContext
from ray.exceptions import ActorDiedError, OutOfMemoryError, RayActorError, RayTaskError

from raysweep.runners.gang import GangBroken
from raysweep.runners.out_of_memory import is_killed_for_memory
from raysweep.runners.tune import cause_of

NODE_DIED = "The actor died because its node has died. Node Id: 12ab\n\tthe actor's node was terminated unexpectedly"
DIED = ActorDiedError(ActorDiedErrorContext(error_message=NODE_DIED, class_name="RankActor", actor_id=bytes(16), pid=7))


def noted(*errors: Exception) -> str:
    """As `Trial.handle_error` of Tune writes them."""
    return "".join(f"Failure # {n} (occurred at 2026-11-26_08-00-00)\n{error}\n" for n, error in enumerate(errors, 1))


def failed(error: Exception) -> RayTaskError:
    try:
        raise error
    except Exception as cause:
        text = f"ray::GangTrainable.train()\n  File x, line 1\n{type(cause).__module__}.{type(cause).__name__}: {cause}"
        return RayTaskError("train", text, cause)


@pytest.mark.parametrize(
    ("errors", "cause"),
    [
        ([RayActorError(None, "a gang grew and is replaced", False, True)], "a gang grew and is replaced"),
        ([failed(GangBroken("1 rank(s) are stuck after: x\n\tmore"))], "1 rank(s) are stuck after: x"),
        ([RayActorError(), failed(ValueError("the last"))], "the last"),
        ([failed(ValueError("first")), RayActorError()], "The actor experienced an error before finishing this task."),
        ([DIED], "The actor died because its node has died. Node Id: 12ab"),
        (
            [failed(GangBroken(f"a worker of the gang died: {DIED}"))],
            "a worker of the gang died: The actor died because its node has died. Node Id: 12ab",
        ),
        (
            [OutOfMemoryError("1 worker(s) were killed: 6.5GB used\nOOM kill reason: x")],
            "1 worker(s) were killed: 6.5GB used",
        ),
        ([], "the gang was lost"),
    ],
)
def test_the_cause_is_the_line_that_says_why(errors, cause):
    assert cause_of(noted(*errors)) == cause


def test_a_kill_for_memory_is_told_from_other_losses():
    killed = OutOfMemoryError(
        "1 worker(s) were killed due to the node running low on memory. Memory on\nOOM kill reason: x"
    )
    for error in (killed, failed(GangBroken(f"a worker of the gang died: {killed}"))):
        assert is_killed_for_memory(cause_of(noted(DIED, error)))
    assert not is_killed_for_memory(cause_of(noted(killed, DIED)))
