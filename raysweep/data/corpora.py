"""What is pretrained on. To add a corpus: a `CorpusSpec` in a file of its own, and its name in `Corpus`."""

from pathlib import Path
from typing import Annotated

from pydantic import Field, TypeAdapter

from raysweep.data.exact import LAW, ExactCorpus
from raysweep.data.hmm import HMM
from raysweep.data.pcfg import PCFG
from raysweep.data.text import Text

Corpus = Annotated[PCFG | HMM | Text, Field(discriminator="name")]


def read_law(tokens: Path) -> ExactCorpus | None:
    """The true law of the rows of a tokens folder; None if nobody knows it."""
    if not (path := tokens / LAW).is_file():
        return None
    corpus = TypeAdapter[Corpus](Corpus).validate_json(path.read_bytes())
    assert isinstance(corpus, ExactCorpus), corpus.name
    return corpus
