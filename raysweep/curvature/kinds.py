"""The models whose symmetries are known here, by the names of their classes. Imports nothing heavy, for a plan."""

from __future__ import annotations

import re
from typing import Literal

Kind = Literal["llama", "gpt2", "bert"]

# Not all that look alike: Gemma's norms multiply by one more than their weight, others turn parts of a head alone.
_CLASSES: dict[str, Kind] = {
    "Llama": "llama",
    "Mistral": "llama",
    "Qwen2": "llama",
    "GPT2": "gpt2",
    "Bert": "bert",
    "Roberta": "bert",
    "Electra": "bert",
}
KNOWN = ", ".join(_CLASSES)


def kind_of(architecture: str) -> Kind | None:
    """Of which kind a class of transformers is; None: its symmetries are not known.

    >>> kind_of("Qwen2ForCausalLM"), kind_of("GPT2LMHeadModel"), kind_of("GemmaForCausalLM")
    ('llama', 'gpt2', None)
    """
    found = re.fullmatch(r"([A-Z]\w*?)(For\w+|LMHeadModel)", architecture)
    return _CLASSES.get(found[1]) if found else None
