"""How text becomes tokens. To add a tokenizer: a spec with `vocab_size` and `build`, and its name in the last line."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from raysweep.spec import Spec

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

END_OF_TEXT = "<|endoftext|>"


class Bpe(Spec):
    """Byte-level BPE (Radford et al., 2019), trained on the start of every domain's training text."""

    name: Literal["bpe"] = "bpe"
    vocab_size: int = Field(default=8192, ge=257)
    num_training_bytes: int = Field(default=2_000_000, ge=1000)
    """Of each domain."""

    def build(self, texts: Callable[[int], Iterator[str]]) -> PreTrainedTokenizerBase:
        """Train; `texts(num_bytes)` yields the documents to train on."""
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
    path: str
    vocab_size: int = Field(ge=2)

    def build(self, texts: Callable[[int], Iterator[str]]) -> PreTrainedTokenizerBase:
        """Load it."""
        return load_tokenizer(Path(self.path))


def load_tokenizer(path: Path) -> PreTrainedTokenizerBase:
    """A tokenizer of a folder (or a hub id), without running code of its own."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(str(path), trust_remote_code=False)


Tokenizer = Annotated[Bpe | Pretrained, Field(discriminator="name")]


def start_of_text(tokenizer: Any) -> int | None:
    """The token that a text begins with, or that the text before it ends with; None if there is neither."""
    start: int | None = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    return start
