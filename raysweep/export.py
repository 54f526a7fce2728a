"""Take a checkpoint out of the store: into a folder of its own, or to the Hugging Face hub."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from raysweep.analysis.choosing import chosen_of
from raysweep.analysis.labels import Key, row_key
from raysweep.analysis.ranking import Ranking
from raysweep.data.sources import checkpoint_files
from raysweep.document import nearest
from raysweep.errors import StoreError
from raysweep.search import Choose
from raysweep.store import Store
from raysweep.train.checkpoints import load_model

HUB = "hub:"
"""What an address on the hub begins with: hub:owner/name."""

# What the hub itself puts into a new repository.
_HUB_OWN = {".gitattributes", "README.md"}


@dataclass(frozen=True)
class Exported:
    """A checkpoint that was taken out. `checkpoint`: its stage id; `to`: the folder, or its page on the hub."""

    checkpoint: str
    label: str
    to: str

    def to_dict(self) -> dict[str, Any]:
        """The three fields, as `raysweep export --json` prints them."""
        return asdict(self)


CHOSEN = "chosen"
"""In place of a checkpoint's name: what `search.choose` of the sweep file picks."""


def export(ranking: Ranking, store: Store, *, to: str, which: str = "1", choose: Choose | None = None) -> Exported:
    """Copy weights, configuration and tokenizer of a checkpoint, and open the copy once to be sure that it can be.

    Args:
        ranking: of the run.
        store: that of the run.
        to: a folder that is new or empty; or `hub:owner/name`, a repository that is made, private, if there is none.
        which: a place in the ranking, a label of it, or a checkpoint's stage id; or `CHOSEN`.
        choose: what of the run is chosen; None: it does not say.

    Raises:
        StoreError: if there is no such checkpoint, something is at `to` already, or the hub refuses.
    """
    row = _chosen(ranking, choose) if which == CHOSEN else _choose(ranking, which)
    checkpoint, label = row["checkpoint"], ranking.labels[row_key(row)]
    source = store.folder(checkpoint)
    if to.startswith(HUB):
        with tempfile.TemporaryDirectory() as folder:
            _copy(source, Path(folder))
            return Exported(checkpoint, label, _upload(Path(folder), to.removeprefix(HUB)))
    target = Path(to).expanduser().absolute()
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise StoreError(f"--to {to!r} is there already and not an empty folder; name another")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=".raysweep-export-") as folder:
            whole = Path(folder) / "whole"
            whole.mkdir()
            _copy(source, whole)
            os.rename(whole, target)
    except OSError as error:
        raise StoreError(f"--to {to!r} cannot be written: {error.strerror or error}") from error
    return Exported(checkpoint, label, str(target))


def _chosen(ranking: Ranking, choose: Choose | None) -> Mapping[Any, Any]:
    if choose is None:
        raise StoreError(
            f"--checkpoint {CHOSEN}: the sweep file has no search.choose; write one and run again, such as {{metric: "
            "flatness/hessian_trace, mode: min, within: {metric: heldout/loss_nats_per_token, mode: min}}"
        )
    chosen = chosen_of(ranking.checkpoints, choose)
    if chosen is None:
        raise StoreError(f"no checkpoint of this run has both {choose.metric} and {choose.within.metric} yet")
    return chosen.row


def _choose(ranking: Ranking, which: str) -> Mapping[Any, Any]:
    """The row of a checkpoint, by place, label or stage id."""
    rows = ranking.checkpoints.to_dict("records")
    if not rows:
        raise StoreError("no checkpoint is finished in this run yet")
    if which.isdecimal() and ranking.best is None:
        why = "no checkpoint is ranked yet"
        if ranking.has_scores:
            why = f"by {ranking.target} checkpoints have places within one objective and text alone"
        raise StoreError(f"{why}; name one by --checkpoint: {_some(ranking.labels)}")
    names = [(str(row["checkpoint"]), ranking.labels[row_key(row)], str(row["rank"])) for row in rows]
    chosen = {row["checkpoint"]: row for row, known in zip(rows, names, strict=True) if which in known}
    if len(chosen) > 1:
        raise StoreError(f"--checkpoint {which!r} is the name of several; take a stage id: {', '.join(chosen)}")
    if not chosen:
        close = nearest(which, [name for known in names for name in known])
        raise StoreError(
            f"no checkpoint {which!r} in this run; "
            + (f"did you mean {', '.join(close)}" if close else f"there are: {_some(ranking.labels)}")
        )
    return next(iter(chosen.values()))


def _some(labels: Mapping[Key, str]) -> str:
    return ", ".join(f"{label!r}" for label in list(labels.values())[:8]) + (", ..." if len(labels) > 8 else "")


def _copy(source: Path, target: Path) -> None:
    from transformers import AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    for path in checkpoint_files(source):
        shutil.copyfile(path, target / path.name)
    load_model(target)
    AutoTokenizer.from_pretrained(target, trust_remote_code=False)


def _upload(folder: Path, name: str) -> str:
    """Upload a checkpoint to a repository without files; the address of its page. Raises StoreError."""
    from huggingface_hub import HfApi

    api = HfApi()
    try:
        url = api.create_repo(name, private=True, exist_ok=True)
        there = set(api.list_repo_files(name)) - _HUB_OWN
        if not there:
            api.upload_folder(repo_id=name, folder_path=folder, commit_message="Checkpoint exported by raysweep")
    except Exception as error:  # Whatever the hub, or the want of a network or a login, answers.
        reason = str(error).strip().splitlines() or [""]
        raise StoreError(
            f"hub:{name} cannot be written ({type(error).__name__}: {reason[0]}); see that the name is owner/name, "
            "that the hub can be reached, and that HF_TOKEN or `hf auth login` gives a token that may write"
        ) from error
    if there:
        raise StoreError(f"hub:{name} holds {len(there)} file(s) already, such as {min(there)}; name another")
    return str(url)
