"""A trial as a chain of stages with content ids. Pure: no disk, no torch, no Ray."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from typing import Any

from raysweep.spec import StageSpec, canonical, fingerprint


@dataclass(frozen=True)
class Stage:
    """One unit of work. `inputs` maps a role to the id of the stage that plays it.

    `checkpoint` is the id of the stage whose checkpoint this one leaves or measures, `step` that checkpoint's step
    (None before there is one), `task` the name of its downstream task.
    """

    spec: StageSpec
    inputs: Mapping[str, str]
    step: int | None = None
    checkpoint: str | None = None
    task: str | None = None

    @cached_property
    def id(self) -> str:
        """`kind-` and twelve hex digits of everything that can change the result."""
        return f"{self.kind}-{fingerprint({'spec': canonical(self.spec), 'inputs': dict(self.inputs)})}"

    @property
    def kind(self) -> str:
        """What kind of stage it is."""
        return self.spec.kind


@dataclass(frozen=True)
class Trial:
    """One variant under one seed: a pretraining trajectory, and all that hangs from its checkpoints, in order."""

    point: Mapping[str, Any]
    seed: int
    stages: tuple[Stage, ...]

    @cached_property
    def variant_id(self) -> str:
        """The same for all seeds of a point."""
        return f"variant-{fingerprint(self.point)}"

    @cached_property
    def id(self) -> str:
        """Stands for its stages: equal chains are one trial."""
        return f"trial-{fingerprint([stage.id for stage in self.stages])}"

    @property
    def last_step(self) -> int:
        """The step of the last checkpoint."""
        return max(stage.step for stage in self.stages if stage.step is not None)

    def legs(self) -> Iterator[tuple[int | None, list[list[Stage]]]]:
        """By checkpoint step: batches of stages that may run side by side, a wide stage being a batch of its own."""
        for step, stages in groupby(self.stages, key=lambda stage: stage.step):
            batches: list[list[Stage]] = []
            for stage in stages:
                if batches and not stage.spec.wide and not batches[-1][-1].spec.wide and _independent(stage, batches):
                    batches[-1].append(stage)
                else:
                    batches.append([stage])
            yield step, batches


def _independent(stage: Stage, batches: Sequence[Sequence[Stage]]) -> bool:
    return not {other.id for other in batches[-1]} & set(stage.inputs.values())
