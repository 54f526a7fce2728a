"""Strict validation of what a file says, and its findings in plain words: what is wrong, and what would be right."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from pydantic import Tag, ValidationError
from pydantic_core import ErrorDetails

from raysweep.document import nearest
from raysweep.errors import Finding, Place
from raysweep.spec import Spec

# Fields that are not for a person to write: they are filled when the sweep file is loaded.
_FILLED = ("fingerprint", "digests", "grammar", "pinned")

S = TypeVar("S", bound=Spec)

# What pydantic asked for. Where a value may be of several types, these are joined by "or".
_WANTED = {
    "string_type": "a text",
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "bool_type": "true or false",
    "tuple_type": "a list",
    "list_type": "a list",
    "dict_type": "a mapping (key: value)",
    "model_type": "a mapping (key: value)",
    "model_attributes_type": "a mapping (key: value)",
    "finite_number": "a finite number",
    "greater_than": "above {gt:,.12g}",
    "greater_than_equal": "{ge:,.12g} or more",
    "less_than": "below {lt:,.12g}",
    "less_than_equal": "at most {le:,.12g}",
    "string_too_short": "a text of {min_length} characters or more",
    "string_too_long": "a text of at most {max_length} characters",
}


@dataclass(frozen=True)
class _Problem:
    """One of pydantic's errors. `place` is its location without the names of union members that pydantic puts in.

    `members`: for each of these, the place of the union and the member's name.
    """

    place: Place
    members: tuple[tuple[Place, str], ...]
    owner: type[Spec] | None
    tags: tuple[str, ...]
    details: ErrorDetails

    @property
    def kind(self) -> str:
        return self.details["type"]

    @property
    def context(self) -> dict[str, Any]:
        return self.details.get("ctx", {})


def validate(spec: type[S], data: Mapping[str, Any]) -> S:
    """Strict validation of plain JSON values, as they come out of a file. Raises pydantic's ValidationError."""
    return spec.model_validate_json(json.dumps(data))


def findings(spec: type[Spec], data: Any, error: ValidationError) -> list[Finding]:
    """(place in `data`, what is wrong there and what would be right) for each finding of a failed validation."""
    problems = [_located(spec, data, details) for details in error.errors(include_url=False)]
    grouped: dict[Place, list[_Problem]] = {}
    for problem in _meant(problems):
        grouped.setdefault(problem.place, []).append(problem)
    return [(place, _in_words(group)) for place, group in grouped.items()]


def _meant(problems: Sequence[_Problem]) -> list[_Problem]:
    """Without those of union members that the value is no attempt at: another member got further into it."""
    places = {problem.place for problem in problems}
    # Of a list with a bad item pydantic also says that it is too short.
    kept = [
        problem
        for problem in problems
        if problem.kind != "too_short" or not any(place[:-1] == problem.place for place in places if place)
    ]
    for union in sorted({place for problem in problems for place, _ in problem.members}, key=len):
        inside = {
            name
            for problem in kept
            for place, name in problem.members
            if place == union and len(problem.place) > len(union)
        }
        if inside:
            kept = [
                problem for problem in kept if all(place != union or name in inside for place, name in problem.members)
            ]
    return kept


def _in_words(problems: Sequence[_Problem]) -> str:
    """What is wrong at one place, which may have been tried as several types."""
    wanted = dict.fromkeys(_wanted(problem) for problem in problems)
    if None in wanted:
        return next(_special(problem) for problem in problems if _wanted(problem) is None)
    if "a number" in wanted:
        wanted.pop("a whole number", None)
    value = problems[0].details["input"]
    # YAML reads 1e3 as a number with a fraction.
    is_whole = isinstance(value, float) and value.is_integer() and "a whole number" in wanted
    mend = f"; write {int(value)}" if is_whole else ""
    # Each may be several words itself, joined alike.
    *others, last = " or ".join(map(str, wanted)).split(" or ")
    return f"must be {' or '.join(filter(None, (', '.join(others), last)))}, not {_shown(value)}{mend}"


def _wanted(problem: _Problem) -> str | None:
    if problem.kind == "literal_error":
        return str(problem.context["expected"]).replace("'", "")
    pattern = _WANTED.get(problem.kind)
    return pattern and pattern.format(**problem.context)


def _special(problem: _Problem) -> str:
    """Words for what is no question of a value's type or bounds."""
    kind, context, value = problem.kind, problem.context, problem.details["input"]
    match kind:
        case "extra_forbidden":
            name = str(problem.place[-1])
            declared = problem.owner.model_fields.items() if problem.owner else ()
            fields = [info.alias or field for field, info in declared if field not in _FILLED]
            return f"no field {name!r}" + suggested(name, fields, "fields")
        case "missing" if isinstance(value, list):
            return f"holds {len(value)} value(s), and needs more"
        case "missing":
            return "is missing, and has no default"
        case "too_long":
            return f"holds {context['actual_length']} values; at most {context['max_length']} belong there"
        case "too_short":
            return f"is empty; at least {context['min_length']} belongs there"
        case "union_tag_not_found":
            field = context["discriminator"].strip("'")
            return f"{field} is missing; there are: {', '.join(problem.tags)}"
        case "union_tag_invalid":
            field, tag = context["discriminator"].strip("'"), str(context["tag"])
            return f"no {field} {tag!r}" + suggested(tag, problem.tags, "there are")
        case "value_error":
            return str(context["error"])
    message = problem.details["msg"]
    return f"{message[0].lower()}{message[1:]}, not {_shown(value)}"


def suggested(word: str, known: Sequence[str], called: str, *, also: Sequence[str] = ()) -> str:
    """What follows on a word that is none of `known`: which of it and of `also` may be meant, and which there are."""
    close = nearest(word, [*known, *also], most=1)
    meant = f", did you mean {close[0]!r}" if close else ""
    return meant + (f"; {called}: {', '.join(known)}" if known else "")


def _shown(value: Any) -> str:
    text = json.dumps(value, default=str)
    text = text if len(text) <= 60 else text[:57] + "..."
    kinds = {str: "the text ", list: "the list ", dict: "the mapping "}
    kind = next((words for plain, words in kinds.items() if isinstance(value, plain)), "")
    return "null (nothing)" if value is None else kind + text


def _located(spec: type[Spec], data: Any, details: ErrorDetails) -> _Problem:
    """Follows pydantic's location through `data` and the types, to tell keys from the names of union members."""
    place: list[str | int] = []
    members: list[tuple[Place, str]] = []
    node: Any = data
    annotation: Any = spec
    holder: Any = None
    for index, part in enumerate(details["loc"]):
        inside = (isinstance(node, dict) and part in node) or (isinstance(node, list) and part in range(len(node)))
        is_missing_key = details["type"] == "missing" and index == len(details["loc"]) - 1 and isinstance(part, str)
        if isinstance(part, str) and any(part in names for names, _ in _members(annotation)):
            members.append((tuple(place), part))
            annotation = _member(annotation, part)
        elif inside or is_missing_key:
            place.append(part)
            holder, annotation = annotation, _below(annotation, part)
            node = node[part] if inside else None
        elif isinstance(part, str):
            members.append((tuple(place), part))
    owner = next((kind for _, kind in _members(holder) if _is_spec(kind)), None)
    tags = tuple(dict.fromkeys(name for names, _ in _members(annotation) for name in names))
    return _Problem(tuple(place), tuple(members), owner, tags, details)


def _members(annotation: Any, tag: str | None = None) -> list[tuple[tuple[str, ...], Any]]:
    """(names, type) of each type that an annotation may stand for; the names are those of a tagged union."""
    origin = get_origin(annotation)
    if origin is Annotated:
        inner, *marks = get_args(annotation)
        return _members(inner, next((mark.tag for mark in marks if isinstance(mark, Tag)), tag))
    if origin in (Union, UnionType):
        return [member for arg in get_args(annotation) for member in _members(arg)]
    if tag is None and _is_spec(annotation):
        fields = [info for name, info in annotation.model_fields.items() if name in ("name", "form")]
        names = [arg for info in fields if get_origin(info.annotation) is Literal for arg in get_args(info.annotation)]
        return [(tuple(names), annotation)]
    return [((tag,) if tag else (), annotation)]


def _member(annotation: Any, name: str) -> Any:
    """The member of a union that pydantic calls `name`; the union itself where it has none that is called so."""
    return next((kind for names, kind in _members(annotation) if name in names), annotation)


def _below(annotation: Any, part: str | int) -> Any:
    """The type of the field, value or item `part`; None if it is not declared."""
    for _, kind in _members(annotation):
        if _is_spec(kind):
            for name, info in kind.model_fields.items():
                if part in (name, info.alias):
                    return info.annotation
            if kind.model_config.get("extra") == "allow":  # Names of the user's own, all of one type.
                return get_args(get_type_hints(kind)["__pydantic_extra__"])[1]
        elif args := get_args(kind):
            if get_origin(kind) is dict and isinstance(part, str):
                return args[1]
            if get_origin(kind) is tuple and isinstance(part, int):
                return args[0]
    return None


def _is_spec(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, Spec)
