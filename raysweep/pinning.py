"""A sweep's data and checkpoints are found and fingerprinted once, when its file is loaded; workers need not look."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from pydantic import ValidationError

from raysweep.data.corpora import Corpus
from raysweep.data.sources import published_config
from raysweep.declared import Declared, Section
from raysweep.errors import Finding, Place, RaysweepError, SpaceError, below
from raysweep.search import Axis, Setting, settings
from raysweep.spec import Spec
from raysweep.stages.fetch import Existing
from raysweep.stages.phases import Phase, segments
from raysweep.stages.pretrain import Recipe
from raysweep.train.models import with_config_read
from raysweep.train.precision import settled
from raysweep.validation import validate

T = TypeVar("T")

SOURCES = ("pretrain.from", "pretrain.start")
"""Axes of checkpoints that exist."""


class Pins:
    """Pins one thing after another; what fails is noted, and stays as it was."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.findings: list[Finding] = []

    def __call__(self, place: Place, thing: T, pin: Callable[[], T]) -> T:
        """What `pin` gives, or `thing` if it fails."""
        try:
            return pin()
        except RaysweepError as error:
            self.findings += below(place, error)
            return thing


class Pinned(NamedTuple):
    """A sweep with fingerprints in all that names data or a checkpoint."""

    declared: Declared
    base: dict[str, Any]
    """The pretrain section as plain values."""
    checkpoints: dict[str, Mapping[str, Any]]
    """Value of an axis of `SOURCES` -> what stands for it in the pretrain section."""


def pinned(declared: Declared, pretrain: Mapping[str, Any], pins: Pins) -> Pinned:
    """Pin all of a sweep; `pretrain` is its section as written. What is wrong is noted in `pins`."""
    section = pins(("pretrain",), declared.pretrain, partial(declared.pretrain.pin, pins.folder))
    sft = declared.sft and pins(("sft",), declared.sft, partial(declared.sft.pin, pins.folder))
    # What "auto" stands for here: a checkpoint trained in other numbers is another checkpoint.
    on_gpu = declared.resources.default.gpus_per_worker > 0
    measured = {
        name: pins((name,), spec, partial(spec.pin, pins.folder, on_gpu=on_gpu))
        for name, spec in declared.measurements.items()
    }
    if isinstance(section, Recipe):
        section = section.with_(precision=settled(section.precision, on_gpu=on_gpu))
    if sft:
        sft = sft.with_(hyperparameters=sft.hyperparameters.in_numbers_of(on_gpu=on_gpu))
    base = {**pretrain, "data": _plain(section.data), **_source(section)}
    if isinstance(section, Recipe):
        base["precision"] = section.precision
        if section.phases:
            base["phases"] = _pinned_phases(base, pins, ("pretrain",))
            section = section.with_(phases=tuple(validate(Phase, phase) for phase in base["phases"]))
    sweep = dict(declared.sweep)
    checkpoints: dict[str, Mapping[str, Any]] = {}
    for name, axis in declared.sweep.items():
        for setting in settings(name, axis):
            _check_content(section.data, base, setting, pins, ("sweep", name))
            values, source = _pinned_setting(base, pretrain, setting, pins, ("sweep", name))
            checkpoints |= {str(setting.label): source} if source else {}
            for path in values:
                sweep[name] = _with_value(sweep[name], setting.places[path], values[path])
    return Pinned(declared.with_(pretrain=section, sft=sft, sweep=sweep, **measured), base, checkpoints)


def with_models_read(declared: Any, pins: Pins, place: Place = ()) -> Any:
    """Plain values of a file, with what a model's configuration says written out wherever a model names one.

    So ids hold the configuration, and workers need not find it.
    """
    if isinstance(declared, list):
        return [with_models_read(item, pins, (*place, index)) for index, item in enumerate(declared)]
    if not isinstance(declared, dict):
        return declared
    whole = {key: with_models_read(value, pins, (*place, key)) for key, value in declared.items()}
    return pins(place, whole, partial(with_config_read, whole, partial(published_config, base=pins.folder)))


def _pinned_setting(
    base: Mapping[str, Any], pretrain: Mapping[str, Any], setting: Setting, pins: Pins, axis: Place
) -> tuple[dict[str, Any], Mapping[str, Any]]:
    """Path -> value with the data in it pinned; and what the setting's checkpoint, if any, is in the pretrain section.

    All that a setting sets is put onto the base first: a corpus may be valid only beside what moves with it.
    """
    where = {path: (*axis, *setting.places[path]) for path, value in setting.values.items() if _names_data(path, value)}
    changed = copy.deepcopy(dict(base))
    if "pretrain.from" in where:  # Each has an objective of its own, unless the file says one for all.
        changed["objective"] = pretrain.get("objective")
    section = _with_setting(changed, setting) if where else None
    if section is None:
        return {}, {}
    source: Mapping[str, Any] = {}
    for path, place in where.items():
        if path in SOURCES:
            source = _source(pins(place, section, partial(section.pin_source, pins.folder)))
        elif path == "pretrain.data":
            changed["data"] = _plain(pins(place, section.data, partial(section.data.pin, pins.folder)))
    if phases := [place for path, place in where.items() if path.startswith("pretrain.phases")]:
        changed["phases"] = _pinned_phases(changed, pins, phases[0])
    held = {path: _place(changed, path) for path in where if path not in SOURCES}
    return {path: holder[key] for path, (holder, key) in held.items()}, source


def _check_content(corpus: Corpus, base: Mapping[str, Any], setting: Setting, pins: Pins, axis: Place) -> None:
    """Note a setting below `pretrain.data` that names files or a hub id: only a whole corpus is pinned."""
    inside = [path for path in setting.values if path.startswith("pretrain.data.")]
    varied = _with_setting(copy.deepcopy(dict(base)), setting) if inside else None
    if varied is None or varied.data.source() == corpus.source():
        return
    place = (*axis, *setting.places[inside[0]])
    if pins(place, varied.data, partial(varied.data.pin, pins.folder)) != varied.data:
        text = f"{inside[0]} names data, whose content would not be seen: sweep pretrain.data (named values)"
        pins.findings.append((place, text))


def _names_data(path: str, value: Any) -> bool:
    inside_phases = path.startswith("pretrain.phases") and isinstance(value, dict | list)
    return inside_phases or path in (*SOURCES, "pretrain.data")


def _with_setting(data: dict[str, Any], setting: Setting) -> Recipe | Existing | None:
    """Put a setting into the section `data`; None if that is not valid, which is said with the values of axes."""
    try:
        for path, value in setting.values.items():
            put(data, path, value)
    except RaysweepError:
        return None
    return parsed(data)


def _with_value(axis: Axis, place: Place, value: Any) -> Axis:
    """The axis with another value at a place below it."""
    fields = axis.model_dump()
    holder: Any = fields
    for key in place[:-1]:
        holder = holder[key]
    holder[place[-1]] = value
    changed: Axis = type(axis)(**fields)
    return changed


def _pinned_phases(base: Mapping[str, Any], pins: Pins, where: Place) -> list[dict[str, Any]]:
    """The phases of a section, as written, with what of their data is not inherited pinned."""
    section, phases = parsed(base), [dict(phase) for phase in base["phases"]]
    try:
        parts = segments(section) if isinstance(section, Recipe) else ()
    except RaysweepError:
        return phases
    for index, (phase, part) in enumerate(zip(reversed(phases), reversed(parts), strict=False)):
        if written := phase.get("data"):
            corpus, place = part.recipe.data, (*where, "phases", len(phases) - 1 - index, "data")
            whole = _plain(pins(place, corpus, partial(corpus.pin, pins.folder)))
            # The rest stays inherited, other domains and their weights too, so that an axis over it reaches this phase.
            phase["data"] = {
                key: _named(whole[key], value) if key in ("domains", "mix") else whole.get(key, value)
                for key, value in written.items()
            }
            if written.get("name", corpus.name) != base["data"]["name"]:
                phase["data"] = whole
    return phases


def _named(whole: Any, written: Any) -> Any:
    """Of a pinned mapping by names those that are written, each whole."""
    return {name: whole[name] for name in written} if isinstance(written, dict) else whole


def _source(section: Recipe | Existing) -> dict[str, Any]:
    """What a section says of the checkpoint that exists, pinned."""
    if isinstance(section, Existing):
        source = {"from": section.from_, "fingerprint": section.fingerprint, "digests": section.digests}
        return source | {"objective": section.objective and _plain(section.objective)}
    return {"start": _plain(section.start)} if section.start else {}


def _plain(spec: Spec) -> dict[str, Any]:
    return spec.model_dump(mode="json", by_alias=True)


def parsed(pretrain: Mapping[str, Any]) -> Recipe | Existing | None:
    """The pretrain section of a variant; None if it is not valid, which is told with the values of axes."""
    try:
        return validate(Section, {"pretrain": pretrain}).pretrain
    except ValidationError:
        return None


def put(data: dict[str, Any], path: str, value: Any) -> None:
    """Set `pretrain.a.b` in the pretrain section; parts that are not there are made, for validation to judge.

    Raises:
        SpaceError: if it names a phase that is not there.
    """
    holder, key = _place(data, path)
    if isinstance(holder, list) and isinstance(value, dict):  # A whole phase, but for its name.
        value = {**value, "name": holder[key]["name"]}
    holder[key] = copy.deepcopy(value)


def _place(data: dict[str, Any], path: str) -> tuple[Any, Any]:
    """What holds the value at a path, and its key there; a phase goes by its name."""
    *parents, last = path.split(".")[1:]
    holder: Any = data
    for part in parents:
        if isinstance(holder, list):
            holder = holder[_index(holder, part)]
            continue
        inner = holder.get(part)
        holder[part] = inner = inner if isinstance(inner, dict | list) else {}
        holder = inner
    return holder, _index(holder, last) if isinstance(holder, list) else last


def _index(phases: list[Any], name: str) -> int:
    names = [phase.get("name") for phase in phases if isinstance(phase, dict)]
    if name not in names:
        raise SpaceError(f"no phase {name!r}; phases: {', '.join(map(str, names)) or 'none'}")
    return names.index(name)
