"""What others have published: folders and hub ids, pinned to their content."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from raysweep.data.digests import Digests, kept_digests
from raysweep.errors import DataError


class Pinned(NamedTuple):
    """A folder or a hub id as it was when it was looked up."""

    source: str
    """The absolute folder, or name@commit."""
    fingerprint: str
    digests: Digests
    """Of a folder's files, by name; none of a hub id, whose commit is its content."""
    config: Mapping[str, Any]
    """What the hub says of a model's config.json; empty for a folder, or a commit that was not looked up."""


def pin(given: str, base: Path, files: Callable[[Path], Sequence[Path]]) -> Pinned:
    """Where it is, and what is there.

    Args:
        given: a folder, relative to `base`; or a hub id, with an optional @branch, @tag or @commit.
        base: folder of the sweep file.
        files: those of a folder that count; raises DataError where some are missing.

    Raises:
        DataError: if it is neither a folder nor a hub id that can be looked up.
    """
    where = expanded(given)
    folder = (base / where).absolute()
    if folder.is_dir():
        digests = {Path(path).name: sha256 for path, sha256 in kept_digests(map(str, files(folder))).items()}
        lines = "".join(f"{name}:{content}\n" for name, content in digests.items())
        return Pinned(str(folder), hashlib.sha256(lines.encode()).hexdigest(), digests, {})
    if problem := unset(where):
        raise DataError(problem)
    name, revision = name_and_revision(given)
    # A branch or a tag may move; a commit is what it is, and needs no network.
    is_commit = revision is not None and re.fullmatch("[0-9a-f]{40}", revision)
    commit, config = (revision, {}) if is_commit else _looked_up(name, revision)
    return Pinned(f"{name}@{commit}", f"hub:{name}@{commit}", {}, config)


def expanded(path: str) -> str:
    """A path with ~ and ${VARIABLES} filled in; those that are not set stay as they are."""
    return os.path.expandvars(os.path.expanduser(path))


def unset(path: str) -> str | None:
    """What to say of a path that is not there, if an expanded one still holds a variable."""
    found = re.search(r"\$(\w+)|\$\{([^}]*)\}", path)
    return (
        found and f"{path!r}: the environment variable {found[1] or found[2]} is not set; set it, or write the path out"
    )


def name_and_revision(hub_id: str) -> tuple[str, str | None]:
    """Of name@revision; no revision is None."""
    name, _, revision = hub_id.partition("@")
    return name, revision or None


def _looked_up(name: str, revision: str | None) -> tuple[str, Mapping[str, Any]]:
    """The commit that a branch or tag is at, and the model's configuration as far as the hub tells it."""
    from huggingface_hub import HfApi

    try:
        info = HfApi().model_info(name, revision=revision, timeout=30)
        return str(info.sha), info.config or {}
    except Exception as error:  # Whatever the hub, or the want of a network, answers: the user mends it one way.
        given = f"{name}@{revision}" if revision else name
        raise DataError(
            f"{given!r} is no folder here, and cannot be looked up as a hub id ({type(error).__name__}); "
            "correct the path, or name the commit of 40 digits: owner/name@commit"
        ) from error
