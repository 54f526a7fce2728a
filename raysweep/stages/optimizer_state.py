"""The optimizer's state at the end of a phase, for the next one to go on with."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar

from raysweep.data.corpora import Corpus
from raysweep.spec import Metric, StageSpec
from raysweep.stages.pretrain import Pretrain
from raysweep.stages.trajectory import OPTIMIZER, Trajectory
from raysweep.worker import Worker


class OptimizerState(StageSpec):
    """The state at the end of a pretraining, whole, whatever gang it was trained on or is to be trained on by.

    Right after that pretraining its saved state is still there, and nothing is trained. Where it is gone, as after a
    run that no phase was to follow, it is trained once more, to the same bits.
    """

    kind: ClassVar[str] = "optimizer_state"

    pretrain: Pretrain

    @property
    def state_key(self) -> str:
        """The trajectory's."""
        return self.pretrain.state_key

    def run(self, inputs: Mapping[str, Path], out: Path, worker: Worker) -> dict[str, float]:
        """Writes optimizer.safetensors: each state of a weight, as `<weight>.<state>`."""
        spec = self.pretrain
        Trajectory(spec.recipe, spec.seed, spec.before, inputs).train(spec.step, worker, optimizer_out=out / OPTIMIZER)
        worker.barrier()
        return {}

    def metrics(self, corpus: Corpus) -> tuple[Metric, ...]:
        """None: it measures nothing."""
        return ()
