"""Phases: what is written compiles to whole recipes, with ids made of what came before."""

import numpy as np
import pytest
from ended import ended

from raysweep.data.packing import Begin, Tokens, num_read
from raysweep.errors import DataError, SpaceError
from raysweep.estimates import estimate
from raysweep.runners.queue import Beginnings
from raysweep.space import load
from raysweep.stages.phases import Reading, merged, segments
from raysweep.stages.pretrain import Pretrain

SWEEP = """\
name: phases
pretrain:
  data: {name: pcfg, vocabulary: 16, num_nonterminals: 4, num_rules: 2, num_words: 3, sentence_length: 4}
  model: {name: llama, hidden_size: 16, num_layers: 1, num_heads: 2}
  optimizer: {name: adamw, lr: 1e-2, weight_decay: 0.3}
  schedule: {name: constant}
  batch_sequences: 8
  sequence_length: 5
  phases:
    - {name: trunk, steps: 20}
    - {name: decay, tokens: 121, schedule: {name: wsd, decay: 1.0}, optimizer: {lr: 1e-3}}
"""
AXIS = "sweep:\n  pretrain.phases.decay.optimizer.lr: {grid: [1e-3, 1e-4]}\n"


@pytest.fixture
def space_of(tmp_path):
    def space(text):
        (tmp_path / "x.yaml").write_text(text)
        return load(tmp_path / "x.yaml")

    return space


def trainings(trial):
    return [(stage.kind, stage.step) for stage in trial.stages if stage.kind not in ("tokenize", "heldout")]


def test_a_mapping_is_merged_unless_it_names_another():
    given = {"name": "adamw", "lr": 1.0, "betas": [0.9, 0.95]}
    assert merged(given, {"lr": 2.0}) == {"name": "adamw", "lr": 2.0, "betas": [0.9, 0.95]}
    assert merged(given, {"name": "adamw", "betas": [0.5, 0.5]}) == {"name": "adamw", "lr": 1.0, "betas": [0.5, 0.5]}
    assert merged(given, {"name": "sgd", "lr": 2.0}) == {"name": "sgd", "lr": 2.0}
    assert merged({"mix": {"a": 0.5, "b": 0.5}}, {"mix": {"a": 0.9}}) == {"mix": {"a": 0.9, "b": 0.5}}
    assert merged({"mix": None}, {"mix": {"a": 0.9}}) == {"mix": {"a": 0.9}}


def test_a_phase_inherits_what_it_does_not_change(space_of):
    trunk, decay = segments(space_of(SWEEP).declared.pretrain)
    assert (trunk.recipe.num_steps, trunk.measured, trunk.keeps_optimizer) == (20, (), False)
    assert (decay.recipe.num_steps, decay.measured, decay.keeps_optimizer) == (4, (4,), True)  # 40 tokens a step
    assert trunk.recipe.schedule.warmup == 0.05
    assert decay.recipe.optimizer == trunk.recipe.optimizer.with_(lr=1e-3)
    assert (decay.recipe.schedule.name, decay.recipe.schedule.warmup) == ("wsd", 0.0)
    assert decay.recipe.phases == ()


def test_fresh_state_warms_up_as_inherited(space_of):
    _, decay = segments(
        space_of(SWEEP.replace("decay, tokens", "decay, optimizer_state: fresh, tokens")).declared.pretrain
    )
    assert decay.recipe.schedule.warmup == 0.05
    assert not decay.keeps_optimizer


def test_steps_of_its_own_come_before_the_phases(space_of):
    text = SWEEP.replace("  phases:", "  steps: 10\n  checkpoints: [5]\n  phases:")
    assert [(part.name, part.measured) for part in segments(space_of(text).declared.pretrain)] == [
        ("", (5,)),
        ("trunk", ()),
        ("decay", (4,)),
    ]


def test_a_trunk_is_the_plain_run_of_its_recipe_and_shared(space_of):
    space = space_of(SWEEP + AXIS)
    trials = [space.trial(point, 0) for point in space.points()]
    assert trainings(trials[0]) == [("pretrain", None), ("optimizer_state", None), ("pretrain", 24)]
    shared = [stage.id for stage in trials[0].stages[:3]]
    assert shared == [stage.id for stage in trials[1].stages[:3]]
    assert trials[0].stages[3].id != trials[1].stages[3].id
    plain = SWEEP[: SWEEP.index("  phases:")] + "  steps: 20\n"
    assert space_of(plain).trial({}, 0).stages[1].id == shared[1]


def test_what_came_before_is_in_the_id_and_in_the_saved_state(space_of):
    other = SWEEP.replace("steps: 20", "steps: 21")
    found = [space_of(text).trial({}, 0).stages[3] for text in (SWEEP, other)]
    assert found[0].id != found[1].id
    assert found[0].state_key != found[1].state_key
    state, trunk = space_of(SWEEP).trial({}, 0).stages[2:0:-1]
    assert state.state_key == trunk.state_key


def test_checkpoints_of_an_earlier_phase_are_measured_where_it_lists_them(space_of):
    text = SWEEP.replace("steps: 20", "steps: 20, checkpoints: [10, 1.0]") + "flatness: {num_sequences: 8}\n"
    assert trainings(space_of(text).trial({}, 0)) == [
        ("pretrain", 10),
        ("flatness", 10),
        ("pretrain", 20),
        ("optimizer_state", 20),
        ("flatness", 20),
        ("pretrain", 24),
        ("flatness", 24),
    ]


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("lr: 1e-3}", "lrr: 1e-3}", r"x.yaml:11: pretrain.phases.1.optimizer.lrr: no field 'lrr', did you mean 'lr'"),
        ("tokens: 121, ", "", r"x.yaml:11: pretrain.phases.1: .*steps or tokens is missing"),
        ("name: decay", "name: trunk", r"phases.1.name: 'trunk' is the name of two phases"),
        (
            "optimizer: {lr: 1e-3}",
            "optimizer: {name: sgd, lr: 0.1}",
            r"sgd cannot go on with the state of adamw; write",
        ),
        ("tokens: 121", "tokens: 121, data: {vocabulary: 17}", r"vocabulary of 18 cannot follow pcfg with 17"),
        ("steps: 20", "steps: 20, optimizer_state: keep", r"phases.0.optimizer_state: keep: the first phase has none"),
        (
            "  phases:",
            "  checkpoints: [1.0]\n  phases:",
            r"checkpoints: pretrain has no steps of its own",
        ),
        ("steps: 20", "steps: 20, checkpoints: [30]", r"phases.0: .*step 30 is not within 1 to 20"),
    ],
)
def test_mistakes_are_named(space_of, old, new, said):
    with pytest.raises(SpaceError, match=said):
        space_of(SWEEP.replace(old, new))


@pytest.mark.parametrize(
    ("axis", "said"),
    [
        ("pretrain.phases.decoy.steps: {grid: [1]}", r"no phase 'decoy'; phases: trunk, decay"),
        ("pretrain.phases.decay.optimizer.lr: {grid: [-1.0]}", r"decay.optimizer.lr.grid.0: must be above 0"),
        ("pretrain.phases.decay.checkpoints: {grid: {a: [1]}}", r"checkpoints is a list of one trajectory's steps"),
    ],
)
def test_mistakes_of_axes_are_named(space_of, axis, said):
    with pytest.raises(SpaceError, match=said):
        space_of(SWEEP + f"sweep:\n  {axis}\n")


def test_a_scheduler_compares_no_losses_of_different_objectives_on_the_way(space_of):
    text = SWEEP.replace("trunk, steps: 20", "trunk, steps: 20, checkpoints: [10]")
    text = text.replace("decay, tokens", "decay, objective: {name: causal_lm}, tokens")
    axis = "sweep:\n  pretrain.phases.trunk.objective: {grid: {next: {name: causal_lm}, prefix: {name: prefix_lm}}}\n"
    asha = "search: {scheduler: {name: asha, metric: heldout/ppl, mode: min}}\n"
    with pytest.raises(SpaceError, match=r"search.scheduler.metric: heldout/ppl would compare losses of 2 objectives"):
        space_of(text + axis + asha)
    # Of the last checkpoints, which a study compares, all losses are of next tokens; and of one trunk all are alike.
    goals = "search: {name: optuna, num_trials: 2, objectives: [{metric: heldout/ppl, mode: min}]}\n"
    assert space_of(text + axis + goals)
    assert space_of(text.replace("trunk,", "trunk, objective: {name: prefix_lm},") + AXIS + asha)


def test_an_axis_reaches_a_phase_or_takes_its_place(space_of):
    axis = "sweep:\n  pretrain.phases.decay: {grid: {short: {steps: 2}, hot: {steps: 4, optimizer: {lr: 1.0}}}}\n"
    space = space_of(SWEEP + axis)
    found = [segments(space.bind(point))[-1] for point in space.points()]
    assert [(each.name, each.recipe.num_steps, each.recipe.optimizer.lr) for each in found] == [
        ("decay", 2, 1e-2),
        ("decay", 4, 1.0),
    ]


def test_columns_are_known_of_text_that_a_whole_phase_brings(space_of, tmp_path):
    (tmp_path / "a.txt").write_text("A plain text. " * 400)
    files = "{train: a.txt, valid: a.txt}"
    corpus = SWEEP[SWEEP.index("  data:") : SWEEP.index("  model:")]
    text = SWEEP.replace(corpus, f"  data: {{name: text, domains: {{a: {files}}}}}\n")
    phases = f"{{more: {{steps: 2, data: {{domains: {{b: {files}}}}}}}, same: {{steps: 2}}}}"
    space = space_of(f"{text}sweep:\n  pretrain.phases.decay: {{grid: {phases}}}\n")
    assert {"heldout/ppl_a", "heldout/ppl_b"} < {column.name for column in space.columns()}


def test_an_axis_over_data_reaches_the_domains_that_a_phase_inherits(space_of, tmp_path):
    for name in ("a", "b", "other"):
        (tmp_path / f"{name}.txt").write_text(f"A plain text of {name}. " * 400)
    a, b, other = (f"{{train: {name}.txt, valid: {name}.txt}}" for name in ("a", "b", "other"))
    corpus = SWEEP[SWEEP.index("  data:") : SWEEP.index("  model:")]
    text = SWEEP.replace(corpus, f"  data: {{name: text, domains: {{a: {a}, c: {a}}}, mix: {{a: 1, c: 1}}}}\n")
    text = text.replace("decay, tokens", f"decay, data: {{domains: {{b: {b}}}, mix: {{b: 2}}}}, tokens")
    corpora = f"{{x: {{name: text, domains: {{a: {other}, c: {a}}}, mix: {{a: 1, c: 5}}}}}}"
    trial = space_of(f"{text}sweep:\n  pretrain.data: {{grid: {corpora}}}\n").trial({"pretrain.data": "x"}, 0)
    trunk, decay = (stage.spec.recipe.data for stage in trial.stages if stage.kind == "pretrain")
    assert list(decay.domains_) == ["a", "c", "b"]
    assert decay.domains_["a"] == trunk.domains_["a"]
    assert trunk.domains_["a"].fingerprint != trunk.domains_["c"].fingerprint
    assert decay.domains_["b"].fingerprint
    assert decay.mix_ == {"a": 1, "c": 5, "b": 2}


def test_each_domain_goes_on_where_it_was_left():
    mixes = [{"a": 0.5, "b": 0.5}, {"a": 0.9, "b": 0.1}, {"a": 0.9, "b": 0.1}]
    reading, begins = Reading(seed=3), []
    for mix in mixes:
        begins.append(reading.begin("tokens-1", mix, 10))
        reading.take(7, 100)
    assert [(each.steps, each.tokens, each.sequences) for each in begins] == [(0, 0, 0), (7, 7000, 0), (14, 14000, 700)]
    first = num_read(mixes[0], 700, seed=3)
    assert begins[0].read == {}
    assert begins[1].read == begins[2].read == first
    assert sum(first.values()) == 700


def test_counted_sequences_are_those_that_are_read(tmp_path, grammar):
    """Against the batches themselves: rows of domain b are above 1000."""
    for name, offset in (("a", 0), ("b", 1000)):
        rows = np.arange(50, dtype=np.uint16) + offset
        np.repeat(rows, 2).tofile(tmp_path / f"{name}.train.bin")
    meta = {"vocab_size": 2000, "dtype": "uint16", "sentence_length": None, "domains": {}}
    grammar.build(tmp_path)
    tokens = Tokens(tmp_path)
    mix = {"a": 0.7, "b": 0.3}
    whole = tokens.batches(mix, sequence_length=2, seed=1).batch(0, 1300)[:, 0]
    assert num_read(mix, 1300, seed=1) == {"a": int((whole < 1000).sum()), "b": int((whole >= 1000).sum())}
    assert meta
    later = tokens.batches(mix, sequence_length=2, seed=1, begin=Begin(1200, {})).batch(0, 100)[:, 0]
    assert (later == whole[1200:]).all()
    # Behind 30 rows of domain a, 20 are left of its first epoch: none of them was read.
    begin = Begin(0, {"a": 30})
    other = tokens.batches({"a": 1.0}, sequence_length=2, seed=1, begin=begin).batch(0, 20)[:, 0]
    before = tokens.batches({"a": 1.0}, sequence_length=2, seed=1).batch(0, 30)[:, 0]
    assert sorted([*other, *before]) == list(range(50))


def test_data_that_cannot_be_read_by_a_start_is_named(space_of):
    text = SWEEP.replace("  model: {name: llama, hidden_size: 16, num_layers: 1, num_heads: 2}\n", "  start: x\n")
    with pytest.raises((SpaceError, DataError), match="cannot be read by the tokenizer of a checkpoint"):
        space_of(text)
    with pytest.raises(SpaceError, match="start 'x' has an architecture of its own; remove model"):
        space_of(SWEEP.replace("  model:", "  start: x\n  model:"))
    with pytest.raises(SpaceError, match="model or start is missing"):
        space_of(text.replace("  start: x\n", ""))


def test_a_trial_waits_for_a_beginning_in_the_making(space_of):
    two_trunks = "sweep:\n  pretrain.phases.trunk.optimizer.lr: {grid: [1e-2, 3e-2]}\n" + AXIS.removeprefix("sweep:\n")
    space = space_of(SWEEP + two_trunks)
    trials = [space.trial(point, 0) for point in space.points()]
    beginnings = Beginnings([])
    left = beginnings.in_order(trials)
    assert left == trials
    beginnings.start("first", left.pop(0))
    assert beginnings.first_ready(left) is trials[2], "the other trunk goes first"
    beginnings.start("second", trials[2])
    assert beginnings.first_ready([trials[1], trials[3]]) is None
    for stage in trials[0].stages[1:3]:
        assert isinstance(stage.spec, Pretrain) or stage.kind == "optimizer_state"
        beginnings.take(ended(stage.id))
    assert beginnings.first_ready([trials[3], trials[1]]) is trials[1]
    beginnings.end("second")
    assert beginnings.first_ready([trials[3], trials[1]]) is trials[3], "its maker ended: it makes the trunk itself"


def test_who_makes_what_most_others_share_goes_first(space_of):
    axis = AXIS + "  pretrain.phases.decay.optimizer_state: {grid: [fresh, keep]}\n"
    space = space_of(SWEEP + axis)
    ordered = Beginnings([]).in_order([space.trial(point, 0) for point in space.points()])
    # Those that keep the state share its making, too.
    states = [trial.point["pretrain.phases.decay.optimizer_state"] for trial in ordered]
    assert states == ["keep", "keep", "fresh", "fresh"]


def test_a_plan_tells_tokens_seen_from_tokens_to_compute(space_of, store):
    space = space_of(SWEEP + AXIS)
    plan = estimate(space, store, mfu=0.5, peak_flops=1e12)
    assert plan.tokens_seen == 2 * (20 + 4) * 40
    assert plan.tokens == (20 + 2 * 4) * 40
    trunk, state = space.trial({}, 0).stages[1:3]
    (store.root / "stages" / trunk.id).mkdir(parents=True)
    # Without its optimizer's state, that of a finished trunk is trained once more.
    assert estimate(space, store, mfu=0.5, peak_flops=1e12).tokens == (20 + 2 * 4) * 40
    (store.root / "stages" / state.id).mkdir()
    plan = estimate(space, store, mfu=0.5, peak_flops=1e12)
    assert (plan.tokens, plan.tokens_seen) == (2 * 4 * 40, 2 * (20 + 4) * 40)


def test_a_state_that_was_left_behind_is_gone_on_with(space_of, store):
    plain = SWEEP[: SWEEP.index("  phases:")] + "  steps: 20\n"
    leaving = space_of(plain + "  leave_optimizer_state: true\n")
    kinds = [stage.kind for stage in leaving.trial({}, 0).stages]
    assert kinds == ["tokenize", "pretrain", "optimizer_state", "heldout"]
    assert [stage.id for stage in leaving.trial({}, 0).stages[:3]] == [
        stage.id for stage in space_of(SWEEP).trial({}, 0).stages[:3]
    ]
    assert leaving.run_name() != space_of(plain).run_name()
    for stage in space_of(plain).trial({}, 0).stages:
        (store.root / "stages" / stage.id).mkdir(parents=True)
    plan = estimate(space_of(SWEEP), store, mfu=0.5, peak_flops=1e12)
    assert plan.tokens == (20 + 4) * 40
    assert "800 tokens are trained once more" in plan.note
    assert plan.to_dict()["tokens"] == plan.tokens


def test_a_rate_that_jumps_back_to_its_peak_is_warned_of(space_of):
    (warning,) = space_of(
        SWEEP.replace("constant}", "cosine}").replace(", schedule: {name: wsd, decay: 1.0}", "")
    ).warnings
    assert "x.yaml:11: pretrain.phases.1: phase decay inherits the cosine schedule, which begins at the peak" in warning
    assert space_of(SWEEP).warnings == ()


def test_a_phase_is_called_as_one_likes(space_of):
    assert space_of(SWEEP).run_name() == space_of(SWEEP.replace("name: trunk", "name: stem")).run_name()
    assert space_of(SWEEP).run_name() != space_of(SWEEP.replace("steps: 20", "steps: 21")).run_name()
