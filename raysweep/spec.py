"""The base of every declared thing: strict validation, canonical form, fingerprint.

A field of a spec is part of its identity unless it is marked `Provenance`. A field added to a released spec is
marked `Neutral(old behaviour)` and stays out of the hash while it equals that.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache, cached_property
from json.encoder import encode_basestring
from typing import Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict


@dataclass(frozen=True)
class Neutral:
    """Marks a later field: while it equals `value`, ids made before the field existed still hold."""

    value: Any


@dataclass(frozen=True)
class Provenance:
    """Marks a field that is recorded but cannot change a result, such as the path of pinned data."""


class Spec(BaseModel):
    """A frozen, strictly validated declaration. Derive a changed one with `with_`, which validates again."""

    model_config = ConfigDict(
        strict=True,  # No text is taken for a number, nor a number for a yes: the file means what it says.
        extra="forbid",
        frozen=True,
        allow_inf_nan=False,
        protected_namespaces=(),  # Fields may begin with `model`.
        populate_by_name=True,  # As a field's alias may be a word of Python, such as `from`.
    )

    VERSION: ClassVar[int] = 1
    """Raised by a fix that changes results: everything made before it gets another id."""

    @classmethod
    def __pydantic_init_subclass__(cls, **settings: Any) -> None:
        """Refuse a member of a family that leaves something out, where its class is made.

        Only a class that has an abstract method of its own is a base; any other has to have all that its bases ask for.

        Raises:
            TypeError: names what is missing.
        """
        super().__pydantic_init_subclass__(**settings)
        unset = {name for name in cls.__class_vars__ if not hasattr(cls, name)}
        missing = sorted(unset | cls.__abstractmethods__)
        is_base = any(getattr(value, "__isabstractmethod__", False) for value in vars(cls).values())
        if missing and not is_base:
            raise TypeError(f"{cls.__name__} lacks {', '.join(missing)}, which {cls.__mro__[1].__name__} asks for")

    def with_(self, **changes: Any) -> Any:
        """A validated copy with some fields replaced (pydantic's `model_copy` would skip validation)."""
        return type(self)(**{name: getattr(self, name) for name in type(self).model_fields} | changes)

    @cached_property
    def _canonical_text(self) -> str:
        # Once: the stages of a trial share tasks and recipes, and its checkpoints share measurements.
        return _text(_fields(self))


Direction = Literal["max", "min"]
"""Which values of a number are better."""


@dataclass(frozen=True)
class Metric:
    """A number that a stage reports of a checkpoint or of its own work.

    `direction` is declared before anything is measured, never chosen by how well the number then predicts a target.
    None marks bookkeeping: a count, an error bar, or what has no better side. `unit` is empty for a pure number. Of a
    stage that measures several tasks, the name is `task/metric`.
    """

    name: str
    direction: Direction | None = None
    unit: str = ""


def check_name(what: str, name: str) -> None:
    """See that a name can be a file's and a part of a metric column, as those of domains and tasks are.

    Raises:
        ValueError: names what it is of, and what is allowed.
    """
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}", name):
        raise ValueError(
            f"{what} name {name!r}: use up to 64 letters, digits, '_', '-' and '.', a letter or digit first"
        )


def canonical(value: Any) -> Any:
    """What of `value` is identity, as plain JSON values. Raises TypeError on what has no stable form."""
    if value is None or isinstance(value, str | bool | int | float):
        return value
    if isinstance(value, Spec):
        return {name: canonical(item) for name, item in _fields(value).items()}
    if isinstance(value, Mapping):
        return {str(key): canonical(item) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return [canonical(item) for item in value]
    raise TypeError(f"no stable form for {type(value).__name__}: {value!r}; declare it with JSON types or a Spec")


def _fields(spec: Spec) -> dict[str, Any]:
    """Name -> value of what is its identity."""
    items = ((name, getattr(spec, name), neutral) for name, neutral in _hashed_fields(type(spec)))
    fields = {name: item for name, item, neutral in items if not (neutral and neutral.value == item)}
    # Defaults are hashed like any value: AdamW and SGD of one rate had the same id when they were left out.
    return fields | ({"VERSION": spec.VERSION} if spec.VERSION != 1 else {})


@cache  # A plan of 100,000 stages asks it of a dozen classes.
def _hashed_fields(spec: type[Spec]) -> tuple[tuple[str, Neutral | None], ...]:
    """Fields that are identity, each with its neutral value if it has one."""
    return tuple(
        (name, next((mark for mark in info.metadata if isinstance(mark, Neutral)), None))
        for name, info in spec.model_fields.items()
        if not any(isinstance(mark, Provenance) for mark in info.metadata)
    )


def fingerprint(value: Any) -> str:
    """Twelve hex digits of the SHA-256 of the canonical form, by which stages are found again."""
    # 48 bits: two of a million stages share them with a chance of 0.2 %, and the store compares specs on a hit.
    return hashlib.sha256(_text(value).encode()).hexdigest()[:12]


def _text(value: Any) -> str:
    """The canonical form in JSON, its keys in order. Raises ValueError on a number that JSON does not have."""
    if type(value) is str:
        return encode_basestring(value)
    if type(value) is int or (type(value) is float and math.isfinite(value)):
        return repr(value)
    if isinstance(value, Spec):
        return value._canonical_text
    if isinstance(value, Mapping):
        texts = {str(key): _text(item) for key, item in value.items()}
        return "{" + ",".join([f"{encode_basestring(key)}:{texts[key]}" for key in sorted(texts)]) + "}"
    if isinstance(value, tuple | list):
        return "[" + ",".join(map(_text, value)) + "]"
    return json.dumps(canonical(value), ensure_ascii=False, allow_nan=False)
