"""Real text in domains, mixed by weight: .txt, .jsonl and .jsonl.gz files with a `text` field."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import os
from collections.abc import Callable, Generator, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

import numpy as np
from pydantic import Field, model_validator

from raysweep.data.base import CorpusSpec
from raysweep.data.digests import Digests, content_fingerprint, kept_digests
from raysweep.data.files import Globs, listed, read_texts, sampled
from raysweep.data.packing import DomainMeta, Dtype, TokensMeta, dtype_of
from raysweep.data.tokenizers import Bpe, Tokenizer, load_tokenizer
from raysweep.errors import DataError, Finding, Place, RaysweepError, below, collect, dotted
from raysweep.spec import Provenance, Spec, check_name

if TYPE_CHECKING:
    from raysweep.objectives.base import ObjectiveSpec

# Documents tokenized at once: enough for the tokenizer's threads, little enough for any memory.
BATCH_DOCUMENTS = 512

BYTES_OF_TOKEN = 4
"""Of text, assumed for a plan."""
PACKED = 3
"""How often its own size a packed file holds, assumed for a plan."""


class Domain(Spec):
    """Files of one kind of text. Without `valid`, one in `1 / valid_fraction` training documents is held out."""

    train: Annotated[Globs, Provenance()]
    """Files or globs of .txt, .jsonl or .jsonl.gz, relative to the sweep file; ${VARIABLES} are filled in."""
    valid: Annotated[Globs | None, Provenance()] = None
    """Files or globs of held-out text."""
    valid_fraction: float = Field(default=0.02, gt=0, lt=0.5)
    """Part of the training documents that is held out, where `valid` is not given."""
    fingerprint: str = ""
    """Of the files' contents; filled when the sweep file is loaded."""
    digests: Annotated[Digests, Provenance()] = Field(default_factory=dict)
    """Of each file; filled when the sweep file is loaded."""

    def pin(self, base: Path) -> Domain:
        """With absolute paths and the contents' fingerprint.

        Raises:
            DataError: if a pattern matches no file, or a file does not begin as text; with all such findings.
        """
        given = {"train": self.train} | ({} if self.valid is None else {"valid": self.valid})
        found = collect(((split,), partial(sampled, globs, base)) for split, globs in given.items())
        digests = kept_digests(itertools.chain(*found))
        # In the order of the files, which is that of the tokens.
        whole = ":".join(content_fingerprint(digests[path] for path in paths) for paths in found)
        return self.with_(**dict(zip(given, found, strict=True)), fingerprint=whole, digests=digests)  # type: ignore[no-any-return]

    def most_tokens(self, split: str, enough: int) -> int:
        """No tokenizer makes more tokens of "train" or "valid" than this; counted only until it is `enough`."""
        total = 0
        # Read in part, so not compared with what it was a moment ago.
        for text in self.with_(digests={}).documents(split):
            # A token is a byte or more; a document may get a blank before it, and an end of text after it.
            total += len(text.encode()) + 2
            if total >= enough:
                break
        return total

    def documents(self, split: str) -> Generator[str]:
        """The documents of "train" or "valid", in the order of the files.

        Raises:
            DataError: if a line is malformed, or a file was changed since it was pinned; names file and line.
        """
        if self.valid is not None:
            yield from read_texts(listed(self.train if split == "train" else self.valid), self.digests)
            return
        with contextlib.closing(read_texts(listed(self.train), self.digests)) as texts:
            for text in texts:
                # By content, so that neither the order nor the number of files moves a document across.
                share = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") / 2**64
                if (share < self.valid_fraction) == (split == "valid"):
                    yield text


class Text(CorpusSpec):
    """Domains of text; `mix` says which part of the training sequences comes from each (default: equal parts)."""

    is_natural_language: ClassVar[bool] = True
    takes_tokenizer: ClassVar[bool] = True
    label_form: ClassVar[str | None] = None

    name: Literal["text"] = "text"
    """Which corpus."""
    domains_: dict[str, Domain] = Field(alias="domains", min_length=1)
    """Name to the files of one kind of text; names become metric columns."""
    mix_: dict[str, Annotated[float, Field(ge=0)]] | None = Field(default=None, alias="mix")
    """Weight of each domain in the training sequences; left out: equal."""
    tokenizer: Tokenizer = Bpe()
    """How text becomes tokens."""

    @model_validator(mode="after")
    def _known(self) -> Text:
        for name in self.domains_:
            check_name("domain", name)
        unknown = sorted((self.mix_ or {}).keys() - self.domains_.keys())
        if unknown:
            raise ValueError(f"mix names {unknown[0]!r}, which is no domain; domains: {', '.join(self.domains_)}")
        if self.mix_ is not None and sum(self.mix_.values()) <= 0:
            raise ValueError(f"mix {self.mix_}: at least one weight must be above 0")
        return self

    @property
    def vocab_size(self) -> int:
        """The tokenizer's."""
        return self.tokenizer.vocab_size

    @property
    def domains(self) -> tuple[str, ...]:
        """Names, as written."""
        return tuple(self.domains_)

    @property
    def mix(self) -> dict[str, float]:
        """Domain -> share of the training sequences; sums to 1."""
        weights = self.mix_ or dict.fromkeys(self.domains_, 1.0)
        total = sum(weights.values())
        return {name: weights.get(name, 0.0) / total for name in self.domains_ if weights.get(name, 0.0) > 0}

    @property
    def row_length(self) -> None:
        """Running text."""

    def pin(self, base: Path) -> Text:
        """With every domain and the tokenizer pinned. Raises DataError with the findings of all of them."""
        pins: list[tuple[Place, Callable[[], Any]]] = [
            (("domains", name), partial(domain.pin, base)) for name, domain in self.domains_.items()
        ]
        *domains, tokenizer = collect([*pins, (("tokenizer",), partial(self.tokenizer.pin, base))])
        named = dict(zip(self.domains_, domains, strict=True))
        return self.with_(domains_=named, tokenizer=tokenizer)  # type: ignore[no-any-return]

    def source(self) -> Text:
        """What its tokens depend on: not the mix."""
        return self.with_(mix_=None)  # type: ignore[no-any-return]

    def build(self, out: Path, *, tokenizer_dir: Path | None = None) -> dict[str, float]:
        """Write the tokens folder (see packing.py): each domain's documents in a row, each closed by end-of-text.

        Raises:
            DataError: if a file is malformed or a domain has no training or no held-out text.
        """
        tokenizer = load_tokenizer(tokenizer_dir) if tokenizer_dir else self.tokenizer.build(self._training_texts)
        if tokenizer.eos_token_id is None:
            raise DataError("pretrain.data.tokenizer has no end-of-text token (eos_token); documents need one")
        # Long documents are cut into sequences later; the tokenizer's own limit is none of ours.
        tokenizer.model_max_length = int(1e9)
        tokenizer.save_pretrained(out / "tokenizer")
        dtype = dtype_of(len(tokenizer))
        domains = {}
        for name, domain in self.domains_.items():
            counts: dict[str, Any] = {}
            for split in ("train", "valid"):
                num_tokens, num_bytes = _tokenize(
                    domain.documents(split), tokenizer, dtype, out / f"{name}.{split}.bin"
                )
                if num_tokens == 0:
                    raise DataError(
                        f"pretrain.data.domains.{name}: no {split} text in {list(listed(domain.train))[:3]}"
                    )
                counts |= {f"num_{split}_tokens": num_tokens, f"{split}_bytes": num_bytes}
            domains[name] = DomainMeta(**counts)
        vocab_size = max(len(tokenizer), 0 if tokenizer_dir else self.vocab_size)
        meta = TokensMeta(
            vocab_size=vocab_size,
            dtype=dtype,
            sentence_length=None,
            domains=domains,
        )
        meta.write(out)
        return {"num_tokens": float(sum(each.num_train_tokens + each.num_valid_tokens for each in domains.values()))}

    def tokens_bytes(self) -> int:
        """By the sizes of its files, as if a token were of `BYTES_OF_TOKEN` bytes of text."""
        paths = [path for domain in self.domains_.values() for path in (*listed(domain.train), *listed(domain.valid))]
        text = sum(os.path.getsize(path) * (PACKED if path.endswith(".gz") else 1) for path in paths)
        return np.dtype(dtype_of(self.vocab_size)).itemsize * text // BYTES_OF_TOKEN

    def knows_optimum(self, objective: ObjectiveSpec) -> bool:
        """Nobody knows the law of real text."""
        return False

    def length_findings(self, place: Place, lengths: Mapping[Place, int]) -> Iterator[Finding]:
        """Domains that cannot hold even one sequence."""
        for name, domain in self.domains_.items():
            for split in ("train", "valid"):
                yield from _domain_findings((*place, "domains", name), domain, split, lengths)

    def _training_texts(self, num_bytes: int) -> Iterator[str]:
        for domain in self.domains_.values():
            left = num_bytes
            with contextlib.closing(domain.documents("train")) as texts:
                for text in texts:
                    yield text[:left]
                    left -= len(text.encode())
                    if left <= 0:
                        break


def _domain_findings(place: Place, domain: Domain, split: str, lengths: Mapping[Place, int]) -> Iterator[Finding]:
    try:
        most = domain.most_tokens(split, max(lengths.values()))
    except RaysweepError as error:
        yield from below(place, error)
        return
    if most == 0:
        mend = "" if split == "train" or domain.valid else "; name files of it (valid), or give more documents"
        yield place, f"no {split} text{mend}"
        return
    for where, length in lengths.items():
        if length > most:
            text = f"{length:,} tokens are more than {dotted(place)} holds of {split} text, at most {most:,}"
            yield where, f"{text}: lower it, or give more text"


def _tokenize(documents: Iterator[str], tokenizer: Any, dtype: Dtype, path: Path) -> tuple[int, int]:
    """Append the documents' tokens to a file; (number of tokens, number of bytes of text)."""
    num_tokens = num_bytes = 0
    with path.open("wb") as file:
        for batch in iter(partial(_take, documents, BATCH_DOCUMENTS), []):
            for text, ids in zip(batch, tokenizer(batch, add_special_tokens=False)["input_ids"], strict=True):
                np.asarray([*ids, tokenizer.eos_token_id], dtype).tofile(file)
                num_tokens += len(ids) + 1
                num_bytes += len(text.encode())
    # Only end-of-text tokens are no text.
    return (num_tokens if num_bytes else 0), num_bytes


def _take(documents: Iterator[str], num: int) -> list[str]:
    return [text for _, text in zip(range(num), documents, strict=False)]
