"""How text becomes tokens. To add a tokenizer: a spec with `vocab_size` and `build`, and its name in the last line."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from raysweep.data import hub, pinned
from raysweep.data.digests import Digests
from raysweep.errors import DataError, collect
from raysweep.spec import Provenance, Spec

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

END_OF_TEXT = "<|endoftext|>"

# One of them holds the vocabulary.
VOCABULARY_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")


class Bpe(Spec):
    """Byte-level BPE (Radford et al., 2019), trained on the start of every domain's training text."""

    name: Literal["bpe"] = "bpe"
    """Which tokenizer."""
    vocab_size: int = Field(default=8192, ge=257)
    """Tokens, the end of text and all 256 bytes among them."""
    num_training_bytes: int = Field(default=2_000_000, ge=1000)
    """About how many bytes of each domain's training text it is trained on."""

    def pin(self, base: Path) -> Bpe:
        """As it is: what it is trained on is pinned with the text."""
        return self

    def build(self, texts: Callable[[int], Iterator[str]]) -> PreTrainedTokenizerBase:
        """Train one. Of a short text it has fewer tokens than `vocab_size`.

        Args:
            texts: takes a number of bytes, and gives the documents to train on: about so much of each domain.

        Returns:
            A fast tokenizer, whose bos, eos and pad token are END_OF_TEXT, its only special token.
        """
        from tokenizers import ByteLevelBPETokenizer
        from transformers import PreTrainedTokenizerFast

        tokenizer = ByteLevelBPETokenizer()
        tokenizer.train_from_iterator(
            texts(self.num_training_bytes),
            vocab_size=self.vocab_size,
            min_frequency=2,
            special_tokens=[END_OF_TEXT],
            show_progress=False,
        )
        return PreTrainedTokenizerFast(
            tokenizer_object=tokenizer._tokenizer, bos_token=END_OF_TEXT, eos_token=END_OF_TEXT, pad_token=END_OF_TEXT
        )


class Pretrained(Spec):
    """The tokenizer of a folder or hub id; `vocab_size` is what the model's embedding is made for."""

    name: Literal["pretrained"]
    """Which tokenizer."""
    path: Annotated[str, Provenance()]
    """Folder, relative to the sweep file, or hub id, with an optional @commit."""
    fingerprint: str = ""
    """Of its content; filled when the sweep file is loaded."""
    digests: Annotated[Digests, Provenance()] = Field(default_factory=dict)
    """Of a folder's files; filled when the sweep file is loaded."""
    vocab_size: int = Field(ge=2)
    """Rows of the model's embedding; at least as many as the tokenizer has tokens."""

    def pin(self, base: Path) -> Pretrained:
        """With the content's fingerprint; relative folders are relative to `base`.

        Raises:
            DataError: if it is neither a folder with a tokenizer nor a hub id that can be looked up.
        """
        [tokenizer] = collect([(("path",), partial(hub.pin, self.path, base, tokenizer_files))])
        return self.with_(path=tokenizer.source, fingerprint=tokenizer.fingerprint, digests=tokenizer.digests)  # type: ignore[no-any-return]

    def build(self, texts: Callable[[int], Iterator[str]]) -> PreTrainedTokenizerBase:
        """Load it; `texts` are not read.

        Raises:
            DataError: if a file was changed since it was pinned.
        """
        if not self.digests:
            return load_tokenizer(Path(self.path))
        # From a copy of what was pinned and no more: what is compared is what is parsed.
        with tempfile.TemporaryDirectory() as folder:
            pinned.copy(Path(self.path), Path(folder), self.digests)
            return load_tokenizer(Path(folder))


def tokenizer_files(folder: Path) -> list[Path]:
    """The files of a tokenizer, by name. Raises DataError if there is none."""
    if not any((folder / name).is_file() for name in VOCABULARY_FILES):
        raise DataError(f"{folder}: no tokenizer; save it there with tokenizer.save_pretrained(folder)")
    # config.json names the kind of model, by which transformers picks a tokenizer's class.
    others = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "merges.txt", "config.json")
    return [folder / name for name in sorted(VOCABULARY_FILES + others) if (folder / name).is_file()]


def load_tokenizer(path: Path) -> PreTrainedTokenizerBase:
    """A tokenizer, without running code of its own.

    Args:
        path: a folder, or a hub id with an optional @commit.
    """
    from transformers import AutoTokenizer

    name, revision = (str(path), None) if path.is_dir() else hub.name_and_revision(str(path))
    return AutoTokenizer.from_pretrained(name, revision=revision or "main", trust_remote_code=False)


def add_control_tokens(tokenizer: Any, names: Sequence[str], *, may_grow: bool) -> dict[str, int]:
    """Name -> id of each control token, added behind the others where the tokenizer lacks it.

    Args:
        tokenizer: of the Hugging Face kind; changed.
        names: such as <|wiki|>, each once.
        may_grow: whether tokens may be added: not to the tokenizer of a trained model, which has no row for them.

    Raises:
        DataError: if it is a token of text, or lacking and the tokenizer may not grow, being that of a trained model.
    """
    from tokenizers import AddedToken

    special = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
    vocabulary = tokenizer.get_vocab()
    for name in names:
        if name in vocabulary and name not in special:
            raise DataError(f"tag {name!r} is a token of text already; choose another, such as <|{name.strip()}|>")
        if name not in vocabulary:
            if not may_grow:
                raise DataError(
                    f"tag {name!r} is no token of the tokenizer that the model was trained with; leave the tag out, or "
                    "train the model with it from the start"
                )
            tokenizer.add_tokens([AddedToken(name, special=True, normalized=False)], special_tokens=True)
    return {name: tokenizer.convert_tokens_to_ids(name) for name in names}


Tokenizer = Annotated[Bpe | Pretrained, Field(discriminator="name")]


def start_of_text(tokenizer: Any) -> int | None:
    """The token that a text begins with, or that the text before it ends with; None if there is neither."""
    start: int | None = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    return start
