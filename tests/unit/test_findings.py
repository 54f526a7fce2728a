"""What is said of a sweep file that is wrong: in plain words, with its line, all at once, and before anything runs."""

import gzip
import json

import pytest
from tiny import TINY

from raysweep.declared import MAX_TRIALS
from raysweep.document import MAX_DEPTH, MAX_VALUES, read_document
from raysweep.errors import DataError, SpaceError
from raysweep.space import load

BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{new}: &{new} [{', '.join([f'*{old}'] * 9)}]\n" for old, new in zip("abcdefgh", "bcdefghi", strict=True)
)
TEXT = """\
name: text
pretrain:
  data:
    name: text
    domains:
      a: {train: a.jsonl, valid: b.txt}
      b: {train: b.txt, valid: b.txt}
  model: {name: llama, hidden_size: 16, num_layers: 1, num_heads: 2}
  optimizer: {name: adamw, lr: 1e-2}
  steps: 4
  batch_sequences: 4
  sequence_length: 16
sweep:
  pretrain.optimizer.lr: {grid: [1e-2, 3e-3]}
sft:
  tasks:
    quiz: {form: multiple_choice, train: quiz.jsonl, test: quiz.jsonl}
"""


@pytest.fixture
def folder(tmp_path):
    """A valid text sweep's data."""
    (tmp_path / "a.jsonl").write_text('{"text": "Some words of text."}\n' * 400)
    (tmp_path / "b.txt").write_text("A plain text. " * 40)
    lines = [{"question": f"fox {i}", "choices": ["dog", "fox"], "answer": i % 2} for i in range(24)]
    (tmp_path / "quiz.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return tmp_path


def findings(path, kind: type[Exception] = SpaceError) -> list[str]:
    with pytest.raises(kind) as caught:
        load(path)
    return str(caught.value).splitlines()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (BOMB, f"more than {MAX_VALUES:,} values"),
        ("a: " + "[" * 3000 + "]" * 3000, f"x.yaml:1: not valid YAML: nested deeper than {MAX_DEPTH} levels"),
        ("seeds: [" + ",".join(map(str, range(100_000))) + "]", "bytes; a sweep file names data"),
        ("seeds: [" + "1," * (MAX_VALUES + 1) + "]", f"more than {MAX_VALUES:,} values"),
        ("a: &a {b: *a}", "by an alias"),
        ("x: &x {a: 1}\ny:\n  <<: *x\n", "x.yaml:3: y: merge keys (<<)"),
        ("a: !!omap [x: 1]", "x.yaml:1: a: the tag !!omap is not read here"),
        ("a: !!python/object:os.system x", "the tag !!python/object:os.system"),
        ("a:\n  {b: 1}: 2", "x.yaml:2: a: a key is a text"),
        ("a: " + "1" * 5000, "x.yaml:1: a: a number of 5,000 characters is too large"),
        ("a: 18446744073709551616", "too large"),
        ("a: !!int word", "'word' is no number"),
        ('a: "\\ud800"', "x.yaml:1: a: holds half of a surrogate pair"),
        ('a: "b\\0c"', "x.yaml:1: a: holds a NUL character"),
        ("a: b\0c", "x.yaml:1: not valid YAML: a control character, U+0000"),
        ("a:\n\tb: 1", "x.yaml:2: not valid YAML: a tab; indent with spaces"),
        (b"a: 1\nb: \xff", "x.yaml:2: not UTF-8 (byte 3 of the line); save the file as UTF-8"),
        ("a: 1\nb: 2\na: 3", "x.yaml:3: a: duplicate key, first on line 1"),
        ("a: 1\n---\nb: 2", "a second document"),
        ("%YAML 1.1\n---\na: on", "a directive"),
        ("", "this is empty"),
        ("- a", "this is a list"),
        ("word", "this is a single value"),
    ],
)
def test_yaml_that_is_no_sweep_file(tmp_path, text, words):
    path = tmp_path / "x.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(SpaceError) as caught:
        read_document(path)
    assert words in str(caught.value)


def test_yaml_as_a_person_writes_it(tmp_path):
    (tmp_path / "x.yaml").write_bytes(
        b"\xef\xbb\xbfa: 1e-3\nb: on\nc: 1_000\nd: &d [~, true, 0x10]\ne: *d\n2: 2020-01-01\n"
    )
    data = read_document(tmp_path / "x.yaml").data
    assert data == {"a": 0.001, "b": "on", "c": 1000, "d": [None, True, 16], "e": [None, True, 16], "2": "2020-01-01"}


@pytest.mark.parametrize(
    ("old", "new", "line"),
    [
        ("name: tiny", "name: [1]", "1: name: must be a text, not the list [1]"),
        ("name: tiny", "name: a b", "1: name: sweep name 'a b': use up to 64 letters"),
        ("steps: 12\n", "steps: many\n", '7: pretrain.steps: must be a whole number, not the text "many"'),
        ("steps: 12\n", "steps: 1.5\n", "7: pretrain.steps: must be a whole number, not 1.5"),
        ("steps: 12\n", "steps: 1e3\n", "7: pretrain.steps: must be a whole number, not 1000.0; write 1000"),
        ("  steps: 12\n", "", "2: pretrain: steps or tokens is missing"),
        ("lr: 1e-2}", "lr: 0}", "6: pretrain.optimizer.lr: must be above 0, not 0"),
        ("lr: 1e-2}", "lr: .inf}", "6: pretrain.optimizer.lr: must be a finite number, not Infinity"),
        ("lr: 1e-2}", "lr: 1, betas: [0.9]}", "6: pretrain.optimizer.betas: holds 1 value(s), and needs more"),
        ("lr: 1e-2}", "lr: 1, betas: [0.9, 0, 0]}", "6: pretrain.optimizer.betas: holds 3 values; at most 2"),
        ("lr: 1e-2}", "lr: 1, betas: [0.9, 2]}", "6: pretrain.optimizer.betas.1: must be below 1, not 2"),
        (
            "batch_sequences: 8\n",
            "batch_sequences: 999_999_999\n",
            "batch_sequences 999,999,999 of sequence_length 5 are 4,999,999,995 tokens a step; at most 2,147,483,648",
        ),
        (
            "name: tiny",
            "name: tiny\nprobes: {num_labels: [8, 500]}",
            "2: probes.num_labels: 500 labels: task span has 40 training examples; raise its num_train, or lower it",
        ),
        (
            "name: tiny",
            "name: tiny\nprobes: {num_labels: [8], layers: [1, 2]}",
            "2: probes.layers: 2: the model has 1 blocks; layers are 0 to 1",
        ),
        (
            "vocabulary: 16",
            "vocabulary: 2_000_000",
            "3: pretrain.data.vocabulary: must be at most 1,000,000, not 2000000",
        ),
        ("lrs: [1e-3, 1e-2]", "seeds: [a]", '18: sft.seeds.0: must be a whole number, not the text "a"'),
        ("lrs: [1e-3, 1e-2]", "seeds: []", "18: sft.seeds: is empty; at least 1 belongs there"),
        ("{name: adamw, lr", "{lr", "6: pretrain.optimizer: name is missing; there are: adamw, sgd"),
        (
            "{name: adamw, lr: 1e-2}",
            "null",
            "6: pretrain.optimizer: must be a mapping (key: value), not null (nothing)",
        ),
        ("{grid: [1e-2, 3e-3]}", "{grid: 3}", "12: sweep.pretrain.optimizer.lr.grid: must be a list or a mapping"),
        (
            "{grid: [1e-2, 3e-3]}",
            "{grid: [[2]]}",
            "grid.0: must be a text, a number, true or false, not the list [2]",
        ),
        ("optimizer.lr: {grid: [1e-2, 3e-3]}", "from: {grid: [a]}", "12: sweep.pretrain.from: pretrain is a recipe"),
        ("optimizer.lr: {grid: [1e-2, 3e-3]}", "steps: {grid: [12, 3]}", "steps.grid.1: pretrain: checkpoints: step 6"),
        ("{grid: [1e-2, 3e-3]}", "{grad: [1]}", "12: sweep.pretrain.optimizer.lr: an axis is one of: grid: [...]"),
        ("pretrain:\n", "pretrain: 3\nx:\n", "2: pretrain: must be a mapping (key: value), not 3"),
        ("pretrain:\n", "pretrain: {from: a, dta: 1}\nx:\n", "2: pretrain.dta: no field 'dta', did you mean 'data'"),
        ("  lrs: [1e-3, 1e-2]", "  linear_probe: on", '18: sft.linear_probe: must be true or false, not the text "on"'),
        (
            "name: tiny",
            "name: tiny\nresources: {zero_stage: 7}",
            "2: resources.zero_stage: must be 0, 1, 2, 3 or auto, not 7",
        ),
        ("name: tiny", "name: tiny\nsearch: {name: gird}", "2: search.name: must be grid, random or optuna"),
        (
            "form: pcfg_span, span: 2",
            "form: qa, train: null, test: [1]",
            "17: sft.tasks.span.train: must be a text or a list",
        ),
        (
            "form: pcfg_span, span: 2",
            "form: qa, train: [], test: [1]",
            "17: sft.tasks.span.test.0: must be a text, not 1",
        ),
    ],
)
def test_plain_words(sweep_file, old, new, line):
    assert old in TINY
    found = findings(sweep_file(TINY.replace(old, new)))
    assert any(line in each for each in found), found
    assert not any(
        word in each for each in found for word in ("tuple[", "nullable", "pretrain.recipe", "dict[", "Input", "valid ")
    )


def test_a_sweep_that_multiplies_beyond_reason(sweep_file):
    axes = "".join(f"  pretrain.optimizer.{name}: {{grid: {list(range(1, 201))}}}\n" for name in ("lr", "eps"))
    text = TINY.replace("  pretrain.optimizer.lr: {grid: [1e-2, 3e-3]}\n", axes)
    (line,) = findings(sweep_file(text))
    assert line.startswith("tiny.yaml:11: sweep: pretrain.optimizer.lr 200 x pretrain.optimizer.eps 200 x seeds 1")
    assert line.endswith(f"are 40,000 trials; at most {MAX_TRIALS:,} can be run")
    (line,) = findings(sweep_file(TINY + "search: {name: random, num_trials: 20000}\n"))
    assert "search.num_trials: num_trials 20,000 x seeds 1 are 20,000 trials" in line
    seeds = TINY.replace("sft:\n", f"sft:\n  seeds: {list(range(18_000))}\n")
    (line,) = findings(sweep_file(seeds + "search: {name: random, num_trials: 100}\n"))
    assert "stages; at most 1,000,000 can be run" in line


def test_data_tasks_and_space_are_told_at_once(sweep_file, folder):
    (folder / "a.jsonl").write_text('{"txt": "no text"}\n')
    (folder / "quiz.jsonl").write_text('{"question": "q", "choices": ["x"], "answer": 0}\n')
    text = TEXT.replace("b: {train: b.txt", "b: {train: c.txt").replace("3e-3]", "-1]")
    lines = findings(sweep_file(text))
    assert [line.split(" ")[0] for line in lines] == [
        "tiny.yaml:6:",
        "tiny.yaml:7:",
        "tiny.yaml:17:",
        "tiny.yaml:17:",
        "tiny.yaml:14:",
    ]
    assert "pretrain.data.domains.a.train: " in lines[0]
    assert "a.jsonl:1: no field 'text' with a string; fields: txt" in lines[0]
    assert "pretrain.data.domains.b.train: no file matches 'c.txt'" in lines[1]
    assert "quiz.jsonl:1: field 'choices' must be a list of two or more texts" in lines[2]
    assert "must be above 0, not -1" in lines[4]
    # A section that is not valid keeps nobody from looking at the data.
    assert len(findings(sweep_file(text.replace("steps: 4", "stepz: 4")))) == 5
    assert len(findings(sweep_file(text.replace("-1]", "1e-3]")), DataError)) == 4


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b'{"text": "x"}\n' * 300 + b'{"txt": "x"}\n' * 20 + b'{"text": "x"}\n' * 300, "a.jsonl:301: no field 'text'"),
        (b'{"text": "\xff"}\n', "a.jsonl:1: not UTF-8"),
        (b"[" * 100_000 + b"\n", "a.jsonl:1: not read: nested too deeply"),
        (b'{"text": ' + b"1" * 5000 + b"}\n", "a.jsonl:1: not read: a number of thousands of digits"),
        (b'{"text": "x", "by": "\\ud800"}\n', "a.jsonl:1: a field holds half of a surrogate pair"),
        (b"", "no train text"),
    ],
)
def test_texts_are_looked_into(sweep_file, folder, content, words):
    (folder / "a.jsonl").write_bytes(content)
    (line,) = findings(sweep_file(TEXT), DataError)
    assert "tiny.yaml:6: pretrain.data.domains.a" in line
    assert words in line


def test_probes_of_tasks_without_classes_are_refused(sweep_file, folder):
    (line,) = findings(sweep_file(TEXT + "probes: {num_labels: [8]}\n"))
    assert "tiny.yaml:18: probes: no task of sft has classes for a linear probe to tell apart (form multiple" in line
    assert line.endswith("add one of form classification, or remove probes")
    for name in ("sort", "test"):
        lines = [json.dumps({"text": f"{name} {i}", "label": i % 2}) for i in range(24)]
        (folder / f"{name}.jsonl").write_text("\n".join(lines))
    sort = "    sort: {form: classification, train: sort.jsonl, test: test.jsonl}\n"
    assert load(sweep_file(TEXT + sort + "probes: {num_labels: [8]}\n"))


def test_the_beginning_of_a_long_text_may_end_within_a_letter(sweep_file, folder):
    (folder / "b.txt").write_bytes(b"x" * (2**20 - 1) + "ö".encode())
    assert load(sweep_file(TEXT)).name == "text"
    (folder / "b.txt").write_bytes(b"x\n\xff" + b"x" * 2**20)
    assert "b.txt:2: not UTF-8 (byte 0 of the line)" in findings(sweep_file(TEXT), DataError)[0]


def test_packed_texts_are_looked_into(sweep_file, folder):
    (folder / "a.jsonl.gz").write_bytes(gzip.compress(b'{"text": "x"}\n')[:-12])
    (line,) = findings(sweep_file(TEXT.replace("a.jsonl,", "a.jsonl.gz,")), DataError)
    assert "a.jsonl.gz: cannot be read" in line


def test_text_that_holds_not_one_sequence(sweep_file, folder):
    (folder / "b.txt").write_text("short")
    lines = findings(sweep_file(TEXT), DataError)
    assert lines[0] == (
        "tiny.yaml:12: pretrain.sequence_length: 16 tokens are more than pretrain.data.domains.a holds of valid text, "
        "at most 7: lower it, or give more text"
    )
    assert len(lines) == 3
    swept = TEXT.replace("sweep:\n", "sweep:\n  pretrain.sequence_length: {grid: [4, 30]}\n")
    assert all(
        "tiny.yaml:14: sweep.pretrain.sequence_length.grid.1: 30" in each
        for each in findings(sweep_file(swept), DataError)
    )


def test_a_byte_order_mark_is_no_text(sweep_file, folder):
    (folder / "a.jsonl").write_bytes(b"\xef\xbb\xbf" + (folder / "a.jsonl").read_bytes())
    assert load(sweep_file(TEXT)).name == "text"


def test_an_unset_variable_is_called_unset(sweep_file, folder, monkeypatch):
    monkeypatch.delenv("NOWHERE", raising=False)
    (line,) = findings(sweep_file(TEXT.replace("train: a.jsonl", 'train: "${NOWHERE}/a.jsonl"')), DataError)
    assert "pretrain.data.domains.a.train: the environment variable NOWHERE is not set" in line
    more = "".join(f'      d{number}: {{train: "${{NOWHERE}}/a", valid: "${{NOWHERE}}/b"}}\n' for number in range(4))
    (line,) = findings(sweep_file(TEXT.replace("    domains:\n", f"    domains:\n{more}")), DataError)
    assert line.endswith("NOWHERE is not set; set it, or write the path out (the same in 7 more places)")
    monkeypatch.setenv("NOWHERE", str(folder))
    assert load(sweep_file(TEXT.replace("train: a.jsonl", 'train: "${NOWHERE}/a.jsonl"'))).name == "text"
    (line,) = findings(sweep_file(TEXT.replace("train: a.jsonl", "train: []")), DataError)
    assert "pretrain.data.domains.a.train: an empty list names no file" in line
