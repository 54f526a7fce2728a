"""How checkpoints are fine-tuned. To add a method: a spec that does what `MethodSpec` asks for, and its name in the
last line."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from importlib.util import find_spec
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, NamedTuple

from pydantic import Discriminator, Field, Tag, field_validator

from raysweep.errors import SpaceError
from raysweep.spec import Spec

if TYPE_CHECKING:
    import torch

    from raysweep.train.model_spec import ModelSpec


class Adapters(NamedTuple):
    """Matrices that are trained beside frozen weights, as far as cost and memory go by them."""

    rank: int
    has_dropout: bool


class MethodSpec(Spec):
    """Which numbers fine-tuning trains, and how the model that is scored comes of them."""

    name: str
    first_lrs: ClassVar[tuple[float, ...]]
    """Learning rates that `sft.lrs: auto` begins with."""

    @property
    @abstractmethod
    def adapters(self) -> Adapters | None:
        """What is trained beside frozen weights; None: the weights themselves are trained."""

    @abstractmethod
    def begin(self, model: torch.nn.Module, *, seed: int) -> Callable[[], None]:
        """Get a model ready to be trained: what is to be trained takes gradients, and nothing else does.

        Args:
            model: a Hugging Face language model, or a `Classifier` on one; changed in place, its function is not.
            seed: of what is drawn; the same weights on every rank, wherever the model lies.

        Returns:
            Ends it: what was trained becomes part of the model's own weights, which are under their names again.

        Raises:
            StageError: if the model has not what is to be trained.
        """

    def check_installed(self) -> None:
        """See that the packages are here which it needs. Raises SpaceError."""

    def check_model(self, model: ModelSpec) -> None:
        """See that it fits models of a kind, before there is one. Raises SpaceError."""


class Full(MethodSpec):
    """All weights are trained."""

    name: Literal["full"] = "full"
    """Which method."""

    first_lrs: ClassVar[tuple[float, ...]] = (1e-4, 3e-4, 1e-3)

    @property
    def adapters(self) -> Adapters | None:
        """None: see `MethodSpec.adapters`."""
        return None

    def begin(self, model: torch.nn.Module, *, seed: int) -> Callable[[], None]:
        """The model as it is; see `MethodSpec.begin`."""
        return _nothing


def _nothing() -> None:
    pass


def _names_or_word(target_modules: Any) -> str | None:
    is_names = isinstance(target_modules, list | tuple)
    return "names" if is_names else "word" if target_modules == "all-linear" else None


TargetModules = Annotated[
    Annotated[tuple[str, ...], Tag("names"), Field(min_length=1)] | Annotated[Literal["all-linear"], Tag("word")],
    Discriminator(
        _names_or_word,
        custom_error_type="target_modules",
        custom_error_message="write a list of modules' names, such as [q_proj, v_proj], or all-linear",
    ),
]


class LoRA(MethodSpec):
    """LoRA (Hu et al., 2021), by Hugging Face's PEFT: W + lora_alpha / r B A in place of W, where B and A are trained.

    A is [r, in] and B [out, r]. A is drawn from the seed and B begins at 0, so that training starts from the
    checkpoint's own function. A new head of a task is trained as a whole. The model that is scored, and whose
    forgetting is measured, is the merged one. Fields go by PEFT's names and, but for target_modules, have its defaults.
    """

    name: Literal["lora"]
    """Which method."""
    r: int = Field(default=8, ge=1)
    """Rank of the matrices that are trained."""
    lora_alpha: int = Field(default=8, ge=1)
    """Their product counts lora_alpha / r times."""
    lora_dropout: float = Field(default=0.0, ge=0, lt=1)
    """Part of A's input that a training step leaves out."""
    target_modules: TargetModules = "all-linear"
    """Last parts of the names of the linear layers that get such matrices; all-linear: all but the output layer, where
    PEFT's own default is a table of architectures, which changes with its version."""

    # Best rates are ten times those of full fine-tuning at lora_alpha 32 in "LoRA without regret" (Schulman et al.,
    # 2025).
    first_lrs: ClassVar[tuple[float, ...]] = (1e-3, 3e-3, 1e-2)

    @field_validator("target_modules")
    @classmethod
    def _in_any_order(cls, names: tuple[str, ...] | str) -> tuple[str, ...] | str:
        # The same layers are the same method, with one id.
        return names if isinstance(names, str) else tuple(sorted(set(names)))

    @property
    def adapters(self) -> Adapters | None:
        """Of rank r, beside all linear layers: named ones are not known by number here."""
        return Adapters(self.r, has_dropout=self.lora_dropout > 0)

    def check_installed(self) -> None:
        """PEFT: see `MethodSpec.check_installed`."""
        if find_spec("peft") is None:
            raise SpaceError("lora needs PEFT, which is not installed: pip install 'raysweep[lora]'")

    def check_model(self, model: ModelSpec) -> None:
        """Whether it has the layers that are named; see `MethodSpec.check_model`."""
        if self.target_modules == "all-linear":
            return  # Which all models have, so that none need be made.
        import torch

        from raysweep.train.adapters import find_targets

        model_class, config = model.configure(vocab_size=8, sequence_length=8)
        with torch.device("meta"):
            skeleton = model_class(config)
        try:
            find_targets(skeleton, self.target_modules)
        except ValueError as error:
            raise SpaceError(f"target_modules: {error}") from None

    def begin(self, model: torch.nn.Module, *, seed: int) -> Callable[[], None]:
        """See `MethodSpec.begin`, and `adapters.add_lora`."""
        from raysweep.train.adapters import add_lora

        return add_lora(
            model,
            r=self.r,
            lora_alpha=self.lora_alpha,
            lora_dropout=self.lora_dropout,
            target_modules=self.target_modules,
            seed=seed,
        )


Method = Annotated[Full | LoRA, Field(discriminator="name")]
