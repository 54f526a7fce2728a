"""The README's examples are true: its sweep loads without a warning, its searches too, its commands exist."""

import json
import re
from pathlib import Path

import pytest

from raysweep.cli import _parser
from raysweep.space import load

README = (Path(__file__).parents[2] / "README.md").read_text()
SWEEP, PHASES, SEARCHES = (re.sub(r"^  ", "", block, flags=re.M) if block.startswith("  ") else block
                   for block in re.findall(r"^ *```yaml\n(.*?)^ *```", README, re.S | re.M))  # fmt: skip

MEASURES = re.findall(
    r"^\| `(\w+: \{.*\})` \| ", README.partition("### What is measured")[2].partition("\n## ")[0], re.M
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """What the example's paths name."""
    for name in ("wiki", "books"):
        (tmp_path / name).mkdir()
    import gzip

    with gzip.open(tmp_path / "wiki" / "a.jsonl.gz", "wt") as file:
        for index in range(300):
            file.write(json.dumps({"text": f"page {index} " + "some words " * 500}) + "\n")
    for index in range(300):
        (tmp_path / "books" / f"{index}.txt").write_text(f"book {index}\n" + "many words of a book\n" * 200)
    for split in ("train", "test"):
        rows = [{"question": f"{split} {index}?", "choices": ["a", "b"], "answer": index % 2} for index in range(200)]
        (tmp_path / f"arc.{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return tmp_path


def test_the_sweep_loads_and_trains_to_the_end(folder):
    (folder / "my-sweep.yaml").write_text(SWEEP)
    space = load(folder / "my-sweep.yaml")
    assert space.warnings == ()
    assert space.declared.pretrain.checkpoint_steps == (3815, 7630)
    assert len(list(space.points())) == 6


@pytest.mark.parametrize("search", [line for line in SEARCHES.splitlines() if line.strip()])
def test_each_search_is_one(folder, search):
    text = SWEEP
    if "optuna" in search or "random" in search:
        text = text.replace("{grid: [3e-4, 1e-3, 3e-3]}", "{loguniform: [3e-4, 3e-3]}")
    (folder / "my-sweep.yaml").write_text(text + search + "\n")
    load(folder / "my-sweep.yaml")


@pytest.mark.parametrize("section", [line for line in MEASURES if "..." not in line and "lm_eval" not in line])
def test_each_measure_is_a_section(folder, section):
    (folder / "wiki.txt").write_text("some words\n" * 5000)
    name = section.partition(":")[0]
    kept = "\n".join(line for line in SWEEP.splitlines() if not line.startswith(f"{name}:"))
    (folder / "my-sweep.yaml").write_text(f"{kept}\n{section}\n")
    given = []
    if name == "probes":  # Of tasks with classes, which the example has none of.
        for split in ("train", "test"):
            lines = [json.dumps({"text": f"{split} {index}", "label": index % 2}) for index in range(200)]
            (folder / f"sort.{split}.jsonl").write_text("\n".join(lines))
        files = "train: sort.train.jsonl, test: sort.test.jsonl"
        given = [f"sft.tasks.sort={{form: classification, {files}, max_train_examples: 5000}}"]
    assert getattr(load(folder / "my-sweep.yaml", given).declared, name) is not None


def test_measures_are_found_in_the_table():
    assert len(MEASURES) >= 14


def test_the_phases_are_some(folder):
    (folder / "my-sweep.yaml").write_text(
        SWEEP.replace("  checkpoints: [0.5, 1.0]", f"  {PHASES.strip()}  #").replace("  tokens: 2_000_000_000\n", "")
    )
    space = load(folder / "my-sweep.yaml")
    assert [phase.name for phase in space.declared.pretrain.phases] == ["trunk", "decay"]


def test_each_command_exists():
    shown = set(re.findall(r"^raysweep (\w+) ", README, re.M))
    (commands,) = [action.choices for action in _parser()._actions if action.metavar == "COMMAND"]
    assert shown == set(commands)
