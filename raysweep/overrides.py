"""`key=value` in place of what a sweep file says, as the command line takes it."""

from __future__ import annotations

import contextlib
import copy
import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from raysweep.document import UNWRITABLE, Document, read_yaml
from raysweep.errors import Place, SpaceError, dotted
from raysweep.search import KINDS

COMMAND_LINE = "on the command line"


def with_overrides(document: Document, overrides: Sequence[str]) -> Document:
    """The document as if its file had said `key=value` of each.

    A key is a place in the file, its words joined by dots. Where keys hold dots themselves, as the axes of a sweep do,
    the longest that is there counts; an item of a list goes by its index or its `name`, as phases have one. A value is
    YAML, read as in the file. What is not there is added, for validation to judge.

    Raises:
        SpaceError: if one is not of that form, leads to no place, is undone by a later one, or gives a value that an
            axis of the sweep sets in every variant.
    """
    if not overrides:
        return document
    data, origins = copy.deepcopy(document.data), dict(document.origins)
    written: dict[Place, str] = {}
    for override in overrides:
        key, text = _parts(override)
        place = _place(data, key)
        value, below = read_yaml(text, lambda line: COMMAND_LINE, place)
        if undone := next((other for other in written if other[: len(place)] == place), None):
            raise _error(key, f"takes the place of {dotted(undone)}={written[undone]}; give one of them")
        _put(data, place, value)
        origins = {at: origin for at, origin in origins.items() if at[: len(place)] != place} | below
        for end in range(1, len(place)):
            origins.setdefault(place[:end], COMMAND_LINE)
        written[place] = text
    for place, text in written.items():
        _refuse_swept(data, place, text)
    return replace(document, data=data, origins=origins, text=_text_with(document.text, written, data))


def _parts(override: str) -> tuple[str, str]:
    """Key and text of the value."""
    key, equals, text = override.partition("=")
    if not equals or not all(key.split(".")) or UNWRITABLE.search(key):
        raise SpaceError(f"{COMMAND_LINE}: {override!r} is no key=value, such as pretrain.steps=200")
    if not text.strip():  # As of pretrain.steps=$STEPS where that is not set.
        raise _error(key, f"has no value; write {key}=null for none")
    return key, text


def _place(data: Mapping[str, Any], key: str) -> Place:
    """Where a key leads, which need not be there."""
    place: list[str | int] = []
    holder: Any = data
    words = key.split(".")
    while words:
        num_words = 1
        if isinstance(holder, list):
            place.append(index := _item(holder, words[0], key, place))
            holder = holder[index]
        elif isinstance(holder, dict) or holder is None:
            num_words = _words_of_key(holder or {}, words, place)
            place.append(part := ".".join(words[:num_words]))
            holder = (holder or {}).get(part)
        else:
            raise _error(key, f"{dotted(tuple(place))} is {holder!r}, with nothing below it")
        words = words[num_words:]
    return tuple(place)


def _words_of_key(holder: Mapping[str, Any], words: Sequence[str], place: Sequence[str | int]) -> int:
    """How many of the words are the next key."""
    for num_words in range(len(words), 0, -1):
        if ".".join(words[:num_words]) in holder:
            return num_words
    # New keys are of one word, but for the paths of a sweep: these end before a kind of axis, or with the last word.
    if list(place) == ["sweep"]:
        return next((index for index, word in enumerate(words) if index and word in KINDS), len(words))
    is_zip = len(place) == 3 and place[0] == "sweep" and place[2] == "zip"
    return len(words) if is_zip else 1


def _item(items: Sequence[Any], word: str, key: str, place: Sequence[str | int]) -> int:
    names = [item.get("name") if isinstance(item, dict) else None for item in items]
    if word in names:
        return names.index(word)
    indices = [str(index) for index in range(len(items))]  # No number is made of what may have thousands of digits.
    if word in indices:
        return indices.index(word)
    there = [str(name or index) for index, name in enumerate(names)]
    raise _error(key, f"{dotted(tuple(place))} has no {word!r}; there are: {', '.join(there) or 'none'}")


def _put(tree: Any, place: Place, value: Any) -> None:
    """Set the value at a place, with the mappings that lead there."""
    for part in place[:-1]:
        if (tree.get(part) if isinstance(tree, dict) else tree[part]) is None:
            tree[part] = {}
        tree = tree[part]
    tree[place[-1]] = value


def _refuse_swept(data: Mapping[str, Any], place: Place, text: str) -> None:
    """A value that an axis sets in every variant would change nothing."""
    path = ".".join(_named_parts(data, place))
    for name, axis in data["sweep"].items() if isinstance(data.get("sweep"), dict) else ():
        zipped = axis.get("zip") if isinstance(axis, dict) else None
        for swept in zipped if isinstance(zipped, dict) else [name]:
            if f"{path}.".startswith(f"{swept}."):
                values = f"{{grid: [{text}]}}" if path == name else "..."
                raise _error(
                    path,
                    f"every variant has a value of its own, of the axis sweep.{name}: give that one, as "
                    f"'sweep.{name}={values}', or sweep={{}} for the base alone",
                )


def _named_parts(data: Any, place: Place) -> Iterator[str]:
    """A place as sweep paths write it: phases by name."""
    for part in place:
        data = data[part]
        yield str(data["name"]) if isinstance(part, int) and isinstance(data, dict) and "name" in data else str(part)


def _text_with(text: str, written: Mapping[Place, str], data: dict[str, Any]) -> str:
    """The sweep file with these values in it, and its comments where that can be."""
    yaml = YAML()
    yaml.preserve_quotes = True
    yaml.width = 2**16  # Lines stay as they are.
    yaml.indent(mapping=2, sequence=4, offset=2)
    # Not where an alias shares what is changed, or ruamel's own types refuse what is a text here: 2026-13-01, !!omap a.
    with contextlib.suppress(SpaceError, YAMLError, ValueError, AttributeError):
        tree = yaml.load(text)
        for place, value in written.items():
            _put(tree, place, yaml.load(value))
        changed = _dumped(yaml, tree)
        if read_yaml(changed, lambda line: COMMAND_LINE)[0] == data:
            return changed
    return _dumped(yaml, data)


def _dumped(yaml: YAML, tree: Any) -> str:
    stream = io.StringIO()
    yaml.dump(tree, stream)
    return stream.getvalue()


def _error(key: str, text: str) -> SpaceError:
    return SpaceError(f"{COMMAND_LINE}: {key}: {text}")
