"""What is pretrained on. To add a corpus: a spec with `pin`, `source` and `build`, and its name in the last line."""

from typing import Annotated

from pydantic import Field

from raysweep.data.hmm import HMM
from raysweep.data.pcfg import PCFG
from raysweep.data.text import Text

Corpus = Annotated[PCFG | HMM | Text, Field(discriminator="name")]
