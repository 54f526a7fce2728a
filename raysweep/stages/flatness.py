"""Flatness of a checkpoint: traces of the Hessian and of the Fisher information of its pretraining loss."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar, Literal

import numpy as np
from pydantic import Field

from raysweep.data.packing import Tokens
from raysweep.spec import StageSpec
from raysweep.worker import Worker


class Flatness(StageSpec):
    """Hutchinson's estimate with exact Hessian-vector products, and the Fisher trace from model-sampled labels.

    Held-out sequences, each domain's share by `mix`, are cut into batches; each batch is a unit with probes and
    draws of its own. Units are dealt over ranks and averaged by index: the same bits for any number of workers.
    """

    kind: ClassVar[str] = "flatness"

    num_sequences: int = Field(default=64, ge=2)
    batch_sequences: int = Field(default=8, ge=1)
    num_probes: int = Field(default=2, ge=1)
    """Probe vectors of each batch."""
    distribution: Literal["rademacher", "gaussian"] = "rademacher"
    seed: int = 0
    mix: dict[str, float] = Field(default_factory=dict)
    """Filled from pretrain.data."""
    sequence_length: int = 0
    """Filled from pretrain."""

    def run(self, inputs: Mapping[str, Path], out: Path, worker: Worker) -> dict[str, float]:
        """Traces are of the mean token loss, in nats per token, over all parameters."""
        import torch
        from transformers import AutoModelForCausalLM

        from raysweep.curvature.operators import prepare
        from raysweep.curvature.trace import fisher_trace_unit, hessian_trace_unit, summarize

        model = AutoModelForCausalLM.from_pretrained(inputs["checkpoint"]).float().to(worker.device)
        prepare(model)
        batches = self._batches(Tokens(inputs["tokens"]))
        mine = {}
        for unit in range(worker.rank, len(batches), worker.world_size):
            ids = torch.from_numpy(batches[unit]).to(worker.device)
            mine[unit] = (
                hessian_trace_unit(
                    model,
                    ids,
                    seed=self.seed,
                    unit=unit,
                    num_probes=self.num_probes,
                    distribution=self.distribution,
                ),
                fisher_trace_unit(model, ids, seed=self.seed, unit=unit),
            )
            worker.report({"step": unit + 1, "num_steps": len(batches)})
        units = {unit: values for part in worker.gather(mine) for unit, values in part.items()}
        hessian = summarize([units[unit][0] for unit in range(len(batches))])
        fisher = summarize([units[unit][1] for unit in range(len(batches))])
        return {
            "hessian_trace": hessian.mean,
            "hessian_trace_stderr": hessian.stderr,
            "fisher_trace": fisher.mean,
            "fisher_trace_stderr": fisher.stderr,
            "num_probes": float(len(batches) * self.num_probes),
            "num_tokens": float(sum(batch.size for batch in batches)),
        }

    def _batches(self, tokens: Tokens) -> list[np.ndarray[tuple[int, ...], np.dtype[np.int64]]]:
        """Batches [batch_sequences, L], all of one size so that their mean is the mean over tokens."""
        parts = [
            tokens.valid(
                name, sequence_length=self.sequence_length, max_sequences=max(1, round(share * self.num_sequences))
            )
            for name, share in sorted(self.mix.items())
        ]
        # Shuffled, so that each batch is a draw from the mix and batches differ by chance alone.
        every = np.concatenate(parts)
        every = every[np.random.default_rng([self.seed, 3]).permutation(len(every))]
        size = min(self.batch_sequences, len(every))
        return [every[start : start + size] for start in range(0, len(every) - size + 1, size)]
