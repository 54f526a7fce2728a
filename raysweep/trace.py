"""Curvature traces of any Hugging Face language models on a text: what `raysweep trace` measures."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from raysweep.curvature.dealing import Item, Value
from raysweep.curvature.kinds import kind_of
from raysweep.curvature.settings import TraceSettings
from raysweep.data.files import resolve
from raysweep.data.sequences import masked_sequences, sequences
from raysweep.data.tokenizers import load_tokenizer, start_of_text
from raysweep.errors import DataError, collect, first_line
from raysweep.objectives.base import Arrays
from raysweep.objectives.heads import Head, head_of
from raysweep.stages.flatness import Shape
from raysweep.train.checkpoints import check_size, load_model
from raysweep.weights import check_files

if TYPE_CHECKING:
    import torch

    from raysweep.curvature.averages import Part, Traces
    from raysweep.curvature.measure import Measured

SEQUENCE_LENGTH = 512
# Small batches are best, as each has a probe vector of its own; below this the fixed cost of a pass is felt.
TOKENS_OF_BATCH = 128
GEODESIC_RHO = 0.1
"""Radius of the ball on the quotient by attention's symmetries, for models whose are known."""

LOSS_SEQUENCES = 256
"""Of the text, that the loss is of: a forward pass each."""

Show = Callable[[str], None]


@dataclass(frozen=True)
class Request:
    """What to measure, on what, and when to stop."""

    models: tuple[str, ...]
    data: tuple[str, ...] = ()
    """Globs of files; see `data.formats`."""
    num_samples: int = 0
    """Sequences of each model's own, to measure on as well; or only, without `data`."""
    sequence_length: int | None = None
    """Tokens; None: SEQUENCE_LENGTH, or what the model takes at most."""
    traces: TraceSettings = field(default_factory=TraceSettings)
    """With `parts`, also the traces of layers and of blocks."""
    shape: Shape | None = None
    """What to measure beyond traces; None: nothing."""
    parameters: tuple[str, ...] = ("*",)
    """Patterns, as of a shell, of the names of the parameters whose curvature is measured."""


@dataclass(frozen=True)
class Checkpoint:
    """A model whose configuration and tokenizer are there; its weights are not loaded yet."""

    name: str
    config: Any
    tokenizer: Any
    head: Head

    @staticmethod
    def find(name: str) -> Checkpoint:
        """A folder or a hub id. Raises DataError if it is neither, or no language model."""
        from transformers import AutoConfig

        try:
            config = AutoConfig.from_pretrained(name, trust_remote_code=False)
            tokenizer = load_tokenizer(Path(name))
        except Exception as error:  # Whatever transformers makes of a configuration that is none.
            raise DataError(
                f"{name!r} cannot be opened as a model and its tokenizer: {first_line(error)}; give a folder that "
                "save_pretrained has written, or a hub id"
            ) from error
        if (head := head_of(config.to_dict())) is None:
            what = (config.architectures or [config.model_type])[0]
            raise DataError(f"{name!r} ({what}) is no causal or masked language model")
        if head == "masked" and tokenizer.mask_token_id is None:
            raise DataError(f"{name!r}: a masked language model, but its tokenizer has no mask token")
        return Checkpoint(name, config, tokenizer, head)

    def load(self) -> Any:
        """The model, in float32, on the GPU if there is one. Raises DataError; see `load_model`."""
        import torch

        if (folder := Path(self.name)).is_dir():
            check_files(folder, folder.glob("*.safetensors*"))
            check_size(folder)
        model = load_model(self.name)
        return model.to("cuda" if torch.cuda.is_available() else "cpu")

    def length(self, asked: int | None) -> int:
        """Tokens of a sequence. Raises DataError if more are asked for than the model takes."""
        most = getattr(self.config, "max_position_embeddings", None)
        if asked is not None and most is not None and asked > most:
            raise DataError(f"--sequence-length {asked}: {self.name!r} takes {most} at most")
        return asked or min(SEQUENCE_LENGTH, most or SEQUENCE_LENGTH)


@dataclass(frozen=True)
class ModelTraces:
    """One model's traces: on the text, on its own samples, or on both."""

    model: str
    objective: Literal["causal_lm", "masked_lm"]
    """Whose loss it is, whatever the model was trained by: of next tokens, or of hidden ones."""
    num_parameters: int
    num_parameters_measured: int
    sequence_length: int
    seconds: float
    on_text: Measured | None
    on_samples: Measured | None
    with_parts: bool
    shape: Mapping[str, float] | None
    """See `curvature.shape.shape_metrics`; on the text, or for lack of one on its own samples."""
    num_shape_sequences: int
    losses: np.ndarray[Any, Any] | None
    """Mean token loss of each of the first LOSS_SEQUENCES sequences of the text, in nats."""

    @property
    def main(self) -> Measured:
        """On the text, where there is one."""
        measured = self.on_text or self.on_samples
        assert measured is not None
        return measured

    def to_dict(self) -> dict[str, Any]:
        """As JSON values; traces are of the mean loss over predicted tokens, in nats, intervals of 95 %."""
        from raysweep.curvature.measure import distance

        main = self.main
        document: dict[str, Any] = {
            "model": self.model,
            "measured_on": "text" if self.on_text else "samples",
            "objective": self.objective,
            "reduction": "mean over predicted tokens, nats",
            **_metrics(main),
            "hessian_trace_interval": list(main.traces.hessian.relative_interval()),
            "fisher_trace_interval": list(main.traces.fisher.relative_interval()),
            "sequence_length": self.sequence_length,
            "num_parameters": self.num_parameters,
            "num_parameters_measured": self.num_parameters_measured,
            "seconds": self.seconds,
        }
        if self.with_parts:
            document["blocks"] = {name: _part(part) for name, part in main.parts("block").items()}
            document["layers"] = {name: _part(part) for name, part in main.parts("layer").items()}
        if self.on_text and self.on_samples:
            off, error = distance(self.on_samples, self.on_text)
            document["samples"] = _metrics(self.on_samples) | {
                "relative_distance": off,
                "relative_distance_stderr": error,
            }
        if self.shape:
            document["shape"] = dict(self.shape)
            document["num_shape_sequences"] = self.num_shape_sequences
        if self.losses is not None:
            document["loss"], document["loss_stderr"] = _mean(self.losses)
            document["num_loss_sequences"] = len(self.losses)
        return document


@dataclass(frozen=True)
class Difference:
    """The traces of one model less those of another, from the units that both have taken."""

    model: str
    less: str
    traces: Traces
    losses: np.ndarray[Any, Any]
    """Of the same sequences, one's less the other's."""

    def to_dict(self) -> dict[str, Any]:
        """As JSON values; intervals are of 95 %."""
        document: dict[str, Any] = {"model": self.model, "less": self.less}
        document["loss_difference"], document["loss_difference_stderr"] = _mean(self.losses)
        for name, estimate in (("hessian", self.traces.hessian), ("fisher", self.traces.fisher)):
            document |= {
                f"{name}_trace_difference": estimate.mean,
                f"{name}_trace_difference_stderr": estimate.stderr,
                f"{name}_trace_difference_interval": list(estimate.interval()),
            }
        return document


def measure(
    request: Request, *, show: Show = lambda line: None
) -> tuple[list[ModelTraces], list[Difference], list[str]]:
    """Measure the models one after another, then the difference of each from the first where the text is the same.

    What fails while others are measured is told last, and does not take their results along.

    Args:
        request: what to measure.
        show: takes lines on the progress.

    Raises:
        DataError: if there is too little text, or no model can be loaded whole and measured.
    """
    if not request.data and not request.num_samples:
        raise DataError("nothing to measure on: give --data FILES, or --samples N for the model's own text")
    [paths] = collect([(("--data",), partial(resolve, request.data, Path.cwd()))]) if request.data else [()]
    # All that may be wrong, before anything is computed.
    checkpoints = [Checkpoint.find(name) for name in request.models]
    texts = [_text(request, each, paths) if paths else {} for each in checkpoints]
    for each in checkpoints:
        if request.num_samples and (each.head == "masked" or start_of_text(each.tokenizer) is None):
            raise DataError(f"--samples {request.num_samples}: {each.name!r} has no text of its own to draw")
    measured: list[tuple[Arrays, ModelTraces]] = []
    failures: list[str] = []
    for checkpoint, text in zip(checkpoints, texts, strict=True):
        # So that they share probe vectors unit by unit.
        shared = measured[0][1].on_text if measured and _same(text, measured[0][0]) else None
        try:
            measured.append(
                (
                    text,
                    _measure_one(request, checkpoint, text, show, unit_batches=shared.unit_batches if shared else None),
                )
            )
        except DataError as error:
            failures.append(str(error))
    if not measured:
        raise DataError("\n".join(failures))
    (first_text, first), *others = measured
    differences = []
    for text, other in others:
        if first.on_text and other.on_text and _same(text, first_text):
            from raysweep.curvature.measure import paired_difference

            assert first.losses is not None
            assert other.losses is not None
            paired = paired_difference(other.on_text, first.on_text)
            differences.append(Difference(other.model, first.model, paired, other.losses - first.losses))
        elif other.on_text:
            show(f"{other.model} and {first.model} read other tokens: no difference of their own error is given")
    return [each for _, each in measured], differences, failures


def _text(request: Request, checkpoint: Checkpoint, paths: Sequence[str]) -> Arrays:
    read = masked_sequences if checkpoint.head == "masked" else sequences
    length = checkpoint.length(request.sequence_length)
    try:
        return read(checkpoint.tokenizer, paths, length=length, seed=request.traces.seed)
    except ValueError as error:
        raise DataError(f"{error}; give more text, or another --sequence-length") from error


def _measure_one(
    request: Request, checkpoint: Checkpoint, text: Arrays, show: Show, *, unit_batches: int | None
) -> ModelTraces:
    import torch

    from raysweep.curvature.language import equal_batches, prepare
    from raysweep.curvature.measure import measure_traces
    from raysweep.curvature.operators import choose_parameters, named_parameters
    from raysweep.curvature.samples import sample_sequences

    show(f"{checkpoint.name}: loading")
    model = checkpoint.load()
    began = time.perf_counter()
    try:
        prepare(model, twice_differentiable=request.traces.products == "exact")
        choose_parameters(model, request.parameters)
    except ValueError as error:
        raise DataError(f"{checkpoint.name!r}: {error}") from error
    length = checkpoint.length(request.sequence_length)

    def on(text: Mapping[str, torch.Tensor], what: str, *, parts: bool, unit_batches: int | None = None) -> Measured:
        here = {name: rows.to(model.device) for name, rows in text.items()}

        def deal(items: Sequence[Item], run: Callable[[Item], Value]) -> list[Value]:
            show(f"{checkpoint.name}: {what}, {len(items)} more units of work ({time.perf_counter() - began:.0f} s)")
            return [run(item) for item in items]

        try:
            return measure_traces(
                model,
                equal_batches(here, TOKENS_OF_BATCH // length),
                request.traces.with_(parts=parts),
                deal=deal,
                unit_batches=unit_batches,
            )
        except ValueError as error:
            raise DataError(f"{checkpoint.name!r}, {what}: {error}") from error

    tensors = {name: torch.from_numpy(rows) for name, rows in text.items()}
    on_text = on(tensors, "text", parts=request.traces.parts, unit_batches=unit_batches) if text else None
    losses = _losses(model, tensors) if text else None
    on_samples = None
    if request.num_samples:
        show(f"{checkpoint.name}: drawing {request.num_samples} sequences")
        start = start_of_text(checkpoint.tokenizer)
        assert start is not None
        ids = sample_sequences(model, request.num_samples, length=length, start=start, seed=request.traces.seed)
        on_samples = on({"input_ids": ids}, "its own samples", parts=request.traces.parts and not on_text)
        tensors = tensors or {"input_ids": ids}
    num_measured = sum(parameter.numel() for parameter in named_parameters(model).values())
    shape = None
    if request.shape:
        try:
            shape = _shape(
                request.shape, request.traces, model, tensors, lambda line: show(f"{checkpoint.name}: {line}")
            )
        except ValueError as error:
            raise DataError(f"{checkpoint.name!r}, --shape: {error}") from error
    return ModelTraces(
        checkpoint.name,
        "masked_lm" if checkpoint.head == "masked" else "causal_lm",
        model.num_parameters(),
        num_measured,
        length,
        time.perf_counter() - began,
        on_text,
        on_samples,
        request.traces.parts,
        shape,
        min(request.shape.num_sequences, len(tensors["input_ids"])) if request.shape else 0,
        losses,
    )


def _losses(model: Any, text: Mapping[str, torch.Tensor]) -> np.ndarray[Any, Any]:
    """Each sequence's mean token loss."""
    import torch

    from raysweep.curvature.language import mean_token_loss

    with torch.no_grad():
        rows = ({name: part[i : i + 1].to(model.device) for name, part in text.items()} for i in _first(text))
        return np.array([mean_token_loss(model, row).item() for row in rows])


def _first(text: Mapping[str, torch.Tensor]) -> range:
    return range(min(LOSS_SEQUENCES, len(text["input_ids"])))


def _mean(values: np.ndarray[Any, Any]) -> tuple[float, float]:
    """And its standard error."""
    return float(values.mean()), float(values.std(ddof=1) / np.sqrt(len(values)))


def _shape(
    shape: Shape, traces: TraceSettings, model: Any, text: Mapping[str, torch.Tensor], show: Show
) -> dict[str, float]:
    from raysweep.curvature.shape import measure_shape

    if kind_of(type(model).__name__) and all(each.requires_grad for each in model.parameters()):
        shape = shape.with_(geodesic_rho=GEODESIC_RHO)

    def deal(items: Sequence[Item], run: Callable[[Item], Value]) -> list[Value]:
        outcomes = []
        for item in items:
            show(str(item).replace("_", " "))
            outcomes.append(run(item))
        return outcomes

    batch = {name: rows[: shape.num_sequences].to(model.device) for name, rows in text.items()}
    return measure_shape(model, [batch], shape, seed=traces.seed, products=traces.products, deal=deal)[1]


def _same(left: Arrays, right: Arrays) -> bool:
    return left.keys() == right.keys() and all(np.array_equal(left[name], right[name]) for name in left)


def _metrics(measured: Measured) -> dict[str, Any]:
    traces = measured.traces
    return measured.metrics() | {
        "num_probes": traces.num_probes,
        "num_fisher_draws": traces.num_fisher_draws,
        "num_tokens": traces.num_tokens,
        "target_reached": measured.reason == "reached",
        "stopped_by": measured.reason,
    }


def _part(part: Part) -> dict[str, float | None]:
    hessian = part.hessian
    return {
        "hessian_trace": hessian.mean if hessian else None,
        "hessian_trace_stderr": hessian.stderr if hessian else None,
        "fisher_trace": part.fisher.mean,
        "fisher_trace_stderr": part.fisher.stderr,
    }
