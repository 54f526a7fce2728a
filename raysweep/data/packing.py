"""From a tokens folder to batches, whose order is a function of seed and step alone.

A tokens folder holds `tokenizer/`, `<domain>.<split>.bin` (token ids in a row) and `meta.json`. A sequence is a
run of `sequence_length` tokens; sequence i of a domain is tokens [i L, (i + 1) L).
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
from pydantic import ConfigDict

from raysweep.errors import DataError
from raysweep.spec import Spec

logger = logging.getLogger(__name__)

Ints = npt.NDArray[np.int64]

# Sequences over which the shares of the domains are exact, up to one sequence.
CYCLE = 1000


META = "meta.json"

Dtype = Literal["uint16", "uint32"]
"""Of token ids on disk."""


class DomainMeta(Spec):
    """What a tokens folder holds of one domain."""

    num_train_tokens: int
    """Token ids to train on."""
    num_valid_tokens: int
    """Held-out ones."""
    train_bytes: int | None = None
    """UTF-8 bytes of their text; None where they are of no text."""
    valid_bytes: int | None = None
    """Of the held-out ones."""


class TokensMeta(Spec):
    """What a tokens folder says of itself, in `meta.json`."""

    # Folders that were made before say more.
    model_config = ConfigDict(extra="ignore")

    vocab_size: int
    """Rows of the embedding of a model of these tokens."""
    dtype: Dtype
    """Of the ids of its files."""
    sentence_length: int | None
    """Tokens of a row, without the one that opens it, where all are of one length; None for running text."""
    domains: dict[str, DomainMeta]
    """By name."""

    @classmethod
    def read(cls, folder: Path) -> TokensMeta:
        """Of a tokens folder. Raises ValueError if it is damaged."""
        return cls.model_validate_json((folder / META).read_bytes())

    def write(self, folder: Path) -> None:
        """As `meta.json` of a tokens folder, which exists."""
        (folder / META).write_text(json.dumps(self.model_dump(mode="json"), indent=1))


def dtype_of(num_tokens: int) -> Dtype:
    """The smallest type that holds the ids of a vocabulary."""
    return "uint16" if num_tokens <= 2**16 else "uint32"


class Tokens:
    """An opened tokens folder; the ids stay on disk and are mapped into memory."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.meta = TokensMeta.read(folder)
        self.tokenizer_dir = folder / "tokenizer"

    @property
    def domains(self) -> tuple[str, ...]:
        """Names of the kinds of text in it, in the order in which the corpus has them."""
        return tuple(self.meta.domains)

    def sequences(self, domain: str, split: str, sequence_length: int) -> npt.NDArray[Any]:
        """All sequences [n, L] of a domain, in the type of the file and mapped into memory; a rest is left out.

        Args:
            domain: one of `domains`.
            split: "train" or "valid".
            sequence_length: L, in tokens.

        Raises:
            DataError: if there is not even one.
        """
        flat = np.memmap(self.folder / f"{domain}.{split}.bin", dtype=self.meta.dtype, mode="r")
        num = len(flat) // sequence_length
        if num == 0:
            raise DataError(
                f"domain {domain!r}: {len(flat)} {split} tokens are less than one sequence of {sequence_length}; "
                "give it more text, or a smaller pretrain.sequence_length"
            )
        return flat[: num * sequence_length].reshape(num, sequence_length)

    def valid(self, domain: str, *, sequence_length: int, max_sequences: int) -> Ints:
        """Held-out sequences [n, L], int64, n at most `max_sequences`, spread evenly over the domain: always the same.

        Raises:
            DataError: if there is not even one.
        """
        every = self.sequences(domain, "valid", sequence_length)
        # Not the first ones: files are often in the order of source or date.
        picked = np.linspace(0, len(every) - 1, num=min(max_sequences, len(every))).astype(np.int64)
        return every[picked].astype(np.int64)

    def valid_mix(
        self, mix: Mapping[str, float], *, sequence_length: int, num_sequences: int, num_needed: int | None = None
    ) -> Ints:
        """Held-out sequences of several domains, each its share [n, L], int64, domain by domain: always the same.

        n is `num_sequences` but for rounding, as each domain has one at least. Where the text of a domain is shorter
        than its share, there are fewer of all: the shares are those of the mix.

        Args:
            mix: domain -> share, summing to 1.
            sequence_length: L, in tokens.
            num_sequences: that are asked for.
            num_needed: of them; where there are fewer, it is warned of. None: all.

        Raises:
            DataError: if there is not even one of a domain.
        """
        there = {name: len(self.sequences(name, "valid", sequence_length)) for name in mix}
        shortest = min(mix, key=lambda name: there[name] / mix[name])
        num = min(float(num_sequences), there[shortest] / mix[shortest])
        needed = num_sequences if num_needed is None else num_needed
        if num < min(needed, sum(there.values())):  # Some are there and left out.
            text = "%d held-out sequences in place of %d: domain %r has %d, and all are to have their shares"
            logger.warning(text, num, needed, shortest, there[shortest])
        parts = [
            self.valid(name, sequence_length=sequence_length, max_sequences=max(1, round(share * num)))
            for name, share in sorted(mix.items())
        ]
        return np.concatenate(parts)

    def batches(
        self, mix: Mapping[str, float], *, sequence_length: int, seed: int, begin: Begin | None = None
    ) -> Batches:
        """Training batches of this mix.

        Args:
            mix: domain -> weight, of any sum; none that is not 0 makes less than one sequence in CYCLE.
            sequence_length: L, in tokens.
            seed: of the order.
            begin: from where on; None: from the beginning.

        Raises:
            DataError: if a domain has too little text, or too small a weight.
        """
        return Batches(self, mix, sequence_length=sequence_length, seed=seed, begin=begin or Begin(0, {}))


class Begin(NamedTuple):
    """Where an order of batches begins."""

    num_sequences: int
    """Of this very order, that are left out."""
    num_read: Mapping[str, int]
    """Domain -> sequences of it that were read in other orders, of other mixes: it goes on behind them."""


class Batches:
    """Endless training batches; every sequence of a domain comes once per epoch of that domain, in a new order.

    Sequence i of the order is a function of the folder, the mix, the seed, where it begins and i alone: whoever resumes
    asks for the step, and reads nothing of those before. A domain's own order does not depend on the others of a mix.
    """

    def __init__(
        self, tokens: Tokens, mix: Mapping[str, float], *, sequence_length: int, seed: int, begin: Begin
    ) -> None:
        self._seed, self._first = seed, begin.num_sequences
        self._names = sorted(mix)
        # Plain arrays of what is mapped: whatever is picked of a memmap is one again, at several times the cost.
        self._data = [np.asarray(tokens.sequences(name, "train", sequence_length)) for name in self._names]
        self._num_read = [begin.num_read.get(name, 0) for name in self._names]
        shares = np.array([mix[name] for name in self._names])
        self._slots = _slots(shares)
        for name, share, num in zip(self._names, shares / shares.sum(), self._slots, strict=True):
            if num == 0 and share > 0:
                raise DataError(
                    f"mix: domain {name!r} has a share of {share:.2g}, less than one sequence in {CYCLE}; "
                    "give it a larger weight, or leave it out"
                )
        # Those that a batch may lie in at once.
        self._order = lru_cache(maxsize=2 * len(self._names))(self._permutation)

    def batch(self, step: int, num_sequences: int) -> Ints:
        """Sequences [num_sequences, L] of batch `step`, counted from 0, int64; in any order of steps."""
        index = self._first + step * num_sequences + np.arange(num_sequences)
        domain, nth = self._places_of(index)
        if len(self._names) == 1:
            return self._sequences(0, nth)
        batch = np.empty((num_sequences, self._data[0].shape[1]), np.int64)
        for which in np.unique(domain).tolist():
            here = domain == which
            batch[here] = self._sequences(which, nth[here])
        return batch

    def _sequences(self, which: int, nth: Ints) -> Ints:
        """Of one domain those that are read as its `nth`, which rise: [n, L], int64."""
        data = self._data[which]
        epoch, position = np.divmod(nth, len(data))
        # A batch may lie in two epochs of a domain.
        order = [self._order(which, each)[position[epoch == each]] for each in range(epoch[0], epoch[-1] + 1)]
        return np.asarray(data[np.concatenate(order)].astype(np.int64))

    def domains(self, step: int, num_sequences: int) -> Ints:
        """The domain of each sequence of `batch`, by its place among the mix's names in order: [num_sequences]."""
        return self._places_of(self._first + step * num_sequences + np.arange(num_sequences))[0]

    def _places_of(self, index: Ints) -> tuple[Ints, Ints]:
        """Of each place of the order: its domain, and which sequence of all that are read of that domain it is."""
        if len(self._names) == 1:
            return np.zeros_like(index), self._num_read[0] + index
        cycles, places = np.divmod(index, CYCLE)
        domain, nth = np.empty_like(index), np.empty_like(index)
        for cycle in np.unique(cycles).tolist():
            here = cycles == cycle
            own, before = self._cycle(cycle)
            domain[here], nth[here] = own[places[here]], before[places[here]]
        # Earlier orders, whole cycles, then this one.
        nth += np.array(self._num_read)[domain] + cycles * self._slots[domain]
        return domain, nth

    @cached_property
    def _cycles(self) -> dict[int, tuple[Ints, Ints]]:
        return {}

    def _cycle(self, cycle: int) -> tuple[Ints, Ints]:
        """For each place of a cycle: its domain, and how many places of that domain come before."""
        if cycle not in self._cycles:
            domain = _places(self._slots, seed=self._seed, cycle=cycle)
            before = np.zeros_like(domain)
            for which in range(len(self._slots)):
                here = domain == which
                before[here] = np.arange(here.sum())
            self._cycles.clear()  # Steps are asked for in order: only the last cycle is needed again.
            self._cycles[cycle] = (domain, before)
        return self._cycles[cycle]

    def _permutation(self, which: int, epoch: int) -> Ints:
        # 2 keeps the key apart from that of `_places`, and the name one domain's order from another's.
        draw = np.random.default_rng([self._seed, 2, epoch, *self._names[which].encode()])
        return draw.permutation(len(self._data[which]))


def num_read(mix: Mapping[str, float], num_sequences: int, *, seed: int) -> dict[str, int]:
    """How many of the first `num_sequences` training sequences of a mix are of each domain; no text is read.

    Args:
        mix: domain -> weight, of any sum.
        num_sequences: counted from the beginning of the order.
        seed: of the order.

    >>> num_read({"books": 1, "wiki": 3}, 4 * CYCLE, seed=0)
    {'books': 1000, 'wiki': 3000}
    """
    names = sorted(mix)
    slots = _slots(np.array([mix[name] for name in names]))
    cycles, rest = divmod(num_sequences, CYCLE)
    last = np.bincount(_places(slots, seed=seed, cycle=cycles)[:rest], minlength=len(names))
    return {name: int(num) for name, num in zip(names, cycles * slots + last, strict=True)}


def _slots(shares: npt.NDArray[np.float64]) -> Ints:
    """Sequences of each domain in a cycle [domains], which sum to CYCLE: rounded edges, not rounded shares."""
    edges: Ints = np.round(np.cumsum(shares) / shares.sum() * CYCLE).astype(np.int64)
    return np.diff(edges, prepend=0)


def _places(slots: Ints, *, seed: int, cycle: int) -> Ints:
    """The domain of each place of a cycle, [CYCLE]: `slots` of each, in an order of its own for each cycle."""
    draw = np.random.default_rng([seed, 1, cycle])
    return draw.permutation(np.repeat(np.arange(len(slots)), slots))
