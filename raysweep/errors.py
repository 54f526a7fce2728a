"""Errors that a user can mend: the CLI prints each as one line and exits with 2."""


class RaysweepError(Exception):
    """Base of every error whose message says what was wrong, the value, and what would be right."""


class SpaceError(RaysweepError):
    """The sweep file asks for something that cannot be; may hold several findings, one a line."""


class DataError(RaysweepError):
    """A data file is missing, empty or malformed; the message names file and line."""


class StageError(RaysweepError):
    """A stage failed; the message names its id and the log."""


class StoreError(RaysweepError):
    """The store cannot be read or written, or holds something altered."""


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
