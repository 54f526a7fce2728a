"""Take a checkpoint that exists already, a folder or a hub id, into the store in place of pretraining."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Annotated, Any, ClassVar

from pydantic import BeforeValidator, Field, TypeAdapter, model_validator

from raysweep.data import hub, pinned
from raysweep.data.corpora import Corpus
from raysweep.data.digests import Digests
from raysweep.data.tokenizers import VOCABULARY_FILES
from raysweep.errors import DataError, Place, collect
from raysweep.objectives.causal_lm import CausalLM
from raysweep.objectives.families import Objective
from raysweep.objectives.masked_lm import MaskedLM
from raysweep.spec import Metric, Neutral, Provenance, Spec, StageSpec
from raysweep.train.checkpoints import SUPPORTED, Head, known_head, load_model, read_config, reads_ahead
from raysweep.worker import Worker

OBJECTIVE_FILE = "objective.json"
"""Beside a checkpoint's config.json: what it was trained by."""

# Weights, configuration, tokenizer: never a pickle, nor code that would be run.
PATTERNS = ("*.safetensors", "*.safetensors.index.json", "*.json", "*.model", "*.txt", "*.jinja")


class Existing(Spec):
    """A Hugging Face checkpoint to measure and fine-tune as it is.

    `data` is the text its flatness and perplexity are measured on, cut into `sequence_length` tokens of its own
    tokenizer. `fingerprint` pins the content; it is filled when the sweep file is loaded.
    """

    from_: Annotated[str, Provenance()] = Field(alias="from")
    """Folder, relative to the sweep file, or hub id, with an optional @commit; safetensors only."""
    fingerprint: str = ""
    """Of the checkpoint's content; filled when the sweep file is loaded."""
    digests: Annotated[Digests, Provenance()] = Field(default_factory=dict)
    """Of a folder's files; filled when the sweep file is loaded."""
    data: Corpus
    """Text that flatness and perplexity are measured on."""
    sequence_length: int = Field(default=512, gt=1)
    """Tokens of a sequence, of the checkpoint's own tokenizer."""
    objective: Annotated[Objective | None, Provenance()] = None
    """Whose perplexity and flatness are measured; left out: that which a folder's objective.json says it was trained
    by, else causal_lm, or masked_lm of a masked model."""

    @model_validator(mode="after")
    def _has_text(self) -> Existing:
        if not self.data.takes_tokenizer:
            raise ValueError("a checkpoint taken with from needs data: text, which its own tokenizer can read")
        return self

    def pin(self, base: Path) -> Existing:
        """With the content's fingerprint; relative folders are relative to `base`.

        Raises:
            DataError: if it is neither a folder with a safetensors checkpoint nor a hub id that can be resolved, or
                is no language model of the objective's kind.
        """
        pins: list[tuple[Place, Callable[[], Any]]] = [
            (("from",), partial(self.pin_source, base)),
            (("data",), partial(self.data.pin, base)),
        ]
        source, data = collect(pins)
        return source.with_(data=data)  # type: ignore[no-any-return]

    def pin_source(self, base: Path) -> Existing:
        """With the checkpoint's fingerprint, its data as it is."""
        found = hub.pin(self.from_, base, checkpoint_files)
        head = _head(found)
        usual = MaskedLM(name="masked_lm") if head == "masked" else CausalLM()
        objective = self.objective or _recorded(found) or usual
        if head and objective.head != head:
            raise DataError(
                f"objective {objective.name} needs a {objective.head} model, and {self.from_} is a {head} one: "
                "change either"
            )
        pinned = {"from_": found.source, "fingerprint": found.fingerprint, "digests": found.digests}
        return self.with_(objective=objective, **pinned)  # type: ignore[no-any-return]


class Start(Spec):
    """A checkpoint to train on from; written as its folder or hub id alone."""

    source: Annotated[str, Provenance()]
    """Folder, relative to the sweep file, or hub id, with an optional @commit; safetensors only."""
    fingerprint: str = ""
    """Of the checkpoint's content; filled when the sweep file is loaded."""
    digests: Annotated[Digests, Provenance()] = Field(default_factory=dict)
    """Of a folder's files; filled when the sweep file is loaded."""
    head: Annotated[Head | None, Provenance()] = None
    """What it predicts, as far as its config.json is known; filled when the sweep file is loaded."""

    def pin(self, base: Path) -> Start:
        """With the checkpoint's fingerprint; see `Existing.pin`."""
        found = hub.pin(self.source, base, checkpoint_files)
        return self.with_(  # type: ignore[no-any-return]
            source=found.source, fingerprint=found.fingerprint, digests=found.digests, head=_head(found)
        )


AS_START = BeforeValidator(
    lambda value: {"source": value} if isinstance(value, str) else value, json_schema_input_type=str | None
)
"""Takes a path where a `Start` is declared."""


def _head(found: hub.Pinned) -> Head | None:
    return known_head(read_config(Path(found.source)) if found.digests else found.config)


def _recorded(found: hub.Pinned) -> Objective | None:
    """The objective that a folder says it was trained by. Raises DataError if that cannot be read."""
    path = Path(found.source) / OBJECTIVE_FILE
    if OBJECTIVE_FILE not in found.digests:
        return None
    try:
        objective: Objective = TypeAdapter(Objective).validate_json(path.read_bytes())
        return objective
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: no objective that is known here; say pretrain.objective ({error})") from error


def checkpoint_files(folder: Path) -> list[Path]:
    """The files of a checkpoint that are taken, by name.

    Raises:
        DataError: if weights as safetensors, config.json or the tokenizer are missing, or weights are cut short.
    """
    found = {path for pattern in PATTERNS for path in folder.glob(pattern) if path.is_file()}
    # A checkpoint of a store has a record beside it, which is no part of it: it tells when and where it was made.
    files = sorted(path for path in found if path.name != "record.json")
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
    for path in files:
        if path.suffix == ".safetensors":
            _check_header(path)
    return files


def _check_header(path: Path) -> None:
    """See that a file is as long as its header says; no tensor is read."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="np"):
            pass
    except (OSError, SafetensorError) as error:
        raise DataError(f"{path}: not whole ({error}); copy it again") from error


class Fetch(StageSpec):
    """Copy a checkpoint's files into the store."""

    kind: ClassVar[str] = "fetch"
    wide: ClassVar[bool] = False

    source: Annotated[str, Provenance()]
    fingerprint: str
    digests: Annotated[Digests, Provenance()] = Field(default_factory=dict)
    """Of the files to take, by name; of a hub id, whose commit is its content, none."""
    head: Annotated[Head, Neutral("causal")] = "causal"
    """What it has to predict: next tokens, or tokens in place."""

    def run(self, inputs: Mapping[str, Path], out: Path, worker: Worker) -> dict[str, float]:
        """Copies weights, config and tokenizer to `out`, and loads the model once to be sure that it can be.

        Raises:
            DataError: if a file was changed since it was pinned, the weights are not whole, or the model is of another
                head: a causal one must not read ahead.
        """
        if self.digests:
            pinned.copy(Path(self.source), out, self.digests)
        else:
            from huggingface_hub import snapshot_download

            name, revision = hub.name_and_revision(self.source)
            folder = Path(snapshot_download(name, revision=revision, allow_patterns=list(PATTERNS)))
            for path in checkpoint_files(folder):
                shutil.copyfile(path, out / path.name)
        if (head := known_head(read_config(out))) != self.head:
            raise DataError(f"checkpoint {self.source}: a {head} model, and the objective is of {self.head} ones")
        model = load_model(out, name=self.source)
        if head == "causal" and reads_ahead(model):
            raise DataError(
                f"checkpoint {self.source}: what follows a token changes what it predicts (a decoder without "
                f"is_decoder: true in its config.json?); {SUPPORTED}"
            )
        return {"num_parameters": float(model.num_parameters())}

    def metrics(self, corpus: Corpus) -> tuple[Metric, ...]:
        """The size of what was taken."""
        return (Metric("num_parameters"),)
