"""Sweep files: what is read, what is refused and in what words."""

import pytest
from tiny import TINY

from raysweep.errors import SpaceError
from raysweep.space import load
from raysweep.spec import canonical


def expand(path) -> None:
    space = load(path)
    for point in space.points():
        space.trial(point, 0)


def refuse(sweep_file, old: str, new: str, *words: str, error: type[Exception] = SpaceError) -> str:
    assert old in TINY
    path = sweep_file(TINY.replace(old, new))
    with pytest.raises(error) as caught:
        expand(path)
    message = str(caught.value)
    for word in words:
        assert word in message
    return message


def test_a_grid_crosses_all_values(sweep_file):
    text = TINY.replace("{grid: [1e-2, 3e-3]}", "{grid: [1e-2, 3e-3]}\n  pretrain.model.num_layers: {grid: [1, 2]}")
    space = load(sweep_file(text))
    points = list(space.points())
    assert len(points) == 4
    assert {space.trial(point, 0).variant_id for point in points} == {space.trial(p, 1).variant_id for p in points}
    assert len({space.trial(point, seed).id for point in points for seed in (0, 1)}) == 8


def test_unknown_key_names_file_line_and_nearest(sweep_file):
    refuse(sweep_file, "  steps: 12", "  stepz: 12", "tiny.yaml:7", "pretrain.stepz", "did you mean 'steps'")


def test_all_findings_come_at_once(sweep_file):
    text = TINY.replace("lr: 1e-2}", "lr: fast}").replace("batch_sequences: 8", "batch_sequences: 0")
    with pytest.raises(SpaceError) as caught:
        load(sweep_file(text))
    lines = str(caught.value).splitlines()
    assert len(lines) == 2
    assert "pretrain.optimizer.lr" in lines[0]
    assert "fast" in lines[0]
    assert "pretrain.batch_sequences" in lines[1]
    assert "must be 1 or more, not 0" in lines[1]


def test_yaml_numbers_and_words(sweep_file):
    space = load(sweep_file(TINY.replace("name: tiny", "name: on")))
    assert space.declared.name == "on"
    assert space.declared.pretrain.optimizer.lr == 0.01


def test_duplicate_key(sweep_file):
    refuse(sweep_file, "  steps: 12", "  steps: 12\n  steps: 13", "tiny.yaml:8", "duplicate key")


def test_wrong_type(sweep_file):
    refuse(sweep_file, "steps: 12", "steps: many", "pretrain.steps: must be a whole number", '"many"')


def test_wrong_name(sweep_file):
    refuse(sweep_file, "{name: adamw, lr", "{name: adam, lr", "no name 'adam', did you mean 'adamw'", "sgd")


def test_empty_grid(sweep_file):
    refuse(sweep_file, "{grid: [1e-2, 3e-3]}", "{grid: []}", "sweep.pretrain.optimizer.lr", "is empty")


def test_checkpoint_beyond_the_last_step(sweep_file):
    refuse(sweep_file, "checkpoints: [6, 12]", "checkpoints: [6, 13]", "step 13 is not within 1 to 12")


def test_steps_and_tokens(sweep_file):
    refuse(sweep_file, "  steps: 12", "  steps: 12\n  tokens: 100", "steps 12 and tokens 100: give either")


def test_sweep_path_that_is_none(sweep_file):
    refuse(sweep_file, "pretrain.optimizer.lr: {", "pretrain.optimiser.lr: {", "did you mean 'optimizer'")
    refuse(sweep_file, "pretrain.optimizer.lr: {", "flatness.seed: {", "starts with 'pretrain.'")


def test_bad_swept_value_names_the_point(sweep_file):
    refuse(sweep_file, "{grid: [1e-2, 3e-3]}", "{grid: [1e-2, -1]}", "sweep.pretrain.optimizer.lr", "-1")


def test_range_in_a_grid_search(sweep_file):
    refuse(sweep_file, "{grid: [1e-2, 3e-3]}", "{loguniform: [1e-3, 1e-2]}", "random or optuna")


def test_bounds_in_order(sweep_file):
    refuse(sweep_file, "{grid: [1e-2, 3e-3]}", "{uniform: [2, 1]}", "low below high")


def test_random_points_do_not_depend_on_their_number(sweep_file):
    text = TINY.replace("{grid: [1e-2, 3e-3]}", "{loguniform: [1e-3, 1e-2]}")
    few = load(sweep_file(text + "search: {name: random, num_trials: 3}\n"))
    many = load(sweep_file(text + "search: {name: random, num_trials: 8}\n"))
    assert list(few.points()) == list(many.points())[:3]


def test_named_values_may_have_any_shape(sweep_file):
    named = "{grid: {hot: {name: adamw, lr: 0.1}, sgd: {name: sgd, lr: 0.1}}}"
    space = load(
        sweep_file(TINY.replace("pretrain.optimizer.lr: {grid: [1e-2, 3e-3]}", f"pretrain.optimizer: {named}"))
    )
    points = list(space.points())
    assert points == [{"pretrain.optimizer": "hot"}, {"pretrain.optimizer": "sgd"}]
    assert space.trial(points[1], 0).stages[1].spec.recipe.optimizer.name == "sgd"


def test_task_that_does_not_fit_the_corpus(sweep_file, tmp_path):
    (tmp_path / "a.jsonl").write_text('{"question": "q", "answers": ["a"]}\n' * 2)
    task = "span: {form: qa, train: a.jsonl, test: a.jsonl}"
    refuse(sweep_file, "span: {form: pcfg_span, span: 2, num_train: 40, num_valid: 20, num_test: 20}", task, "pcfg")


def test_span_that_the_grammar_has_not(sweep_file):
    refuse(sweep_file, "span: 2,", "span: 3,", "sft.tasks.span.span: 3 is no span", "[1, 2, 4]")


def test_missing_data_file(sweep_file, tmp_path):
    text = TINY[: TINY.index("  data:")] + "  data: {name: text, domains: {a: {train: nowhere/*.txt}}}\n"
    text += TINY[TINY.index("  model:") :]
    with pytest.raises(SpaceError, match=r"pretrain\.data\.domains\.a\.train: no file matches 'nowhere/\*\.txt'"):
        load(sweep_file(text))


def test_a_folder_is_no_file(sweep_file, tmp_path):
    (tmp_path / "here").mkdir()
    text = TINY[: TINY.index("  data:")] + "  data: {name: text, domains: {a: {train: here}}}\n"
    text += TINY[TINY.index("  model:") :]
    with pytest.raises(
        SpaceError, match=r"domains\.a\.train: 'here' is a folder; name files in it, .*'here/\*\.jsonl'"
    ):
        load(sweep_file(text))


def test_seeds_that_nothing_can_be_drawn_with(sweep_file):
    refuse(sweep_file, "name: tiny", "seeds: [0, -1]\nname: tiny", "seeds.1: must be 0 or more, not -1")
    refuse(sweep_file, "lrs: [", "seeds: [-1]\n  lrs: [", "sft.seeds.0: must be 0 or more, not -1")
    search = "search: {name: random, num_trials: 3, seed: -1}\nname: tiny"
    refuse(sweep_file, "name: tiny", search, "search.seed: must be 0 or more, not -1")


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("{", "a.jsonl:2: not JSON"),
        (
            '{"question": "q", "choices": ["x", "y"], "answer": 2}',
            "a.jsonl:2: field 'answer' must be",
        ),
        ('{"choices": ["x", "y"], "answer": 0}', "a.jsonl:2: field 'question'"),
    ],
)
def test_malformed_task_file(sweep_file, tmp_path, line, words):
    good = '{"question": "q", "choices": ["x", "y"], "answer": 1}'
    (tmp_path / "a.jsonl").write_text(f"{good}\n{line}\n")
    task = "span: {form: multiple_choice, train: a.jsonl, test: a.jsonl}"
    old = "span: {form: pcfg_span, span: 2, num_train: 40, num_valid: 20, num_test: 20}"
    refuse(sweep_file, old, task, words)


def test_empty_task_file(sweep_file, tmp_path):
    (tmp_path / "a.jsonl").write_text("\n")
    old = "span: {form: pcfg_span, span: 2, num_train: 40, num_valid: 20, num_test: 20}"
    refuse(sweep_file, old, "span: {form: qa, train: a.jsonl, test: a.jsonl}", "no examples")


def test_missing_sweep_file(tmp_path):
    with pytest.raises(SpaceError, match="no such file"):
        load(tmp_path / "none.yaml")


def test_what_is_filled_in_may_not_be_given(sweep_file):
    refuse(sweep_file, "max_units: 8}", "max_units: 8, mix: {a: 1.0}}", "mix is taken from pretrain")
    refuse(sweep_file, "{kshot: 2,", "{tasks: {}, kshot: 2,", "tasks is taken from pretrain and sft.tasks")


def test_indicators_without_tasks_are_refused(sweep_file):
    text = TINY[: TINY.index("sft:")]
    with pytest.raises(SpaceError, match="indicators are scores of the tasks of sft: add sft, or remove indicators"):
        load(sweep_file(text))


REPLICATES = "replicates: {seeds: [3, 4], of: {pretrain.optimizer.lr: [3e-3]}}\nsweep:"


def test_some_variants_run_under_further_seeds(sweep_file):
    text = TINY.replace("sweep:", REPLICATES)
    lrs = [(trial.point["pretrain.optimizer.lr"], trial.seed) for trial in load(sweep_file(text)).trials()]
    assert lrs == [(1e-2, 0), (3e-3, 0), (3e-3, 3), (3e-3, 4)]
    same = (
        load(sweep_file(text)).trials(),
        load(sweep_file(TINY.replace("name: tiny", "seeds: [0, 3, 4]\nname: tiny"))).trials(),
    )
    assert {trial.id for trial in same[0]} < {trial.id for trial in same[1]}


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("[3e-3]}", "[1e-5]}", "replicates.of.pretrain.optimizer.lr: pretrain.optimizer.lr takes no 1e-05"),
        ("{pretrain.optimizer.lr: [3e-3]}", "{size: [3e-3]}", "replicates.of.size: no axis 'size'"),
        ("[3, 4]", "[0, 4]", "replicates.seeds: seeds has 0 already"),
        ("[3, 4]", "[4, 4]", "replicates.seeds: seeds [4, 4] holds one twice"),
        ("sweep:", "search: {name: random, num_trials: 2}\nsweep:", "replicates: search.name random draws its points"),
    ],
)
def test_replicates_of_what_there_is_not_are_refused(sweep_file, old, new, said):
    refuse(sweep_file, "sweep:", REPLICATES.replace(old, new), said)


def test_optuna_needs_objectives_and_one_seed(sweep_file):
    refuse(sweep_file, "name: tiny", "search: {name: optuna, num_trials: 3}\nname: tiny", "objectives is missing")
    optuna = "search: {name: optuna, num_trials: 3, objectives: [{metric: sft/mean_score, mode: max}]}\nseeds: [0, 1]\n"
    refuse(sweep_file, "name: tiny", optuna + "name: tiny", "seeds holds one")


def test_resources_are_no_identity(sweep_file):
    one = load(sweep_file())
    two = load(sweep_file(TINY + "resources: {workers: 2, zero_stage: 2}\n"))
    point = next(iter(one.points()))
    assert one.trial(point, 0).id == two.trial(point, 0).id
    assert one.run_name() == two.run_name()


BY = """\
resources:
  by: pretrain.optimizer.lr
  default: {cpus_per_worker: 2, max_retries: 1}
  3e-3: {workers: 2, zero_stage: 2}
"""


def test_a_value_of_an_axis_may_have_a_gang_of_its_own(sweep_file):
    space = load(sweep_file(TINY + BY))
    resources = space.resources
    small, large = (resources.of(point) for point in space.points())
    assert (small.workers, small.zero_stage, small.cpus_per_worker, small.max_retries) == (1, 0, 2, 1)
    assert (large.workers, large.zero_stage, large.cpus_per_worker, large.max_retries) == (2, 2, 2, 1)
    assert resources.every == (small, large)
    assert resources.of({}) == small
    plain = load(sweep_file())
    assert [space.trial(point, 0).id for point in space.points()] == [
        plain.trial(point, 0).id for point in plain.points()
    ]
    assert space.run_name() == plain.run_name()


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("  by: pretrain.optimizer.lr", "  by: pretrain.optimizer.lrs", "tiny.yaml:21: resources.by: no axis"),
        ("3e-3:", "4e-3:", "tiny.yaml:23: resources.4e-3: pretrain.optimizer.lr takes no '4e-3'; values: 0.01, 0.003"),
        ("workers: 2", "workerz: 2", "workerz: no field 'workerz', did you mean 'workers'"),
        ("workers: 2", "max_retries: 2", "max_retries is the whole run's: set it in default"),
        ("workers: 2", "gpus_per_worker: 1", "gpus_per_worker 1 beside 0 in default"),
        ("workers: 2", "workers: 2, gpus_per_worker: 0.5", "workers 2 with gpus_per_worker 0.5: N"),
        ("max_retries: 1", "max_retriez: 1", "resources.default.max_retriez"),
    ],
)
def test_gangs_by_an_axis_are_checked(sweep_file, old, new, said):
    assert old in BY
    with pytest.raises(SpaceError) as caught:
        load(sweep_file(TINY + BY.replace(old, new)))
    assert said in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


def test_another_checkpoint_leaves_the_others_ids(sweep_file):
    point = {"pretrain.optimizer.lr": 0.01}
    before = {stage.id for stage in load(sweep_file()).trial(point, 0).stages}
    after = {stage.id for stage in load(sweep_file(TINY.replace("[6, 12]", "[6, 9, 12]"))).trial(point, 0).stages}
    assert before < after


@pytest.mark.parametrize("name", ["heldout/ppl_pcfg", "flatness/hessian_trace", "sft/span/score", "sft/mean_score"])
def test_metrics_that_a_search_may_ask_for(sweep_file, name):
    search = f"search: {{name: optuna, num_trials: 3, objectives: [{{metric: {name}, mode: max}}]}}\n"
    assert load(sweep_file(TINY + search)).declared.search.objectives[0].metric == name


def test_metrics_that_no_stage_reports(sweep_file):
    search = "search:\n  name: optuna\n  num_trials: 3\n  objectives:\n    - {metric: heldout/pppl, mode: min}\n"
    with pytest.raises(SpaceError) as caught:
        load(sweep_file(TINY + search + "  scheduler: {name: asha, metric: sft/meen_score, mode: max}\n"))
    first, second = str(caught.value).splitlines()
    assert "tiny.yaml:24: search.objectives.0.metric: no stage of this sweep reports 'heldout/pppl'" in first
    assert "did you mean: heldout/ppl" in first
    assert "search.scheduler.metric" in second
    assert "did you mean: sft/mean_score" in second


PREFIXES = "sweep:\n  pretrain.objective: {grid: {plain: {name: causal_lm}, prefix: {name: prefix_lm}}}\n"


@pytest.mark.parametrize(
    ("axis", "goal"),
    [
        (PREFIXES, "heldout/ppl"),
        (PREFIXES, "flatness/hessian_trace"),
        ("sweep:\n  pretrain.objective.attention: {choice: [both_ways, causal]}\n", "heldout/ppl_pcfg"),
        # How much of the own loss is lost is of that loss, too, if not the scores of the same stages.
        (PREFIXES, "sft/mean_forgetting"),
        (PREFIXES, "sft/span/forgetting_nats_per_token"),
    ],
)
def test_a_search_compares_no_losses_of_different_objectives(sweep_file, axis, goal):
    search = f"search: {{name: optuna, num_trials: 3, objectives: [{{metric: {goal}, mode: min}}]}}\n"
    text = TINY.replace("sweep:\n", axis) + search
    if "attention" in axis:
        text = text.replace("  steps: 12", "  objective: {name: prefix_lm}\n  steps: 12")
    if "forgetting" in goal:
        text = text.replace("sft:\n", "sft:\n  forgetting: true\n")
    with pytest.raises(SpaceError) as caught:
        load(sweep_file(text))
    assert f"search.objectives.0.metric: {goal} would compare losses of 2 objectives" in str(caught.value)
    assert load(sweep_file(text.replace(goal, "sft/mean_score")))


def test_flatness_of_one_loss_compares_over_objectives(sweep_file):
    search = "search: {name: optuna, num_trials: 3, objectives: [{metric: flatness/hessian_trace, mode: min}]}\n"
    text = TINY.replace("sweep:\n", PREFIXES).replace("flatness: {", "flatness: {objective: causal_lm, ")
    assert load(sweep_file(text + search))


def steps_of(space, point) -> list[int]:
    return [stage.step for stage in space.trial(point, 0).stages if stage.kind == "pretrain"]


def test_checkpoints_as_parts_and_tokens_fit_every_batch_size(sweep_file):
    text = TINY.replace("  steps: 12", "  tokens: 480").replace("[6, 12]", '["1.2e2 tokens", 0.5, 1.0]')
    space = load(
        sweep_file(
            text.replace("pretrain.optimizer.lr: {grid: [1e-2, 3e-3]}", "pretrain.batch_sequences: {grid: [8, 4, 6]}")
        )
    )
    assert [steps_of(space, point) for point in space.points()] == [[3, 6, 12], [6, 12, 24], [4, 8, 16]]


def test_parts_of_a_trajectory_are_the_stages_of_its_steps(sweep_file):
    in_steps, in_parts = (load(sweep_file(TINY.replace("[6, 12]", given))) for given in ("[6, 12]", "[0.5, 1.0]"))
    assert in_steps.trial({}, 0).id == in_parts.trial({}, 0).id
    # Of another number of steps they are others: it is another sweep.
    assert in_steps.run_name() != in_parts.run_name()


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("[0.5, 6]", "checkpoints: 0.5 and 6 are both step 6 of 12"),
        ("[0.01, 0.02]", "checkpoints: 0.01 and 0.02 are both step 1 of 12"),
        ("[1.0, 6]", "checkpoints: 6 is step 6, and comes after 1.0, step 12; let them rise"),
        ("[1.5]", "checkpoints: 1.5, step 18, is not within 1 to 12"),
        ("[0.0]", "checkpoints: 0.0, step 0, is not within 1 to 12"),
        ('["2e9 tokens"]', "checkpoints: '2e9 tokens', step 50000000, is not within 1 to 12"),
        ('["half"]', "checkpoints: 'half' is none; write a step (300), a part (0.5) or tokens"),
        ("[[1]]", "pretrain.checkpoints.0: must be a number or a text, not the list [1]"),
    ],
)
def test_checkpoints_that_are_none(sweep_file, given, words):
    refuse(sweep_file, "[6, 12]", given, words)


def test_steps_beyond_the_last_checkpoint_are_warned_of(sweep_file):
    assert load(sweep_file()).warnings == ()
    (warning,) = load(sweep_file(TINY.replace("[6, 12]", "[6, 10]"))).warnings
    assert warning.startswith("tiny.yaml:10: pretrain.checkpoints: the last is step 10 of 12: the 2 after it are not")
    swept = TINY.replace("pretrain.optimizer.lr: {grid: [1e-2, 3e-3]}", "pretrain.steps: {grid: [12, 20]}")
    (warning,) = load(sweep_file(swept)).warnings
    assert "step 12 of 20 with pretrain.steps = 20" in warning


DOSES = "pretrain.objective.strength: [0.1, 0.2], pretrain.optimizer.lr: [1e-2, 3e-3]"
NAMED = "a: {name: adversary, strength: 0.1}, b: {name: adversary, strength: -0.1}"


@pytest.mark.parametrize(
    ("axis", "missed"),
    [
        ("pretrain.objective.strength: {grid: [0.1, 0.2]}", None),  # It gets 0 by itself.
        (f"doses: {{zip: {{{DOSES}}}}}", ": 0.1 / 0.01; 0.2 / 0.003;"),
        (f"doses: {{zip: {{{DOSES.replace('0.1,', '0,')}}}}}", ": 0.2 / 0.003;"),  # Whose rate is another.
        (f"doses: {{zip: {{{DOSES.replace('0.1,', '0,').replace(' 3e-3', ' 0.01')}}}}}", None),
        (f"pretrain.objective: {{grid: {{{NAMED}}}}}", ": a; b;"),
        (f"pretrain.objective: {{grid: {{{NAMED}, clm: {{name: causal_lm}}}}}}", ": a; b;"),
        (f"pretrain.objective: {{grid: {{{NAMED}, c: {{name: adversary, strength: 0}}}}}}", None),
        ("pretrain.optimizer.lr: {grid: [1e-2, 3e-3]}", ";"),
    ],
)
def test_doses_without_a_control_are_warned_of(sweep_file, axis, missed):
    text = TINY.replace("pretrain.optimizer.lr: {grid: [1e-2, 3e-3]}", axis)
    text = text.replace("  steps: 12", "  steps: 12\n  objective: {name: adversary, strength: 0.3}")
    warnings = load(sweep_file(text)).warnings
    assert len(warnings) == (missed is not None)
    if missed:
        at = "pretrain.objective" if missed == ";" else f"sweep.{axis.partition(':')[0]}"
        assert f": {at}: " in warnings[0]
        assert f"an adversary without a control{missed} no variant has strength 0 and is alike" in warnings[0]


def test_an_objective_of_another_kind_of_model_is_refused(sweep_file):
    refuse(
        sweep_file,
        "  steps: 12",
        "  steps: 12\n  objective: {name: masked_lm}",
        "tiny.yaml:2: pretrain: objective masked_lm needs a masked model, and llama is a causal one: change either",
    )


def test_flatness_on_samples_that_an_objective_cannot_draw_is_refused(sweep_file):
    text = TINY.replace("  steps: 12", "  steps: 12\n  objective: {name: prefix_lm}")
    path = sweep_file(text.replace("max_units: 8}", "max_units: 8, own_samples: 8}"))
    with pytest.raises(
        SpaceError, match=r"tiny.yaml:14: flatness.own_samples: 8: prefix_lm is no distribution of texts"
    ):
        expand(path)


@pytest.mark.parametrize(
    ("flatness", "said"),
    [("{rescaled: true}", "rescaled: True"), ("{shape: {geodesic_rho: 0.1}}", "shape.geodesic_rho: 0.1")],
)
def test_symmetries_that_are_not_known_are_refused_at_load(sweep_file, flatness, said):
    start, end = TINY.index("  model:"), TINY.index("\n", TINY.index("  model:"))
    fields = "{hidden_size: 16, intermediate_size: 32, num_hidden_layers: 1, num_attention_heads: 2}"
    model = f"  model: {{name: transformers, architecture: GPTNeoXForCausalLM, fields: {fields}}}"
    text = TINY[:start] + model + TINY[end:]
    flat = text.index("flatness:")
    text = text[:flat] + f"flatness: {flatness}" + text[text.index("\n", flat) :]
    with pytest.raises(SpaceError, match=f"flatness.{said}: the symmetries of GPTNeoXForCausalLM are not known"):
        load(sweep_file(text))


@pytest.mark.parametrize(("tied", "symmetries"), [(True, 1), (False, 2)])
def test_symmetries_of_an_output_layer_are_in_the_id_of_models_that_have_one(sweep_file, tied, symmetries):
    text = TINY.replace("max_units: 8}", "max_units: 8, rescaled: own}")
    space = load(sweep_file(text), [f"pretrain.model.tie_embeddings={str(tied).lower()}"])
    [spec, *_] = [stage.spec for stage in space.trial(next(space.points()), 0).stages if stage.kind == "flatness"]
    assert spec.symmetries == symmetries
    assert ("symmetries" in canonical(spec)) == (not tied)


def test_what_flatness_is_of_is_part_of_its_id_where_it_matters(sweep_file):
    """Not where the objective is causal_lm by itself: the same number by two names is computed once."""

    def flatness_ids(text):
        space = load(sweep_file(text))
        return {
            stage.id for point in space.points() for stage in space.trial(point, 0).stages if stage.kind == "flatness"
        }

    of_causal_lm = TINY.replace("max_units: 8}", "max_units: 8, objective: causal_lm}")
    assert flatness_ids(TINY) == flatness_ids(of_causal_lm)
    prefix = "  steps: 12\n  objective: {name: prefix_lm}"
    own, other = (flatness_ids(text.replace("  steps: 12", prefix)) for text in (TINY, of_causal_lm))
    assert len(own | other) == len(own) + len(other)


def test_a_masked_objective_goes_with_a_masked_model(sweep_file):
    text = TINY.replace("  model: {name: llama,", "  objective: {name: masked_lm, mask: one}\n  model: {name: bert,")
    stages = load(sweep_file(text)).trial({"pretrain.optimizer.lr": 0.01}, 0).stages
    specs = {stage.kind: stage.spec for stage in stages}
    assert specs["pretrain"].recipe.objective.mask == "one"
    assert specs["flatness"].loss == specs["heldout"].objective == specs["pretrain"].recipe.objective


def test_flatness_of_next_tokens_is_not_that_of_a_masked_model(sweep_file):
    text = TINY.replace("  model: {name: llama,", "  objective: {name: masked_lm}\n  model: {name: bert,")
    path = sweep_file(text.replace("max_units: 8}", "max_units: 8, objective: causal_lm}"))
    with pytest.raises(SpaceError, match=r"flatness\.objective: causal_lm: masked_lm trains a masked model"):
        load(path)


@pytest.mark.parametrize(("gpus", "precision"), [(0, "fp32"), (1, "bf16")])
def test_brief_fine_tunings_are_told_apart_by_their_numbers_too(sweep_file, gpus, precision):
    text = f"{TINY}updates: {{}}\nearly_sft: {{}}\nresources: {{workers: 1, gpus_per_worker: {gpus}}}\n"
    stages = load(sweep_file(text)).trial({"pretrain.optimizer.lr": 0.01}, 0).stages
    specs = [stage.spec for stage in stages if stage.kind in ("updates", "early_sft", "sft")]
    assert {spec.hyperparameters.precision for spec in specs} == {precision}
