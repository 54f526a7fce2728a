"""What the READMEs show is true: sweeps and pieces of them load without a warning, commands and links exist."""

import json
import re
from pathlib import Path

import pytest
from tiny_models import build
from tokenizers import ByteLevelBPETokenizer
from transformers import PreTrainedTokenizerFast

from raysweep.cli import _parser
from raysweep.document import read_yaml
from raysweep.space import load
from raysweep.variants import SearchSpace

ROOT = Path(__file__).parents[2]
PAGES = [
    ROOT / folder / "README.md"
    for folder in ("", "search_spaces", "cluster", "raysweep/analysis", "raysweep/curvature")
]
README, REFERENCE = (page.read_text() for page in PAGES[:2])
BLOCK = re.compile(r"^```yaml\n(.*?)^```", re.S | re.M)
(SWEEP,) = BLOCK.findall(README)
PIECES = BLOCK.findall(REFERENCE)

MEASURES = re.findall(
    r"^\| `(\w+: \{.*\})` \| ", README.partition("### What is measured")[2].partition("\n## ")[0], re.M
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """What the examples' paths name; each test writes a sweep file of its own beside it."""
    folder = tmp_path_factory.mktemp("readme")
    for name in ("wiki", "books"):
        (folder / name).mkdir()
    import gzip

    with gzip.open(folder / "wiki" / "a.jsonl.gz", "wt") as file:
        for index in range(300):
            file.write(json.dumps({"text": f"page {index} " + "some words " * 500}) + "\n")
    for index in range(300):
        (folder / "books" / f"{index}.txt").write_text(f"book {index}\n" + "many words of a book\n" * 200)
    for split in ("train", "test"):
        rows = [{"question": f"{split} {index}?", "choices": ["a", "b"], "answer": index % 2} for index in range(200)]
        (folder / f"arc.{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))
        rows = [{"question": f"{split} {index}?", "answers": ["a"], "context": "b"} for index in range(200)]
        (folder / f"rag.{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))
        rows = [{"text": f"{split} {index}", "label": index % 2} for index in range(200)]
        (folder / f"sort.{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (folder / "other.jsonl").write_text((folder / "arc.test.jsonl").read_text().replace("test", "other"))
    (folder / "wiki.txt").write_text("some words\n" * 5000)
    save_model(folder / "model")
    for name in ("model-a", "model-b"):
        (folder / name).symlink_to(folder / "model")
    return folder


def save_model(folder: Path) -> None:
    """A Hugging Face checkpoint that takes the example's sequences."""
    build("gpt2", vocab=300, positions=1024).save_pretrained(folder)
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(["many words of a book"], 300, special_tokens=["<e>"])
    PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, eos_token="<e>").save_pretrained(folder)


def test_the_sweep_loads_and_trains_to_the_end(folder):
    (folder / "my-sweep.yaml").write_text(SWEEP)
    space = load(folder / "my-sweep.yaml")
    assert space.warnings == ()
    assert space.declared.pretrain.checkpoint_steps == (3815, 7630)
    assert len(list(space.points())) == 6


def with_piece(piece: str) -> dict:
    """The README's sweep without its axes, with the sections of a piece in place of its own; a recipe's and those of
    fine-tuning setting by setting."""
    (sweep, _), (sections, _) = read_yaml(SWEEP, str), read_yaml(piece, str)
    recipe = sections.get("pretrain", {})
    if "from" in recipe:
        sweep["pretrain"] = {}
    for name in ["model"] if "start" in recipe else ["tokens", "checkpoints"] if "phases" in recipe else []:
        del sweep["pretrain"][name]
    merged = {name: sweep[name] | sections.get(name, {}) for name in ("pretrain", "sft")}
    return sweep | {"sweep": {}} | sections | merged


def load_piece(folder: Path, piece: str) -> SearchSpace:
    (folder / "my-sweep.yaml").write_text(json.dumps(with_piece(piece)))
    return load(folder / "my-sweep.yaml")


@pytest.mark.parametrize("piece", PIECES)
def test_each_piece_of_the_reference_loads(folder, piece):
    assert load_piece(folder, piece).warnings == ()


def test_the_pieces_are_found():
    assert len(PIECES) >= 24


@pytest.mark.parametrize("section", [line for line in MEASURES if "..." not in line and "lm_eval" not in line])
def test_each_measure_is_a_section(folder, section):
    name = section.partition(":")[0]
    kept = "\n".join(line for line in SWEEP.splitlines() if not line.startswith(f"{name}:"))
    (folder / "my-sweep.yaml").write_text(f"{kept}\n{section}\n")
    given = []
    if name == "probes":  # Of tasks with classes, which the example has none of.
        files = "train: sort.train.jsonl, test: sort.test.jsonl"
        given = [f"sft.tasks.sort={{form: classification, {files}, max_train_examples: 5000}}"]
    assert getattr(load(folder / "my-sweep.yaml", given).declared, name) is not None


def test_measures_are_found_in_the_table():
    assert len(MEASURES) >= 14


def test_the_phases_are_some(folder):
    (piece,) = (piece for piece in PIECES if "phases: [" in piece)
    space = load_piece(folder, piece)
    assert [phase.name for phase in space.declared.pretrain.phases] == ["trunk", "decay"]


def test_each_command_exists():
    shown = set(re.findall(r"^raysweep (\w+) ", README, re.M))
    (commands,) = [action.choices for action in _parser()._actions if action.metavar == "COMMAND"]
    assert shown == set(commands)
    assert set(re.findall(r"^raysweep (\w+) ", "\n".join(page.read_text() for page in PAGES), re.M)) == shown


def anchors(page: Path) -> set[str]:
    """Those of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", re.sub(r"^```.*?^```", "", page.read_text(), flags=re.S | re.M), re.M)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.parent.name)
def test_each_link_leads_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if "://" not in target:
            path, _, anchor = target.partition("#")
            leads_to = (page.parent / path).resolve() if path else page
            assert leads_to.exists(), target
            assert not anchor or anchor in anchors(leads_to), target
