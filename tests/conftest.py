"""Tiny real things that the tests share."""

import gzip
import itertools
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import settings
from tiny import GRAMMAR, LONGER, TINY, results_of, tokens_of

# One thread a process: the tests' own processes share two cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from raysweep.data.pcfg import PCFG
from raysweep.runs import Run
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
def small_pack(tmp_path: Path) -> Path:
    """The first rows of each file of the data pack: else a short sweep is at all of them for most of its time."""
    whole, pack = Path(os.environ["RAYSWEEP_DATA"]), tmp_path / "pack"
    for path in whole.glob("*/*.jsonl.gz"):
        (copy := pack / path.relative_to(whole)).parent.mkdir(parents=True, exist_ok=True)
        with gzip.open(path, "rt") as rows, gzip.open(copy, "wt") as few:
            few.writelines(itertools.islice(rows, 20 if path.parent.name == "pretrain" else 100))
    return pack


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """An empty store."""
    return Store(tmp_path / "store")


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory) -> dict[str, object]:
    """What `LONGER` gives on Ray where nothing happens to it; run once."""
    home = tmp_path_factory.mktemp("undisturbed")
    (home / "tiny.yaml").write_text(LONGER)
    command = [sys.executable, "-m", "raysweep", "run", str(home / "tiny.yaml"), "--store", str(home / "store")]
    ended = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, timeout=240)
    assert ended.returncode == 0, ended.stderr[-5000:]
    return results_of(Run.all(Store(home / "store"))[0])
