"""What others have published: folders, hub ids and the files of hub data sets, pinned to their content."""

from __future__ import annotations

import fnmatch
import hashlib
import os
import re
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote, unquote

from raysweep.data.digests import Digests, kept_digests
from raysweep.errors import DataError

_DATASETS = "hf://datasets/"
"""Opens the URL of a data set's files, as in fsspec and in the library `datasets`."""


class PinnedSource(NamedTuple):
    """A folder or a hub id as it was when it was looked up."""

    source: str
    """The absolute folder, or name@commit."""
    fingerprint: str
    digests: Digests
    """Of a folder's files, by name; none of a hub id, whose commit is its content."""
    config: Mapping[str, Any]
    """What the hub says of a model's config.json; empty for a folder, or a commit that was not looked up."""


def pin(given: str, base: Path, files: Callable[[Path], Sequence[Path]]) -> PinnedSource:
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
        # By the files' names, not their paths: a folder that is moved is the same checkpoint.
        lines = "".join(f"{name}:{content}\n" for name, content in digests.items())
        return PinnedSource(str(folder), hashlib.sha256(lines.encode()).hexdigest(), digests, {})
    if problem := unset(where):
        raise DataError(problem)
    name, revision = name_and_revision(given)
    # A branch or a tag may move; a commit is what it is, and needs no network.
    commit, config = (revision, {}) if is_commit(revision) else _looked_up(name, revision)
    return PinnedSource(f"{name}@{commit}", f"hub:{name}@{commit}", {}, config)


def expanded(path: str) -> str:
    """A path with ~ and ${VARIABLES} filled in; those that are not set stay as they are."""
    return os.path.expandvars(os.path.expanduser(path))


def unset(path: str) -> str | None:
    """What to say of a path that is not there, if an expanded one still holds a variable; else None."""
    variable = re.search(r"\$(\w+)|\$\{([^}]*)\}", path)
    if variable is None:
        return None
    # Without the path, so that a variable that many paths name is told of once.
    return f"the environment variable {variable[1] or variable[2]} is not set; set it, or write the path out"


def name_and_revision(hub_id: str) -> tuple[str, str | None]:
    """Of name@revision; no revision is None.

    >>> name_and_revision("owner/name@main"), name_and_revision("owner/name")
    (('owner/name', 'main'), ('owner/name', None))
    """
    name, _, revision = hub_id.partition("@")
    return name, revision or None


def is_commit(revision: str | None) -> bool:
    """Whether a revision cannot move, as a branch or a tag may."""
    return revision is not None and re.fullmatch("[0-9a-f]{40}", revision) is not None


def is_dataset(path: str) -> bool:
    """Whether it names files of a data set on the hub."""
    return path.startswith(_DATASETS)


def dataset_files(pattern: str) -> list[str]:
    """The files of hf://datasets/owner/name[@revision]/pattern, as URLs that name the commit.

    Raises:
        DataError: if it is no such URL, the hub cannot be asked, or no file matches.
    """
    url = _DatasetUrl.parse(pattern)
    info = _dataset_info(url.name, url.revision, given=pattern)
    files = [sibling.rfilename for sibling in info.siblings or ()]
    matches = fnmatch.filter(files, url.path)
    if not matches:
        there = ", ".join(sorted(files)[:5])
        raise DataError(f"no file matches {pattern!r}; of {len(files)} files there are: {there}")
    # At the commit that was listed: a branch may move before its files are read.
    return [str(url._replace(revision=info.sha, path=match)) for match in matches]


def dataset_commit(name: str, revision: str | None) -> str:
    """The commit that a data set's branch or tag is at; of None its newest. Raises DataError as `dataset_files`."""
    return str(_dataset_info(name, revision, given=f"{name}@{revision}" if revision else name).sha)


def _dataset_info(name: str, revision: str | None, *, given: str) -> Any:
    from huggingface_hub import HfApi

    try:
        return HfApi().dataset_info(name, revision=revision, timeout=30)
    except Exception as error:  # Whatever the hub, or the want of a network, answers: the user mends it one way.
        raise DataError(
            f"{given!r}: the hub does not show this data set ({type(error).__name__}); correct the id and the "
            "revision, set HF_TOKEN if it is private, or download it and name its files"
        ) from error


def dataset_digests(urls: Sequence[str]) -> Digests:
    """URL at a commit -> SHA-256 of the file; the hub knows that of large files, small ones are fetched.

    Raises:
        DataError: if the hub cannot be asked.
    """
    known = {url: file.sha256 for url, file in _dataset_infos(urls).items() if file.sha256}
    fetched = {located(url): url for url in urls if url not in known}
    return known | {fetched[path]: sha256 for path, sha256 in kept_digests(fetched).items()}


def dataset_sizes(urls: Sequence[str]) -> dict[str, int]:
    """URL at a commit -> bytes of the file. Raises DataError if the hub cannot be asked."""
    return {url: file.num_bytes for url, file in _dataset_infos(urls).items()}


class _HubFile(NamedTuple):
    num_bytes: int
    sha256: str | None
    """Of large files; of small ones the hub knows git's own hash only."""


def _dataset_infos(urls: Sequence[str]) -> dict[str, _HubFile]:
    """What the hub says of each file."""
    repositories: dict[tuple[str, str | None], dict[str, str]] = {}
    for url in urls:
        parts = _DatasetUrl.parse(url)
        repositories.setdefault((parts.name, parts.revision), {})[parts.path] = url
    return {
        files[path]: file
        for (name, commit), files in repositories.items()
        for path, file in _repository_infos(name, commit, tuple(files)).items()
    }


@cache  # A commit is what it is.
def _repository_infos(name: str, commit: str | None, paths: tuple[str, ...]) -> dict[str, _HubFile]:
    from huggingface_hub import HfApi

    try:
        infos = HfApi().get_paths_info(name, list(paths), revision=commit, repo_type="dataset")
    except Exception as error:
        raise DataError(f"{name}@{commit}: the hub does not tell its files ({type(error).__name__})") from error
    return {info.path: _HubFile(info.size, info.lfs and info.lfs.sha256) for info in infos}


def located(path: str) -> str:
    """The path of a file on this machine; one of the hub is fetched into its own cache, once.

    Args:
        path: of this machine, which it stays, or a URL of a hub's data set at a commit.

    Raises:
        DataError: if it cannot be fetched.
    """
    if not is_dataset(path):
        return path
    from huggingface_hub import hf_hub_download

    url = _DatasetUrl.parse(path)
    try:
        return str(hf_hub_download(url.name, url.path, revision=url.revision, repo_type="dataset"))
    except Exception as error:
        raise DataError(f"{path}: cannot be fetched: {type(error).__name__}; run again when the hub answers") from error


class _DatasetUrl(NamedTuple):
    """The parts of hf://datasets/owner/name[@revision]/path; a revision's own slashes are written %2F."""

    name: str
    revision: str | None
    path: str

    @staticmethod
    def parse(url: str) -> _DatasetUrl:
        parts = re.fullmatch(r"([^/@]+/[^/@]+)(?:@([^/]+))?/(.+)", url.removeprefix(_DATASETS))
        if not parts:
            raise DataError(
                f"{url!r} names no files of a data set; write hf://datasets/owner/name@revision/*.parquet, and leave "
                "out @revision for the newest"
            )
        name, revision, path = parts.groups()
        return _DatasetUrl(name, revision and unquote(revision), path)

    def __str__(self) -> str:
        revision = f"@{quote(self.revision, safe='')}" if self.revision else ""
        return f"{_DATASETS}{self.name}{revision}/{self.path}"


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


def download(hub_id: str, name: str) -> Path:
    """Where one file of a hub id is on this machine, fetched into the hub's own cache once.

    Args:
        hub_id: owner/name, with an optional @revision.
        name: of the file.

    Raises:
        DataError: if there is none, or the hub cannot be asked.
    """
    path = download_if_there(hub_id, name)
    if path is None:
        raise DataError(f"{hub_id!r} has no {name}; correct the id")
    return path


def download_if_there(hub_id: str, name: str) -> Path | None:
    """One file of a hub id; None if it has none, as the hub says, or said of this commit before. Raises DataError."""
    from huggingface_hub import _CACHED_NO_EXIST, hf_hub_download, try_to_load_from_cache
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    owner_and_name, revision = name_and_revision(hub_id)
    try:
        is_known = try_to_load_from_cache(owner_and_name, name, revision=revision) is _CACHED_NO_EXIST
        if is_known and is_commit(revision):
            return None
        return Path(hf_hub_download(owner_and_name, name, revision=revision))
    except Exception as error:  # As above.
        # The other kind says that the hub could not be asked.
        if isinstance(error, EntryNotFoundError) and not isinstance(error, LocalEntryNotFoundError):
            return None
        raise DataError(
            f"{hub_id!r} is no folder here, and {name} cannot be had of it as a hub id ({type(error).__name__}); "
            "correct the path or the id"
        ) from error
