"""Flatness of a checkpoint: traces of the Hessian, Gauss-Newton and Fisher matrices of its objective's loss."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

import numpy as np
from pydantic import Field, field_validator, model_validator

from raysweep.costs import Size
from raysweep.curvature.cost import COST, first_draws, most_batches, predicted
from raysweep.curvature.dealing import Deal
from raysweep.curvature.kinds import KNOWN, kind_of
from raysweep.curvature.settings import ShapeSettings, TraceSettings
from raysweep.data.corpora import Corpus
from raysweep.data.packing import Tokens
from raysweep.data.tokenizers import load_tokenizer, start_of_text
from raysweep.errors import SpaceError, StageError
from raysweep.memory import product_bytes
from raysweep.objectives.base import ObjectiveSpec
from raysweep.objectives.causal_lm import CausalLM
from raysweep.objectives.families import Objective
from raysweep.resources import Resources
from raysweep.spec import Metric, Neutral, Provenance
from raysweep.stages.base import StageSpec, Subject
from raysweep.stages.dealing import RankDeal
from raysweep.stages.specials import checkpoint_specials
from raysweep.train.checkpoints import load_model
from raysweep.train.models import Model, Transformers
from raysweep.worker import Worker

if TYPE_CHECKING:
    import torch

    from raysweep.curvature.language import Batch
    from raysweep.curvature.measure import Measured
    from raysweep.curvature.units import Unit, Values

# Of the models that are declared by size.
_CLASSES = {"llama": "LlamaForCausalLM", "bert": "BertForMaskedLM"}

# What `curvature` measures, said here too: a plan lists it, and cannot import that.
NATS = "nats/token"
TRACES = (
    *(Metric(f"{name}_trace", "min", NATS) for name in ("hessian", "fisher", "gauss_newton", "residual")),
    *(Metric(f"{name}_trace_stderr", unit=NATS) for name in ("hessian", "fisher", "gauss_newton", "residual")),
    Metric("hessian_trace_stderr_probe", unit=NATS),
    Metric("hessian_trace_stderr_data", unit=NATS),
)
# Of parameters by what they are for, as `curvature.roles` has it.
ROLES = ("head", "embeddings", "blocks")
SYMMETRIES = 2
"""See `Flatness.symmetries`."""
FEATURES = (Metric("feature_trace", "min", NATS), Metric("feature_trace_stderr", unit=NATS))
WORK = (
    Metric("difference_error"),
    Metric("target_reached"),
    Metric("num_probes"),
    Metric("num_fisher_draws"),
    Metric("num_tokens", unit="tokens"),
    Metric("gradient_equivalents", unit="gradients"),
    Metric("unit_batches"),
)
_SHARPNESS = ("average_sharpness", "average_sharpness_adaptive")
SHAPE = (
    *(Metric(name, "min", NATS) for name in ("frobenius_norm", "adaptive_trace", "relative_flatness", *_SHARPNESS)),
    *(Metric(f"{name}_stderr", unit=NATS) for name in ("frobenius_norm", "adaptive_trace", "relative_flatness")),
    *(Metric(f"{name}_stderr", unit=NATS) for name in _SHARPNESS),
    Metric("worst_sharpness", "min", NATS),
    Metric("worst_sharpness_adaptive", "min", NATS),
    Metric("effective_rank"),
    Metric("stable_rank"),
)


class Shape(ShapeSettings):
    """What is measured beyond traces, on a fixed piece of the text: the spectrum, sharpness, scale-free forms.

    Standard errors hold the chance of random vectors alone; those of the traces hold that of the text, too.
    """

    num_sequences: int = Field(default=8, ge=1)
    """Held-out sequences to measure on."""


class Flatness(TraceSettings, StageSpec):
    """Traces to a target error: each is a mean over units of work, taken until the error is small enough.

    Held-out sequences, each domain's share by `mix`, are cut into batches; a unit is a batch with a probe vector or
    with label draws of its own. Units are dealt over ranks and averaged in their order: the same bits for any number
    of workers. Finished units are saved; a stage that was killed goes on from them.

    Writes `units.jsonl`, the values of every unit, and if asked to `parameters.json` and `shape.json`.
    """

    kind: ClassVar[str] = "flatness"
    VERSION: ClassVar[int] = 3
    reads_text: ClassVar[bool] = True
    of_weights: ClassVar[bool] = True
    filled: ClassVar[frozenset[str]] = frozenset({"mix", "sequence_length", "loss", "symmetries"})

    num_sequences: int = Field(default=512, ge=2)
    """Held-out sequences to measure on, each domain's share by its mix; fewer where a domain has not its share."""
    batch_sequences: int = Field(default=1, ge=1)
    """Of a batch, the least that a probe vector is for; `max_unit_batches` may share one."""
    parameters: tuple[str, ...] = ("*",)
    """Patterns, as of a shell, of the names of the parameters whose curvature is measured."""
    num_blocks: Annotated[int, Neutral(0)] = Field(default=0, ge=0)
    """Of the first so many blocks the traces one by one, beside those of `parts`, at no further cost; NaN of a block
    that a model has not."""
    own_samples: Annotated[int, Neutral(0)] = Field(default=0, ge=0)
    """Sequences drawn from the model itself, on which the traces are measured as well."""
    rescaled: Annotated[bool | Literal["own"], Neutral(False)] = False
    """Also the traces after a random change of scale that leaves the function as it is: where they order models
    otherwise, the trace is of the scale of weights. By the same factors for all models of a shape, or by each model's
    own, which is harder to survive. For models that `curvature.kinds` knows."""
    symmetries: Annotated[int, Neutral(1)] = 1
    """Raised where `curvature.rescaling` learns of more; filled, and 1 where that changes nothing.
    2: the last norm against an output layer of its own, of models that may have one."""
    shape: Annotated[Shape | None, Neutral(None)] = None
    """What is measured beyond traces; left out: nothing."""
    mix: dict[str, float] = Field(default_factory=dict)
    """Domain to its share of the sequences; filled from pretrain.data."""
    sequence_length: int = 0
    """Tokens of a sequence of text; filled from pretrain."""
    objective: Annotated[Literal["own", "causal_lm"], Provenance()] = "own"
    """Whose loss it is the flatness of: the pretraining objective's own, or that of predicting every next token."""
    loss: Annotated[Objective, Neutral(CausalLM())] = CausalLM()
    """That objective; filled from pretrain."""

    @field_validator("own_samples")
    @classmethod
    def _enough_for_an_error(cls, num: int) -> int:
        if num == 1:
            raise ValueError("1 sequence gives no error bar; take 2 at least (256 are few), or 0 for none")
        return num

    @model_validator(mode="after")
    def _blocks_are_parts(self) -> Flatness:
        if self.num_blocks and not self.parts:
            raise ValueError(f"num_blocks: {self.num_blocks} needs traces of single parameters: set parts: true")
        return self

    def bind(self, subject: Subject) -> Flatness:
        """With the text, and the objective whose loss is measured, of a model that is trained by the subject's.

        Raises:
            SpaceError: if a model that is trained so has no such loss, no samples of its own, or no known symmetries.
        """
        objective = subject.objective
        if subject.model is not None:
            self._check_symmetries(subject.model)
        loss = CausalLM() if self.objective == "causal_lm" else objective
        if loss.head != objective.head:
            raise SpaceError(
                f"{self.objective}: {objective.name} trains a {objective.head} model, which predicts no next tokens; "
                "set own",
                ("objective",),
            )
        if self.own_samples and not loss.is_likelihood:
            raise SpaceError(
                f"{self.own_samples}: {loss.name} is no distribution of texts, to draw from; set 0", ("own_samples",)
            )
        text = {"mix": subject.corpus.mix, "sequence_length": subject.sequence_length}
        is_tied = subject.model is not None and subject.model.is_tied
        symmetries = SYMMETRIES if self.rescaled and not is_tied else 1
        return self.with_(loss=loss, symmetries=symmetries, **text)  # type: ignore[no-any-return]

    def _check_symmetries(self, model: Model) -> None:
        asked: dict[tuple[str, ...], object] = {("rescaled",): self.rescaled}
        asked |= {("shape", "geodesic_rho"): self.shape.geodesic_rho} if self.shape else {}
        architecture = model.architecture if isinstance(model, Transformers) else _CLASSES.get(model.name, model.name)
        for path, value in asked.items():
            if value and kind_of(architecture) is None:
                raise SpaceError(
                    f"{value}: the symmetries of {architecture} are not known, those of {KNOWN} are; leave it out", path
                )

    @property
    def input_length(self) -> int:
        """Tokens of a row that the model reads."""
        return self.loss.input_length(self.sequence_length)

    @property
    def _needs_whole(self) -> bool:
        """Whether the traces themselves take a model that is not sharded."""
        return self.products == "exact" or self.head == "closed_form"

    @property
    def expected_rse(self) -> float:
        """Of the Hessian's trace, within the budget of units."""
        return self.predict()[1]

    def flops(self, size: Size, corpus: Corpus) -> float:
        """Gradients of the tokens that the target is expected to take."""
        return size.gradient_flops(self.predict()[0], self.input_length)

    def memory_bytes(self, size: Size, resources: Resources) -> int:
        """That of a product; see `memory.product_bytes`.

        Under ZeRO-3 weights and vectors are sharded, but not where samples or shape are measured too.
        """
        is_whole = self._needs_whole or self.own_samples or self.shape or self.parts or self.rescaled
        shards = resources.workers if resources.zero_stage == 3 and not is_whole else 1
        return product_bytes(
            size,
            self.products,
            sequences=self.batch_sequences * self._most_batches(on_gpu=resources.gpus_per_worker > 0),
            length=self.input_length,
            parts=self.parts,
            on_gpu=resources.gpus_per_worker > 0,
            shards=shards,
        )

    def _most_batches(self, *, on_gpu: bool) -> int:
        """That may share a probe vector; see `curvature.groups`."""
        if first_draws(self.products, parts=self.parts, min_units=self.min_units):
            return 1
        return most_batches(self.max_unit_batches, num_tokens=self.batch_sequences * self.input_length, on_gpu=on_gpu)

    def disk_bytes(self, size: Size) -> int:
        """Values of units, and of single parameters: some kilobytes."""
        return 0

    def predict(self) -> tuple[float, float]:
        """What is expected before anything runs: tokens of gradients to compute, and the relative standard error."""
        tokens = self.batch_sequences * self.input_length
        num_predicted = self.batch_sequences * self.loss.mean_predicted(self.sequence_length)
        # What is read and not predicted costs time, and makes no estimate surer.
        units, rse = predicted(
            self.rse, num_predicted=num_predicted, min_units=self.min_units, max_units=self.max_units
        )
        draws: float = first_draws(self.products, parts=self.parts, min_units=self.min_units)
        if draws:  # In the end they are about a fifth as many as probes.
            draws = min(max(draws, units / 5), self.max_units)
        work = tokens * (units * COST[self.products] + draws * COST["fisher"])
        # The same measurement again, to the same target.
        work *= 1 + bool(self.own_samples) + bool(self.rescaled)
        if self.shape:
            products = self.shape.num_steps * (self.shape.num_vectors + 2)
            work += products * self.shape.num_sequences * self.input_length * COST["exact"]
        return work, rse

    @property
    def loss_of(self) -> Objective:
        """Its own, or causal_lm where the sweep file says so."""
        return self.loss

    def run(self, inputs: Mapping[str, Path], out: Path, worker: Worker) -> dict[str, float]:
        """Traces are of the mean loss of `loss`, in nats per predicted token."""
        from raysweep.curvature.language import prepare
        from raysweep.curvature.operators import choose_parameters

        text = self._text(Tokens(inputs["tokens"]), inputs["checkpoint"], worker.device)
        # Exact products differentiate twice and in forward mode: for these each rank holds the model whole.
        is_sharded = worker.zero_stage == 3 and worker.world_size > 1 and not self._needs_whole
        if is_sharded:
            measured = self._measure_sharded(inputs["checkpoint"], text, worker)
        if not is_sharded or self.own_samples or self.shape or self.parts or self.rescaled:
            model = load_model(inputs["checkpoint"]).to(worker.device)
            prepare(model, twice_differentiable=self.products == "exact")
            choose_parameters(model, self.parameters)
            _confirm(model, self.loss, {name: rows[: self.batch_sequences] for name, rows in text.items()})
        if not is_sharded:
            measured = self._measure(model, text, RankDeal(worker, "units"))
        metrics = measured.metrics()
        if worker.rank == 0:
            (out / "units.jsonl").write_text("".join(map(_line, sorted(measured.units.items()))))
            if self.parts:
                parts = {name: asdict(part) for name, part in measured.parts("parameter").items()}
                (out / "parameters.json").write_text(json.dumps(parts, indent=1))
        if self.parts:
            metrics |= self._by_part(model, measured, text)
        if self.own_samples:
            metrics |= self._on_samples(model, inputs["checkpoint"], measured, worker)
        if self.shape:
            metrics |= self._shape(model, self.shape, text, out, worker)
        if self.rescaled:  # Last, as it changes the model.
            metrics |= self._rescaled(model, text, worker)
        return metrics

    def metrics(self, corpus: Corpus) -> tuple[Metric, ...]:
        """Traces with their errors, and what else is asked for; the flatter the better."""
        metrics = (*TRACES, *WORK)
        if self.parts:
            metrics += (*self._parts, *FEATURES)
        if self.own_samples:
            metrics += tuple(replace(each, name=f"samples_{each.name}") for each in TRACES)
            metrics += (Metric("samples_relative_distance"), Metric("samples_relative_distance_stderr"))
        if self.rescaled:
            moved = (*TRACES, *(FEATURES if self.parts else ()))
            metrics += tuple(replace(each, name=f"rescaled_{each.name}") for each in moved)
        if self.shape:
            ranks = range(1, min(self.shape.num_eigenvalues, self.shape.num_steps) + 1)
            metrics += tuple(Metric(f"eigenvalue_{rank}", "min", NATS) for rank in ranks)
            metrics += tuple(Metric(f"eigenvalue_{rank}_error", unit=NATS) for rank in ranks)
            metrics += SHAPE
            metrics += (Metric("worst_sharpness_geodesic", "min", NATS),) if self.shape.geodesic_rho else ()
        return metrics

    @property
    def _parts(self) -> tuple[Metric, ...]:
        """The default products say nothing of the Hessian's parts."""
        traces = ("fisher",) if self.products == "logit_differences" else ("fisher", "hessian")
        parts = (*ROLES, *(f"block_{number}" for number in range(self.num_blocks)))
        return tuple(
            Metric(f"{trace}_trace_{part}{end}", None if end else "min", NATS)
            for trace in traces
            for part in parts
            for end in ("", "_stderr")
        )

    def _by_part(self, model: Any, measured: Measured, text: Batch) -> dict[str, float]:
        """Traces by role, 0 where nothing is measured of one, and of single blocks; and the feature norm's."""
        from raysweep.curvature.roles import blocks_of, roles_of

        metrics = {metric.name: math.nan if "_block_" in metric.name else 0.0 for metric in self._parts}
        parts = measured.roles(roles_of(model)) | measured.roles(blocks_of(model))
        for name, part in parts.items():
            for trace, estimate in (("fisher", part.fisher), ("hessian", part.hessian)):
                if estimate and f"{trace}_trace_{name}" in metrics:
                    metrics[f"{trace}_trace_{name}"] = estimate.mean
                    metrics[f"{trace}_trace_{name}_stderr"] = estimate.stderr
        return metrics | self._features(model, text)

    def _features(self, model: Any, text: Batch) -> dict[str, float]:
        from raysweep.curvature.language import equal_batches
        from raysweep.curvature.roles import feature_trace

        found = feature_trace(model, equal_batches(text, self.batch_sequences))
        return {"feature_trace": found.mean, "feature_trace_stderr": found.stderr}

    def _on_samples(self, model: Any, checkpoint: Path, on_text: Measured, worker: Worker) -> dict[str, float]:
        from raysweep.curvature.measure import distance
        from raysweep.curvature.samples import sample_sequences

        start = start_of_text(load_tokenizer(checkpoint))
        if start is None:  # A text without a beginning has no distribution to draw from.
            raise ValueError("own_samples: the checkpoint's tokenizer has no token that a text could begin with")
        given: dict[str, Any] = {"length": self.sequence_length, "start": start, "seed": self.seed}
        ids = sample_sequences(model, self.own_samples, deal=RankDeal(worker, "samples"), **given)
        measured = self.with_(parts=False, num_blocks=0)._measure(
            model, {"input_ids": ids}, RankDeal(worker, "units-of-samples")
        )
        # Other text than the one they are compared with: the errors of both add up, none is paired.
        off, error = distance(measured, on_text)
        traces = {f"samples_{name}": value for name, value in measured.metrics().items() if "trace" in name}
        return traces | {"samples_relative_distance": off, "samples_relative_distance_stderr": error}

    def _rescaled(self, model: Any, text: Batch, worker: Worker) -> dict[str, float]:
        import torch

        from raysweep.curvature.rescaling import own_seed, rescale

        seed = own_seed(model, self.seed) if self.rescaled == "own" else self.seed
        rescale(model, torch.Generator().manual_seed(seed))
        measured = self.with_(parts=False, num_blocks=0)._measure(model, text, RankDeal(worker, "units-of-rescaled"))
        traces = {name: value for name, value in measured.metrics().items() if "trace" in name}
        if self.parts:
            traces |= self._features(model, text)
        return {f"rescaled_{name}": value for name, value in traces.items()}

    def _shape(self, model: Any, shape: Shape, text: Batch, out: Path, worker: Worker) -> dict[str, float]:
        from raysweep.curvature.shape import measure_shape

        num = min(shape.num_sequences, len(text["input_ids"]))
        batches = [
            {name: rows[start : min(start + self.batch_sequences, num)] for name, rows in text.items()}
            for start in range(0, num, self.batch_sequences)
        ]
        deal = RankDeal(worker, "shape")
        document, metrics = measure_shape(model, batches, shape, seed=self.seed, products=self.products, deal=deal)
        if worker.rank == 0:
            (out / "shape.json").write_text(json.dumps(document, indent=1))
        return metrics

    def _measure(self, model: Any, text: Batch, deal: Deal) -> Measured:
        """Traces on a text, which is cut into batches."""
        from raysweep.curvature.language import equal_batches
        from raysweep.curvature.measure import measure_traces

        batches = equal_batches(text, self.batch_sequences)
        return measure_traces(model, batches, self, deal=deal)

    def _measure_sharded(self, checkpoint: Path, text: Batch, worker: Worker) -> Measured:
        """The same on a model of which each worker holds a shard, so that all work on each unit, each on its rows."""
        from raysweep.curvature.language import equal_batches, prepare
        from raysweep.curvature.measure import measure_traces
        from raysweep.curvature.operators import choose_parameters
        from raysweep.curvature.zero3 import MovableShards, SummedDeal, rows_of
        from raysweep.train.sharded import sharded_model

        whole = equal_batches(text, self.batch_sequences)
        batches = [rows_of(batch, rank=worker.rank, world_size=worker.world_size) for batch in whole]
        with sharded_model(checkpoint, worker) as (model, release):
            prepare(model, twice_differentiable=False)
            choose_parameters(model, self.parameters)
            shards = MovableShards(model, rank=worker.rank, gather=worker.gather, reduce=worker.sum, release=release)
            deal = RankDeal(worker, "units", SummedDeal(worker.gather))
            return measure_traces(model, batches, self, deal=deal, movable=shards)

    def _text(self, tokens: Tokens, checkpoint: Path, device: str) -> dict[str, torch.Tensor]:
        """Held-out sequences of all domains, as the objective prepares them: the same for all models."""
        import torch

        every = tokens.valid_mix(self.mix, sequence_length=self.sequence_length, num_sequences=self.num_sequences)
        # Shuffled, so that each batch is a draw from the mix and batches differ by chance alone.
        every = every[np.random.default_rng([self.seed, 3]).permutation(len(every))]
        specials = checkpoint_specials(checkpoint, self.loss)
        rows = self.loss.prepare(every, np.random.default_rng([self.seed, 4]), specials)
        # Padding stands on the right and is not predicted; nothing attends to it.
        return {name: torch.from_numpy(part).to(device) for name, part in rows.items() if name != "lengths"}


def _confirm(model: Any, objective: ObjectiveSpec, batch: Batch) -> None:
    """See that what is measured is what was trained: curvature is of the cross-entropy of a batch's labels.

    Raises:
        StageError: if the objective's loss is another one.
    """
    import torch

    from raysweep.curvature.language import mean_token_loss

    with torch.no_grad():
        own = float(objective.loss_sum(model, batch)) / max(1, objective.num_predicted(batch))
        measured = float(mean_token_loss(model, batch))
    if abs(own - measured) > 1e-3 * max(1.0, abs(own)):
        raise StageError(
            f"objective {objective.name}: its loss is {own:.4f} nats per token, and the cross-entropy of the labels, "
            f"whose curvature is measured, is {measured:.4f}; set flatness.objective: causal_lm, or leave flatness out"
        )


def _line(item: tuple[Unit, Values]) -> str:
    (unit, values) = item
    return json.dumps({"unit": [unit.kind, unit.batch, unit.draw], "values": dict(values)}) + "\n"
