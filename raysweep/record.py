"""The record of a finished stage: what it was asked, what it gave, and the files it left."""

from __future__ import annotations

import difflib
import hashlib
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from types import UnionType
from typing import Any

from raysweep.durable import below, parse_object


@dataclass(frozen=True)
class Record:
    """The outcome of one finished stage.

    `status` is "done" or "diverged" (training left the finite numbers: final, and without files). `files` maps a
    path in the stage's folder to its {"bytes", "sha256"}; `provenance` says when, where and with what it ran.
    """

    id: str
    kind: str
    status: str
    spec: Mapping[str, Any]
    inputs: Mapping[str, str]
    metrics: Mapping[str, float]
    provenance: Mapping[str, Any]
    files: Mapping[str, Mapping[str, Any]]

    def to_json(self) -> str:
        """One JSON document that carries its own checksum."""
        body = asdict(self)
        return json.dumps(body | {"checksum": _checksum(body)}, indent=1, sort_keys=True)

    @staticmethod
    def from_json(text: str | bytes) -> Record:
        """Raises ValueError if the text is not a record, was altered, or names a file outside of its stage's folder."""
        body = parse_object(text)
        if body.pop("checksum", None) != _checksum(body):
            raise ValueError("the record does not match its checksum")
        # A checksum is no signature: whoever can write to the store can make one.
        if body.keys() != Record.__dataclass_fields__.keys():
            raise ValueError(f"its fields are {', '.join(sorted(body))}")
        record = Record(**body)
        wrong = [name for name, is_right in _IS_RIGHT.items() if not is_right(body[name])]
        if wrong:
            raise ValueError(f"its {wrong[0]} is {str(body[wrong[0]])[:60]!r}")
        for name in record.files:
            below(Path(), name)
        return record


def is_id(value: object) -> bool:
    """Whether a value can be the id of a stage, and so the name of its folder."""
    return isinstance(value, str) and re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,199}", value) is not None


def _has(kind: type | UnionType) -> Callable[[Any], bool]:
    """Of a value: whether it is a mapping to values of a type."""
    return lambda value: isinstance(value, dict) and all(isinstance(item, kind) for item in value.values())


def _are_files(value: Any) -> bool:
    return isinstance(value, dict) and all(
        isinstance(entry, dict) and isinstance(entry.get("bytes"), int) and isinstance(entry.get("sha256"), str)
        for entry in value.values()
    )


_IS_RIGHT: Mapping[str, Callable[[Any], bool]] = {
    "id": is_id,
    "kind": lambda value: isinstance(value, str),
    "status": lambda value: value in ("done", "diverged"),
    "spec": _has(object),
    "inputs": _has(str),
    "metrics": _has(int | float),
    "provenance": _has(object),
    "files": _are_files,
}
"""Of each field of a record."""


def difference(have: str, asked: str) -> str:
    """Of two indented JSON texts, the lines that differ, at most six: `-` is there, `+` is asked for."""
    lines = difflib.unified_diff(have.splitlines(), asked.splitlines(), lineterm="", n=0)
    return "; ".join([line for line in lines if not line.startswith(("---", "+++", "@@"))][:6])


def _checksum(body: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
