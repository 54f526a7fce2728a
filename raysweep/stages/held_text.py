"""Held-out text that measurements of a checkpoint's own loss read: the same rows for all models of one mix."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from raysweep.costs import Size
from raysweep.data.packing import Tokens
from raysweep.objectives.base import Arrays
from raysweep.objectives.families import Objective
from raysweep.spec import Spec
from raysweep.stages.base import Subject
from raysweep.stages.heldout import DRAW
from raysweep.stages.specials import checkpoint_specials
from raysweep.train.evaluate import BATCH

POOL = 4
"""Times as many sequences as are read are drawn from, so that draws have mostly different ones."""


class HeldText(Spec):
    """Sequences of all domains, each its share, and the objective that makes rows of them."""

    loss: Objective
    """Whose loss is measured."""
    mix: dict[str, float]
    """Domain to its share of the sequences."""
    sequence_length: int
    """Tokens of a sequence of text."""

    @staticmethod
    def of(subject: Subject) -> HeldText:
        """That of a pretraining, and its objective without what that adds for training alone."""
        return HeldText(
            loss=subject.objective.measured, mix=subject.corpus.mix, sequence_length=subject.sequence_length
        )

    @property
    def input_length(self) -> int:
        """Tokens of a row that the model reads."""
        return self.loss.input_length(self.sequence_length)

    def batch_bytes(self, size: Size, num_sequences: int) -> int:
        """One layer's activations and the logits of a batch that is only read, of so many sequences, in 32 bits."""
        tokens = min(BATCH, num_sequences) * self.input_length
        return tokens * (size.forward_bytes + 4 * size.vocab_size)

    def rows(self, tokens: Path, checkpoint: Path, *, num_sequences: int, draw: int = 0) -> Arrays:
        """What the objective makes of at most `num_sequences` sequences, in an order that is as good as random.

        Args:
            tokens: a tokens folder.
            checkpoint: whose tokenizer has the objective's own tokens.
            num_sequences: of all domains; fewer where one has not its share.
            draw: another one gives other sequences, as far as there are so many, and other draws of the objective.

        Raises:
            DataError: if a domain has no sequence, or the tokenizer lacks a token.
        """
        there = Tokens(tokens).valid_mix(
            self.mix,
            sequence_length=self.sequence_length,
            num_sequences=POOL * num_sequences,
            num_needed=num_sequences,
        )
        # Shuffled, so that each part of the rows is a draw from the mix.
        text = there[np.random.default_rng([DRAW, draw, 1]).permutation(len(there))[:num_sequences]]
        return self.loss.prepare(
            text, np.random.default_rng([DRAW, draw, 2]), checkpoint_specials(checkpoint, self.loss)
        )
