"""What objectives share that train otherwise than another one, and are compared by its loss."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

import numpy as np
from pydantic import Field

from raysweep.objectives.base import Arrays, Floats, Ints, ObjectiveSpec, Specials
from raysweep.objectives.causal_lm import CausalLM
from raysweep.objectives.heads import Head
from raysweep.objectives.masked_lm import MaskedLM

if TYPE_CHECKING:
    from raysweep.objectives.optimum import LabelledLaw, Law, TabledLaw


class OfAnother(ObjectiveSpec):
    """An objective that has its rows, and what is measured, from `of`; how it trains on them a member says."""

    of: Annotated[CausalLM | MaskedLM, Field(discriminator="name")] = CausalLM()
    """The objective whose rows it trains on, and whose loss is measured."""

    reads_labels: ClassVar[bool] = True

    @abstractmethod
    def from_law(self, law: LabelledLaw, ids: Ints, rows: Arrays) -> Arrays:
        """See `ObjectiveSpec.from_law`."""

    @property
    def head(self) -> Head:  # type: ignore[override]
        """That of `of`."""
        return self.of.head

    @property
    def measured(self) -> CausalLM | MaskedLM:
        """`of`: all that train otherwise than it are compared by its loss."""
        return self.of

    def extra_tokens(self) -> tuple[str, ...]:
        """Those of `of`."""
        return self.of.extra_tokens()

    def input_length(self, sequence_length: int) -> int:
        """That of `of`."""
        return self.of.input_length(sequence_length)

    def mean_predicted(self, sequence_length: int) -> float:
        """That of `of`."""
        return self.of.mean_predicted(sequence_length)

    def prepare(self, ids: Ints, draw: np.random.Generator, specials: Specials) -> Arrays:
        """The rows of `of`, whose labels say where something is predicted."""
        return self.of.prepare(ids, draw, specials)

    def num_predicted(self, batch: Mapping[str, Any]) -> int:
        """That of `of`."""
        return self.of.num_predicted(batch)

    def conditionals(self, law: TabledLaw, ids: Ints, rows: Arrays) -> Floats | None:
        """Those of `of`."""
        return self.of.conditionals(law, ids, rows)

    @property
    def has_optimum(self) -> bool:
        """That of `of`."""
        return self.of.has_optimum

    def optimal_losses(self, law: Law, ids: Ints, rows: Arrays, specials: Specials) -> Floats:
        """Those of `of`."""
        return self.of.optimal_losses(law, ids, rows, specials)
