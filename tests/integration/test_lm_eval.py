"""Tasks of lm-evaluation-harness as indicators: found with the sweep file, and scored as the harness scores them."""

import importlib.metadata
import json
import math
import random
import shutil

import pytest
from tiny import NOTES

from raysweep.data.tokenizers import load_tokenizer
from raysweep.errors import RaysweepError
from raysweep.results import Results
from raysweep.runners import run_sweep
from raysweep.space import load
from raysweep.train.checkpoints import load_model
from raysweep.worker import Worker

SWEEP = (
    NOTES
    + """\
lm_eval:
  tasks:
    places: {task: tasks/places.yaml, limit: 20}
    shots: {task: tasks/places.yaml, num_fewshot: 2}
    said: {task: tasks/said.yaml, limit: 3}
"""
)
PLACES = r"""
include: common.yaml
task: places_of_animals
dataset_kwargs: {data_files: {train: ../data/train.jsonl, test: ../data/test*.jsonl}}
doc_to_text: "Question: {{question}}\nAnswer:"
doc_to_target: !function utils.right
doc_to_choice: choices
"""
COMMON = """
dataset_path: json
output_type: multiple_choice
training_split: train
test_split: test
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
  - {metric: brier_score, aggregation: brier_score, higher_is_better: false}
"""
UTILS = """
def right(doc):
    return doc["answer"]
"""
SAID = r"""
task: said
dataset_path: json
dataset_kwargs: {data_files: {test: ../data/test.jsonl}}
output_type: generate_until
test_split: test
doc_to_text: "Question: {{question}}\nAnswer:"
doc_to_target: "{{choices[answer]}}"
generation_kwargs: {until: ["\n"], max_gen_toks: 4}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
filter_list:
  - {name: strict, filter: [{function: take_first}]}
"""


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "notes.txt").write_text("the cat sat on the mat in the old barn " * 60)
    (tmp_path / "tasks").mkdir()
    (tmp_path / "data").mkdir()
    for name, text in {"places.yaml": PLACES, "common.yaml": COMMON, "said.yaml": SAID, "utils.py": UTILS}.items():
        (tmp_path / "tasks" / name).write_text(text)
    for name, num in (("train", 8), ("test", 24)):
        lines = [
            {"question": f"where is the cat {name} {n}?", "choices": ["barn", "mat", "the old mat"], "answer": n % 3}
            for n in range(num)
        ]
        (tmp_path / "data" / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return tmp_path


def stages_of(path):
    return {stage.task: stage for stage in load(path).trial({}, 0).stages if stage.kind == "lm_eval"}


def test_without_the_extra_a_line_says_so(folder, sweep_file, monkeypatch):
    def not_there(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", not_there)
    with pytest.raises(RaysweepError, match=r"lm_eval\.tasks\.places: .*run: pip install 'raysweep\[lm-eval\]'"):
        load(sweep_file(SWEEP))


def test_scores_are_the_harnesss_own(folder, sweep_file, store):
    harness = pytest.importorskip("lm_eval", reason="lm_eval is not installed")
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    run = run_sweep(load(sweep_file(SWEEP)), store, runner="inline")
    [row] = Results(run).checkpoints.to_dict("records")
    checkpoint = store.folder(row["checkpoint"])
    model = HFLM(pretrained=load_model(checkpoint).eval(), tokenizer=load_tokenizer(checkpoint), batch_size=8)
    for name, task, given, scores in (
        ("places", "places_of_animals", {"limit": 20}, ("acc", "brier_score")),
        ("shots", "places_of_animals", {"num_fewshot": 2}, ("acc", "brier_score")),
        ("said", "said", {"limit": 3}, ("exact_match",)),
    ):
        # As its own users call it, from the folder of the task, whose paths it takes for the process's.
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(folder / "tasks")
            patch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)  # It asks the hub about the model.
            manager = TaskManager(include_path=str(folder / "tasks"), include_defaults=False)
            report = harness.simple_evaluate(model, tasks=[task], task_manager=manager, **given)
        for score in scores:
            kept = "strict" if name == "said" else "none"
            column = f"lm_eval/{name}/{score}" + ("_strict" if name == "said" else "")
            assert row[column] == pytest.approx(report["results"][task][f"{score},{kept}"], abs=1e-6)
            stderr = report["results"][task][f"{score}_stderr,{kept}"]
            assert row.get(f"{column}_stderr", math.nan) == pytest.approx(
                math.nan if stderr == "N/A" else stderr, nan_ok=True
            )
        assert row[f"lm_eval/{name}/num_cut"] == 0
    directions = {column.name: column.metric.direction for column in run.columns()}
    assert directions["lm_eval/shots/acc"] == "max"
    assert directions["lm_eval/shots/brier_score"] == "min"
    assert directions["lm_eval/shots/acc_stderr"] is None
    stages = stages_of(sweep_file(SWEEP))
    for stage in stages.values():
        record = store.get(stage.id)
        assert record.provenance["wall_seconds"] > 0
        assert (store.folder(stage.id) / "harness.json").is_file()
    # Of a checkpoint that exists positions are known when it is there.
    spec = stages["said"].spec
    said = spec.tasks["said"]
    longer = spec.with_(tasks={"said": said.with_(pinned=said.pinned.with_(max_new_tokens=2048))})
    with pytest.raises(RaysweepError, match=r"answers may have 2,048 tokens, and the model has 2,048 positions"):
        longer.run({"checkpoint": checkpoint}, folder, Worker())
    # A file that is not as it was is not read.
    (folder / "tasks" / "utils.py").write_text(UTILS + "\n")
    with pytest.raises(RaysweepError, match=r"utils\.py: was changed since the sweep was loaded"):
        stages["places"].spec.run({"checkpoint": checkpoint}, folder, Worker())


def test_what_a_task_draws_is_the_same_in_each_process(folder, sweep_file, store):
    pytest.importorskip("lm_eval", reason="lm_eval is not installed")
    (folder / "tasks" / "utils.py").write_text(
        UTILS
        + """

def shuffled(docs):
    import random

    return docs.map(lambda doc: doc | {"choices": random.sample(doc["choices"], k=3)})
"""
    )
    text = (folder / "tasks" / "places.yaml").read_text()
    (folder / "tasks" / "places.yaml").write_text(text + "process_docs: !function utils.shuffled\n")
    run = run_sweep(load(sweep_file(SWEEP)), store, runner="inline")
    [row] = Results(run).checkpoints.to_dict("records")
    spec = stages_of(sweep_file(SWEEP))["places"].spec
    random.seed(7)
    before = random.getstate()
    again = spec.run({"checkpoint": store.folder(row["checkpoint"])}, folder, Worker())
    assert random.getstate() == before
    for name in ("acc", "brier_score"):
        assert again[name] == row[f"lm_eval/places/{name}"]


def test_each_task_has_an_id_by_its_bytes_and_its_datas(folder, sweep_file):
    pytest.importorskip("lm_eval", reason="lm_eval is not installed")
    # Its functions import modules beside theirs, which import others.
    (folder / "tasks" / "more" / "inner").mkdir(parents=True)
    modules = {
        "utils": f"import json\nfrom helpers import pick\n{UTILS}",
        "helpers": "def pick():\n    from more.deep import deep\n",
        "more/__init__": "",
        "more/deep": "from more.other import one\nfrom .third import one\nfrom . import fourth\n",
        "more/other": "",
        "more/third": "",
        "more/fourth": "from .inner import one\n",
        "more/inner/__init__": "from ..fifth import one\n",
        "more/fifth": "",
    }
    for name, text in {**modules, "unused": "", "third": "", "more/unused": ""}.items():
        (folder / "tasks" / f"{name}.py").write_text(text)
    first = stages_of(sweep_file(SWEEP))
    assert first["places"].id != first["shots"].id
    paths = ("tasks/places.yaml", "tasks/common.yaml", "data/test.jsonl")
    for path in (*paths, *(f"tasks/{name}.py" for name in modules)):
        text = (folder / path).read_text()
        (folder / path).write_text(text + "\n")
        then = stages_of(sweep_file(SWEEP))
        assert then["places"].id != first["places"].id, path
        # The other task has files of its own.
        assert (then["said"].id == first["said"].id) == (path != "data/test.jsonl")
        (folder / path).write_text(text)
    for unused in ("unused", "third", "more/unused"):
        (folder / "tasks" / f"{unused}.py").write_text("unused = 1")
    assert stages_of(sweep_file(SWEEP)) == first
    # A further task leaves the others as they are, and where files lie is no part of a result.
    for name in ("tasks", "data"):
        shutil.copytree(folder / name, folder / "elsewhere" / name)
    moved = SWEEP.replace("task: tasks", "task: elsewhere/tasks") + "    again: {task: tasks/said.yaml}\n"
    more = stages_of(sweep_file(moved))
    assert {name: more[name].id for name in first} == {name: stage.id for name, stage in first.items()}


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("tasks/said.yaml", "tasks/sad.yaml", r"lm_eval\.tasks\.said: no file 'tasks/sad\.yaml' \(looked for .*sad"),
        ("said: {task: tasks/said.yaml, ", "gsm8kk: {", r"lm_eval 0\.\S+ has no task 'gsm8kk', did you mean 'gsm8k'"),
        ("said: {task: tasks/said.yaml, ", "mmlu: {", "'mmlu' is a group of tasks in lm_eval; name its tasks"),
        ("said: {task: tasks/said.yaml, ", "humaneval: {", "humaneval: it runs code that models write"),
        ("name: llama, ", "name: bert, ", "lm_eval needs a causal model, and masked_lm trains a masked one"),
    ],
)
def test_what_is_wrong_is_told_before_anything_runs(folder, sweep_file, old, new, words):
    pytest.importorskip("lm_eval", reason="lm_eval is not installed")
    assert old in SWEEP
    text = SWEEP.replace(old, new)
    if "bert" in new:
        text = text.replace("  optimizer:", "  objective: {name: masked_lm}\n  optimizer:")
    with pytest.raises(RaysweepError, match=words):
        load(sweep_file(text))


@pytest.mark.parametrize(
    ("file", "text", "words"),
    [
        ("said.yaml", "task: [1, 2", r"said\.yaml: no YAML: "),
        ("said.yaml", "task: a\ncustom_dataset: !function utils.made", r"said\.yaml: its data come from a function"),
        (
            "said.yaml",
            "task: a\nmetric_list: [{metric: acuracy}]",
            r"said\.yaml: metric 'acuracy' is none of lm_eval's",
        ),
        ("said.yaml", SAID.replace("toks: 4", "toks: 2048"), r"said: answers may have 2,048 tokens, and .* 2,048 pos"),
        ("utils.py", "def right(:", r"utils\.py: no Python: invalid syntax"),
        ("said.yaml", "hello", r"said\.yaml: holds no mapping"),
        ("said.yaml", "output_type: multiple_choice", r"said\.yaml: lm_eval finds no task in it"),
        ("said.yaml", "include: said.yaml\ntask: a", r"said\.yaml includes itself"),
        ("said.yaml", "include: no.yaml\ntask: a", r"no\.yaml: cannot be read \(No such file"),
        ("said.yaml", SAID.replace("test.jsonl", "tests.jsonl"), r"no file matches '\.\./data/tests\.jsonl'"),
        ("said.yaml", SAID.replace("dataset_kwargs", "metadata"), "dataset_path json needs dataset_kwargs"),
        ("said.yaml", SAID.replace("path: json", "path: ../data"), r"dataset_path '\.\./data' is a folder"),
    ],
)
def test_what_is_wrong_with_a_task_is_told_before_anything_runs(folder, sweep_file, file, text, words):
    pytest.importorskip("lm_eval", reason="lm_eval is not installed")
    (folder / "tasks" / file).write_text(text)
    with pytest.raises(RaysweepError, match=words):
        load(sweep_file(SWEEP))
