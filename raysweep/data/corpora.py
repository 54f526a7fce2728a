"""What is pretrained on. To add a corpus: a `CorpusSpec` in a file of its own, and its name in `Corpus`."""

from pathlib import Path
from typing import Annotated

from pydantic import Field, TypeAdapter

from raysweep.data.base import LAW
from raysweep.data.brackets import Brackets
from raysweep.data.hmm import HMM
from raysweep.data.pcfg import PCFG
from raysweep.data.sampled import Sampled
from raysweep.data.text import Text
from raysweep.objectives.base import ObjectiveSpec
from raysweep.objectives.optimum import Law

Corpus = Annotated[PCFG | HMM | Brackets | Text | Sampled, Field(discriminator="name")]


def read_law(tokens: Path, objective: ObjectiveSpec) -> Law | None:
    """The true law of the rows of a tokens folder; None if nobody knows it, or not what an objective asks of it.

    Args:
        tokens: whatever corpus it is of: that is read from LAW in it.
        objective: whose lowest loss is wanted; see `CorpusSpec.knows_optimum`.
    """
    if not (path := tokens / LAW).is_file():
        return None
    corpus: Corpus = TypeAdapter(Corpus).validate_json(path.read_bytes())
    return corpus.law(tokens) if corpus.knows_optimum(objective) else None
