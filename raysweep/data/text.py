"""Real text in domains, mixed by weight; `formats` says which files are read, `files` how they are named."""

from __future__ import annotations

import contextlib
import copy
import hashlib
import itertools
import math
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

import numpy as np
from pydantic import Field, model_validator

from raysweep.data.base import CorpusSpec
from raysweep.data.digests import Digests, content_fingerprint
from raysweep.data.files import Globs, digests_of, listed, sampled, sizes_of
from raysweep.data.formats import COLUMN, is_document, is_packed, read_texts
from raysweep.data.packing import DomainMeta, TokensMeta, dtype_of
from raysweep.data.tokenizers import Bpe, Tokenizer, add_control_tokens, load_tokenizer
from raysweep.data.tokenizing import encoder, num_cores, write_tokens
from raysweep.errors import DataError, Finding, Place, RaysweepError, below, collect, dotted
from raysweep.spec import Neutral, Provenance, Spec, check_name

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from raysweep.objectives.base import ObjectiveSpec

TextSplit = Literal["train", "valid"]
SPLITS: tuple[TextSplit, ...] = ("train", "valid")

Quantile = Annotated[float, Field(ge=0, le=1)]

BYTES_OF_TOKEN = 4
"""Of text, assumed for a plan."""
PACKED = 3
"""How often its own size a packed file holds, assumed for a plan."""


class Domain(Spec):
    """Files of one kind of text. Without `valid`, one in `1 / valid_fraction` training documents is held out."""

    train: Annotated[Globs, Provenance()]
    """Files or globs of .txt, .jsonl (.gz, .zst), .parquet or .arrow, or a folder of `datasets`; relative to the sweep
    file, ${VARIABLES} filled in. Of the hub: hf://datasets/owner/name@revision/glob."""
    valid: Annotated[Globs | None, Provenance()] = None
    """Files or globs of held-out text."""
    valid_fraction: float = Field(default=0.02, gt=0, lt=0.5)
    """Part of the training documents that is held out, where `valid` is not given."""
    column: Annotated[str, Neutral(COLUMN)] = COLUMN
    """Field of JSON lines, or column of Parquet and `datasets`, that holds the text."""
    tag: Annotated[str | None, Neutral(None)] = Field(default=None, min_length=1)
    """A control token before each document, held-out ones too, such as <|wiki|>; left out: none."""
    length_quantiles: Annotated[tuple[Quantile, Quantile] | None, Neutral(None)] = None
    """[low, high]: only documents longer, in bytes, than the low part of those in `train` and no longer than the high
    part, held-out ones too: [0.25, 0.75] is the middle half, [0.75, 1] the longest quarter."""
    fingerprint: str = ""
    """Of the files' contents; filled when the sweep file is loaded."""
    digests: Annotated[Digests, Provenance()] = Field(default_factory=dict)
    """Of each file; filled when the sweep file is loaded."""

    @model_validator(mode="after")
    def _ordered(self) -> Domain:
        if self.length_quantiles and self.length_quantiles[0] >= self.length_quantiles[1]:
            raise ValueError(f"length_quantiles {list(self.length_quantiles)}: write [low, high] with low below high")
        return self

    def pin(self, base: Path) -> Domain:
        """With absolute paths and the contents' fingerprint.

        Raises:
            DataError: if a pattern matches no file, or a file does not begin as text; with all such findings.
        """
        given = {"train": self.train} | ({} if self.valid is None else {"valid": self.valid})
        by_split = collect(
            ((split,), partial(sampled, globs, base, column=self.column)) for split, globs in given.items()
        )
        digests = digests_of(itertools.chain(*by_split))
        # In the order of the files, which is that of the tokens.
        whole = ":".join(content_fingerprint(_as_read(path, digests[path]) for path in paths) for paths in by_split)
        return self.with_(**dict(zip(given, by_split, strict=True)), fingerprint=whole, digests=digests)  # type: ignore[no-any-return]

    def most_tokens(self, split: TextSplit, enough: int) -> int:
        """No tokenizer makes more tokens of a split than this; counted only until it is `enough`.

        A bound before there is a tokenizer, by the bytes of the documents, so that a plan can refuse too little text.

        Raises:
            DataError: if a file is malformed; names file and line.
        """
        total = 0
        # Read in part, so not compared with what it was a moment ago; of all lengths, for quantiles are of the whole.
        some = self.with_(digests={}, length_quantiles=None)
        for text in some.documents(split):
            # A token is a byte or more; a document may get a blank before it, a tag, and an end of text after it.
            total += len(text.encode()) + 2 + (self.tag is not None)
            if total >= enough:
                break
        return total

    def documents(self, split: TextSplit) -> Generator[str]:
        """The documents of one split; see `split_documents`."""
        with contextlib.closing(self.split_documents(split)) as documents:
            for _, text in documents:
                yield text

    def split_documents(self, *splits: TextSplit) -> Generator[tuple[TextSplit, str]]:
        """(split, document) for the documents of these splits, read once, in the order of the files.

        Which split a document is of follows from `valid`, or from its own content: so both can be read in one pass.
        With `length_quantiles` all of `train` is read once before, to know the lengths.

        Raises:
            DataError: if a line is malformed, or a file was changed since it was pinned; names file and line.
        """
        shortest, longest = self._lengths
        with contextlib.closing(self._every(splits)) as documents:
            for split, text in documents:
                if split in splits and shortest < len(text.encode()) <= longest:
                    yield split, text

    def _every(self, splits: Sequence[TextSplit]) -> Generator[tuple[TextSplit, str]]:
        """Of all lengths, and of other splits too where they are read in passing."""
        if self.valid is not None:
            for split in splits:
                with contextlib.closing(self._texts(self.train if split == "train" else self.valid)) as texts:
                    for text in texts:
                        yield split, text
            return
        with contextlib.closing(self._texts(self.train)) as texts:
            for text in texts:
                # By content, so that neither the order nor the number of files moves a document across.
                share = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") / 2**64
                yield ("valid" if share < self.valid_fraction else "train"), text

    def _texts(self, globs: Globs) -> Generator[str]:
        return read_texts(listed(globs), self.digests, column=self.column)

    @cached_property
    def _lengths(self) -> tuple[float, float]:
        """Documents are longer than the first and no longer than the second, in bytes of UTF-8."""
        if self.length_quantiles is None:
            return -1, math.inf
        lengths = Counter(len(text.encode()) for text in self._texts(self.train))
        low, high = length_bounds(lengths, self.length_quantiles)
        return low, high


class Text(CorpusSpec):
    """Domains of text; `mix` says which part of the training sequences comes from each (default: equal parts)."""

    is_natural_language: ClassVar[bool] = True
    takes_tokenizer: ClassVar[bool] = True
    counts_bytes: ClassVar[bool] = True
    label_form: ClassVar[str | None] = None

    name: Literal["text"] = "text"
    """Which corpus."""
    domains_: dict[str, Domain] = Field(alias="domains", min_length=1)
    """Name to the files of one kind of text; names become metric columns."""
    mix_: dict[str, Annotated[float, Field(ge=0)]] | None = Field(default=None, alias="mix")
    """Weight of each domain in the training sequences; left out: equal."""
    tokenizer: Tokenizer = Bpe()
    """How text becomes tokens."""
    later_tags: Annotated[tuple[str, ...], Neutral(())] = ()
    """Tags that documents of later phases have: a model has a row for each from its beginning."""

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
        """The tokenizer's, and a row for each tag."""
        return self.tokenizer.vocab_size + len(self._tags)

    @property
    def domains(self) -> tuple[str, ...]:
        """Names of the domains in the order of the sweep file, those without weight among them."""
        return tuple(self.domains_)

    @property
    def mix(self) -> dict[str, float]:
        """Domain -> share of the training sequences; sums to 1."""
        weights = self.mix_ or dict.fromkeys(self.domains_, 1.0)
        total = sum(weights.values())
        return {name: weights.get(name, 0.0) / total for name in self.domains_ if weights.get(name, 0.0) > 0}

    @property
    def row_length(self) -> None:
        """None: documents follow each other, and sequences are cut out of them at any place."""

    @property
    def sampler(self) -> None:
        """None: it is read from files, not drawn from a model."""

    def pin(self, base: Path) -> Text:
        """With every domain and the tokenizer pinned; see `CorpusSpec.pin`.

        Raises:
            DataError: with the findings of all of them.
        """
        pins: list[tuple[Place, Callable[[], Any]]] = [
            (("domains", name), partial(domain.pin, base)) for name, domain in self.domains_.items()
        ]
        *domains, tokenizer = collect([*pins, (("tokenizer",), partial(self.tokenizer.pin, base))])
        named = dict(zip(self.domains_, domains, strict=True))
        return self.with_(domains_=named, tokenizer=tokenizer)  # type: ignore[no-any-return]

    def source(self) -> Text:
        """What its tokens depend on: not the mix."""
        return self.with_(mix_=None)  # type: ignore[no-any-return]

    def build(
        self, out: Path, *, tokenizer_dir: Path | None = None, sampler: PreTrainedModel | None = None
    ) -> dict[str, float]:
        """Write the tokens folder (see packing.py): each domain's documents in a row, each closed by end-of-text.

        Returns:
            `num_tokens`, of all domains and both splits, end-of-text and tags included.

        Raises:
            DataError: if a file is malformed or a domain has no training or no held-out text.
        """
        tokenizer = load_tokenizer(tokenizer_dir) if tokenizer_dir else self.tokenizer.build(self._training_texts)
        if tokenizer.eos_token_id is None:
            raise DataError("pretrain.data.tokenizer has no end-of-text token (eos_token); documents need one")
        # Long documents are cut into sequences later; the tokenizer's own limit is none of ours.
        tokenizer.model_max_length = int(1e9)
        # Before there are tags: a document that happens to spell one holds no control token.
        encode = encoder(copy.deepcopy(tokenizer))
        tags = add_control_tokens(tokenizer, self._tags, may_grow=tokenizer_dir is None)
        tokenizer.save_pretrained(out / "tokenizer")
        # A tokenizer in Python holds the lock all the time: more threads would only wait for each other.
        num_threads = num_cores() if tokenizer.is_fast else 1
        dtype = dtype_of(len(tokenizer))
        domains = {}
        for name, domain in self.domains_.items():
            written = write_tokens(
                domain.split_documents(*SPLITS),
                encode,
                {split: out / f"{name}.{split}.bin" for split in SPLITS},
                before=[] if domain.tag is None else [tags[domain.tag]],
                after=[tokenizer.eos_token_id],
                dtype=dtype,
                num_threads=num_threads,
            )
            for split, each in written.items():
                if each.num_bytes == 0:  # Only end-of-text tokens are no text.
                    raise DataError(
                        f"pretrain.data.domains.{name}: no {split} text in {list(listed(domain.train))[:3]}"
                    )
            domains[name] = DomainMeta(
                num_train_tokens=written["train"].num_tokens,
                num_valid_tokens=written["valid"].num_tokens,
                train_bytes=written["train"].num_bytes,
                valid_bytes=written["valid"].num_bytes,
            )
        meta = TokensMeta(
            # Of a short text the tokenizer has fewer tokens than were asked for; models are of one size all the same.
            vocab_size=max(len(tokenizer), 0 if tokenizer_dir else self.vocab_size),
            dtype=dtype,
            sentence_length=None,
            domains=domains,
        )
        meta.write(out)
        return {"num_tokens": float(sum(each.num_train_tokens + each.num_valid_tokens for each in domains.values()))}

    def tokens_bytes(self) -> int:
        """By the sizes of its files, as if a token were of `BYTES_OF_TOKEN` bytes of text."""
        paths = [path for domain in self.domains_.values() for path in (*listed(domain.train), *listed(domain.valid))]
        text = sum(size * (PACKED if is_packed(path) else 1) for path, size in sizes_of(paths).items())
        return np.dtype(dtype_of(self.vocab_size)).itemsize * text // BYTES_OF_TOKEN

    def knows_optimum(self, objective: ObjectiveSpec) -> bool:
        """Nobody knows the law of real text."""
        return False

    def law(self, tokens: Path) -> None:
        """Nobody knows that of real text."""

    def length_findings(self, place: Place, lengths: Mapping[Place, int]) -> Iterator[Finding]:
        """Domains that cannot hold even one sequence."""
        for name, domain in self.domains_.items():
            for split in SPLITS:
                yield from _domain_findings((*place, "domains", name), domain, split, lengths)

    @property
    def _tags(self) -> tuple[str, ...]:
        here = (domain.tag for domain in self.domains_.values() if domain.tag is not None)
        return tuple(dict.fromkeys((*self.later_tags, *here)))

    def _training_texts(self, num_bytes: int) -> Iterator[str]:
        """Documents for the tokenizer: about `num_bytes` of each domain whatever its weight, so mixes share it."""
        for domain in self.domains_.values():
            left = num_bytes
            with contextlib.closing(domain.documents("train")) as texts:
                for text in texts:
                    yield text[:left]
                    left -= len(text.encode())
                    if left <= 0:
                        break


def _as_read(path: str, sha256: str) -> str:
    """A file's digest, and whether it is one document, as which lines of JSON may be read, too."""
    return f"{sha256} whole" if is_document(path) else sha256


def _domain_findings(place: Place, domain: Domain, split: TextSplit, lengths: Mapping[Place, int]) -> Iterator[Finding]:
    try:
        most = domain.most_tokens(split, max(lengths.values()))
    except RaysweepError as error:
        yield from below(place, error)
        return
    if most == 0:
        mend = (
            ""
            if split == "train" or domain.valid
            else "; name files of it (valid), raise valid_fraction, or give more documents"
        )
        yield place, f"no {split} text{mend}"
        return
    for where, length in lengths.items():
        if length > most:
            text = f"{length:,} tokens are more than {dotted(place)} holds of {split} text, at most {most:,}"
            yield where, f"{text}: lower it, or give more text"


def length_bounds(counts: Mapping[int, int], quantiles: tuple[float, float]) -> tuple[int, int]:
    """Lengths (a, b] that hold the documents between two quantiles; neighbouring ranges share none, and leave none out.

    The q-quantile is the least length that at least a part q of the documents does not exceed: the inverse of the
    empirical distribution (Hyndman and Fan, 1996, type 1); at q = 0 it is -1, below every length.

    Args:
        counts: length -> number of documents.
        quantiles: (low, high), parts between 0 and 1.

    >>> length_bounds({10: 1, 20: 2, 30: 1}, (0.25, 0.75))
    (10, 20)
    """
    lengths = sorted(counts)
    cumulative = np.cumsum([counts[length] for length in lengths])
    low, high = (
        lengths[int(np.searchsorted(cumulative, part * cumulative[-1]))] if part > 0 and lengths else -1
        for part in quantiles
    )
    return low, high
