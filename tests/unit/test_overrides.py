"""`key=value` on the command line: the sweep file as if it had said so."""

import json

import pytest
from tiny import TINY

from raysweep.cli import main
from raysweep.document import read_document
from raysweep.errors import SpaceError
from raysweep.overrides import with_overrides
from raysweep.results import Results
from raysweep.runs import Run
from raysweep.space import load
from raysweep.store import Store

LR = "pretrain.optimizer.lr"
PHASED = TINY.replace("  steps: 12\n", "").replace(
    "  checkpoints: [6, 12]\n", "  phases: [{name: trunk, steps: 8}, {name: decay, steps: 4}]\n"
)


def refused(path, *overrides: str) -> list[str]:
    with pytest.raises(SpaceError) as caught:
        load(path, overrides)
    return str(caught.value).splitlines()


@pytest.mark.parametrize(
    ("overrides", "old", "new"),
    [
        (["pretrain.batch_sequences=4"], "batch_sequences: 8", "batch_sequences: 4"),
        ([f"sweep.{LR}={{grid: [1e-3, 3e-4]}}"], "[1e-2, 3e-3]", "[1e-3, 3e-4]"),
        ([f"sweep.{LR}.grid=[1e-3, 3e-4]"], "[1e-2, 3e-3]", "[1e-3, 3e-4]"),
        ([f"sweep.{LR}.grid.0=1e-3"], "[1e-2, 3e-3]", "[1e-3, 3e-3]"),
        (["pretrain.steps=20", "pretrain.checkpoints=[0.5, 1.0]"], "steps: 12", "steps: 20\n  checkpoints: [0.5, 1.0]"),
        (["sft.tasks.span.num_test=10"], "num_test: 20", "num_test: 10"),
        (["seeds=[0, 1]"], "name: tiny", "name: tiny\nseeds: [0, 1]"),
        (["resources.workers=2"], "name: tiny", "name: tiny\nresources: {workers: 2}"),
        (["pretrain.schedule.name=cosine"], "  steps: 12", "  steps: 12\n  schedule: {name: cosine}"),
        (["flatness=null"], "flatness: {num_sequences: 16, batch_sequences: 2, min_units: 4, max_units: 8}\n", ""),
        ([f"sweep.{LR}={{grid: [1]}}", f"sweep.{LR}.grid.0=2"], "[1e-2, 3e-3]", "[2]"),
        (
            ["sweep.pretrain.model.num_layers.grid=[1, 2]", "sweep.size.zip.pretrain.steps=[12, 14]"],
            "sweep:\n",
            "sweep:\n  pretrain.model.num_layers: {grid: [1, 2]}\n  size: {zip: {pretrain.steps: [12, 14]}}\n",
        ),
    ],
)  # fmt: skip
def test_the_sweep_is_as_if_its_file_had_said_so(sweep_file, overrides, old, new):
    given = load(sweep_file(), overrides)
    text = TINY.replace("  checkpoints: [6, 12]\n", "") if "checkpoints: [0.5" in new else TINY
    assert old in text
    written = load(sweep_file(text.replace(old, new)))
    assert given.declared.model_dump() == written.declared.model_dump()
    assert given.run_name() == written.run_name()
    # So does the copy that the run keeps.
    assert load(sweep_file(given.text)).declared.model_dump() == written.declared.model_dump()


def test_phases_go_by_name_or_index(sweep_file):
    path = sweep_file(PHASED)
    for name in ("decay", "1"):
        pretrain = load(path, [f"pretrain.phases.{name}.steps=6"]).declared.pretrain
        assert [phase.steps for phase in pretrain.phases] == [8, 6]
    (line,) = refused(path, "pretrain.phases.dekay.steps=6")
    assert line == (
        "on the command line: pretrain.phases.dekay.steps: pretrain.phases has no 'dekay'; there are: trunk, decay"
    )


def test_values_are_read_as_in_the_file(sweep_file):
    texts = ["1e-3", "on", "~", "1_000", "0x10", "'5'", "[a, {b: c}]", "2020-01-01", "true", "a=b"]
    data = with_overrides(read_document(sweep_file()), [f"x{i}={text}" for i, text in enumerate(texts)]).data
    values = [data[f"x{i}"] for i in range(len(texts))]
    assert values == [0.001, "on", None, 1000, 16, "5", ["a", {"b": "c"}], "2020-01-01", True, "a=b"]


def test_the_copy_keeps_comments_and_every_other_line(sweep_file):
    text = TINY.replace("  steps: 12", "  # why so few\n  steps: 12  # a dozen") + "seeds:\n  - 0\n"
    space = load(sweep_file(text), ["pretrain.steps=14", "sft.lrs=[2e-3]"])
    changed = text.replace("steps: 12 ", "steps: 14 ").replace("lrs: [1e-3, 1e-2]", "lrs: [2e-3]")
    rest = [line for line in changed.splitlines() if "num_" not in line]
    assert [line for line in space.text.splitlines() if "num_" not in line] == rest
    assert load(sweep_file(), []).text == TINY


@pytest.mark.parametrize(
    "given", ["b: &b {lr: 1e-2}\nc: *b", "b: {lr: 1}\nd: 2026-13-01", "b: {lr: 1}\nyes: {true: 1}"]
)
def test_a_copy_that_cannot_keep_comments_says_the_same(tmp_path, given):
    path = tmp_path / "x.yaml"
    path.write_text(f"# Comment.\n{given}\n")
    document = with_overrides(read_document(path), ["b.lr=5", "yes.true=2"])
    path.write_text(document.text)
    assert read_document(path).data == document.data
    assert document.data["b"] == {"lr": 5}
    assert document.data.get("c", {"lr": 0.01}) == {"lr": 0.01}


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("pretrain.stepz=5", "pretrain.stepz: no field 'stepz', did you mean 'steps'"),
        ("pretrian.steps=5", "pretrian: no field 'pretrian', did you mean 'pretrain'"),
        ("pretrain.steps=many", 'pretrain.steps: must be a whole number, not the text "many"'),
        ("pretrain.steps=1e3", "pretrain.steps: must be a whole number, not 1000.0; write 1000"),
        ("pretrain.steps=", "pretrain.steps: has no value; write pretrain.steps=null for none"),
        ("pretrain.steps=[1", "pretrain.steps: not valid YAML: "),
        ("pretrain.steps=a: b: c", "pretrain.steps: not valid YAML: mapping values are not allowed"),
        ("pretrain.steps=!!set {a}", "pretrain.steps: the tag !!set is not read here"),
        ("pretrain.steps={a: 1, a: 2}", "pretrain.steps.a: duplicate key, first on line 1"),
        ("pretrain.optimizer={nam: sgd}", "pretrain.optimizer: name is missing; there are: adamw, sgd"),
        ("pretrain.steps.more=1", "pretrain.steps.more: pretrain.steps is 12, with nothing below it"),
        ("pretrain.checkpoints.2=12", "pretrain.checkpoints.2: pretrain.checkpoints has no '2'; there are: 0, 1"),
        (f"pretrain.checkpoints.{'1' * 5000}=12", "pretrain.checkpoints.1111"),
        (f"sweep.{LR}.grid=[1, -1]", f"sweep.{LR}.grid.1: pretrain.optimizer.lr: must be above 0, not -1"),
        ("sweep.pretrain.optimiser.lr.grid=[1]", "sweep.pretrain.optimiser.lr.grid.0: pretrain.optimiser: no field"),
        (f"{LR}=1e-3", f"{LR}: every variant has a value of its own, of the axis sweep.{LR}: give that one"),
        ("pretrain.steps", "'pretrain.steps' is no key=value, such as pretrain.steps=200"),
        ("=5", "'=5' is no key=value"),
        ("pretrain..steps=5", "'pretrain..steps=5' is no key=value"),
        ("other.yaml", "'other.yaml' is no key=value"),
    ],
)
def test_what_is_wrong_is_told_with_its_key(sweep_file, override, line):
    found = refused(sweep_file(), override)
    assert any(each.startswith(f"on the command line: {line}") for each in found), found


def test_what_is_wrong_in_the_file_keeps_its_line(sweep_file):
    found = refused(sweep_file(TINY.replace("batch_sequences: 8", "batch_sequences: 0")), "pretrain.steps=no")
    assert [line.split(" pretrain")[0] for line in found] == ["on the command line:", "tiny.yaml:8:"]


def test_what_is_none_is_filled(sweep_file):
    found = refused(sweep_file(), "pretrain.phases=[null]", "pretrain.phases.0.steps=5")
    assert found == ["on the command line: pretrain.phases.0.name: is missing, and has no default"]


def test_what_an_axis_sets_is_not_given_beside_it(sweep_file):
    text = TINY.replace(f"  {LR}: {{grid: [1e-2, 3e-3]}}", f"  a: {{zip: {{{LR}: [1, 2]}}}}")
    (line,) = refused(sweep_file(text), f"{LR}=1")
    assert f"{LR}: every variant has a value of its own, of the axis sweep.a: give that one, as 'sweep.a=...'" in line
    (line,) = refused(sweep_file(), f"{LR}=1")
    assert f"give that one, as 'sweep.{LR}={{grid: [1]}}', or sweep={{}} for the base alone" in line
    swept = PHASED.replace(f"  {LR}", "  pretrain.phases.decay.optimizer.lr")
    (line,) = refused(sweep_file(swept), "pretrain.phases.1.optimizer.lr=1")
    assert "pretrain.phases.decay.optimizer.lr: every variant has a value of its own" in line
    assert load(sweep_file(swept), ["pretrain.phases.0.optimizer.lr=1"])


def test_one_that_undoes_another_is_refused(sweep_file):
    for later in ("pretrain.steps=6", "pretrain={}"):
        (line,) = refused(sweep_file(), "pretrain.steps=5", later)
        assert "takes the place of pretrain.steps=5; give one of them" in line


def test_options_may_stand_between(sweep_file, tmp_path, capsys):
    orders = [
        ["plan", "S", "pretrain.steps=14", "--json", "--store", "T", "seeds=[0, 1]"],
        ["plan", "S", "--json", "pretrain.steps=14", "--store", "T", "seeds=[0, 1]"],
        ["plan", "--store", "T", "--json", "S", "pretrain.steps=14", "seeds=[0, 1]"],
        ["plan", "S", "--store", "T", "pretrain.steps=14", "seeds=[0, 1]", "--json"],
    ]
    names = {
        "S": str(sweep_file(TINY.replace("checkpoints: [6, 12]", "checkpoints: [0.5, 1.0]"))),
        "T": str(tmp_path / "t"),
    }
    plans = []
    for order in orders:
        assert main([names.get(word, word) for word in order]) == 0
        plans.append(json.loads(capsys.readouterr().out))
    assert all(plan == plans[0] for plan in plans)
    assert plans[0]["num_trials"] == 4


def test_mistakes_of_the_command_line_end_it(sweep_file, capsys):
    path = str(sweep_file())
    assert main(["plan", path, "pretrain.stepz=1"]) == 2
    assert "SpaceError: on the command line: pretrain.stepz: no field 'stepz'" in capsys.readouterr().err
    for wrong in (["plan", path, "--pretrain.steps", "5"], ["schema", "a=1"]):
        with pytest.raises(SystemExit, match="2"):
            main(wrong)
        said = capsys.readouterr().err
        assert "unrecognized arguments: " + " ".join(wrong[2:] or wrong[1:]) in said
        assert ("given without dashes: pretrain.steps=200" in said) == (wrong[0] == "plan")


def test_a_run_is_found_by_what_it_was_run_with(sweep_file, tmp_path, capsys):
    path, root, overrides = sweep_file(), tmp_path / "store", ["pretrain.batch_sequences=4"]
    space, store = load(path, overrides), Store(root)
    Run.create(store, space.run_name(), sweep_text=space.text, identity=space.identity())
    assert Results.open(path, store=root, overrides=overrides).run.name == space.run_name()
    assert main(["status", str(path), "--store", str(root), "--json", *overrides]) == 0
    assert json.loads(capsys.readouterr().out)["run"] == space.run_name()
    assert "batch_sequences: 4" in (store.root / "runs" / space.run_name() / "sweep.yaml").read_text()
    with pytest.raises(SpaceError, match=r"'pretrain.batch_sequences=4' changes a sweep file, and 'tiny' is none"):
        Results.open("tiny", store=root, overrides=overrides)


def test_a_value_that_keeps_no_comments_is_taken(tmp_path):
    path = tmp_path / "x.yaml"
    path.write_text("# Comment.\nb: {lr: 1}\n")
    document = with_overrides(read_document(path), ["b.c={!!omap a: 1}"])
    path.write_text(document.text)
    assert read_document(path).data == document.data == {"b": {"lr": 1, "c": {"a": 1}}}
