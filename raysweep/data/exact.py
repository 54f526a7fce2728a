"""Languages whose law is known exactly, so that the lowest loss that a model can have is, too.

All have words that are drawn from hidden symbols, one above each word: the states of a hidden Markov model, the
lowest non-terminals of a grammar. What is seen of a sentence enters as the probability of what is seen at each place
under each symbol; what it says of the symbol at another place is the language's own algorithm (`contexts`), and all
conditionals follow. To add a language: a class with `emissions`, `contexts`, `sample` and `at_temperature`, in a
file beside this one, and its name in `corpora.py`.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

import numpy as np
from pydantic import Field

from raysweep.data.base import LAW, CorpusSpec
from raysweep.data.draws import Bools, Floats, Ints
from raysweep.data.packing import DomainMeta, TokensMeta, dtype_of
from raysweep.errors import Finding, Place

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from raysweep.objectives.base import ObjectiveSpec

TRAIN, VALID, TASK, INDICATOR = 0, 1, 2, 3
"""Streams of sentences that share no draw."""

Seen = Literal["before", "around"]
"""Of a sentence, by whoever predicts a word: the words before it, or all but itself."""

MAX_NUMBERS = 10**8
"""Of a table of words, and of the sentences that a task draws at once, in numbers of 8 bytes."""

# Numbers of 8 bytes of the tables that are worked on at once: more are no faster, fewer are slower.
_TABLE = 2**19
# Words that are drawn at once, so that a corpus of any size is written in the same memory.
_WORDS = 2**20


class ExactCorpus(CorpusSpec):
    """A corpus of sentences of one length, opened by a token of its own."""

    is_natural_language: ClassVar[bool] = False
    takes_tokenizer: ClassVar[bool] = False
    counts_bytes: ClassVar[bool] = False

    num_words_total: int = Field(default=200, ge=2, le=1_000_000, alias="vocabulary")
    """Words there are."""
    sentence_length: int = Field(ge=2, le=4096)
    """Words of a sentence."""
    num_train_sentences: int = Field(default=100_000, ge=1)
    """Sentences to train on."""
    num_valid_sentences: int = Field(default=2_000, ge=1)
    """Held-out sentences."""

    @property
    def vocab_size(self) -> int:
        """Words, and the token that opens every sentence."""
        return self.num_words_total + 1

    @property
    def domains(self) -> tuple[str, ...]:
        """A single one, which bears the corpus's name."""
        return (self.name,)

    @property
    def mix(self) -> dict[str, float]:
        """The one domain has all training sequences."""
        return {self.name: 1.0}

    @property
    def row_length(self) -> int:
        """The words, and the token that opens them."""
        return self.sentence_length + 1

    @property
    def sampler(self) -> None:
        """None: its law is written out."""

    def pin(self, base: Path) -> Self:
        """As it is, as no file or hub id is read for it."""
        return self

    def source(self) -> Self:
        """What its tokens depend on: all of it."""
        return self

    @abstractmethod
    def at_temperature(self, factor: float) -> Self:
        """The same language, whose words and hidden symbols are more alike in probability above 1, less below.

        Args:
            factor: on all its temperatures; above 0.
        """

    @property
    @abstractmethod
    def emissions(self) -> Floats:
        """Probability of each word under each hidden symbol, [symbols, vocabulary]."""

    @abstractmethod
    def contexts(self, evidence: Floats, *, seen: Seen) -> Floats:
        """What the rest of a sentence says of the symbol above each word: p(symbol at t | what is seen elsewhere).

        Args:
            evidence: [symbols, T, n]: probability of what is seen at a place, given the symbol there; 1 if nothing is.
            seen: "before": only the places before t count; "around": all but t itself.

        Returns:
            [symbols, T, n], sums of 1 over symbols; 0 throughout where what is seen cannot be.
        """

    @abstractmethod
    def sample(self, num: int, *, seed: int, stream: int, part: slice = slice(None)) -> tuple[Ints, Any]:
        """Sentences and their hidden symbols; a sentence depends on `num`, `seed`, `stream` and its place alone.

        Args:
            num: sentences of the stream.
            seed: another one gives other sentences of the same language.
            stream: TRAIN, VALID, TASK or INDICATOR, which share no draw.
            part: which of the `num` sentences to make: the same as they are in the whole.

        Returns:
            Words [sentences, T] in [0, vocabulary), int64; and the symbols as the language has them.
        """

    def word_probabilities(self, words: Ints, *, seen: Seen, hidden: Bools | None = None) -> Floats:
        """p(x_t = w | seen) = sum over symbols s of p(s_t = s | seen) p(w | s): exact, of every word at every place.

        Args:
            words: [n, T], in [0, vocabulary).
            seen: "before": p(x_t | x_1 ... x_{t-1}); "around": p(x_t | all others).
            hidden: [n, T], true where a word is seen at no other place either, as those under a mask.

        Returns:
            [n, T, vocabulary], sums of 1 over words; 0 throughout where what is seen cannot be.

        >>> from raysweep.data.hmm import HMM
        >>> corpus = HMM(vocabulary=3, num_states=2, sentence_length=4)
        >>> probabilities = corpus.word_probabilities(np.array([[0, 2, 1, 1]]), seen="before")
        >>> probabilities.sum(axis=-1).round(12)
        array([[1., 1., 1., 1.]])
        >>> np.allclose(probabilities[0, 0], corpus.emissions.mean(axis=0))  # Before anything is seen.
        True
        """
        probabilities = np.empty((*words.shape, self.num_words_total))
        for rows, contexts in self._parts(words, seen, hidden):
            probabilities[rows] = (
                (contexts.reshape(len(contexts), -1).T @ self.emissions).reshape(*contexts.shape[1:], -1).swapaxes(0, 1)
            )
        return probabilities

    def word_losses(self, words: Ints, *, seen: Seen, hidden: Bools | None = None) -> Floats:
        """-log p(x_t | seen) of the word that stands at each place: no model can have a lower loss on average.

        Arguments are those of `word_probabilities`, whose table of all words is not made.

        Returns:
            [n, T], in nats; infinite where a sentence cannot be.
        """
        losses = np.empty(words.shape)
        for rows, contexts in self._parts(words, seen, hidden):
            own = self.emissions[:, words[rows].T]
            with np.errstate(divide="ignore"):
                losses[rows] = -np.log(np.einsum("atn,atn->nt", contexts, own))
        return losses

    def _parts(self, words: Ints, seen: Seen, hidden: Bools | None) -> Iterator[tuple[slice, Floats]]:
        """Rows, and the contexts of their sentences, [symbols, T, rows]."""
        for rows in self._cut(words):
            evidence = self.emissions[:, words[rows].T]
            if hidden is not None:
                # As likely under every symbol: it tells nothing of the symbol above it.
                evidence[:, hidden[rows].T] = 1.0
            yield rows, self.contexts(evidence, seen=seen)

    def _cut(self, words: Ints) -> Iterator[slice]:
        # A sentence's table of evidence is symbols x T numbers.
        step = max(1, _TABLE // self.emissions.shape[0] // words.shape[1])
        return (slice(first, first + step) for first in range(0, len(words), step))

    def token_losses(self, ids: Ints, *, seen: Seen, hidden: Bools | None = None) -> Floats:
        """`word_losses` of token rows [n, T + 1], as `rows` makes them: 0 of the token that opens a sentence.

        See `optimum.Law`; `hidden` is [n, T + 1] here, too.
        """
        under = None if hidden is None else hidden[:, 1:]
        losses = self.word_losses(ids[:, 1:] - 1, seen=seen, hidden=under)
        return np.pad(losses, ((0, 0), (1, 0)))

    def token_probabilities(self, ids: Ints, *, seen: Seen, hidden: Bools | None = None) -> Floats:
        """`word_probabilities` of token rows [n, T + 1], and of all tokens, [n, T + 1, words + 1].

        See `optimum.TabledLaw`; `hidden` is [n, T + 1] here, too. The token that opens a sentence stands nowhere else.
        """
        under = None if hidden is None else hidden[:, 1:]
        probabilities = np.zeros((*ids.shape, self.vocab_size))
        probabilities[:, 1:, 1:] = self.word_probabilities(ids[:, 1:] - 1, seen=seen, hidden=under)
        return probabilities

    def label_probabilities(self, ids: Ints) -> Floats:
        """p(symbol | all words), above each word and, of a language that has them, above longer spans.

        See `optimum.Law`: token rows [n, T + 1] give [n, places, symbols].
        """
        words = ids[:, 1:] - 1
        parts = [
            np.concatenate(self.posteriors(self.emissions[:, words[rows].T]), axis=1).transpose(2, 1, 0)
            for rows in self._cut(words)
        ]
        return np.concatenate(parts)

    def posteriors(self, evidence: Floats) -> list[Floats]:
        """p(symbol | all that is seen), [symbols, places, n], of one kind of place after another; see `contexts`."""
        return [normalised(self.contexts(evidence, seen="around") * evidence)]

    def log_probability(self, words: Ints) -> Floats:
        """log p(x_1 ... x_T) = sum_t log p(x_t | x_<t): exact, in nats, [n], of words [n, T].

        >>> from raysweep.data.hmm import HMM
        >>> every = np.array(list(np.ndindex(3, 3)))
        >>> probabilities = np.exp(HMM(vocabulary=3, num_states=2, sentence_length=2).log_probability(every))
        >>> round(float(probabilities.sum()), 9)  # Of all sentences that there are.
        1.0
        """
        return np.asarray(-self.word_losses(words, seen="before").sum(axis=1))

    def build(
        self, out: Path, *, tokenizer_dir: Path | None = None, sampler: PreTrainedModel | None = None
    ) -> dict[str, float]:
        """Write the tokens folder (see packing.py), and LAW in it: one sentence a row, opened by <s>, token 0.

        Returns:
            `num_tokens`; and `optimal_loss_nats_per_token`, the mean over held-out sentences of -log p(words) / T.

        Raises:
            ValueError: if a tokenizer is given, as the words are its own.
        """
        if tokenizer_dir is not None:
            raise ValueError(f"a corpus {self.name} has its own tokenizer")
        counts = {"train": self.num_train_sentences, "valid": self.num_valid_sentences}
        dtype = dtype_of(self.vocab_size)
        optimum = 0.0
        for split, stream in (("train", TRAIN), ("valid", VALID)):
            with (out / f"{self.name}.{split}.bin").open("wb") as file:
                for words in self._sentences(counts[split], stream):
                    self.rows(words).astype(dtype).tofile(file)
                    if split == "valid":
                        optimum -= float(self.log_probability(words).sum())
        train, valid = (counts[split] * self.row_length for split in ("train", "valid"))
        meta = TokensMeta(
            vocab_size=self.vocab_size,
            dtype=dtype,
            sentence_length=self.sentence_length,
            domains={self.name: DomainMeta(num_train_tokens=train, num_valid_tokens=valid)},
        )
        meta.write(out)
        (out / LAW).write_text(self.model_dump_json(by_alias=True, indent=1))
        self._write_tokenizer(out / "tokenizer")
        optimum /= self.num_valid_sentences * self.sentence_length
        return {"optimal_loss_nats_per_token": optimum, "num_tokens": float(train + valid)}

    def tokens_bytes(self) -> int:
        """Of all sentences, to the byte: 2 or 4 bytes a token, by `dtype_of`."""
        num = self.num_train_sentences + self.num_valid_sentences
        return np.dtype(dtype_of(self.vocab_size)).itemsize * num * self.row_length

    def knows_optimum(self, objective: ObjectiveSpec) -> bool:
        """Of all objectives that can tell it from a law."""
        return objective.has_optimum

    def law(self, tokens: Path) -> Self:
        """The corpus itself, by its `token_losses`; the folder need not be read."""
        return self

    def length_findings(self, place: Place, lengths: Mapping[Place, int]) -> Iterator[Finding]:
        """None: its sentences are of one length, which a recipe is checked for by itself."""
        yield from ()

    def rows(self, words: Ints) -> Ints:
        """Words [num, T] as token rows [num, T + 1]: <s> is 0, word w is w + 1."""
        return np.concatenate([np.zeros((len(words), 1), np.int64), words + 1], axis=1)

    def _sentences(self, num: int, stream: int) -> Iterator[Ints]:
        """All sentences of a stream of `num` [some, T], some at a time: the same as all at once; see `sample`."""
        step = max(1, _WORDS // self.sentence_length)
        for first in range(0, num, step):
            yield self.sample(num, seed=0, stream=stream, part=slice(first, first + step))[0]

    def _write_tokenizer(self, folder: Path) -> None:
        from tokenizers import Tokenizer
        from tokenizers.models import WordLevel
        from tokenizers.pre_tokenizers import WhitespaceSplit
        from transformers import PreTrainedTokenizerFast

        vocabulary = {"<s>": 0} | {f"w{word}": word + 1 for word in range(self.num_words_total)}
        tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="<s>"))
        tokenizer.pre_tokenizer = WhitespaceSplit()
        fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="<s>", pad_token="<s>")
        fast.save_pretrained(folder)


def check_table(field: str, num: int, num_words: int) -> None:
    """See that emissions of `num` symbols fit into memory. Raises ValueError, which calls `num` by `field`."""
    if (size := num * num_words) > MAX_NUMBERS:
        raise ValueError(f"{field} x vocabulary is {size:,}; at most {MAX_NUMBERS:,} fit into memory")


def normalised(weights: Floats) -> Floats:
    """weights / sum of weights over the first axis; 0 stays where all are 0.

    >>> normalised(np.array([[1.0, 0.0], [3.0, 0.0]]))
    array([[0.25, 0.  ],
           [0.75, 0.  ]])
    """
    return np.asarray(weights / np.maximum(weights.sum(axis=0), np.finfo(np.float64).tiny))
