"""Whatever stands in a sweep file, a data file, a journal or a record: raysweep loads it, or says why not.

`RAYSWEEP_FUZZ=100000 python -m pytest tests/unit/test_fuzz.py` tries so many inputs in all, others each time, and not
the 1,000 of every run.
"""

import contextlib
import copy
import json
import os
import re
import shutil
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from ruamel.yaml import YAML
from shipped import FOLDER
from tiny import TINY
from tiny_models import build
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from raysweep.analysis.terminal import format_terminal
from raysweep.data.packing import TokensMeta
from raysweep.data.text import Domain
from raysweep.errors import RaysweepError
from raysweep.estimates import estimate
from raysweep.lease import Holder, Lease, Pace
from raysweep.mirror import Mirror
from raysweep.record import Record, _checksum
from raysweep.remote import Remote
from raysweep.results import Results
from raysweep.runners.journal import trial_row
from raysweep.runs import Run, status
from raysweep.space import load
from raysweep.spec import canonical
from raysweep.store import Store
from raysweep.tasks.multiple_choice import MultipleChoice
from raysweep.tasks.qa import QA
from raysweep.weights import check_files

NUM_CASES = int(os.environ.get("RAYSWEEP_FUZZ", "1000"))
if "RAYSWEEP_FUZZ" in os.environ:
    pytestmark = pytest.mark.timeout(0)  # Hours, where many are asked for.


def cases(share: float) -> settings:
    """The same inputs in every run, so that a change fails by its own doing; others where more are asked for."""
    return settings(
        max_examples=max(1, round(share * NUM_CASES)),
        derandomize="RAYSWEEP_FUZZ" not in os.environ,
        suppress_health_check=list(HealthCheck),
    )


TEXT = """\
name: text
pretrain:
  data: {name: text, domains: {a: {train: a.jsonl, valid: b.txt}}, mix: {a: 1}, tokenizer: {name: bpe}}
  model: {name: llama, hidden_size: 16, num_heads: 2}
  optimizer: {name: sgd, lr: 1e-2}
  schedule: {name: wsd, warmup: 0.1}
  tokens: 480
  batch_sequences: 4
  sequence_length: 16
  checkpoints: [0.5, "400 tokens", 1.0]
sweep:
  pretrain.optimizer: {choice: {a: {name: sgd, lr: 1}, b: {name: adamw, lr: 1}}}
  pretrain.batch_sequences: {randint: [2, 4]}
  size: {zip: {pretrain.model.hidden_size: {s: 16, l: 32}, pretrain.model.num_heads: [2, 4]}}
flatness: {shape: {num_steps: 4}, own_samples: 4}
indicators: {}
sft:
  tasks:
    quiz: {form: multiple_choice, train: quiz.jsonl, test: quiz.test.jsonl}
    ask: {form: qa, train: ask.jsonl, test: ask.test.jsonl}
  lrs: auto
resources: {workers: 2, zero_stage: 2}
search: {name: optuna, num_trials: 3, objectives: [{metric: sft/mean_score, mode: max}]}
seeds: [3]
"""
LANGUAGE = """\
name: language
pretrain:
  data: {name: hmm, vocabulary: 16, num_states: 4, sentence_length: 8, num_train_sentences: 400,
         num_valid_sentences: 40}
  model: {name: llama, hidden_size: 16, num_layers: 1, num_heads: 2}
  optimizer: {name: adamw, lr: 1e-2}
  objective: {name: mixture, objectives: {next: {name: causal_lm}, prefix: {name: prefix_lm}},
              mix: {next: 1, prefix: 1}}
  flat: {name: sam, rho: 0.05}
  batch_sequences: 8
  sequence_length: 9
  phases:
    - {name: trunk, steps: 8, checkpoints: [4]}
    - {name: decay, steps: 4, flat: {name: label_noise, probability: 0.1}, optimizer_state: fresh,
       optimizer: {name: muon, lr: 1e-2}, schedule: {name: wsd, decay: 1.0}, objective: {name: causal_lm}}
sweep:
  pretrain.phases.decay.optimizer.lr: {grid: {low: 1e-3, high: 1e-2}}
  pretrain.flat: {grid: {none: null, ema: {name: ema, decay: 0.9}, lawa: {name: lawa, num: 2, every: 2}}}
flatness: {parts: true, rescaled: own}
noise: {}
quantization: {bits: [4]}
updates: {}
gradient_noise: {}
features: {}
curve: {}
span_loss: {}
probes: {num_labels: [8, 16], num_draws: 2, layers: [0]}
early_sft: {lr: 3e-3, hyperparameters: {epochs: 1, max_examples: 8}}
enlarge: {model: {name: llama, hidden_size: 32, num_layers: 2, num_heads: 4}}
sft:
  tasks:
    state: {form: hmm_state, position: 2, num_train: 60, num_valid: 20, num_test: 20}
    other: {form: hmm_state, position: 4, num_train: 60, num_valid: 20, num_test: 20, max_labels: 2}
  methods: {full: {name: full}, lora: {name: lora, r: 2}}
  families: {both: [state, other]}
  lrs: {full: [1e-3, 1e-2], lora: auto}
  seeds: [0, 1]
  forgetting: true
resources:
  by: pretrain.phases.decay.optimizer.lr
  default: {max_concurrent: 1}
  high: {workers: 2, zero_stage: 1, fine_tuning: wide}
search: {scheduler: {name: asha, metric: heldout/ppl, mode: min}}
replicates: {seeds: [1], of: {pretrain.phases.decay.optimizer.lr: [low]}}
"""
MIXED = """\
name: mixed
pretrain:
  data: {name: text, domains: {a: {train: a.jsonl, valid: b.txt, tag: <|a|>}, b: {train: b.txt, valid: b.txt}},
         mix: {a: 0.5, b: 0.5}, later_tags: [<|b|>], tokenizer: {name: bpe, vocab_size: 300}}
  model: {name: llama, hidden_size: 16, num_layers: 1, num_heads: 2}
  optimizer: {name: adamw, lr: 1e-2}
  batch_sequences: 4
  sequence_length: 16
  phases: [{name: trunk, steps: 4}, {name: end, steps: 2, data: {mix: {a: 1.0, b: 0.0}}}]
agreement: {}
other_text: {texts: {b: {files: b.txt}}, objective: {name: causal_lm}}
indicators: {kshot: 1, kshot_by_task: {ask: 2}, max_examples: 4}
sft:
  tasks:
    quiz: {form: multiple_choice, train: quiz.jsonl, test: quiz.test.jsonl}
    ask: {form: qa, train: ask.jsonl, test: ask.test.jsonl, max_new_tokens: 2, max_length: 32}
  mixtures: {all: [quiz, ask]}
  likelihood: true
  lrs: [1e-3]
"""
HARNESS = """\
lm_eval:
  tasks: {quiz: {task: quiz.yaml, limit: 4}, shots: {task: quiz.yaml, num_fewshot: 1}}
"""
HARNESS_TASK = """\
task: a_quiz
dataset_path: json
dataset_kwargs: {data_files: {train: quiz.jsonl, test: quiz.test.jsonl}}
output_type: multiple_choice
training_split: train
test_split: test
doc_to_text: "{{question}}"
doc_to_target: answer
doc_to_choice: choices
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
"""


@cache
def parsed(text: str) -> Any:
    return YAML(typ="safe", pure=True).load(text)


def shipped(path: Path) -> str:
    """A shipped sweep, with two values of each axis and files of the fuzz's own: seconds less to load."""
    plain = copy.deepcopy(parsed(path.read_text()))
    for axis in plain.get("sweep", {}).values():
        for how, values in axis.items():
            axis[how] = {name: two(column) for name, column in values.items()} if how == "zip" else two(values)
    plain.pop("replicates", None)  # Of values that may be left out.
    text = json.dumps(plain).replace("${RAYSWEEP_TEACHER}", "teacher")
    text = re.sub(r"\$\{RAYSWEEP_DATA\}/pretrain/[^\"]*", "long.jsonl", text)
    return re.sub(r"\$\{RAYSWEEP_DATA\}/[^\"]*?(\.test)?\.jsonl\.gz", r"every\1.jsonl", text)


def two(values: object) -> object:
    """The first ones of an axis, named or not."""
    if isinstance(values, dict):
        return dict(list(values.items())[:2])
    return values[:2] if isinstance(values, list) else values


SWEEPS = [TINY, TEXT, LANGUAGE, MIXED, MIXED + HARNESS]
if "RAYSWEEP_FUZZ" in os.environ:  # Less often each, as they take longer.
    SWEEPS = [*SWEEPS * 4, *map(shipped, sorted(FOLDER.glob("*.yaml")))]
QUIZ = [{"question": f"fox {i}", "choices": ["dog", "fox"], "answer": i % 2} for i in range(30)]
ASK = [{"question": f"fox {i}", "answers": ["dog", "fox"], "context": "so"} for i in range(30)]
DOCUMENTS = [{"text": f"some words of text, line {i}"} for i in range(30)]
# For shipped sweeps, which ask for more of each, and for tasks of all forms.
LONG = [{"text": f"some words of a text, number {i}. " * 20} for i in range(30)]
EVERY = [{"question": f"hen {i}", "text": f"hen {i}", "label": "ab"[i % 2], "answers": ["a"]} for i in range(2700)]
EVERY = [QUIZ[i % 2] | line for i, line in enumerate(EVERY)]

TOKENS = [
    *"{}[]:,-#&*!|>'\"%@`?~\n\t \0\x07\x1b\x85\u2028\ufeff",
    *(
        "<<: *x",
        "&x ",
        "*x",
        "!!omap ",
        "!!python/none ",
        "!!binary ",
        "!!int ",
        "---\n",
        "...\n",
        "%YAML 1.1\n",
        "? ",
        ": ",
    ),
    *("0x", "1e999", "-.inf", ".nan", "1" * 5000, "[" * 500, "{a: " * 50, "2020-01-01", "null", "on", "0o7", "1_000"),
    *('"\\ud800"', '"\\0"', "${HOME}", "${NO_SUCH}", "../", "/", "~", "a" * 300, "[/]", "pretrain.", "seeds: [1, 1]\n"),
]
SCALARS = st.one_of(
    st.sampled_from([None, True, False, 0, -1, 1, 2, 7, 10**4, 2**31, 2**62, 0.0, -0.5, 0.5, 1.0, 1e-300, 1e300]),
    st.sampled_from(
        [float("inf"), float("nan"), "", " ", "a", "auto", "1e9 tokens", "\ud800", "\0", "../x", "a/b", "[/]"]
    ),
    st.sampled_from(
        ["pretrain.from", "pretrain.optimizer.lr", "sft/mean_score", "${NO_SUCH}", "*.txt", "b.txt", "pcfg"]
    ),
    st.integers(),
    st.floats(),
    st.text(max_size=20),
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)


@st.composite
def spliced(draw, text: str) -> str:
    """A text with pieces cut out, doubled, and put in."""
    for _ in range(draw(st.integers(1, 4))):
        start = draw(st.integers(0, len(text)))
        stop = min(len(text), start + draw(st.integers(0, 30)))
        piece = draw(st.sampled_from(TOKENS) | st.text(max_size=10) | st.just(text[start:stop] * 2))
        text = text[:start] + piece + text[stop:]
    return text


def places(value, place=()):
    """Of all values below, but for the whole."""
    pairs = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in pairs:
        yield (*place, key)
        yield from places(inner, (*place, key))


@st.composite
def changed(draw, value):
    """A JSON document with some of its values replaced, added or left out."""
    value = copy.deepcopy(value)
    for _ in range(draw(st.integers(1, 3))):
        if not value:
            break
        *parents, key = draw(st.sampled_from(list(places(value))))
        inner = value
        for part in parents:
            inner = inner[part]
        what = draw(st.sampled_from(["replace", "replace", "replace", "leave out", "add", "swap"]))
        if what == "leave out":
            del inner[key]
        elif what == "add" and isinstance(inner, dict):
            inner[draw(st.text(max_size=10) | st.sampled_from(["from", "name", "form", "seed", "tokens", "steps"]))] = (
                draw(VALUES)
            )
        else:
            inner[key] = draw(VALUES)
    return value


def sweep_texts(text: str):
    return spliced(text) | changed(parsed(text)).map(lambda data: json.dumps(data)) | st.binary(max_size=60)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("fuzz")
    lines_of = {"a": DOCUMENTS, "long": LONG, "quiz": QUIZ, "ask": ASK, "every": EVERY}
    lines_of |= {f"{name}.test": lines_of[name][:9] for name in ("quiz", "ask", "every")}
    for name, lines in lines_of.items():
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, lines)))
    (folder / "quiz.yaml").write_text(HARNESS_TASK)
    words = {"<s>": 0} | {f"w{index}": index for index in range(1, 23)}
    tokenizer = Tokenizer(WordLevel(words, unk_token="<s>"))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>").save_pretrained(folder / "teacher")
    build("llama").save_pretrained(folder / "teacher")
    (folder / "b.txt").write_text("Some words. " * 40)
    return folder


@contextlib.contextmanager
def in_its_own_words():
    """Lets a RaysweepError pass that says something, and can be printed."""
    try:
        yield
    except RaysweepError as error:
        said = str(error)
    else:
        return
    assert said.encode()


@pytest.fixture(scope="module")
def tiny(folder):
    return load(written(folder / "tiny.yaml", TINY))


def written(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8", "surrogatepass"))
    return path


@pytest.mark.parametrize("text", dict.fromkeys(SWEEPS), ids=lambda text: parsed(text)["name"])
def test_what_is_altered_is_valid(text, folder):
    if "lm_eval" in text:
        pytest.importorskip("lm_eval", reason="lm_eval is not installed")
    estimate(load(written(folder / "x.yaml", text)), Store(folder / "store"), mfu=0.4, peak_flops=1e15)


@cases(0.4)
@given(st.data())
def test_sweep_files(folder, data):
    path = written(folder / "x.yaml", data.draw(st.sampled_from(SWEEPS).flatmap(sweep_texts)))
    with in_its_own_words():
        estimate(load(path), Store(folder / "store"), mfu=0.4, peak_flops=1e15)


@cases(0.1)
@given(st.data())
def test_overrides(folder, data):
    text = data.draw(st.sampled_from(SWEEPS))
    keys = [".".join(map(str, place)) for place in places(parsed(text))]
    key = st.sampled_from(keys).flatmap(lambda key: st.just(key) | spliced(key))
    value = VALUES.map(json.dumps) | st.sampled_from(["{grid: [1]}", "{zip: {a: [1]}}", "[1, 2]"]).flatmap(spliced)
    given = data.draw(st.lists(st.tuples(key, value).map("=".join), min_size=1, max_size=3))
    with in_its_own_words():
        space = load(written(folder / "x.yaml", text), given)
        assert load(written(folder / "y.yaml", space.text)).run_name() == space.run_name()


DEEP = ["[" * 20_000, '{"a":' * 20_000, '{"text": ' + "1" * 5000 + "}"]
KINDS = {"quiz": (MultipleChoice, QUIZ), "ask": (QA, ASK), "texts": (Domain, DOCUMENTS)}


@cases(0.25)
@given(st.data())
def test_task_files(folder, data):
    kind, lines = KINDS[data.draw(st.sampled_from(sorted(KINDS)))]
    text = "\n".join(map(json.dumps, lines[:4]))
    line = changed(lines[0]).map(lambda line: json.dumps(line) + "\n" + text)
    content = data.draw(line | spliced(text) | st.binary(max_size=60) | st.sampled_from(DEEP))
    name = written(folder / f"x.{data.draw(st.sampled_from(['jsonl', 'jsonl.gz', 'txt']))}", content).name
    given = {"train": name, "valid": name} if kind is Domain else {"train": name, "test": name}
    form = {MultipleChoice: {"form": "multiple_choice"}, QA: {"form": "qa"}}.get(kind, {})
    with in_its_own_words():
        pinned = kind(**form, **given).pin(folder)
        if kind is Domain:
            pinned.most_tokens("train", 10**6)
        else:
            pinned.examples("train"), pinned.chance()


@cases(0.1)
@given(st.data())
def test_journals(folder, tiny, data):
    store, identity = Store(folder / "store"), tiny.identity()
    shutil.rmtree(store.root / "runs" / "fuzz", ignore_errors=True)
    run = Run.create(store, "fuzz", sweep_text=TINY, identity=identity)
    trial = json.loads(json.dumps(trial_row(tiny.trial({}, 0)), default=vars))
    failure = {"stage": "sft-1", "kind": "sft", "trial": "t", "cause": "c", "attempts": 1, "log": "l"}
    documents = {"trials.jsonl": trial, "failures/sft-1.json": failure, "pruned.json": {"trial-1": 6}}
    documents |= {"identity.json": json.loads(identity), "planned.json": {"num_trials": 2, "stages": {"sft": 3}}}
    name = data.draw(st.sampled_from(list(documents)))
    text = json.dumps(documents[name])
    (run.folder / "failures").mkdir(exist_ok=True)
    written(
        run.folder / name, data.draw(changed(documents[name]).map(json.dumps) | spliced(text) | st.binary(max_size=60))
    )
    with in_its_own_words():
        status(run)
        Run.create(store, "fuzz", sweep_text=TINY, identity=identity)
        run.add_failure("sft-1", kind="sft", trial="t", cause="c", log="l")
        run.add_pruned("trial-2", 6)
        run.start_attempt()


def sealed(document: object) -> str:
    """A record's text with a checksum that fits, as whoever can write to a store can make one."""
    if not isinstance(document, dict):
        return json.dumps(document)
    body = {key: value for key, value in document.items() if key != "checksum"}
    with contextlib.suppress(UnicodeEncodeError):
        body["checksum"] = _checksum(body)
    return json.dumps(body)


@pytest.fixture(scope="module")
def finished(folder, tiny) -> tuple[Run, list[dict]]:
    """A run whose stages all have a record, and these as JSON values."""
    run = Run.create(Store(folder / "finished"), "fuzz", sweep_text=TINY, identity=tiny.identity())
    run.note_columns(tiny.columns())
    known = {"started": "2026-11-26T08:00:00", "wall_seconds": 1.0, "peak_memory_bytes": 2**20, "world_size": 1}
    known |= {"device": "cpu", "host": "h", "git_commit": None, "versions": {"torch": "2"}}
    records = []
    for point in tiny.points():
        trial = tiny.trial(point, 0)
        run.add_trial(trial_row(trial))
        for stage in trial.stages:
            metrics = {metric.name: 0.5 for metric in stage.spec.metrics(tiny.declared.pretrain.data)}
            metrics |= {"score": 0.5, "valid_score": 0.5} if stage.kind == "sft" else {}
            record = Record(
                stage.id, stage.kind, "done", canonical(stage.spec), dict(stage.inputs), metrics, known, files={}
            )
            with run.store.claim(stage.id):
                run.store.commit(record, run.store.work_dir(stage.id))
            records.append(json.loads(record.to_json()))
    return run, records


@cases(0.03)
@given(st.data())
def test_records(finished, data):
    run, records = finished
    document = data.draw(st.sampled_from(records))
    text = json.dumps(document)
    forged = changed(document).map(sealed)
    content = data.draw(forged | forged | changed(document).map(json.dumps) | spliced(text) | st.binary(max_size=60))
    path = run.store.root / "stages" / document["id"] / "record.json"
    path.parent.mkdir(exist_ok=True)
    written(path, content)
    try:
        with in_its_own_words():
            status(run)
            results = Results(run)
            format_terminal(results.ranking)
            results.ranking.to_dict()
    finally:
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)


@cases(0.1)
@given(st.data())
def test_manifests(folder, data):
    """What tells of a run's copy, of a token folder, of a checkpoint's files, and of who holds a run."""
    alike = {"trials.jsonl": ["stamp", 10, 20], "failures/sft-1.json": [None, 1, 2]}
    meta = {"num_train": {"all": 10}, "num_valid": {"all": 5}, "dtype": "uint16", "vocab_size": 16}
    index = {"metadata": {"total_size": 4}, "weight_map": {"a": "model.safetensors"}}
    note = {"host": "h", "pid": 1, "lock": "l", "holds": True, "beat": 1, "taken_from": ["a"]}
    name, document = data.draw(
        st.sampled_from([("alike", alike), ("meta.json", meta), ("x.safetensors.index.json", index), ("note", note)])
    )
    content = data.draw(changed(document).map(json.dumps) | spliced(json.dumps(document)) | st.binary(max_size=60))
    place = folder / "manifests"
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir()
    path = written(place / name, content)
    if name == "meta.json":
        with contextlib.suppress(ValueError):  # What its reader says it raises.
            TokensMeta.read(place)
        return
    with in_its_own_words():
        if name == "alike":
            remote = Remote(f"local://{folder}/url")
            remote.write("runs/r/trials.jsonl", b"{}")
            target = place / "runs" / "r"
            target.mkdir(parents=True)
            path.rename(target / ".mirror.json")
            mirror = Mirror(remote, place, "runs/r")
            mirror.pull()
            mirror.push()
        elif name == "note":
            remote = Remote(f"local://{folder}/held")
            remote.write("n/other", path.read_bytes())
            holder = Holder("here", 2, "mine")
            pace = Pace(beat_seconds=0.004, expiry_seconds=0.004)
            with Lease(remote, "n", holder, what="it", pace=pace, renewed=lambda: None, lost=lambda who: None):
                pass
        else:
            check_files(place, [path])
