"""Sweep files as text: YAML 1.2 as plain values, with the line of every key; bounded in size and in depth."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.composer import Composer
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode
from ruamel.yaml.reader import ReaderError

from raysweep.errors import Place, SpaceError, dotted

# A person's sweep file has some hundred values. An alias in an alias multiplies them, a loop of them never ends.
MAX_BYTES = 2**18
MAX_VALUES = 20_000
MAX_DEPTH = 32

# JSON and YAML can spell half of a pair ("\\ud800"); no encoding can hold it. No path can hold a NUL.
UNWRITABLE = re.compile("[\0\ud800-\udfff]")

_TAG = "tag:yaml.org,2002:"

Origin = Callable[[int], str]
"""Line of a text, counted from 1 -> where a person finds it, as `file:line`."""


@dataclass(frozen=True)
class Document:
    """A YAML 1.2 mapping as plain values, that knows where each key is written."""

    path: Path
    text: str
    data: dict[str, Any]
    origins: Mapping[Place, str]
    """Of each key and item: `file:line`, or that it comes from the command line."""

    def at(self, place: Place) -> str:
        """`file:line: dotted.path`, the line of the deepest part of `place` that is written anywhere."""
        known = next(place[:end] for end in range(len(place), -1, -1) if place[:end] in self.origins)
        return f"{self.origins[known]}: {dotted(place)}" if place else self.path.name


def read_document(path: Path) -> Document:
    """Parse a YAML file.

    Raises:
        SpaceError: if the file is missing, is no YAML mapping of plain values, names a key twice or is too large.
    """
    text = _text(path)
    data, origins = read_yaml(text, lambda line: f"{path.name}:{line}")
    if not isinstance(data, dict):
        kind = "empty" if data is None else "a list" if isinstance(data, list) else "a single value"
        raise SpaceError(
            f"{path.name}: a sweep file is a mapping of sections (name: ..., pretrain: ...); this is {kind}"
        )
    return Document(path=path, text=text, data=data, origins=origins)


def read_yaml(text: str, origin: Origin, place: Place = ()) -> tuple[Any, dict[Place, str]]:
    """YAML as plain values, and where each key and item of it is written; `place` is where the whole belongs.

    Raises:
        SpaceError: if it is no YAML of plain values, names a key twice or is too large.
    """
    # ruamel: YAML 1.2, so 1e-3 is a number and `on` a word. The nodes are read here, not by its constructors: these
    # would make objects of tags, take merge keys in, and of what an alias stands for make no copy.
    yaml = YAML(typ="safe", pure=True)
    yaml.Composer = _BoundedComposer
    try:
        tree = yaml.compose(text)
    except MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise _mistake(origin(line), place, f"not valid YAML: {_in_words(error.problem)}") from error
    except ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        control = f"a control character, U+{error.character:04X}"
        raise _mistake(origin(line), place, f"not valid YAML: {control}") from error
    except YAMLError as error:
        raise _mistake(origin(1), place, f"not valid YAML: {_in_words(str(error))}") from error
    reader = _Reader(origin, yaml.constructor)
    reader.origins[place] = origin(1)
    return (None if tree is None else reader.value(tree, place)), reader.origins


def _mistake(origin: str, place: Place, text: str) -> SpaceError:
    where = f" {dotted(place)}:" if place else ""
    return SpaceError(f"{origin}:{where} {text}")


def _text(path: Path) -> str:
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_BYTES + 1)
    except FileNotFoundError:
        raise SpaceError(f"{path}: no such file") from None
    except (OSError, ValueError) as error:
        raise SpaceError(f"{path}: cannot be read: {error}") from error
    if len(raw) > MAX_BYTES:
        raise SpaceError(f"{path.name}: more than {MAX_BYTES:,} bytes; a sweep file names data, and does not hold it")
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line, before = raw.count(b"\n", 0, error.start) + 1, raw.rfind(b"\n", 0, error.start)
        where = f"byte {error.start - before - 1} of the line"
        raise SpaceError(f"{path.name}:{line}: not UTF-8 ({where}); save the file as UTF-8") from error


def _in_words(problem: str | None) -> str:
    text = " ".join((problem or "malformed").split())
    text = text.replace("found character '\\t' that cannot start any token", "a tab; indent with spaces")
    return text.replace("but found another document", "a second document; a sweep file holds one")


class _BoundedComposer(Composer):
    """Stops at `MAX_DEPTH`, where Python's own stack would end a little later, and at directives."""

    levels = 0

    def compose_document(self) -> Any:
        start = self.parser.peek_event()
        if start.version or start.tags:  # %YAML 1.1 would make words such as `on` true.
            raise MarkedYAMLError(problem="a directive (%YAML, %TAG); leave it out", problem_mark=start.start_mark)
        return super().compose_document()

    def compose_node(self, parent: Any, index: Any) -> Any:
        self.levels += 1
        if self.levels > MAX_DEPTH:
            mark = self.parser.peek_event().start_mark
            raise MarkedYAMLError(problem=f"nested deeper than {MAX_DEPTH} levels", problem_mark=mark)
        node = super().compose_node(parent, index)
        self.levels -= 1
        return node


class _Reader:
    """YAML's nodes as plain JSON values, noting where each key and item is written."""

    def __init__(self, origin: Origin, constructor: Any) -> None:
        self.origins: dict[Place, str] = {}
        self._origin = origin
        self._constructor = constructor
        self._num_values = 0

    def value(self, node: Node, place: Place) -> Any:
        """The plain value of a node."""
        self._num_values += 1
        if self._num_values > MAX_VALUES:
            raise self._error(
                node, (), f"more than {MAX_VALUES:,} values, those that aliases (*name) repeat among them"
            )
        if len(place) > MAX_DEPTH:
            raise self._error(node, place[:3], f"nested deeper than {MAX_DEPTH} levels, by an alias (*name)")
        if not isinstance(node, ScalarNode) and node.tag not in (f"{_TAG}map", f"{_TAG}seq"):
            raise self._error(node, place, self._tagged(node))
        if isinstance(node, MappingNode):
            return {key: self.value(item, (*place, key)) for key, item in self._items(node, place)}
        if isinstance(node, SequenceNode):
            self.origins |= {
                (*place, index): self._origin(item.start_mark.line + 1) for index, item in enumerate(node.value)
            }
            return [self.value(item, (*place, index)) for index, item in enumerate(node.value)]
        assert isinstance(node, ScalarNode)
        return self._scalar(node, place)

    def _items(self, node: MappingNode, place: Place) -> Iterator[tuple[str, Node]]:
        seen: dict[str, int] = {}
        for key, item in node.value:
            line = key.start_mark.line + 1
            if not isinstance(key, ScalarNode):
                raise self._error(
                    key, place, "a key is a text, not a list or a mapping; quote it if braces belong to it"
                )
            if key.tag == f"{_TAG}merge":
                raise self._error(key, place, "merge keys (<<) are no part of YAML 1.2; write the fields out")
            name = self._written(key, place)
            if name in seen:
                raise self._error(key, (*place, name), f"duplicate key, first on line {seen[name]}")
            seen[name] = line
            self.origins[*place, name] = self._origin(line)
            yield name, item

    def _scalar(self, node: ScalarNode, place: Place) -> Any:
        text = self._written(node, place)
        match str(node.tag).removeprefix(_TAG):
            case "str" | "timestamp":
                return text
            case "null":
                return None
            case "bool" if text.lower() in ("true", "false"):
                return text.lower() == "true"
            case "int" | "float" as kind:
                return self._number(node, kind, place)
        raise self._error(node, place, self._tagged(node))

    def _number(self, node: ScalarNode, kind: str, place: Place) -> int | float:
        if len(node.value) <= 100:
            try:
                number: int | float = getattr(self._constructor, f"construct_yaml_{kind}")(node)
            except (ValueError, IndexError):  # !!int word
                raise self._error(node, place, f"{node.value!r} is no number") from None
            if isinstance(number, float) or abs(number) < 2**63:
                return number
        raise self._error(node, place, f"a number of {len(node.value):,} characters is too large")

    def _written(self, node: ScalarNode, place: Place) -> str:
        text = str(node.value)
        if unwritable := UNWRITABLE.search(text):
            what = "a NUL character" if unwritable[0] == "\0" else "half of a surrogate pair, which is no text"
            raise self._error(node, place, f"holds {what}")
        return text

    def _tagged(self, node: Node) -> str:
        tag = str(node.tag).replace(_TAG, "!!")
        return (
            f"the tag {tag} is not read here; a sweep file holds texts, numbers, true, false, null, lists and mappings"
        )

    def _error(self, node: Node, place: Place, text: str) -> SpaceError:
        return _mistake(self._origin(node.start_mark.line + 1), place, text)


def nearest(word: str, known: Sequence[str], *, most: int = 3) -> list[str]:
    """Those of `known` that may be meant, the likeliest first: they begin with `word`, or differ in a few letters."""
    begun = [name for name in known if word and name.startswith(word)]
    return list(dict.fromkeys([*begun, *difflib.get_close_matches(word, known, n=most)]))[:most]
