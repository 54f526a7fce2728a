"""Zip axes: paths that move together, as one axis of the sweep."""

import json

import pytest
from handed import under_way
from tiny import ONE_CPU, TINY, roomy

from raysweep.errors import DataError, SpaceError
from raysweep.runners.optuna_search import study_search
from raysweep.runners.queue import Beginnings
from raysweep.space import load

SIZE = """\
  size:
    zip:
      pretrain.model.hidden_size: [16, 32]
      pretrain.model.num_heads: [2, 4]
"""
AXIS = "  pretrain.optimizer.lr: {grid: [1e-2, 3e-3]}\n"


def zipped(*lines: str, base: str = TINY) -> str:
    """The tiny sweep with zip axes in place of its own."""
    assert AXIS in base
    return base.replace(AXIS, "".join(lines))


def findings(path, kind: type[Exception] = SpaceError) -> list[str]:
    with pytest.raises(kind) as caught:
        load(path)
    return str(caught.value).splitlines()


def test_points_are_those_of_one_axis_beside_others(sweep_file):
    space = load(sweep_file(zipped(SIZE, AXIS)))
    lrs = [0.01, 0.003]
    assert list(space.points()) == [
        {"size": size, "pretrain.optimizer.lr": lr} for size in ("16 / 2", "32 / 4") for lr in lrs
    ]


def test_stages_are_those_of_the_same_point_written_by_hand(sweep_file):
    zipped_ids = [
        [stage.id for stage in load(sweep_file(zipped(SIZE))).trial({"size": label}, 0).stages]
        for label in ("16 / 2", "32 / 4")
    ]
    for ids, (width, heads) in zip(zipped_ids, [(16, 2), (32, 4)], strict=True):
        hand = zipped("  {}\n").replace(
            "hidden_size: 16, num_layers: 1, num_heads: 2", f"hidden_size: {width}, num_layers: 1, num_heads: {heads}"
        )
        assert [stage.id for stage in load(sweep_file(hand)).trial({}, 0).stages] == ids
    assert set(zipped_ids[0]).isdisjoint(zipped_ids[1][1:])


def test_names_stand_for_the_settings(sweep_file):
    text = zipped(
        "  way:\n    zip:\n",
        "      pretrain.objective: {next: {name: causal_lm}, masked: {name: masked_lm}}\n",
        "      pretrain.model.name: [llama, bert]\n",
    )
    space = load(sweep_file(text))
    assert list(space.points()) == [{"way": "next"}, {"way": "masked"}]
    recipe = space.trial({"way": "masked"}, 0).stages[1].spec.recipe
    assert (recipe.objective.name, recipe.model.name) == ("masked_lm", "bert")
    # Both objectives' numbers are known as columns, though neither path is an axis of its own.
    assert "heldout/ppl" in space.metric_names()


def test_words_and_flags_are_labelled_as_written(sweep_file):
    text = zipped("  how: {zip: {pretrain.schedule.name: [wsd, cosine], pretrain.clip_norm: [null, 1.5]}}\n")
    assert [point["how"] for point in load(sweep_file(text)).points()] == ["wsd / null", "cosine / 1.5"]


@pytest.mark.parametrize(
    ("axis", "line"),
    [
        (
            "  size:\n    zip: {pretrain.steps: [12, 14], pretrain.batch_sequences: [8]}\n",
            "12: sweep.size: a zip has as many values for each path, and here are: pretrain.steps 2, "
            "pretrain.batch_sequences 1",
        ),
        (
            "  size: {zip: {pretrain.steps: {a: 12, b: 14}, pretrain.batch_sequences: {a: 8, c: 4}}}\n",
            "12: sweep.size: a zip names its values alike for each path, in one order, and here are: "
            "pretrain.steps: a, b; pretrain.batch_sequences: a, c",
        ),
        (
            "  size: {zip: {pretrain.steps: [12, 12], pretrain.batch_sequences: [8, 8]}}\n",
            "12: sweep.size: a zip sets the same values twice: 12 / 8",
        ),
        (
            "  size:\n    zip:\n      pretrain.steps: [12]\n      pretrain.stepz: [12]\n",
            "13: sweep.size.zip.12 / 12: pretrain.stepz: no field 'stepz', did you mean 'steps'",
        ),
        (
            "  size:\n    zip:\n      flatness.seed: [1, 2]\n",
            "14: sweep.size.zip.flatness.seed: a sweep path starts with 'pretrain.'",
        ),
        (
            "  size: {zip: {pretrain.checkpoints: [1, 2]}}\n",
            "12: sweep.size.zip.pretrain.checkpoints: checkpoints is a list of one trajectory's steps",
        ),
        (
            "  pretrain.size: {zip: {pretrain.steps: [12, 14]}}\n",
            "12: sweep.pretrain.size: a zip goes by a name of its own, such as size, not 'pretrain.size'",
        ),
        ("  seed: {zip: {pretrain.steps: [12, 14]}}\n", "12: sweep.seed: a zip goes by a name of its own"),
        ("  a/b: {zip: {pretrain.steps: [12, 14]}}\n", "12: sweep.a/b: zip name 'a/b': use up to 64 letters"),
        ("  size: {zip: {}}\n", "12: sweep.size.zip: is empty; at least 1 belongs there"),
        ("  size: {zip: [pretrain.steps]}\n", "12: sweep.size.zip: must be a mapping (key: value)"),
        ("  size: {zip: {pretrain.steps: 12}}\n", "12: sweep.size.zip.pretrain.steps: must be a list or a mapping"),
        ("  size: {zap: {pretrain.steps: [12]}}\n", "12: sweep.size: an axis is one of: grid: [...]"),
        ("  size: {grid: [1, 2]}\n", "12: sweep.size: 'size' is no path; only a zip has a name of its own"),
        (
            "  size: {zip: {pretrain.optimizer.lr: [1, 2]}}\n" + AXIS,
            "13: sweep.pretrain.optimizer.lr: pretrain.optimizer.lr is varied by the axis size already; leave",
        ),
        (
            AXIS + "  pretrain.optimizer: {grid: {a: {name: sgd, lr: 1}}}\n",
            "13: sweep.pretrain.optimizer: pretrain.optimizer replaces what pretrain.optimizer.lr sets before it",
        ),
        (
            "  size:\n    zip:\n      pretrain.model.hidden_size: [16, 33]\n      pretrain.model.num_heads: [2, 4]\n",
            "13: sweep.size.zip.33 / 4: pretrain.model: hidden_size 33 must be a multiple",
        ),
    ],
)
def test_what_is_wrong_is_told_with_its_line(sweep_file, axis, line):
    found = findings(sweep_file(zipped(axis)))
    assert any(f"tiny.yaml:{line}" in each for each in found), found


def test_axes_refine_what_comes_before_them(sweep_file):
    optimizers = "  pretrain.optimizer: {grid: {plain: {name: sgd, lr: 1}, usual: {name: adamw, lr: 1}}}\n"
    space = load(sweep_file(zipped(optimizers, AXIS)))
    recipes = [space.trial(point, 0).stages[1].spec.recipe.optimizer for point in space.points()]
    assert {(each.name, each.lr) for each in recipes} == {
        (name, lr) for name in ("sgd", "adamw") for lr in (0.01, 0.003)
    }


def test_a_trial_is_the_same_in_whatever_order_a_point_names_the_axes(sweep_file):
    optimizers = "  pretrain.optimizer: {grid: {plain: {name: sgd, lr: 1}, usual: {name: adamw, lr: 1}}}\n"
    space = load(sweep_file(zipped(optimizers, AXIS)))
    for point in space.points():
        assert space.trial(dict(reversed(point.items())), 0).id == space.trial(point, 0).id


def test_a_random_search_draws_whole_settings(sweep_file):
    text = zipped(SIZE) + "search: {name: random, num_trials: 12}\n"
    space = load(sweep_file(text))
    assert {point["size"] for point in space.points()} == {"16 / 2", "32 / 4"}
    for point in space.points():
        space.trial(point, 0)


TEXT = """\
name: text
pretrain:
  data: {name: text, domains: {a: {train: a.txt, valid: a.txt}}}
  model: {name: llama, hidden_size: 16, num_layers: 1, num_heads: 2}
  optimizer: {name: adamw, lr: 1e-2}
  steps: 4
  batch_sequences: 4
  sequence_length: 16
sweep:
  corpus:
    zip:
      pretrain.data:
        a: {name: text, domains: {a: {train: a.txt, valid: a.txt}}}
        b: {name: text, domains: {b: {train: b.txt, valid: b.txt}}}
      pretrain.sequence_length: [64, 8]
"""


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "a.txt").write_text("A plain text. " * 400)
    (tmp_path / "b.txt").write_text("Some words. " * 400)
    return tmp_path


def fingerprints(space, point) -> list[str]:
    tokenize = space.trial(point, 0).stages[0].spec
    return [domain.fingerprint for domain in tokenize.corpus.domains_.values()]


def test_data_within_a_zip_is_pinned(sweep_file, folder):
    space = load(sweep_file(TEXT))
    before = [fingerprints(space, point) for point in space.points()]
    assert all(all(each) for each in before)
    (folder / "b.txt").write_text("Other words. " * 400)
    after = [fingerprints(load(sweep_file(TEXT)), point) for point in space.points()]
    assert before[0] == after[0]
    assert before[1] != after[1]
    assert load(sweep_file(TEXT)).run_name() != space.run_name()


def test_missing_data_within_a_zip_is_told_with_its_line(sweep_file, folder):
    (folder / "b.txt").unlink()
    lines = findings(sweep_file(TEXT), DataError)
    assert "tiny.yaml:14: sweep.corpus.zip.pretrain.data.b.domains.b.train: no file matches 'b.txt'" in lines[0]


def test_a_corpus_meets_the_length_that_moves_with_it(sweep_file, folder):
    (folder / "b.txt").write_text("Some words.")
    assert [point["corpus"] for point in load(sweep_file(TEXT)).points()] == ["a", "b"]
    lines = findings(sweep_file(TEXT.replace("[64, 8]", "[8, 64]")), DataError)
    assert len(lines) == 2
    assert "tiny.yaml:15: sweep.corpus.zip.pretrain.sequence_length.1: 64 tokens are more than" in lines[0]


def test_a_corpus_may_be_valid_only_beside_what_moves_with_it(sweep_file, folder):
    """It is pinned all the same: a base of masked sentences takes no text."""
    base = TINY.replace("  model: {name: llama,", "  objective: {name: masked_lm, mask: one}\n  model: {name: bert,")
    base = base[: base.index("sft:")].replace("indicators: {kshot: 2, max_examples: 20}\n", "")
    text = "{a: {name: text, domains: {a: {train: a.txt, valid: a.txt}}}}"
    axis = f"  all: {{zip: {{pretrain.data: {text}, pretrain.objective: {{a: {{name: causal_lm}}}}, "
    space = load(sweep_file(zipped(axis + "pretrain.model.name: [llama]}}\n", base=base)))
    assert all(fingerprints(space, {"all": "a"}))


PHASES = """\
  phases:
    - {name: trunk, steps: 8}
    - {name: decay, steps: 4, schedule: {name: wsd, decay: 1.0}}
"""


def test_a_zip_reaches_into_phases(sweep_file):
    text = TINY.replace("  steps: 12\n", "").replace("  checkpoints: [6, 12]\n", PHASES)
    axis = (
        "  end:\n    zip:\n      pretrain.phases.decay.steps: [4, 6]\n"
        "      pretrain.phases.decay.optimizer: {a: {lr: 1}, b: {lr: 2}}\n"
    )
    space = load(sweep_file(zipped(axis, base=text)))
    trials = [space.trial(point, 0) for point in space.points()]
    assert [trial.last_step for trial in trials] == [12, 14]
    assert trials[0].stages[1].id == trials[1].stages[1].id  # The trunk.
    (line,) = findings(sweep_file(zipped(axis.replace("phases.decay.steps", "phases.dekay.steps"), base=text)))[:1]
    assert "sweep.end.zip.a: no phase 'dekay'; phases: trunk, decay" in line


def test_an_optuna_search_picks_among_settings(sweep_file, store, tmp_path):
    text = zipped(SIZE) + "search: {name: optuna, num_trials: 8, objectives: [{metric: heldout/ppl, mode: min}]}\n"
    space = load(sweep_file(text))
    study, num_to_do = study_search(space, store, tmp_path)
    study.use(under_way(roomy(), Beginnings([])), [ONE_CPU])
    points = []
    for number in range(num_to_do):
        points.append(study.suggest(str(number)))
        study.on_trial_complete(str(number), {"heldout/ppl": 2.0, "last": True})
    assert {point["size"] for point in points} == {"16 / 2", "32 / 4"}
    assert {space.trial(point, 0).stages[1].spec.recipe.model.hidden_size for point in points} == {16, 32}


def test_identity_holds_what_a_zip_sets(sweep_file):
    one, other = (load(sweep_file(zipped(SIZE.replace("[2, 4]", heads)))) for heads in ("[2, 4]", "[2, 8]"))
    assert json.loads(one.identity())["sweep"]["size"]["zip"]["pretrain.model.num_heads"] == [2, 4]
    assert one.run_name() != other.run_name()


def test_data_of_phases_within_a_zip_is_pinned(sweep_file, folder):
    base = TEXT[: TEXT.index("sweep:")].replace(
        "  steps: 4\n", "  phases: [{name: trunk, steps: 4}, {name: end, steps: 2}]\n"
    )
    axis = (
        "sweep:\n  end:\n    zip:\n      pretrain.phases.end.steps: [2, 3]\n"
        "      pretrain.phases.end.data:\n"
        "        a: {domains: {a: {train: a.txt, valid: a.txt}}}\n"
        "        b: {domains: {a: {train: b.txt, valid: b.txt}}}\n"
    )
    space = load(sweep_file(base + axis))
    ends = [space.trial(point, 0).stages[-1].id for point in space.points()]
    (folder / "b.txt").write_text("Other words. " * 400)
    again = [load(sweep_file(base + axis)).trial(point, 0).stages[-1].id for point in space.points()]
    assert ends[0] == again[0]
    assert ends[1] != again[1]
    lines = findings(sweep_file(base + axis.replace("b.txt, valid", "c.txt, valid")), DataError)
    assert any("sweep.end.zip.pretrain.phases.end.data.b" in line and "c.txt" in line for line in lines), lines
