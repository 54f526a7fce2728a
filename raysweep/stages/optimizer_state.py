"""The optimizer's state at the end of a phase, for the next one to go on with."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar

from raysweep.costs import Size
from raysweep.data.corpora import Corpus
from raysweep.resources import Resources
from raysweep.spec import Metric
from raysweep.stages.base import StageSpec
from raysweep.stages.pretrain import Pretrain
from raysweep.stages.trajectory import OPTIMIZER, Trajectory
from raysweep.worker import Worker

logger = logging.getLogger(__name__)


class OptimizerState(StageSpec):
    """The state at the end of a pretraining, whole, whatever gang it was trained on or is to be trained on by.

    Right after that pretraining its saved state is still there, and nothing is trained. Where it is gone, as after a
    run that no phase was to follow, it is trained once more, to the same bits.
    """

    kind: ClassVar[str] = "optimizer_state"

    pretrain: Pretrain

    @property
    def state_key(self) -> str:
        """That of its pretraining, whose saved state it finds there if it runs right after it."""
        return self.pretrain.state_key

    def run(self, inputs: Mapping[str, Path], out: Path, worker: Worker) -> dict[str, float]:
        """Writes optimizer.safetensors: each state of a weight, as `<weight>.<state>`."""
        spec = self.pretrain
        saved = worker.state_dir.names() if worker.rank == 0 and worker.state_dir else set()
        if worker.rank == 0 and not any(name.startswith("step-") for name in saved):
            logger.warning(
                "%s steps are trained once more: a finished run's optimizer state was not kept "
                "(pretrain.leave_optimizer_state)",
                f"{spec.step:,}",
            )
        Trajectory(spec.recipe, spec.seed, spec.before, inputs).train(spec.step, worker, optimizer_out=out / OPTIMIZER)
        worker.barrier()  # Rank 0 has written the file: the stage is not finished on any rank before.
        return {}

    def metrics(self, corpus: Corpus) -> tuple[Metric, ...]:
        """None: it measures nothing of a checkpoint, and its file is read by the next phase alone."""
        return ()

    @property
    def repeated(self) -> Pretrain:
        """The pretraining from its beginning: none of its checkpoints keeps what the optimizer needs to go on."""
        recipe = self.pretrain.recipe
        return self.pretrain.with_(recipe=recipe.with_(checkpoints=()))  # type: ignore[no-any-return]

    def flops(self, size: Size, corpus: Corpus) -> float:
        """None right after its pretraining; where that was finished before, those of what is `repeated`."""
        return 0.0

    def memory_bytes(self, size: Size, resources: Resources) -> int:
        """Its pretraining's, whose engine it sets up anew."""
        return self.pretrain.memory_bytes(size, resources)

    def host_bytes(self, size: Size, resources: Resources) -> int:
        """Its pretraining's; or what it leaves, which rank 0 gathers."""
        return max(self.pretrain.host_bytes(size, resources), self.disk_bytes(size))

    def disk_bytes(self, size: Size) -> int:
        """The optimizer's numbers of each weight, in 32 bits."""
        return 4 * self.pretrain.recipe.optimizer.state_floats * size.num_parameters

    def state_bytes(self, size: Size, resources: Resources) -> int:
        """Its pretraining's, which it goes on from or leaves anew."""
        return self.pretrain.state_bytes(size, resources)
