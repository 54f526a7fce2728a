"""What every kind of stage owes: its work, the metrics that it reports, and what it costs.

Nothing else knows which kinds there are: gangs run them, plans add them up and tables show their metrics by these
methods alone. A member that leaves one of the abstract methods out is refused as its class is made.

To add a stage that measures each checkpoint: a `StageSpec` in a file here, and its section in `raysweep/declared.py`.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

from raysweep.costs import Size
from raysweep.data.corpora import Corpus
from raysweep.memory import TrainingSteps
from raysweep.objectives.families import Objective
from raysweep.resources import Resources
from raysweep.spec import Metric, Spec
from raysweep.tasks.families import Task
from raysweep.train.models import Model
from raysweep.worker import Worker


@dataclass(frozen=True)
class Subject:
    """The pretraining whose checkpoints are measured: what a measurement may be filled from."""

    corpus: Corpus
    objective: Objective
    """Whose loss is measured."""
    sequence_length: int
    """Tokens of a sequence of the text."""
    tasks: Mapping[str, Task]
    """What the checkpoints are fine-tuned on, by name."""
    model: Model | None = None
    """That is trained; None: checkpoints that exist, or training that goes on from one."""
    shown_tokens: frozenset[str] | None = None
    """Those that the objectives of training have written, of earlier phases, too; None: of a checkpoint that exists, or
    training that goes on from one, whose tokenizer may know others."""
    trained_by: Objective | None = None
    """The objective of training, which may add a penalty to `objective`; None of checkpoints that exist."""
    steps_before: int = 0
    """Of earlier phases."""


class StageSpec(Spec):
    """What one kind of stage does: declared as fields, done by `run`.

    `kind` opens the stage's id. A *wide* stage runs on all ranks of the gang at once; any other runs on one rank,
    beside its siblings on the other ranks, unless `is_wide` says otherwise of a gang.

    A stage that measures each checkpoint is a section of the sweep file. Its inputs are the "checkpoint", and, where it
    `reads_text`, the "tokens" that this was pretrained on.
    """

    kind: ClassVar[str]
    wide: ClassVar[bool] = True
    timings: ClassVar[tuple[Metric, ...]] = ()
    """What `run` returns beside its `metrics` of how the work went, such as its speed.

    It differs from run to run, so that it is kept with a record's provenance and takes no part in any result.
    """
    reads_text: ClassVar[bool] = False
    """Of a measurement: whether it reads held-out text."""
    of_weights: ClassVar[bool] = False
    """Of a measurement: whether it changes with what weights a function has, so that it is of the enlarged checkpoint
    where the sweep file asks for one."""
    filled: ClassVar[frozenset[str]] = frozenset()
    """Of a measurement: fields that `bind` fills, which a sweep file leaves out."""

    @abstractmethod
    def run(self, inputs: Mapping[str, Path], out: Path, worker: Worker) -> dict[str, float]:
        """Do the work.

        Args:
            inputs: role -> read-only folder of the stage that plays it.
            out: an empty folder, of rank 0 alone in a wide stage: the other ranks' hosts may not have it.
            worker: the process this runs in; in a split stage a worker of its own, of world size 1.

        Returns:
            metric name -> number: those of `metrics` and `timings`. NaN where a score could not be had. Of a wide stage
            those of rank 0 count.

        Raises:
            Diverged: if training left the finite numbers.
        """

    def is_wide(self, resources: Resources) -> bool:
        """Whether all ranks of such a gang work on it at once; of a `wide` stage in any gang."""
        return self.wide

    @abstractmethod
    def metrics(self, corpus: Corpus) -> tuple[Metric, ...]:
        """The metrics that `run` gives where the pretraining text is `corpus`: what a search may ask for."""

    @abstractmethod
    def flops(self, size: Size, corpus: Corpus) -> float:
        """Floating-point operations of `run`, those of all workers together.

        Args:
            size: of the model; `UNKNOWN`, by which the formulas of `Size` give 0, where it is not known.
            corpus: the pretraining text.
        """

    @abstractmethod
    def memory_bytes(self, size: Size, resources: Resources) -> int:
        """Bytes that one worker holds at its peak in tensors; the accelerator's own context is not counted.

        Args:
            size: of the model; `UNKNOWN` where it is not known.
            resources: of the gang. A stage that is not wide has one worker, which shards nothing.
        """

    def host_bytes(self, size: Size, resources: Resources) -> int:
        """Bytes that one worker with a GPU holds beside it at its peak, in the memory of its node: a model is loaded
        there, in 32 bits.

        Args:
            size: of the model; `UNKNOWN` where it is not known.
            resources: of the gang, whose workers all hold so much at once.
        """
        return size.weights_bytes

    @abstractmethod
    def disk_bytes(self, size: Size) -> int:
        """Bytes that it leaves in the store: tokens or weights. Measurements, of some kilobytes, are not counted."""

    def pin(self, base: Path, *, on_gpu: bool) -> Self:
        """Of a measurement: with the data that it names found and fingerprinted, and with what "auto" stands for.

        Args:
            base: folder of the sweep file, which paths are relative to.
            on_gpu: whether gangs have GPUs.

        Raises:
            DataError: if something is missing or malformed.
        """
        return self

    def given(self, **changes: Any) -> Self:
        """With some fields replaced; those that `bind` fills stay unset, as a sweep file leaves them."""
        return type(self)(**{name: getattr(self, name) for name in self.model_fields_set} | changes)

    def bind(self, subject: Subject) -> Self:
        """Of a measurement: with what it takes from pretraining.

        Raises:
            SpaceError: if it and pretraining do not go together.
        """
        return self

    def by_task(self) -> Mapping[str | None, Self]:
        """Of a measurement: the stages that it is, by the task that their columns name; None: one of no task."""
        return {None: self}

    @property
    def state_key(self) -> str | None:
        """Names resumable state that several stages hand on, as the checkpoints of one trajectory do."""
        return None

    def state_bytes(self, size: Size, resources: Resources) -> int:
        """Bytes of resumable state that stand in the store while it runs, where they are as many as a checkpoint's."""
        return 0

    @property
    def model_size(self) -> Size | None:
        """Of the model that it leaves; None if it leaves none, or that is of the size of its input "start"."""
        return None

    @property
    def pretraining_tokens(self) -> int:
        """Tokens of text that it trains a model on, from the checkpoint before on; of a measurement none."""
        return 0

    @property
    def training(self) -> TrainingSteps | None:
        """What it trains, as memory counts it; None: it trains nothing."""
        return None

    def gang(self, resources: Resources) -> Resources:
        """Those that work on it together: all of a gang, or one."""
        return resources if self.is_wide(resources) else resources.alone

    @property
    def repeated(self) -> StageSpec | None:
        """What it trains once more, at that cost, where its "checkpoint" was finished by an earlier run."""
        return None

    @property
    def loss_of(self) -> Objective | None:
        """The objective whose loss its metrics are of, so that those of another do not compare; None: all compare."""
        return None

    def loss_of_metric(self, name: str) -> Objective | None:
        """The same of one of its metrics, where these differ."""
        return self.loss_of

    @property
    def expected_rse(self) -> float | None:
        """Relative standard error that its estimate is expected to have; None where nothing is estimated."""
        return None
