"""Prediction of hidden tokens from all that is left (BERT: Devlin et al., 2019)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal, final

import numpy as np
from pydantic import Field

from raysweep.objectives.base import IGNORED, MASK, Arrays, Floats, Ints, MaskedObjective, Specials

if TYPE_CHECKING:
    from raysweep.objectives.optimum import TabledLaw

# Of hidden tokens, by BERT: the part that is masked, and, up to here, that or another word; the rest stay.
MASKED, MASKED_OR_REPLACED = 0.8, 0.9


@final
class MaskedLM(MaskedObjective):
    """Some tokens of a sequence are hidden, and each is predicted in its place: -sum over them of log p(x_t | visible).

    Places are drawn without replacement, each as likely, so that every row hides as many. Special tokens of the text,
    such as the end of a document, are read and never hidden.
    """

    name: Literal["masked_lm"]
    """Which objective."""
    mask: Annotated[float, Field(gt=0, lt=1)] | Literal["one"] = 0.15
    """The part of a sequence's tokens that is hidden, rounded to whole ones, at least one; or one: a single one."""
    replacement: Literal["mask", "80/10/10"] = "mask"
    """What stands where a token is hidden: always a mask; or a mask in 80 % of places, a random token in 10 %, and in
    10 % the token itself, as in BERT."""

    def predicts(self) -> str:
        """Hidden tokens, how many and what stands there, in words; see `ObjectiveSpec.predicts`."""
        hidden = "one token" if self.mask == "one" else f"{self.mask:.3g} of the tokens"
        how = "" if self.replacement == "mask" else f" ({self.replacement})"
        return f"{hidden} of a sequence, hidden{how}, from all that is left"

    def extra_tokens(self) -> tuple[str, ...]:
        """The mask; of a tokenizer that has one, its own."""
        return (MASK,)

    def input_length(self, sequence_length: int) -> int:
        """As many: what is hidden stays in its place."""
        return sequence_length

    def mean_predicted(self, sequence_length: int) -> float:
        """`mask` times L, rounded to whole tokens, at least one: exact, as every row hides as many."""
        return float(self._num_hidden(np.array(sequence_length)))

    def prepare(self, ids: Ints, draw: np.random.Generator, specials: Specials) -> Arrays:
        """The text with masks, or with BERT's replacements, and the hidden tokens as labels.

        Args:
            ids: [n, L]; places of `specials.reserved` are never hidden, so a row of these alone has no label.
            draw: of the places, and of what stands there.
            specials: the mask, and the words that may stand for a hidden one.

        Returns:
            input_ids and labels, [n, L].

        >>> specials = Specials({MASK: 50}, num_text_tokens=50, reserved=(0, 50))
        >>> half = MaskedLM(name="masked_lm", mask=0.5)
        >>> rows = half.prepare(np.array([[0, 7, 8, 9, 6]]), np.random.default_rng(0), specials)
        >>> rows["input_ids"], rows["labels"]
        (array([[ 0,  7, 50, 50,  6]]), array([[-100, -100,    8,    9, -100]]))
        """
        is_text = ~specials.is_reserved[ids]
        # Ranks of random numbers: the first so many places of a random order, of those that may be hidden.
        # Reserved ones get 1.0, above any number drawn, so they come last.
        numbers = np.where(is_text, draw.random(ids.shape), 1.0)
        if self.mask == "one":  # The same place, without two sorts.
            is_hidden = (np.arange(ids.shape[1]) == numbers.argmin(axis=1)[:, None]) & is_text
        else:
            order = numbers.argsort(axis=1).argsort(axis=1)
            is_hidden = (order < self._num_hidden(is_text.sum(axis=1))[:, None]) & is_text
        labels = np.where(is_hidden, ids, IGNORED)
        if self.replacement == "mask":
            return {"input_ids": np.where(is_hidden, specials[MASK], ids), "labels": labels}
        # Drawn at every place, hidden or not: the numbers of a row do not hang on what others hide.
        chance = draw.random(ids.shape)
        others = specials.words[draw.integers(len(specials.words), size=ids.shape)]
        shown = np.where(chance < MASKED, specials[MASK], np.where(chance < MASKED_OR_REPLACED, others, ids))
        return {"input_ids": np.where(is_hidden, shown, ids), "labels": labels}

    def conditionals(self, law: TabledLaw, ids: Ints, rows: Arrays) -> Floats | None:
        """p(token | what is visible), of a hidden token as of any; see `ObjectiveSpec.conditionals`."""
        if not self.has_optimum:
            return None
        return law.token_probabilities(ids, seen="around", hidden=rows["labels"] != IGNORED)

    @property
    def has_optimum(self) -> bool:
        """Not with 80/10/10: which of the other tokens to doubt would have to be summed over."""
        return self.replacement == "mask"

    def _num_hidden(self, num_text: Ints) -> Ints:
        """Of rows with so many tokens of text [n]."""
        if self.mask == "one":
            return np.minimum(num_text, 1)
        return np.minimum(num_text, np.maximum(np.round(self.mask * num_text).astype(np.int64), 1))
