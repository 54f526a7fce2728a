"""Flatness of a checkpoint: traces of the Hessian, Gauss-Newton and Fisher matrices of its pretraining loss."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

import numpy as np
from pydantic import Field

from raysweep.curvature.cost import COST, Products, predicted
from raysweep.data.packing import Tokens
from raysweep.spec import StageSpec
from raysweep.worker import Worker

if TYPE_CHECKING:
    from raysweep.curvature.units import Unit, Values

SAVED = "units"


class Flatness(StageSpec):
    """Traces to a target error: each is a mean over units of work, taken until the error is small enough.

    Held-out sequences, each domain's share by `mix`, are cut into batches; a unit is a batch with a probe vector or
    with label draws of its own. Units are dealt over ranks and averaged in their order: the same bits for any number
    of workers. Finished units are saved; a stage that was killed goes on from them.

    Writes `units.jsonl`, the values of every unit, and `parameters.json`, traces by parameter.
    """

    kind: ClassVar[str] = "flatness"

    num_sequences: int = Field(default=512, ge=2)
    batch_sequences: int = Field(default=2, ge=1)
    rse: float = Field(default=0.05, gt=0)
    """Relative standard error of the Hessian's and the Fisher's trace at which to stop."""
    min_units: int = Field(default=16, ge=2)
    """Batches that are measured at least, for an error that can be trusted."""
    max_units: int = Field(default=256, ge=2)
    """Probe vectors, and label draws, at most."""
    products: Products = "logit_differences"
    """How v'Hv is made; see `raysweep.curvature.cost`."""
    distribution: Literal["rademacher", "gaussian"] = "rademacher"
    parameters: tuple[str, ...] = ("*",)
    """Patterns, as of a shell, of the names of the parameters whose curvature is measured."""
    seed: int = 0
    mix: dict[str, float] = Field(default_factory=dict)
    """Filled from pretrain.data."""
    sequence_length: int = 0
    """Filled from pretrain."""

    def predict(self) -> tuple[float, float]:
        """What is expected before anything runs: tokens of gradients to compute, and the relative standard error."""
        tokens = self.batch_sequences * self.sequence_length
        units, rse = predicted(self.rse, tokens_of_batch=tokens, min_units=self.min_units, max_units=self.max_units)
        # About a third as many label draws as probes.
        return units * tokens * (COST[self.products] + COST["fisher"] / 3), rse

    def run(self, inputs: Mapping[str, Path], out: Path, worker: Worker) -> dict[str, float]:
        """Traces are of the mean token loss, in nats per predicted token."""
        import torch
        from transformers import AutoModelForCausalLM

        from raysweep.curvature.adaptive import Budget
        from raysweep.curvature.language import prepare
        from raysweep.curvature.measure import measure_traces
        from raysweep.curvature.operators import choose_parameters

        model = AutoModelForCausalLM.from_pretrained(inputs["checkpoint"]).float().to(worker.device)
        prepare(model, twice_differentiable=self.products == "exact")
        choose_parameters(model, self.parameters)
        batches = [
            {"input_ids": torch.from_numpy(ids).to(worker.device)} for ids in self._batches(Tokens(inputs["tokens"]))
        ]
        measured = measure_traces(
            model,
            batches,
            budget=Budget(rse=self.rse, min_units=self.min_units, max_units=self.max_units),
            seed=self.seed,
            products=self.products,
            distribution=self.distribution,
            share=_Shared(worker),
        )
        if worker.rank == 0:
            (out / "units.jsonl").write_text("".join(map(_line, sorted(measured.units.items()))))
            parts = {name: asdict(part) for name, part in measured.parts("parameter").items()}
            (out / "parameters.json").write_text(json.dumps(parts, indent=1))
        return measured.metrics()

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
        size = min(self.batch_sequences, max(1, len(every) // 2))
        return [every[start : start + size] for start in range(0, len(every) - size + 1, size)]


def _line(item: tuple[Unit, Values]) -> str:
    (unit, values) = item
    return json.dumps({"unit": [unit.kind, unit.batch, unit.draw], "values": dict(values)}) + "\n"


class _Shared:
    """Units dealt over the ranks of a gang; each rank appends what it has finished to a file of its own."""

    def __init__(self, worker: Worker) -> None:
        self._worker = worker
        self._num = 0
        saved = _read(worker.state_dir) if worker.rank == 0 and worker.state_dir else {}
        # Rank 0's reading is everyone's: what is saved must not differ between those who deal by it.
        self._saved: dict[Unit, Values] = worker.gather(saved)[0]

    def __call__(self, units: Sequence[Unit], run: Callable[[Unit], Values]) -> list[Values]:
        worker = self._worker
        missing = [unit for unit in units if unit not in self._saved]
        mine: dict[Unit, Values] = {}
        for unit in missing[worker.rank :: worker.world_size]:
            mine[unit] = run(unit)
            self._save(unit, mine[unit])
            self._num += 1
            worker.report({"step": self._num * worker.world_size})
        for part in worker.gather(mine):
            self._saved |= part
        return [self._saved[unit] for unit in units]

    def _save(self, unit: Unit, values: Values) -> None:
        if (folder := self._worker.state_dir) is not None:
            folder.mkdir(parents=True, exist_ok=True)
            with open(folder / f"{SAVED}-{self._worker.rank}-{os.getpid()}.jsonl", "a") as file:
                file.write(_line((unit, values)))


def _read(folder: Path) -> dict[Unit, Values]:
    """The units that earlier attempts have saved; a line that was cut off is left out."""
    from raysweep.curvature.units import Unit

    found: dict[Unit, Values] = {}
    for path in sorted(folder.glob(f"{SAVED}-*.jsonl")):
        for line in path.read_text().splitlines():
            try:
                entry = json.loads(line)
            except ValueError:
                continue
            kind, batch, draw = entry["unit"]
            found[Unit(kind, batch, draw)] = entry["values"]
    return found
