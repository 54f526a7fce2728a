"""Take a checkpoint that exists already, a folder or a hub id, into the store in place of pretraining."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Annotated, Any, ClassVar

from pydantic import Field, TypeAdapter, model_validator

from raysweep.costs import UNKNOWN, Size, size_of_folder
from raysweep.data import hub, pinned
from raysweep.data.corpora import Corpus
from raysweep.data.digests import Digests
from raysweep.data.sources import PATTERNS, checkpoint_files, head_of_pinned
from raysweep.errors import DataError, Place, collect
from raysweep.objectives.causal_lm import CausalLM
from raysweep.objectives.families import Objective
from raysweep.objectives.heads import SUPPORTED, Head, known_head, read_config
from raysweep.objectives.masked_lm import MaskedLM
from raysweep.resources import Resources
from raysweep.spec import Metric, Neutral, Provenance, Spec
from raysweep.stages.base import StageSpec
from raysweep.train.checkpoints import check_size, load_model, reads_ahead
from raysweep.worker import Worker

OBJECTIVE_FILE = "objective.json"
"""Beside a checkpoint's config.json: what it was trained by."""


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
    """Whose perplexity and flatness are measured; left out: that which the checkpoint's objective.json says it was
    trained by, else causal_lm, or masked_lm of a masked model."""

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
        checkpoint = hub.pin(self.from_, base, checkpoint_files)
        head = head_of_pinned(checkpoint)
        usual = MaskedLM(name="masked_lm") if head == "masked" else CausalLM()
        objective = self.objective or _recorded(checkpoint) or usual
        if head and objective.head != head:
            raise DataError(
                f"objective {objective.name} needs a {objective.head} model, and {self.from_} is a {head} one: "
                "change either"
            )
        pinned = {
            "from_": checkpoint.source,
            "fingerprint": checkpoint.fingerprint,
            "digests": checkpoint.digests,
        }
        return self.with_(objective=objective, **pinned)  # type: ignore[no-any-return]


def _recorded(checkpoint: hub.PinnedSource) -> Objective | None:
    """The objective that a checkpoint says it was trained by. Raises DataError if that cannot be read."""
    path: Path | None = Path(checkpoint.source) / OBJECTIVE_FILE if OBJECTIVE_FILE in checkpoint.digests else None
    if not checkpoint.digests:
        try:
            path = hub.download_if_there(checkpoint.source, OBJECTIVE_FILE)
        except DataError as error:
            raise DataError(f"{error}, or say by pretrain.objective what it was trained by") from error
    if path is None:
        return None
    try:
        objective: Objective = TypeAdapter(Objective).validate_json(path.read_bytes())
        return objective
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: no objective that is known here; say pretrain.objective ({error})") from error


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
        if self.digests:  # A folder: each file is compared with its digest as it is copied.
            pinned.copy(Path(self.source), out, self.digests)
        else:
            from huggingface_hub import snapshot_download

            # The revision is a commit, which is its content: nothing else has to be compared.
            name, revision = hub.name_and_revision(self.source)
            folder = Path(snapshot_download(name, revision=revision, allow_patterns=list(PATTERNS)))
            for path in checkpoint_files(folder):
                shutil.copyfile(path, out / path.name)
        if (head := known_head(read_config(out))) != self.head:
            raise DataError(f"checkpoint {self.source}: a {head} model, and the objective is of {self.head} ones")
        check_size(out, name=self.source)
        model = load_model(out, name=self.source)
        if head == "causal" and reads_ahead(model):
            raise DataError(
                f"checkpoint {self.source}: what follows a token changes what it predicts (a decoder without "
                f"is_decoder: true in its config.json?); {SUPPORTED}"
            )
        return {"num_parameters": float(model.num_parameters())}

    def metrics(self, corpus: Corpus) -> tuple[Metric, ...]:
        """The size of what was taken, which tables show where there is no pretraining to tell it."""
        return (Metric("num_parameters"),)

    @property
    def model_size(self) -> Size | None:
        """Of the checkpoint, where it is a folder; of a hub id nothing is known before it is taken."""
        return size_of_folder(Path(self.source))

    def flops(self, size: Size, corpus: Corpus) -> float:
        """None to speak of: two rows of eight tokens, to see that a causal model does not read ahead."""
        return 0.0

    def memory_bytes(self, size: Size, resources: Resources) -> int:
        """The weights, which are loaded once to be sure that they can be."""
        return (self.model_size or UNKNOWN).weights_bytes

    def disk_bytes(self, size: Size) -> int:
        """The checkpoint's own files; `size` is that of the model that is trained, which may be another."""
        return (self.model_size or UNKNOWN).num_bytes
