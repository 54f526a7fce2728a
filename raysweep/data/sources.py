"""Checkpoints that exist, folders or hub ids: found, checked by their files alone, and pinned to their content."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from pydantic import BeforeValidator, Field

from raysweep.data import hub
from raysweep.data.digests import Digests
from raysweep.data.tokenizers import VOCABULARY_FILES
from raysweep.errors import DataError
from raysweep.objectives.heads import Head, known_head, read_config
from raysweep.spec import Provenance, Spec
from raysweep.weights import check_files, num_stored

# Weights, configuration, tokenizer: never a pickle, nor code that would be run.
PATTERNS = ("*.safetensors", "*.safetensors.index.json", "*.json", "*.model", "*.txt", "*.jinja")


class Source(Spec):
    """A checkpoint to go on from or to draw text from; written as its folder or hub id alone."""

    source: Annotated[str, Provenance()]
    """Folder, relative to the sweep file, or hub id, with an optional @commit; safetensors only."""
    fingerprint: str = ""
    """Of the checkpoint's content; filled when the sweep file is loaded."""
    digests: Annotated[Digests, Provenance()] = Field(default_factory=dict)
    """Of a folder's files; filled when the sweep file is loaded."""
    head: Annotated[Head | None, Provenance()] = None
    """What it predicts, as far as its config.json is known; filled when the sweep file is loaded."""

    def pin(self, base: Path) -> Source:
        """With the checkpoint's fingerprint; relative folders are relative to `base`.

        Raises:
            DataError: if it is neither a folder with a safetensors checkpoint nor a hub id that can be resolved, or is
                no language model.
        """
        checkpoint = hub.pin(self.source, base, checkpoint_files)
        return self.with_(  # type: ignore[no-any-return]
            source=checkpoint.source,
            fingerprint=checkpoint.fingerprint,
            digests=checkpoint.digests,
            head=head_of_pinned(checkpoint),
        )


AS_SOURCE = BeforeValidator(
    lambda value: {"source": value} if isinstance(value, str) else value, json_schema_input_type=str | None
)
"""Takes a path where a `Source` is declared."""


def head_of_pinned(checkpoint: hub.PinnedSource) -> Head | None:
    """What a pinned checkpoint predicts; None where its config.json is not known, as of a hub id with its commit.

    Raises:
        DataError: if it predicts no tokens.
    """
    return known_head(read_config(Path(checkpoint.source)) if checkpoint.digests else checkpoint.config)


def published_config(given: str, base: Path) -> dict[str, Any]:
    """The config.json of a folder, relative to `base`, or of a hub id. Raises DataError."""
    folder = (base / hub.expanded(given)).absolute()
    return read_config(folder if folder.is_dir() else hub.download(given, "config.json").parent)


def checkpoint_files(folder: Path) -> list[Path]:
    """The files of a checkpoint that are taken, by name.

    Raises:
        DataError: if weights as safetensors, config.json or the tokenizer are missing, or weights are cut short.
    """
    paths = {path for pattern in PATTERNS for path in folder.glob(pattern) if path.is_file()}
    # A checkpoint of a store has a record beside it, which is no part of it: it tells when and where it was made.
    files = sorted(path for path in paths if path.name != "record.json")
    names = {path.name for path in files}
    if not any(name.endswith(".safetensors") for name in names):
        pickled = ", ".join(sorted(path.name for path in folder.glob("*.bin"))) or "none either"
        raise DataError(
            f"checkpoint {folder}: no *.safetensors in it (pickled weights, which are never read: {pickled}); "
            "save it with model.save_pretrained(folder)"
        )
    if "config.json" not in names:
        raise DataError(f"checkpoint {folder}: no config.json; save it with model.save_pretrained(folder)")
    if names.isdisjoint(VOCABULARY_FILES):
        raise DataError(f"checkpoint {folder}: no tokenizer; save it there with tokenizer.save_pretrained(folder)")
    check_files(folder, files)
    num_stored(folder)  # As long as their headers say; no tensor is read.
    return files
