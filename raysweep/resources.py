"""What gangs are made of: the whole run's, or by the value of an axis. None of it changes a result, or a stage's id."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated, Any, Generic, Literal, TypeVar

from pydantic import (
    ConfigDict,
    Field,
    GetJsonSchemaHandler,
    ValidationError,
    field_validator,
    model_validator,
)
from pydantic_core import CoreSchema

from raysweep.search import name_of, written
from raysweep.spec import Spec, canonical
from raysweep.validation import validate

Auto = Literal["auto"]
"""Left to the planner: what costs least of what fits the memory that a worker has. See `choice`."""

ZeroStage = Literal[0, 1, 2, 3]
FineTuning = Literal["split", "wide"]

SETTINGS = ("workers", "zero_stage", "gradient_checkpointing", "micro_batch_sequences", "fine_tuning")
"""What makes a training take less memory of a worker, and more time."""


class AskedResources(Spec):
    """What a gang is made of, as a sweep file asks for it; as a whole `auto`, or its settings that are."""

    workers: Annotated[int, Field(ge=1)] | Auto = 1
    """Processes of a gang; auto: 1, or 2, 4 or 8 where a model does not fit fewer."""
    cpus_per_worker: float = Field(default=1, gt=0)
    """May be a fraction."""
    gpus_per_worker: float = Field(default=0, ge=0)
    """May be a fraction, so that several gangs of one worker share a GPU: NCCL takes no two ranks of a gang on one.
    Never chosen: on GPUs other numbers are computed in."""
    zero_stage: ZeroStage | Auto = 0
    """What ZeRO shards: 1 optimizer state, 2 gradients too, 3 weights too; auto: as little as fits."""
    gradient_checkpointing: bool | Auto = False
    """Recompute activations in the backward pass: less memory, a third more work; auto: where nothing cheaper fits."""
    micro_batch_sequences: Annotated[int, Field(ge=1)] | Auto | None = None
    """Sequences per forward pass of a worker; None: its whole share of the batch; auto: as much of it as fits."""
    compile: bool | None = None
    """Whether torch compiles a model's blocks for pretraining, once for all variants of a shape: faster, and rounded
    otherwise, as with another number of workers; None: on GPUs, but for zero_stage 3, which does not take it."""
    fine_tuning: FineTuning | Auto = "split"
    """split: each worker fine-tunes a model by itself; wide: all work on one, sharded by `zero_stage`, where the
    training of a model does not fit one worker. Rounded otherwise, as with another number of workers. auto: split where
    that fits."""
    max_concurrent: int | None = Field(default=None, ge=1)
    """Gangs at once; None: as many as fit."""
    max_retries: int = Field(default=2, ge=0)
    """How often a failed stage, or a trial whose gang died, is tried again."""
    max_silence_seconds: float = Field(default=120, gt=0)
    """A gang is replaced if a worker gives no sign of life for so long or, without GPUs, all use no processor."""

    max_store_wait_seconds: float = Field(default=600, ge=0)
    """How long to wait for a store that does not answer, or has no room, before what needs it fails."""

    max_node_wait_seconds: float = Field(default=30, ge=0)
    """How long to wait for a cluster to have room for a first gang; an autoscaler takes minutes to bring nodes. Once
    all room is lost, ten minutes at least."""

    @model_validator(mode="before")
    @classmethod
    def _spelt_out(cls, given: Any) -> Any:
        return _spelt_out(given)

    @classmethod
    def __get_pydantic_json_schema__(cls, schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        """With the short form."""
        mapping = handler(schema)
        return {"description": mapping.pop("description"), "anyOf": [mapping, {"const": "auto"}]}

    @field_validator("gpus_per_worker")
    @classmethod
    def _whole_above_one(cls, gpus: float) -> float:
        if gpus > 1 and gpus != int(gpus):
            raise ValueError(f"{gpus:g} GPUs: more than one must be a whole number; less may be a fraction")
        return gpus

    @model_validator(mode="after")
    def _compilable(self) -> AskedResources:
        if self.compile and self.zero_stage == 3:
            raise ValueError(
                "compile true: zero_stage 3 gathers each weight as it is used, between pieces too small to compile; "
                "set zero_stage to 2, or remove compile"
            )
        return self

    @model_validator(mode="after")
    def _one_rank_to_a_gpu(self) -> AskedResources:
        if self.workers != "auto" and self.workers > 1 and self.shares_gpus:
            raise ValueError(
                f"workers {self.workers} with gpus_per_worker {self.gpus_per_worker:g}: NCCL takes no two ranks of a "
                "gang on one GPU; set gpus_per_worker to 1, or workers to 1 so that several trials share a GPU"
            )
        return self

    @property
    def shares_gpus(self) -> bool:
        """Whether a GPU holds several workers: of gangs of one, then."""
        return 0 < self.gpus_per_worker < 1

    @property
    def autos(self) -> tuple[str, ...]:
        """The settings that are left to the planner."""
        return tuple(name for name in SETTINGS if getattr(self, name) == "auto")

    def without_autos(self) -> Resources:
        """With the default of each setting that is left to the planner: what takes most memory of one worker."""
        given = {name: getattr(self, name) for name in type(self).model_fields if name not in self.autos}
        return Resources(**given)

    @property
    def default(self) -> AskedResources:
        """What holds for the run as a whole."""
        return self

    @property
    def by_variant(self) -> ByVariant[AskedResources]:
        """The same for all."""
        return ByVariant({None: self})


def _spelt_out(given: Any) -> Any:
    return dict.fromkeys(SETTINGS, "auto") if given == "auto" else given


class Resources(AskedResources):
    """What a gang is made of. None of it changes a result, or a stage's id."""

    workers: int = Field(default=1, ge=1)
    zero_stage: ZeroStage = 0
    gradient_checkpointing: bool = False
    micro_batch_sequences: int | None = Field(default=None, ge=1)
    fine_tuning: FineTuning = "split"

    @property
    def compiles(self) -> bool:
        """What `compile` comes to."""
        return self.gpus_per_worker > 0 and self.zero_stage < 3 if self.compile is None else self.compile

    @property
    def fine_tunes_wide(self) -> bool:
        """Whether several workers fine-tune one model."""
        return self.fine_tuning == "wide" and self.workers > 1

    @cached_property
    def alone(self) -> Resources:
        """Of a worker by itself, as in a split stage; it has nobody to shard with."""
        return self.with_(workers=1, zero_stage=0)  # type: ignore[no-any-return]


_OF_THE_RUN = tuple(name for name in Resources.model_fields if name.startswith("max_"))


class ResourcesBy(Spec):
    """Gangs by the value of an axis, so that large models get large ones: `default`, and by label what differs."""

    model_config = ConfigDict(extra="allow")
    __pydantic_extra__: dict[str, AskedResources]

    by: str
    """The axis: its name under sweep."""
    default: AskedResources = AskedResources()
    """Of values that are not named here; what a named one leaves out is taken from it, and what is the run's."""

    @model_validator(mode="before")
    @classmethod
    def _filled_up(cls, given: Any) -> Any:
        if not isinstance(given, dict):
            return given
        default = _spelt_out(given.get("default", {}))
        try:
            validate(AskedResources, default)
        except ValidationError:
            return given  # What is wrong with it is told once.
        default = canonical(default) if isinstance(default, Spec) else default
        sizes = {name: _spelt_out(value) for name, value in given.items() if name not in cls.model_fields}
        return given | {name: default | value for name, value in sizes.items() if isinstance(value, dict)}

    @model_validator(mode="after")
    def _alike(self) -> ResourcesBy:
        for label, resources in self.sizes.items():
            if differ := [name for name in _OF_THE_RUN if getattr(resources, name) != getattr(self.default, name)]:
                raise ValueError(f"{label}: {differ[0]} is the whole run's: set it in default")
            if bool(resources.gpus_per_worker) != bool(self.default.gpus_per_worker):
                raise ValueError(
                    f"{label}: gpus_per_worker {resources.gpus_per_worker:g} beside {self.default.gpus_per_worker:g} "
                    "in default: all variants are trained on GPUs, or none, as the numbers they are trained in differ"
                )
        return self

    @property
    def sizes(self) -> Mapping[str, AskedResources]:
        """By label, as in the file: of a number, as it is written there."""
        return self.__pydantic_extra__

    @property
    def by_variant(self) -> ByVariant[AskedResources]:
        """By the name that a label has in a point."""
        parts: dict[str | None, AskedResources] = {None: self.default}
        parts |= {name_of(label): resources for label, resources in self.sizes.items()}
        return ByVariant(parts, by=self.by)


R = TypeVar("R", bound=AskedResources)
S = TypeVar("S", bound=AskedResources)


@dataclass(frozen=True)
class ByVariant(Generic[R]):
    """What variants are trained by."""

    parts: Mapping[str | None, R]
    """By the name of a value of `by`; None: of all others."""
    by: str | None = None
    """The axis; None: all variants are trained by the same."""

    @property
    def default(self) -> R:
        """Of values that have nothing of their own."""
        return self.parts[None]

    @property
    def every(self) -> tuple[R, ...]:
        """Each that there is, once; `default` first."""
        return tuple(dict.fromkeys(self.parts.values()))

    def part_of(self, point: Mapping[str, Any]) -> str | None:
        """Which of `parts` a variant is trained by."""
        name = written(point[self.by]) if self.by is not None and self.by in point else None
        return name if name in self.parts else None

    def map(self, change: Callable[[R], S]) -> ByVariant[S]:
        """With something made of each part."""
        return ByVariant({name: change(part) for name, part in self.parts.items()}, by=self.by)

    def of(self, point: Mapping[str, Any]) -> R:
        """Those of a variant."""
        return self.parts[self.part_of(point)]
