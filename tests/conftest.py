"""Tiny real things that the tests share."""

import os
from pathlib import Path

import pytest
from hypothesis import settings
from tiny import GRAMMAR, TINY, tokens_of

# One thread a process: the tests' own processes share two cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from raysweep.data.pcfg import PCFG
from raysweep.space import load
from raysweep.store import Store
from raysweep.variants import SearchSpace

# How long an example takes tells of the machine, not of what is tested.
settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")


@pytest.fixture
def grammar() -> PCFG:
    """A small grammar."""
    return GRAMMAR


@pytest.fixture
def tokens_dir(grammar: PCFG, tmp_path: Path) -> Path:
    """The tokens folder of `grammar`."""
    return tokens_of(grammar, tmp_path / "tokens")


@pytest.fixture
def sweep_file(tmp_path: Path):
    """Writes a sweep file, by default the tiny one, and gives its path."""

    def write(text: str = TINY, **replaced: str) -> Path:
        for old, new in replaced.items():
            text = text.replace(f"{old}:", f"{new}:")
        path = tmp_path / "tiny.yaml"
        path.write_text(text)
        return path

    return write


@pytest.fixture
def tiny_space(sweep_file) -> SearchSpace:
    """The tiny sweep, loaded."""
    return load(sweep_file())


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """An empty store."""
    return Store(tmp_path / "store")
