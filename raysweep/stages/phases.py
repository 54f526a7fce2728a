"""Phases of a pretraining: each goes on from the end of the one before, and inherits what it does not change.

What is written (`Phase`) compiles to a full recipe and the numbers it begins at (`Segment`), with no look at any data.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, ValidationError, field_validator

from raysweep.data.packing import num_read
from raysweep.errors import Finding, Place, SpaceError
from raysweep.spec import Spec, check_name
from raysweep.validation import findings, validate

if TYPE_CHECKING:
    from raysweep.stages.pretrain import Recipe

OWN = ("phases", "steps", "tokens", "checkpoints", "leave_optimizer_state")
"""Fields of a recipe that no phase inherits."""


class Phase(Spec):
    """What a phase changes of the one before. A mapping is merged into the one it inherits, unless it names another
    `name`: then it takes its place."""

    name: str
    """By which sweep axes reach into it (pretrain.phases.NAME.optimizer.lr); part of no id."""
    steps: int | None = Field(default=None, ge=1)
    """Optimizer steps of this phase; in place of tokens."""
    tokens: int | None = Field(default=None, ge=1)
    """In place of steps; rounded up to whole ones."""
    checkpoints: tuple[int | float | str, ...] = ()
    """Where to save and measure one, counted from the phase's beginning, as in a recipe. None: at the end of the last
    phase, and nowhere in those before."""
    optimizer_state: Literal["keep", "fresh"] = "keep"
    """keep: its running means go on, and the learning rate is not warmed up again unless schedule.warmup says so;
    fresh: it begins anew, as it has to where the optimizer's name changes."""
    data: dict[str, Any] | None = None
    """What of the corpus changes; text keeps the tokenizer of the first phase."""
    objective: dict[str, Any] | None = None
    """What of the objective changes."""
    optimizer: dict[str, Any] | None = None
    """What of the optimizer changes."""
    schedule: dict[str, Any] | None = None
    """What of the schedule changes, which goes over the steps of this phase alone."""
    flat: dict[str, Any] | None = None
    """What of the method for flat minima changes; null: none from here on."""
    batch_sequences: int | None = Field(default=None, ge=1)
    """Of the global batch."""
    sequence_length: int | None = Field(default=None, ge=2)
    """Tokens of a sequence."""
    clip_norm: float | None = Field(default=None, gt=0)
    """Longest gradient; null: any."""

    @field_validator("name")
    @classmethod
    def _plain(cls, name: str) -> str:
        check_name("phase", name)
        if "." in name:
            raise ValueError(f"phase name {name!r}: a dot would end it in a sweep path; use '_' or '-'")
        return name


class Before(Spec):
    """What a phase goes on from, in numbers, all of them counted from the first phase's beginning."""

    steps: int
    """Optimizer steps taken, by which what is drawn in a step goes on."""
    tokens: int
    """Tokens of text read, by all phases together."""
    sequences: int
    """Training sequences read in the order that this phase goes on in; 0 where data or sequence length changed."""
    read: dict[str, int]
    """Domain -> its sequences that were read in other orders."""


def merged(inherited: Any, change: Any) -> Any:
    """A value with what a phase changes of it; plain JSON values."""
    if not (isinstance(inherited, Mapping) and isinstance(change, Mapping)):
        return change
    if "name" in change and change["name"] != inherited.get("name"):
        return change
    return {**inherited, **{key: merged(inherited.get(key), value) for key, value in change.items()}}


@dataclass
class Reading:
    """What of the data was read, phase after phase: each domain goes on where it was left."""

    seed: int
    steps: int = 0
    tokens: int = 0
    _order: Any = None
    _mix: Mapping[str, float] = field(default_factory=dict)
    _sequences: int = 0
    _read: dict[Any, dict[str, int]] = field(default_factory=dict)

    def begin(self, tokens_id: str, mix: Mapping[str, float], sequence_length: int) -> Before:
        """What comes before a phase that reads such sequences."""
        # Other tokens, lengths or shares are another order; the same sequences are read in it from its beginning, but
        # for those of each domain that were read before.
        order = (tokens_id, sequence_length, dict(mix))
        if order != self._order:
            if self._order is not None:
                here = self._read.setdefault(self._order[:2], {})
                for name, num in num_read(self._mix, self._sequences, seed=self.seed).items():
                    here[name] = here.get(name, 0) + num
            self._order, self._mix, self._sequences = order, mix, 0
        read = dict(self._read.get(order[:2], {}))
        return Before(steps=self.steps, tokens=self.tokens, sequences=self._sequences, read=read)

    def take(self, num_steps: int, batch_sequences: int) -> None:
        """Take the steps of the phase that has just begun."""
        num_sequences = num_steps * batch_sequences
        self.steps += num_steps
        self.tokens += num_sequences * self._order[1]
        self._sequences += num_sequences


@dataclass(frozen=True)
class Segment:
    """A phase, compiled: all that it inherits written out, so that its stages know of no other phase."""

    name: str
    """Empty where the recipe has no phases, or has steps of its own before them."""
    recipe: Recipe
    """Whole, without phases and what is left behind them."""
    keeps_optimizer: bool
    """Whether the optimizer goes on from its state at the end of the segment before."""
    measured: tuple[int, ...]
    """Steps of its checkpoints, counted from its own beginning."""
    shown_tokens: frozenset[str] | None
    """Those that its objective and those before it write; None where a checkpoint that it starts from may know more."""


def segments(recipe: Recipe) -> tuple[Segment, ...]:
    """What a recipe trains, one segment after another; a recipe without phases is its only one.

    Raises:
        SpaceError: with all that is wrong with phases, each finding below the recipe.
    """
    alone = recipe
    if recipe.num_steps and (recipe.phases or recipe.leave_optimizer_state):
        alone = recipe.with_(phases=(), leave_optimizer_state=False)
    if not recipe.phases:
        return (_segment((), "", alone, keeps_optimizer=False, measured=recipe.checkpoint_steps),)
    problems = list(_name_findings(recipe))
    parts: list[Segment] = []
    if recipe.num_steps:
        parts.append(_segment((), "", alone, keeps_optimizer=False, measured=_listed(alone)))
    inherited = recipe.model_dump(mode="json", by_alias=True, exclude=set(OWN))
    for index, phase in enumerate(recipe.phases):
        place: Place = ("phases", index)
        written = phase.model_dump(mode="json", exclude_unset=True, exclude={"name", "optimizer_state"})
        inherited = merged(inherited, {key: value for key, value in written.items() if key not in OWN})
        keeps = bool(parts) and phase.optimizer_state == "keep"
        whole = {**inherited, **{key: written[key] for key in OWN if key in written}}
        # With its running means an optimizer goes on at the rate of its schedule, without a second warm-up.
        if keeps and "warmup" not in (phase.schedule or {}) and isinstance(whole["schedule"], dict):
            whole["schedule"] = {**whole["schedule"], "warmup": 0.0}
        try:
            made = validate(type(recipe), whole)
        except ValidationError as error:
            problems += [((*place, *at), text) for at, text in findings(type(recipe), whole, error)]
            break  # What comes after would inherit the mistake.
        is_last = index == len(recipe.phases) - 1
        problems += [((*place, *at), text) for at, text in _change_findings(parts, phase, made)]
        steps = made.checkpoint_steps if is_last else _listed(made)
        parts.append(_segment(parts, phase.name, made, keeps_optimizer=keeps, measured=steps))
    if problems:
        together = SpaceError()
        together.findings = tuple(problems)
        raise together
    return tuple(parts)


def _segment(
    before: Sequence[Segment], name: str, recipe: Recipe, *, keeps_optimizer: bool, measured: tuple[int, ...]
) -> Segment:
    earlier = before[-1].shown_tokens if before else frozenset()
    shown = None if recipe.start or earlier is None else earlier | {*recipe.objective.extra_tokens()}
    return Segment(name, recipe, keeps_optimizer, measured, shown)


def _listed(recipe: Recipe) -> tuple[int, ...]:
    return recipe.checkpoint_steps if recipe.checkpoints else ()


def _name_findings(recipe: Recipe) -> Iterator[Finding]:
    names = [phase.name for phase in recipe.phases]
    for index, name in enumerate(names):
        if name in names[:index]:
            yield ("phases", index, "name"), f"{name!r} is the name of two phases; give one another"


def _change_findings(parts: list[Segment], phase: Phase, made: Recipe) -> Iterator[Finding]:
    """What cannot change from one phase to the next."""
    if not parts:
        if "optimizer_state" in phase.model_fields_set and phase.optimizer_state == "keep":
            yield ("optimizer_state",), "keep: the first phase has none to keep; remove it"
        return
    was = parts[-1].recipe
    if phase.optimizer_state == "keep" and was.optimizer.name != made.optimizer.name:
        yield (
            ("optimizer_state",),
            f"keep: {made.optimizer.name} cannot go on with the state of {was.optimizer.name}; "
            "write optimizer_state: fresh",
        )
    if "tokenizer" in (phase.data or {}):
        yield ("data", "tokenizer"), "a phase goes on with the tokenizer of the first; remove it"
    elif (was.data.name, was.data.vocab_size) != (made.data.name, made.data.vocab_size):
        yield (
            ("data",),
            f"{made.data.name} with a vocabulary of {made.data.vocab_size:,} cannot follow {was.data.name} with "
            f"{was.data.vocab_size:,}: the model's tokens would be others",
        )
