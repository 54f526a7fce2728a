"""Loss of a checkpoint on text that is not of its pretraining's domains."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Annotated, Any, ClassVar

import numpy as np
from pydantic import Field, field_validator

from raysweep.costs import Size
from raysweep.data.corpora import Corpus
from raysweep.data.digests import Digests, content_fingerprint
from raysweep.data.files import Globs, digests_of, listed, sampled
from raysweep.data.formats import COLUMN, read_texts
from raysweep.data.tokenizers import load_tokenizer
from raysweep.data.tokenizing import encoder
from raysweep.errors import DataError, SpaceError, collect
from raysweep.objectives.base import Ints
from raysweep.objectives.families import Objective
from raysweep.resources import Resources
from raysweep.spec import Direction, Metric, Neutral, Provenance, Spec, check_name
from raysweep.stages.base import StageSpec, Subject
from raysweep.stages.held_text import HeldText
from raysweep.stages.heldout import DRAW
from raysweep.stages.specials import checkpoint_specials
from raysweep.train.checkpoints import load_model
from raysweep.worker import Worker


class Texts(Spec):
    """Files of one kind of text."""

    files: Annotated[Globs, Provenance()]
    """Files or globs, as of a domain of pretrain.data."""
    column: str = COLUMN
    """Field of JSON lines, or column of Parquet and `datasets`, that holds the text."""
    fingerprint: str = ""
    """Of the files' contents; filled when the sweep file is loaded."""
    digests: Annotated[Digests, Provenance()] = Field(default_factory=dict)
    """Of each file; filled when the sweep file is loaded."""

    def pin(self, base: Path) -> Texts:
        """With absolute paths and the contents' fingerprint.

        Raises:
            DataError: if a pattern matches no file, or a file does not begin as text.
        """
        (paths,) = collect([(("files",), partial(sampled, self.files, base, column=self.column))])
        digests = digests_of(paths)
        whole = content_fingerprint(digests[path] for path in paths)
        return self.with_(files=paths, fingerprint=whole, digests=digests)  # type: ignore[no-any-return]


class OtherText(StageSpec):
    """Loss on other corpora, by which the order of models can be another.

    By the own objective, or for all models by one: causal_lm gives PPL-CLM of Zeng et al. (2025, arXiv 2504.12491), the
    same text read the same way by models of any objective, mix and tags.

    Documents in the order of the files, each closed by the end of a text, cut into sequences of pretraining's length.
    """

    kind: ClassVar[str] = "other_text"
    # 2: the mean over texts.
    VERSION: ClassVar[int] = 2
    wide: ClassVar[bool] = False
    filled: ClassVar[frozenset[str]] = frozenset({"text"})

    texts: dict[str, Texts] = Field(min_length=1)
    """Name to files; names become metrics."""
    num_sequences: int = Field(default=256, ge=2)
    """Of each text, the first so many."""
    objective: Annotated[Objective | None, Neutral(None)] = None
    """Whose loss is measured; left out: that of the checkpoint's own pretraining."""
    text: HeldText | None = None
    """Whose objective and length of sequences are taken; filled from pretrain."""

    @field_validator("texts")
    @classmethod
    def _plain_names(cls, texts: dict[str, Texts]) -> dict[str, Texts]:
        for name in texts:
            check_name("text", name)
        return texts

    def pin(self, base: Path, *, on_gpu: bool) -> OtherText:
        """With every text's files found and fingerprinted."""
        pinned = collect((("texts", name), partial(texts.pin, base)) for name, texts in self.texts.items())
        return self.given(texts=dict(zip(self.texts, pinned, strict=True)))

    def bind(self, subject: Subject) -> OtherText:
        """With the objective.

        Raises:
            SpaceError: if the models' words are no language's that files could be of, or they read otherwise than the
                objective does.
        """
        if not subject.corpus.is_natural_language:
            raise SpaceError(f"other_text needs pretrain.data text, not {subject.corpus.name}: its words spell no text")
        text = HeldText.of(subject)
        if self.objective and self.objective.head != text.loss.head:
            raise SpaceError(
                f"other_text.objective {self.objective.name} is of {self.objective.head} models, and pretrain's is a "
                f"{text.loss.head} one; leave it out for the own objective"
            )
        shown = subject.shown_tokens
        if self.objective and shown is not None and (missing := {*self.objective.extra_tokens()} - shown):
            raise SpaceError(
                f"other_text.objective {self.objective.name} writes {min(missing)!r}, a token that pretrain's "
                f"objectives up to {text.loss.name} show no model; take causal_lm, or leave it out for the own one"
            )
        return self.with_(text=text.with_(loss=self.objective or text.loss))  # type: ignore[no-any-return]

    @property
    def loss_of(self) -> Objective | None:
        """What is measured."""
        return self.text.loss if self.text else None

    def run(self, inputs: Mapping[str, Path], out: Path, worker: Worker) -> dict[str, float]:
        """Of each text the loss in nats per predicted token, and its standard error over batches of sequences; the mean
        over texts, each counting alike.

        Where the loss is the text's own likelihood, bits per byte, too, which compare over tokenizers.
        """
        from raysweep.train.evaluate import heldout

        assert self.text
        loss = self.text.loss
        model, tokenizer = load_model(inputs["checkpoint"]).to(worker.device), load_tokenizer(inputs["checkpoint"])
        specials = checkpoint_specials(inputs["checkpoint"], loss)
        metrics: dict[str, float] = {}
        means, errors = [], []
        for name, texts in self.texts.items():
            ids, bytes_per_token = self._sequences(name, texts, tokenizer)
            rows = loss.prepare(ids, np.random.default_rng([DRAW, *name.encode()]), specials)
            mean, error = heldout(model, rows, loss).above(np.zeros(len(ids)))
            metrics |= {f"loss_{name}": mean, f"loss_{name}_stderr": error}
            means.append(mean)
            errors.append(error)
            if loss.is_likelihood:
                metrics[f"bits_per_byte_{name}"] = mean / math.log(2) / bytes_per_token
        return metrics | {"mean_loss": fmean(means), "mean_loss_stderr": math.hypot(*errors) / len(errors)}

    def metrics(self, corpus: Corpus) -> tuple[Metric, ...]:
        """Bits per byte order models of one tokenizer as the loss does, and are no indicator of their own."""
        is_likelihood = self.text is not None and self.text.loss.is_likelihood
        of_texts = (
            metric
            for name in self.texts
            for metric in (
                Metric(f"loss_{name}", "min", "nats/token"),
                Metric(f"loss_{name}_stderr", unit="nats/token"),
                *((Metric(f"bits_per_byte_{name}", unit="bits/byte"),) if is_likelihood else ()),
            )
        )
        # Of one text it is that text's.
        direction: Direction | None = "min" if len(self.texts) > 1 else None
        return *of_texts, Metric("mean_loss", direction, "nats/token"), Metric("mean_loss_stderr", unit="nats/token")

    def flops(self, size: Size, corpus: Corpus) -> float:
        """A forward pass over each text."""
        assert self.text
        row = self.text.input_length
        return size.forward_flops(len(self.texts) * self.num_sequences * row, row)

    def memory_bytes(self, size: Size, resources: Resources) -> int:
        """Weights, one layer's activations and the logits of a batch, all in 32 bits."""
        assert self.text
        return size.weights_bytes + self.text.batch_bytes(size, self.num_sequences)

    def disk_bytes(self, size: Size) -> int:
        """None: its numbers stand in its record."""
        return 0

    def _sequences(self, name: str, texts: Texts, tokenizer: Any) -> tuple[Ints, float]:
        """Token ids [n, L], and bytes of text to a token; no more is read than is needed."""
        assert self.text
        length, encode = self.text.sequence_length, encoder(tokenizer)
        end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
        ids: list[int] = []
        num_bytes = 0
        with contextlib.closing(read_texts(listed(texts.files), texts.digests, column=texts.column)) as documents:
            for document in documents:
                ids += [*encode([document])[0], *end]
                num_bytes += len(document.encode())
                if len(ids) >= self.num_sequences * length:
                    break
        num = min(self.num_sequences, len(ids) // length)
        if num == 0:
            raise DataError(f"other_text.texts.{name}: its {len(ids)} tokens make no sequence of {length}; add text")
        return np.array(ids[: num * length], np.int64).reshape(num, length), num_bytes / len(ids)
