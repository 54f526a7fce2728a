"""Errors that a user can mend: the CLI prints each finding as one line and exits with 2."""

from collections.abc import Callable, Iterable
from typing import TypeVar

T = TypeVar("T")

Place = tuple[str | int, ...]
"""Keys and indices that lead to a value: of the sweep file, or below what is looked at."""

Finding = tuple[Place, str]
"""Where something is wrong, and what."""


class RaysweepError(Exception):
    """Base of every error whose message says what was wrong, the value, and what would be right.

    Args:
        message: of the only finding.
        at: the finding's place, below what raises it; whoever knows more puts the rest before it.
    """

    def __init__(self, message: str = "", at: Place = ()) -> None:
        super().__init__(message)
        self.findings: tuple[Finding, ...] = ((at, message),)

    def __str__(self) -> str:
        """Each finding on a line, behind its place where that is known."""
        return "\n".join(f"{dotted(at)}: {text}" if at else text for at, text in self.findings)


class SpaceError(RaysweepError):
    """The sweep file asks for something that cannot be; may hold several findings, one a line."""


class DataError(RaysweepError):
    """A data file is missing, empty or malformed; the message names file and line."""


class StageError(RaysweepError):
    """A stage failed; the message names its id and the log."""


class StoreError(RaysweepError):
    """The store cannot be read or written, or holds something altered."""


class UnreachableError(StoreError):
    """What the store lies on did not do as it was asked; it may do so later: a stage that met it is tried again."""


class LostError(StoreError):
    """A finished stage is gone from the store, or damaged: whatever needs it can go on once it is made again."""

    def __init__(self, stage_id: str, message: str) -> None:
        super().__init__(message)
        self.stage_id = stage_id

    def __reduce__(self) -> tuple[type["LostError"], tuple[str, str]]:
        return type(self), (self.stage_id, str(self))


class ClusterError(RaysweepError):
    """The cluster cannot give what the sweep file asks for."""


class Diverged(Exception):  # noqa: N818 - an outcome of training, not a fault of the program
    """Training left the finite numbers, or its loss ran away: final, recorded, never retried."""

    def __init__(self, step: int, loss: float) -> None:
        super().__init__(f"diverged at step {step}: loss {loss:.4g} nats per token")
        self.step = step
        self.loss = loss

    def __reduce__(self) -> tuple[type["Diverged"], tuple[int, float]]:
        # The default would rebuild it from the message alone when it crosses processes.
        return type(self), (self.step, self.loss)


def first_line(error: BaseException) -> str:
    """What an error of another library says first, or its kind where it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def dotted(place: Place) -> str:
    """A place as a person writes it."""
    return ".".join(map(str, place))


def collect(parts: Iterable[tuple[Place, Callable[[], T]]]) -> list[T]:
    """What each part gives, in order.

    Raises:
        DataError: with the findings of all parts, each below its part's place; a SpaceError if any of them is one.
    """
    values: list[T] = []
    findings: list[Finding] = []
    kind: type[RaysweepError] = DataError
    for place, make in parts:
        try:
            values.append(make())
        except RaysweepError as error:
            findings += below(place, error)
            kind = kind if isinstance(error, DataError) else SpaceError
    if findings:
        together = kind()
        together.findings = tuple(dict.fromkeys(findings))
        raise together
    return values


def below(place: Place, error: RaysweepError) -> list[Finding]:
    """The findings of an error of what stands at `place`."""
    return [((*place, *at), text) for at, text in error.findings]
