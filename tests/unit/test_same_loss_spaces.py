"""The shipped studies, without running them: in three sizes; bases are trained once and finished in many ways."""

import os

import pytest
from shipped import FOLDER, presets
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from raysweep.estimates import estimate
from raysweep.objectives.adversary import Adversary
from raysweep.space import load
from raysweep.train.models import Llama


@pytest.mark.parametrize(
    ("name", "ways", "others", "doses"),
    [("same_loss_hmm", 7, 2, {-0.05, 0.06, 0.1}), ("same_loss_pcfg", 14, 0, {-0.05, 0.03, 0.05, 0.1})],
)
def test_every_base_is_trained_once_and_finished_in_many_ways(name, ways, others, doses):
    space = load(FOLDER / f"{name}.yaml")
    trials = [space.trial(point, seed) for point in space.points() for seed in space.declared.seeds]
    ends = [[stage for stage in trial.stages if stage.kind == "pretrain"] for trial in trials]
    finishes_of = {base.id: [finish for other, finish in ends if other == base] for base, _ in ends}
    # Three of the size that is finished in many ways, and three of each other size.
    assert sorted(map(len, finishes_of.values())) == [1] * 3 * others + [ways] * 3
    assert len({finish.id for _, finish in ends}) == len(trials) == 3 * (ways + others)
    finishes = [finish.spec.recipe for _, finish in ends]
    assert all(isinstance(recipe.objective, Adversary) for recipe in finishes)
    strengths = [recipe.objective.strength for recipe in finishes]
    assert {strength for strength in strengths if strength} == doses
    # The control is a dose's own recipe with a strength of 0; all are measured by the loss that is kept.
    alike = [recipe.with_(objective=recipe.objective.with_(strength=0.0)) for recipe in finishes]
    assert alike.count(alike[0]) == 3 * (1 + len(doses))
    heldout = [stage for trial in trials for stage in trial.stages if stage.kind == "heldout"]
    assert {stage.spec.loss_of.name for stage in heldout} == {"causal_lm"}


@pytest.mark.parametrize(
    ("name", "millions"),
    [
        ("theory", [0.0, 0.0, 0.0]),
        ("same_loss_hmm", [0.1, 4.8, 21.4]),
        ("same_loss_pcfg", [0.1, 3.2, 14.3]),
        pytest.param("same_loss_sampled", [0.2, 31.7, 113.3], marks=pytest.mark.data),
    ],
)
def test_studies_plan_at_every_size(store, tmp_path, monkeypatch, name, millions):
    if name == "same_loss_sampled":
        if "RAYSWEEP_DATA" not in os.environ:
            pytest.skip("RAYSWEEP_DATA names no data pack")
        teacher(tmp_path)
        monkeypatch.setenv("RAYSWEEP_TEACHER", str(tmp_path))
    spaces = {preset: load(FOLDER / f"{name}.yaml", overrides) for preset, overrides in presets(name).items()}
    plans = {preset: estimate(space, store, mfu=0.5, peak_flops=1e12) for preset, space in spaces.items()}
    assert [round(plans[size].num_parameters[1] / 1e6, 1) for size in ("cpu", "gpu", "paper")] == millions


@pytest.mark.parametrize("name", ["same_loss_hmm", "same_loss_pcfg"])
def test_larger_models_are_fine_tuned_at_lower_rates_too(name):
    plans = {
        preset: load(FOLDER / f"{name}.yaml", presets(name)[preset]).declared for preset in ("cpu", "gpu", "paper")
    }
    rates = {preset: plan.sft.lrs for preset, plan in plans.items()}
    assert rates["gpu"] == rates["paper"] == (1e-4, 3e-4, *rates["cpu"])
    assert {(plans[preset].early_sft.lr, plans[preset].updates.lr) for preset in ("gpu", "paper")} == {(1e-3, 1e-3)}


@pytest.mark.parametrize("name", ["same_loss_hmm", "same_loss_pcfg"])
def test_other_sentences_are_asked_of_the_same_checkpoints(name):
    """Whatever is measured of the weights alone is the same, too."""
    plain, ood = (load(FOLDER / f"{name}.yaml", presets(name)[preset]) for preset in ("cpu", "ood"))
    anew = {
        kind
        for point in plain.points()
        for one, other in zip(plain.trial(point, 0).stages, ood.trial(point, 0).stages, strict=True)
        for kind in ({one.kind} if one.id != other.id else set())
    }
    assert anew == {"probes", "early_sft", "updates", "sft"}


@pytest.mark.parametrize("name", ["same_loss_hmm", "same_loss_pcfg"])
def test_harder_tasks_have_few_labels_of_each_seeds_own(name):
    plain, harder = (load(FOLDER / f"{name}.yaml", presets(name)[preset]).declared for preset in ("cpu", "harder"))
    for before, given in ((plain.sft, harder.sft), (plain.early_sft, harder.early_sft)):
        was, now = before.hyperparameters, given.hyperparameters
        assert now.max_examples == 64 == was.max_examples / 4
        assert now.epochs * now.max_examples == was.epochs * was.max_examples
    assert harder.sft.hyperparameters.examples == "by_seed"
    if name == "same_loss_pcfg":
        assert all(task.place is not None for task in harder.sft.tasks.values())


@pytest.mark.parametrize(
    ("name", "preset", "num_doses"),
    [
        ("same_loss_hmm", "doses", 8),
        ("same_loss_hmm", "few-directions", 5),
        ("same_loss_pcfg", "all-directions", 8),
    ],
)
def test_other_doses_begin_with_the_studys_own_bases(name, preset, num_doses):
    plain, doses = (load(FOLDER / f"{name}.yaml", presets(name)[which]) for which in ("cpu", preset))
    assert doses.warnings == ()  # There is a control among them.
    assert len(list(doses.points())) == num_doses
    bases = [
        {
            stage.inputs["start"]
            for point in space.points()
            for stage in space.trial(point, 0).stages
            if "start" in stage.inputs
        }
        for space in (plain, doses)
    ]
    assert len(bases[1]) == 1
    assert bases[1] <= bases[0]  # Of which models of other sizes have their own.


def test_the_whole_study_has_all_checkpoints_of_the_file_and_more():
    file, whole = (load(FOLDER / "same_loss_hmm.yaml", presets("same_loss_hmm")[which]) for which in ("cpu", "whole"))
    ends = [
        {stage.id for point in space.points() for stage in space.trial(point, 0).stages if stage.kind == "pretrain"}
        for space in (file, whole)
    ]
    assert ends[0] < ends[1]
    assert set(file.declared.sft.tasks) < set(whole.declared.sft.tasks)


def teacher(folder):
    """A causal model that writes text, of 64 words."""
    Llama(hidden_size=16, num_layers=1, num_heads=2).build(vocab_size=64, sequence_length=32, seed=0).save_pretrained(
        folder
    )
    words = Tokenizer(WordLevel({f"w{number}": number for number in range(64)}, unk_token="w0"))
    PreTrainedTokenizerFast(tokenizer_object=words, bos_token="w0", eos_token="w0").save_pretrained(folder)
