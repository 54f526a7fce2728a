"""Which vocabulary a checkpoint's tokens are of: what is measured by token compares within one alone."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterable
from pathlib import Path

from raysweep.data.tokenizers import VOCABULARY_FILES
from raysweep.errors import LostError
from raysweep.record import Record
from raysweep.store import Store

logger = logging.getLogger(__name__)

FOLDERS = {"tokenize": "tokenizer/", "fetch": ""}
"""Kind of stage -> where its files have the tokenizer by which a checkpoint reads."""


def vocabularies_of(store: Store, records: Iterable[Record]) -> dict[str, str]:
    """Id of a stage with a tokenizer -> its vocabulary, as `8192 tokens (0a1b2c3d4e5f)`.

    By the tokens and their ids, as files of one vocabulary may differ in what else they say. Of equal files one is
    read.
    """
    read: dict[str, str] = {}
    found = {}
    for record in records:
        for name in (f"{FOLDERS[record.kind]}{each}" for each in VOCABULARY_FILES if record.kind in FOLDERS):
            if name in record.files:
                digest = str(record.files[name]["sha256"])
                if digest not in read:
                    read[digest] = _vocabulary(store, record.id, name) or digest[:12]
                found[record.id] = read[digest]
                break
    return found


def _vocabulary(store: Store, stage_id: str, name: str) -> str | None:
    """None where the file is lost, or is of another kind than those of fast tokenizers."""
    try:
        return vocabulary_of(store.file(stage_id, name))
    except LostError as error:
        logger.warning("%s", error)
    except (ValueError, TypeError, KeyError, AttributeError):  # Another format: told from others by its bytes.
        pass
    return None


def vocabulary_of(path: Path) -> str:
    """Of a `tokenizer.json`. Raises ValueError, TypeError, KeyError or AttributeError if it is none."""
    document = json.loads(path.read_text(encoding="utf-8"))
    vocabulary = document["model"]["vocab"]
    if isinstance(vocabulary, list):  # Of a unigram model: (token, its score), in the order of ids.
        vocabulary = {token: place for place, (token, _) in enumerate(vocabulary)}
    whole = vocabulary | {each["content"]: each["id"] for each in document.get("added_tokens", [])}
    digest = hashlib.sha256(json.dumps(sorted(whole.items())).encode()).hexdigest()
    return f"{len(whole)} tokens ({digest[:12]})"
