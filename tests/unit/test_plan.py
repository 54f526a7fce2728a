"""Chains, legs, identity, costs."""

import hashlib
import json
import math
import pickle
from dataclasses import replace
from typing import ClassVar

import pytest
from pydantic import ValidationError
from tiny import TINY

from raysweep.costs import Size
from raysweep.curvature.cost import COST
from raysweep.declared import Declared
from raysweep.errors import SpaceError
from raysweep.estimates import ToWrite, estimate, size_of
from raysweep.finetuning import Finetuning
from raysweep.objectives.causal_lm import CausalLM
from raysweep.objectives.masked_lm import MaskedLM
from raysweep.objectives.span_corruption import SpanCorruption
from raysweep.plan import LADDER, Stage
from raysweep.progress import Progress
from raysweep.scores import Result, finetuning_runs, pick
from raysweep.space import load
from raysweep.spec import Metric, Neutral, Provenance, Spec, canonical, fingerprint
from raysweep.stages.base import StageSpec
from raysweep.stages.flatness import Flatness
from raysweep.stages.pretrain import Pretrain, Recipe
from raysweep.store import Store
from raysweep.tasks.spans import PCFGSpan
from raysweep.train.checkpoints import load_model
from raysweep.train.methods import Full
from raysweep.train.models import Llama
from raysweep.train.optimizers import SGD, AdamW
from raysweep.variants import SearchSpace


def test_a_chain_goes_checkpoint_by_checkpoint(tiny_space):
    trial = tiny_space.trial({"pretrain.optimizer.lr": 0.01}, 0)
    legs = [(step, [[stage.kind for stage in batch] for batch in batches]) for step, batches in trial.legs()]
    measured = [["pretrain"], ["heldout"], ["indicators"], ["flatness"], ["probe", "sft", "sft"]]
    assert legs == [(None, [["tokenize"]]), (6, measured), (12, measured)]
    seen = set()
    for stage in trial.stages:
        assert set(stage.inputs.values()) <= seen
        seen.add(stage.id)


def test_what_all_ranks_work_on_comes_first_and_what_they_share_is_one_batch(sweep_file):
    more = "enlarge: {model: {name: llama, hidden_size: 16, num_layers: 2, num_heads: 2}}\nprobes: {num_labels: [8]}\n"
    trial = load(sweep_file(TINY.replace("flatness:", f"{more}noise: {{num_sequences: 8}}\nflatness:"))).trial({}, 0)
    (_, (*wide, split)), *_ = list(trial.legs())[1:]
    kinds = [[stage.kind for stage in batch] for batch in wide]
    assert kinds == [["pretrain"], ["heldout"], ["indicators"], ["enlarge"], ["flatness"], ["noise"]]
    assert [stage.kind for stage in split] == ["probes", "probe", "sft", "sft"]


def test_equal_optimizers_of_other_kinds_have_other_ids(tiny_space):
    def id_of(optimizer):
        return fingerprint(tiny_space.declared.pretrain.with_(optimizer=optimizer))

    assert id_of(AdamW(lr=1e-3)) != id_of(SGD(name="sgd", lr=1e-3))
    assert id_of(AdamW(lr=1e-3)) == id_of(AdamW(lr=1e-3, betas=(0.9, 0.95)))


def test_fingerprint_is_of_the_canonical_form_as_json_writes_it(tiny_space):
    def plainly(value):
        text = json.dumps(canonical(value), sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
        return hashlib.sha256(text.encode()).hexdigest()[:12]

    odd = [0, -1, 10**30, True, None, 0.1, -0.0, 1e16, 1e-7, 5e-324, "", 'a"\\\n\x00\x7f é 漢 \U0001f600', (), [[]], {}]
    # Keys whose order is another with quotes around them, or as numbers.
    odd += [{"b": 1, "a": 2, "a!": 3, "": 4, 10: 5, 9: 6, '"': 7}, {"x": [{"y": (1.5, {"z": "é"})}]}]
    # Twice: of a spec, it is kept.
    for value in [*odd, tiny_space.declared] * 2:
        assert fingerprint(value) == plainly(value), value
    for stage in tiny_space.trial({}, 0).stages:
        assert stage.id == f"{stage.kind}-{plainly({'spec': stage.spec, 'inputs': dict(stage.inputs)})}"
    with pytest.raises(ValueError, match="not JSON compliant"):
        fingerprint({"lr": math.nan})
    with pytest.raises(TypeError, match="no stable form for set"):
        fingerprint({"lr": {1}})


def test_a_run_makes_each_trial_once_and_sends_none_along(tiny_space, tmp_path, monkeypatch):
    made = []
    trial = SearchSpace.trial
    monkeypatch.setattr(SearchSpace, "trial", lambda self, *given: made.append(given) or trial(self, *given))
    store = Store(tmp_path)
    Progress(tiny_space)
    ToWrite.of(tiny_space, store)
    estimate(tiny_space, store, mfu=1, peak_flops=1)
    # The third: columns are those of one trial for all learning rates.
    assert len(made) == 2 + 1
    again = pickle.loads(pickle.dumps(tiny_space))
    assert again.identity() == tiny_space.identity()
    assert not {"_trials", "resources"} & vars(again).keys()


def test_canonical_form_knows_neutral_and_provenance():
    from typing import Annotated, ClassVar

    class Old(Spec):
        lr: float

    class New(Spec):
        lr: float
        z_loss: Annotated[float, Neutral(0.0)] = 0.0
        path: Annotated[str, Provenance()] = "x"

    class Fixed(Old):
        VERSION: ClassVar[int] = 2

    assert fingerprint(Old(lr=1.0)) == fingerprint(New(lr=1.0, path="y"))
    assert fingerprint(Old(lr=1.0)) != fingerprint(New(lr=1.0, z_loss=0.1))
    assert fingerprint(Old(lr=1.0)) != fingerprint(Fixed(lr=1.0))
    with pytest.raises(TypeError, match="no stable form for set"):
        canonical({"a": {1, 2}})


def test_changed_copies_are_validated():
    with pytest.raises(ValidationError):
        AdamW(lr=1.0).with_(lr=-1.0)


def test_an_id_holds_the_inputs(tiny_space):
    stage = tiny_space.trial({}, 0).stages[1]
    assert Stage(stage.spec, {"tokens": "tokenize-other"}).id != stage.id
    assert Stage(stage.spec, dict(stage.inputs)).id == stage.id


def test_costs_add_up(tiny_space, store):
    plan = estimate(tiny_space, store, mfu=0.5, peak_flops=1e12)
    assert plan.num_variants == 2
    assert plan.stages == {
        "tokenize": 1,
        "pretrain": 4,
        "heldout": 4,
        "indicators": 4,
        "flatness": 4,
        "probe": 4,
        "sft": 8,
    }
    assert plan.stages_done == {}
    assert plan.tokens == 2 * 12 * 8 * 5
    assert plan.gpu_hours == pytest.approx(plan.flops / (0.5 * 1e12) / 3600)
    size = size_of(tiny_space.trial({}, 0))
    assert plan.flops > size.gradient_flops(plan.tokens, 5)
    assert plan.num_parameters == (size.num_parameters, size.num_parameters)


def test_optuna_plans_count_the_base(sweep_file, store):
    text = TINY.replace("{grid: [1e-2, 3e-3]}", "{loguniform: [1e-3, 1e-2]}")
    text += "search: {name: optuna, num_trials: 5, objectives: [{metric: sft/mean_score, mode: max}]}\n"
    plan = estimate(load(sweep_file(text)), store, mfu=0.5, peak_flops=1e12)
    assert plan.num_trials == 5
    assert plan.stages["pretrain"] == 10
    assert "Optuna" in plan.note


def test_flatness_counts_the_label_draws_that_parts_take():
    def draws(**given):
        with_parts, without = (
            Flatness(sequence_length=129, parts=parts, **given).predict()[0] for parts in (True, False)
        )
        return (with_parts - without) / (129 * COST["fisher"])

    assert draws(min_units=12) == pytest.approx(12)
    assert draws(rse=0.02, min_units=12) == pytest.approx(157 / 5)  # (0.25 / 0.02)^2 probes.
    assert draws(min_units=12, max_units=8) == pytest.approx(8)


def test_the_error_of_flatness_goes_by_what_is_predicted():
    def expected(objective, **given):
        return Flatness(sequence_length=129, loss=objective, max_units=16, **given).expected_rse

    one = MaskedLM(name="masked_lm", mask="one")
    assert expected(CausalLM()) == pytest.approx(0.25 / 4)  # 16 probes on 128 predicted tokens.
    assert expected(one) == pytest.approx(0.25 * 128**0.5 / 4)
    assert expected(one, batch_sequences=128) == pytest.approx(expected(CausalLM()))


class Norms(StageSpec):
    """A measurement as a contributor writes one: it takes nothing from pretraining but its checkpoints."""

    kind: ClassVar[str] = "norms"

    def run(self, inputs, out, worker):
        squares = (float(weight.square().sum()) for weight in load_model(inputs["checkpoint"]).parameters())
        return {"weights": sum(squares) ** 0.5}

    def metrics(self, corpus):
        return (Metric("weights", "min"),)

    def flops(self, size, corpus):
        return 2.0 * size.num_parameters

    def memory_bytes(self, size, resources):
        return size.weights_bytes

    def disk_bytes(self, size):
        return 0


class WithNorms(Declared):
    """A sweep file with a section for it."""

    norms: Norms | None = None


def test_a_measurement_is_its_file_and_its_section(tiny_space, store):
    without = tiny_space.declared
    sections = {name: getattr(without, name) for name in type(without).model_fields}
    space = replace(tiny_space, declared=WithNorms(**sections, norms=Norms()))
    trial = space.trial({}, 0)
    added = [stage for stage in trial.stages if stage.kind == "norms"]
    assert [dict(stage.inputs) for stage in added] == [{"checkpoint": stage.checkpoint} for stage in added]
    assert [stage for stage in trial.stages if stage not in added] == list(tiny_space.trial({}, 0).stages)
    assert set(space.metric_names()) - set(tiny_space.metric_names()) == {"norms/weights"}
    plan, before = (estimate(each, store, mfu=0.5, peak_flops=1e12) for each in (space, tiny_space))
    assert plan.flops - before.flops == pytest.approx(4 * 2 * plan.num_parameters[0])
    assert plan.stages == before.stages | {"norms": 4}


def test_held_out_rows_are_as_many_as_the_file_says(sweep_file):
    few, usual = load(sweep_file(TINY + "heldout: {max_sequences: 5}\n")), load(sweep_file())
    changed = [
        (stage, before)
        for stage, before in zip(few.trial({}, 0).stages, usual.trial({}, 0).stages, strict=True)
        if stage.id != before.id
    ]
    assert [(stage.kind, stage.spec, stage.inputs) for stage, _ in changed] == [
        ("heldout", before.spec.with_(max_sequences=5), before.inputs) for _, before in changed
    ]
    assert len(changed) == 2


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (("a/b",), r"task name 'a/b': use up to 64 letters"),
        (("",), r"task name ''"),
        (("x[/]",), r"task name 'x\[/\]'"),
    ],
)
def test_task_names_are_plain(names, words):
    task = PCFGSpan(form="pcfg_span", span=2)
    with pytest.raises(ValidationError, match=words):
        Finetuning(tasks=dict.fromkeys(names, task))
    assert Finetuning(tasks=dict.fromkeys(("arc", "arc_easy", "x", "x_valid", "mean", "b-2.c"), task))


def finished(trial, valid_score):
    """Results of all fine-tuning stages of a trial; None for a score: it diverged."""
    return {
        stage.id: Result(
            id=stage.id,
            kind="sft",
            status="diverged" if (valid := valid_score(stage.spec.lr)) is None else "done",
            metrics={} if valid is None else {"valid_score": valid, "score": valid},
            task=stage.task,
            lr=stage.spec.lr,
            seed=stage.spec.seed,
        )
        for stage in trial.stages
        if stage.kind == "sft"
    }


def widened_to_the_end(trial, valid_score):
    rounds = 0
    while (wider := trial.widened(finished(trial, valid_score))) is not trial:
        trial, rounds = wider, rounds + 1
        assert rounds <= len(LADDER)
    return trial


@pytest.fixture
def auto_trial(sweep_file):
    return load(sweep_file(TINY.replace("lrs: [1e-3, 1e-2]", "lrs: auto\n  seeds: [0, 1]"))).trial({}, 0)


def test_auto_rates_grow_until_the_best_is_inside(auto_trial):
    def peaked(best):
        return lambda lr: None if lr > 0.05 else math.exp(-abs(math.log(lr / best)))

    for best in (1e-5, 3e-4, 3e-3, 3e-2):
        trial = widened_to_the_end(auto_trial, peaked(best))
        assert trial.id == auto_trial.id
        for checkpoint in {stage.checkpoint for stage in trial.stages if stage.kind == "sft"}:
            results = finished(trial, peaked(best)).values()
            ids = {stage.id for stage in trial.stages if stage.checkpoint == checkpoint}
            picked = pick(finetuning_runs([result for result in results if result.id in ids], "span"))
            assert (picked.lr, len(picked.runs), picked.edge) == (best, 2, None)
        # Every stage once, each leg still in one piece.
        assert len({stage.id for stage in trial.stages}) == len(trial.stages)
        assert [step for step, _ in trial.legs()] == [None, 6, 12]
    inside = widened_to_the_end(auto_trial, peaked(3e-4))
    assert inside is auto_trial


def test_auto_rates_end_at_the_ladders_ends_and_wait_for_what_is_unfinished(auto_trial):
    flat = widened_to_the_end(auto_trial, lambda lr: 0.0)
    assert {stage.spec.lr for stage in flat.stages if stage.kind == "sft"} == set(LADDER)
    diverging = widened_to_the_end(auto_trial, lambda lr: None)
    assert min(stage.spec.lr for stage in diverging.stages if stage.kind == "sft") == LADDER[0]
    assert max(stage.spec.lr for stage in diverging.stages if stage.kind == "sft") == Full.first_lrs[-1]
    results = finished(auto_trial, lambda lr: lr)
    missing = next(iter(results))
    wider = auto_trial.widened({key: result for key, result in results.items() if key != missing})
    assert {stage.step for stage in wider.stages if stage.id in wider.added} == {12}


@pytest.mark.parametrize("likelihood", [False, True])
def test_auto_rates_go_on_along_a_plateau_of_scores(sweep_file, likelihood):
    """Scores of 200 examples that fine-tuning gave: of the first three rates the best is inside, far below the next."""
    text = TINY.replace("lrs: [1e-3, 1e-2]", f"lrs: auto\n  likelihood: {str(likelihood).lower()}")
    trial = load(sweep_file(text.replace("num_valid: 20", "num_valid: 200"))).trial({}, 0)
    scores = {1e-4: 0.55, 3e-4: 0.62, 1e-3: 0.615, 3e-3: 0.88, 1e-2: 0.84}
    rates = {stage.spec.lr for stage in widened_to_the_end(trial, scores.__getitem__).stages if stage.kind == "sft"}
    assert max(rates) == (1e-3 if likelihood else 1e-2)
    assert min(rates) == 1e-4


def test_auto_is_the_only_word_for_rates(sweep_file, store):
    with pytest.raises(SpaceError, match=r"sft\.lrs: write a list of rates, .*, or auto, not the text \"fast\""):
        load(sweep_file(TINY.replace("lrs: [1e-3, 1e-2]", "lrs: fast")))
    for given in ("[-1.0]", "[]"):
        with pytest.raises(SpaceError, match=r"sft\.lrs: \[.*\]: give one or more learning rates above 0, or auto"):
            load(sweep_file(TINY.replace("lrs: [1e-3, 1e-2]", f"lrs: {given}")))
    plan = estimate(load(sweep_file(TINY.replace("lrs: [1e-3, 1e-2]", "lrs: auto"))), store, mfu=0.5, peak_flops=1e12)
    assert plan.stages["sft"] == 12
    assert "at least" in plan.note


def test_costs_count_what_the_model_reads(grammar):
    """A row of span corruption is longer than its text; tokens are those of the text."""
    given = {"data": grammar, "model": Llama(), "optimizer": AdamW(lr=1e-3), "steps": 3, "batch_sequences": 2}
    causal = Recipe(sequence_length=5, **given)
    spans = Recipe(sequence_length=5, objective=SpanCorruption(name="span_corruption", num_sentinels=4), **given)
    assert (causal.input_length, spans.input_length) == (5, 8)
    size = Size(
        num_parameters=1000, num_layers=1, hidden_size=4, num_heads=2, inner_numbers=96, vocab_size=50, num_bytes=4000
    )
    stages = [Pretrain(recipe=recipe, seed=0, step=3) for recipe in (causal, spans)]
    assert [stage.pretraining_tokens for stage in stages] == [30, 30]
    flops = [stage.flops(size, grammar) for stage in stages]
    assert flops == [size.gradient_flops(3 * 2 * 5, 5), size.gradient_flops(3 * 2 * 8, 8)]
    flatness = [Flatness(sequence_length=5, loss=recipe.objective) for recipe in (causal, spans)]
    assert flatness[1].predict()[0] > flatness[0].predict()[0]
