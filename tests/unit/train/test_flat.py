"""Methods for flat minima, each by a naive reference."""

import numpy as np
import pytest
import torch
from tiny import pretrain, recipe_of

from raysweep.costs import Size
from raysweep.data.hmm import HMM
from raysweep.objectives.adversary import Adversary
from raysweep.objectives.base import IGNORED, Specials
from raysweep.resources import Resources
from raysweep.stages.phases import Phase, segments
from raysweep.stages.pretrain import Pretrain
from raysweep.train.flat import LAWA, SAM, GradientAgreement, LabelNoise, TracePenalty

NOISE = LabelNoise(name="label_noise", probability=0.25)


def weights_of(folder):
    from safetensors.torch import load_file

    return load_file(folder / "model.safetensors")


def test_label_noise_replaces_its_part_of_the_labels_by_any_word():
    labels = np.full((400, 100), 7)
    labels[:, ::2] = IGNORED
    rows = {"input_ids": labels + 1, "labels": labels}
    noisy = NOISE.relabel(rows, np.random.default_rng(0), Specials({}, 12, reserved=(0, 3)))
    assert noisy["input_ids"] is rows["input_ids"]
    assert (noisy["labels"][:, ::2] == IGNORED).all()
    drawn, counts = np.unique(noisy["labels"][:, 1::2], return_counts=True)
    assert drawn.tolist() == [1, 2, 4, 5, 6, 7, 8, 9, 10, 11]
    # 20,000 labels, of which each other word takes a tenth of a quarter: 500 +- 4 x 22.
    assert np.abs(np.delete(counts, 5) - 500).max() < 88
    assert (labels[:, 1::2] == 7).all()


def test_label_noise_is_of_the_step_and_resumes_to_the_bit(grammar, tokens_dir, tmp_path):
    recipe = recipe_of(grammar, flat=NOISE)
    for name, step, state in (("whole", 12, None), ("half", 5, "state"), ("resumed", 12, "state")):
        pretrain(recipe, tokens_dir, tmp_path / name, step=step, state=state and tmp_path / state)
    pretrain(recipe.with_(flat=None), tokens_dir, tmp_path / "plain", step=12)
    whole, resumed, plain = (weights_of(tmp_path / name) for name in ("whole", "resumed", "plain"))
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    assert not torch.equal(whole["model.embed_tokens.weight"], plain["model.embed_tokens.weight"])


def test_a_phase_inherits_a_method_changes_it_or_ends_it(grammar):
    phases = [{"name": "a"}, {"name": "b", "flat": {"probability": 0.5}}, {"name": "c", "flat": None}]
    recipe = recipe_of(grammar, flat=NOISE, phases=tuple(Phase(steps=1, **each) for each in phases))
    found = [segment.recipe.flat for segment in segments(recipe)]
    assert found == [NOISE, NOISE, NOISE.with_(probability=0.5), None]


@pytest.mark.parametrize("probability", [0.0, 1.0])
def test_noise_on_no_label_or_all_is_refused(probability):
    with pytest.raises(ValueError, match="probability"):
        LabelNoise(name="label_noise", probability=probability)


def test_several_gradients_a_step_are_refused_where_the_loss_learns_from_each():
    hmm = HMM(num_words_total=16, num_states=3, sentence_length=4)
    with pytest.raises(ValueError, match="flat sam takes several gradients in a step, and objective adversary learns"):
        recipe_of(hmm, objective=Adversary(name="adversary", strength=0.1), flat=SAM(name="sam"))
    recipe_of(hmm, objective=Adversary(name="adversary", strength=0.1), flat=NOISE)


def test_domains_that_are_none_are_refused(grammar):
    with pytest.raises(ValueError, match=r"gradient_agreement compares domains, and data has one alone \(pcfg\)"):
        recipe_of(grammar, flat=GradientAgreement(name="gradient_agreement"))


def test_a_plan_counts_gradients_and_numbers_of_a_method(grammar):
    plain, size = recipe_of(grammar), Size(1000, 2, 16, 2, inner_numbers=64, vocab_size=16, num_bytes=4000)
    costs = {}
    for name, flat in {
        "plain": None,
        "sam": SAM(name="sam"),
        "cheap": SAM(name="sam", every=4, part=0.5),
        "penalty": TracePenalty(name="trace_penalty", part=0.5),
        "lawa": LAWA(name="lawa", num=3, every=1),
    }.items():
        stage = Pretrain(recipe=plain.with_(flat=flat), seed=0, step=12)
        costs[name] = (
            stage.flops(size, grammar),
            stage.state_bytes(size, Resources()),
            stage.training.optimizer_floats,
        )
    flops, state, floats = zip(*costs.values(), strict=True)
    assert [each / flops[0] for each in flops] == [1, 2, 1.125, 2, 1]
    assert state == (12_000, 12_000, 12_000, 12_000, 24_000)
    assert floats == (2, 3, 3, 5, 5)
