"""Sweep files as text: YAML 1.2 with the line of every key, and validation findings that say where and what instead."""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, TypeVar, Union, get_args, get_origin

from pydantic import ValidationError
from ruamel.yaml import YAML
from ruamel.yaml.comments import CommentedMap, CommentedSeq
from ruamel.yaml.error import MarkedYAMLError, YAMLError

from raysweep.errors import SpaceError
from raysweep.spec import Spec

S = TypeVar("S", bound=Spec)


@dataclass(frozen=True)
class Document:
    """A YAML 1.2 mapping as plain values, that knows the line of each key."""

    path: Path
    text: str
    data: dict[str, Any]
    lines: Mapping[tuple[str | int, ...], int]

    def at(self, loc: Sequence[str | int]) -> str:
        """`file:line: dotted.path`, the line of the deepest part of `loc` that stands in the file."""
        known = next(tuple(loc[:end]) for end in range(len(loc), -1, -1) if tuple(loc[:end]) in self.lines)
        dotted = ".".join(map(str, loc))
        return f"{self.path.name}:{self.lines[known]}: {dotted}" if dotted else f"{self.path.name}"


def read_document(path: Path) -> Document:
    """Parse a YAML file.

    Raises:
        SpaceError: if the file is missing, is no YAML mapping, or names a key twice.
    """
    # ruamel: YAML 1.2, so 1e-3 is a number and `on` a word; of two equal keys PyYAML would silently keep the last.
    try:
        text = path.read_text(encoding="utf-8")
        tree = YAML(typ="rt").load(text)
    except FileNotFoundError:
        raise SpaceError(f"{path}: no such file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise SpaceError(f"{path}: cannot be read: {error}") from error
    except MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        problem = " ".join((error.problem or "malformed").split())
        raise SpaceError(f"{path.name}:{line}: not valid YAML: {problem}") from error
    except YAMLError as error:
        raise SpaceError(f"{path.name}: not valid YAML: {error}") from error
    if not isinstance(tree, dict):
        raise SpaceError(f"{path.name}: a sweep file is a mapping of sections, not {type(tree).__name__}")
    lines: dict[tuple[str | int, ...], int] = {(): 1}
    data = _plain(tree, (), lines)
    return Document(path=path, text=text, data=data, lines=lines)


def _plain(node: Any, loc: tuple[str | int, ...], lines: dict[tuple[str | int, ...], int]) -> Any:
    """ruamel's tree as plain JSON values, noting the line of each key and item."""
    if isinstance(node, CommentedMap):
        for key in node:
            lines[(*loc, str(key))] = node.lc.key(key)[0] + 1
        return {str(key): _plain(item, (*loc, str(key)), lines) for key, item in node.items()}
    if isinstance(node, CommentedSeq):
        for index in range(len(node)):
            lines[(*loc, index)] = node.lc.item(index)[0] + 1
        return [_plain(item, (*loc, index), lines) for index, item in enumerate(node)]
    if isinstance(node, bool) or node is None:
        return node
    for plain in (int, float, str):
        if isinstance(node, plain):
            return plain(node)
    return str(node)  # A date, say: validation will tell what was wanted there.


def validate(spec: type[S], data: Mapping[str, Any]) -> S:
    """Strict validation of plain JSON values, as they come out of a file. Raises pydantic's ValidationError."""
    return spec.model_validate_json(json.dumps(data))


def findings(spec: type[Spec], data: Any, error: ValidationError) -> list[tuple[tuple[str | int, ...], str]]:
    """(place in `data`, what is wrong there and what would be right) for each finding of a failed validation."""
    found = []
    for item in error.errors(include_url=False):
        loc, owner = _resolve(spec, data, item["loc"])
        kind, value = item["type"], item.get("input")
        if kind == "extra_forbidden":
            fields = [info.alias or name for name, info in owner.model_fields.items()] if owner else []
            close = difflib.get_close_matches(str(loc[-1]), fields, n=1)
            message = f"no field {loc[-1]!r}" + (f", did you mean {close[0]!r}" if close else "")
            message += f"; fields: {', '.join(fields)}" if fields else ""
        elif kind == "missing":
            message = "is missing, and has no default"
        elif kind == "value_error":
            message = str(item["ctx"]["error"])
        elif kind == "union_tag_invalid":
            tag, names = item["ctx"]["tag"], item["ctx"]["expected_tags"].replace("'", "")
            close = difflib.get_close_matches(tag, names.split(", "), n=1)
            field = item["ctx"]["discriminator"].strip("'")
            message = (
                f"no {field} {tag!r}" + (f", did you mean {close[0]!r}" if close else "") + f"; there are: {names}"
            )
        else:
            message = f"{item['msg'][0].lower()}{item['msg'][1:]}, not {_shown(value)}"
        found.append((loc, message))
    return found


def nearest(word: str, known: Sequence[str], *, most: int = 3) -> list[str]:
    """Those of `known` that may be meant, the likeliest first: they begin with `word`, or differ in a few letters."""
    begun = [name for name in known if name.startswith(word)]
    return list(dict.fromkeys([*begun, *difflib.get_close_matches(word, known, n=most)]))[:most]


def _shown(value: Any) -> str:
    text = json.dumps(value, default=str)
    return text if len(text) <= 60 else text[:57] + "..."


def _resolve(spec: type[Spec], data: Any, loc: Sequence[str | int]) -> tuple[tuple[str | int, ...], type[Spec] | None]:
    """`loc` without the union tags pydantic puts in, and the spec that holds its last part."""
    kept: list[str | int] = []
    owner: type[Spec] | None = spec
    node, annotation = data, spec
    last = len(loc) - 1
    for index, part in enumerate(loc):
        inside = (isinstance(node, dict) and part in node) or (isinstance(node, list) and isinstance(part, int))
        if not inside and index != last and not (isinstance(node, dict) and index == 0):
            continue  # A tag such as 'adamw'.
        if not inside and isinstance(node, dict) and part in _tags(annotation):
            continue
        owner = _spec_of(annotation, node)
        annotation = _annotation_of(annotation, owner, part)
        kept.append(part)
        node = node[part] if inside else None
    return tuple(kept), owner


def _members(annotation: Any) -> list[Any]:
    """The types an annotation may stand for."""
    origin = get_origin(annotation)
    if origin is Annotated:
        return _members(get_args(annotation)[0])
    if origin in (Union, UnionType):
        return [member for arg in get_args(annotation) for member in _members(arg)]
    return [annotation]


def _tags(annotation: Any) -> set[str]:
    return {
        str(info.default)
        for member in _members(annotation)
        if isinstance(member, type) and issubclass(member, Spec)
        for name, info in member.model_fields.items()
        if name in ("name", "form")
    }


def _spec_of(annotation: Any, node: Any) -> type[Spec] | None:
    """The spec that `node` is meant to be: the only candidate, or the one whose tag it bears."""
    specs = [member for member in _members(annotation) if isinstance(member, type) and issubclass(member, Spec)]
    tags = {node.get("name"), node.get("form")} if isinstance(node, dict) else set()
    tagged = [
        member
        for member in specs
        if any(info.default in tags for name, info in member.model_fields.items() if name in ("name", "form"))
    ]
    return next(iter(tagged or specs), None)


def _annotation_of(annotation: Any, owner: type[Spec] | None, part: str | int) -> Any:
    if owner:
        for name, info in owner.model_fields.items():
            if part in (name, info.alias):
                return info.annotation
        return None
    for member in _members(annotation):
        if args := get_args(member):
            return args[1] if get_origin(member) is dict else args[0]
    return None
