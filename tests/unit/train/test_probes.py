"""Linear probes: fits at their minimum, draws that share nothing, and what they read of known features."""

import pytest
import torch
import torch.nn.functional as F
from pydantic import ValidationError

from raysweep.data.hmm import HMM
from raysweep.errors import SpaceError
from raysweep.objectives.causal_lm import CausalLM
from raysweep.stages.base import Subject
from raysweep.stages.probes import PENALTIES, RIDGE, Probes, fits, ridge
from raysweep.tasks.base import Features
from raysweep.tasks.states import HMMState
from raysweep.train.models import Llama

CHAIN = HMM(vocabulary=5, num_states=3, sentence_length=4)


def draw_of(num: int, seed: int, *, noise: float = 0.0) -> Features:
    """Labels of three classes that one linear map of eight features tells, but for noise."""
    generator = torch.Generator().manual_seed(seed)
    states = torch.randn(num, 8, generator=generator)
    rule = torch.randn(8, 3, generator=torch.Generator().manual_seed(9))
    return Features(states, (states @ rule + noise * torch.randn(num, 3, generator=generator)).argmax(dim=1))


def test_each_fit_is_the_minimum_of_its_penalised_loss():
    states, labels = draw_of(60, seed=0, noise=1.0)
    for penalty, found in zip(PENALTIES, fits(states, labels, num_classes=3), strict=True):
        weights = found.double().requires_grad_()
        logits = F.pad(states, (0, 1), value=1.0).double() @ weights
        (F.cross_entropy(logits, labels) + penalty / 2 * weights[:-1].square().sum()).backward()
        # Convex, so a gradient of zero is the minimum; its tolerance is 1e-4.
        assert weights.grad.abs().max() < 1e-3


def test_more_labels_tell_more_and_draws_share_no_label_and_no_example():
    train, valid, test = (draw_of(num, seed, noise=0.5) for seed, num in enumerate((1000, 200, 1000)))
    probes = Probes(num_labels=(20, 200), num_draws=5)
    given = {"num_classes": 3, "train": train, "valid": valid, "test": test}
    few, many, every = (probes._scores(**given, num_labels=num) for num in (20, 200, 1000))
    assert sum(few) < sum(many)
    assert len(set(many)) > 1
    assert len(set(every)) > 1  # Of all labels the probe is one; examples to score are not.
    # Of a draw alone: other labels and other examples to score leave its number as it is.
    order = torch.randperm(1000, generator=torch.Generator().manual_seed(0))
    labels, tested = train.labels.clone(), test.labels.clone()
    labels[order[200:]] = 0
    tested[torch.arange(1000) % 5 != 0] = 0
    changed = {"train": Features(train.states, labels), "test": Features(test.states, tested)}
    again = probes._scores(**given | changed, num_labels=200)
    assert again[0] == many[0]
    assert again[1] != many[1]


def test_ridge_is_the_regression_of_nearly_the_least_norm():
    states, labels = draw_of(6, seed=0)
    weights = ridge(states.double(), labels, num_classes=3)
    x, y = states.double(), F.one_hot(labels, 3).double() - 1 / 3
    # The minimum of |X w - Y|^2 + lambda |w|^2: (X'X + lambda) w = X'Y.
    scale = RIDGE * torch.linalg.matrix_norm(x, 2) ** 2
    torch.testing.assert_close((x.T @ x + scale * torch.eye(8)) @ weights[:-1], x.T @ y, rtol=1e-9, atol=1e-9)
    assert not bool(weights[-1].any())
    assert ridge(states * torch.inf, labels, num_classes=3).isnan().all()


@pytest.mark.parametrize("num", [2, 3, 4, 6])
def test_the_least_norm_head_on_transferable_features_fails_only_where_all_labels_are_of_one_class(num):
    """Paper 1's theorem 6.1: no error with probability 1 - 2^(1 - n), on labels that are the sign of one feature."""
    generator = torch.Generator().manual_seed(num)
    s = torch.randint(0, 3, (1000, num + 200), generator=generator) * 2 + 1
    s = s * (2 * torch.randint(0, 2, s.shape, generator=generator) - 1)
    states, labels = torch.stack([s.relu(), (-s).relu()], dim=-1).double(), (s > 0).long()
    perfect = 0
    for x, y in zip(states, labels, strict=True):
        weights = ridge(x[:num], y[:num], num_classes=2)
        # Of one class alone nothing is known of the other neuron: all of its examples tie.
        perfect += bool(((x[num:] @ weights[:-1]).diff(dim=1)[:, 0] * (2 * y[num:] - 1) > 0).all())
    chance = 1 - 2.0 ** (1 - num)
    assert abs(perfect / 1000 - chance) < 4 * (chance * (1 - chance) / 1000) ** 0.5


@pytest.mark.parametrize("is_mean", [False, True], ids=["all", "mean"])
def test_states_of_all_layers_are_those_of_one_pass(is_mean, monkeypatch):
    task = HMMState(form="hmm_state", position=2, num_train=300).bind(CHAIN)
    if is_mean:
        monkeypatch.setattr(HMMState, "pooling", "mean")
    model, passes = Llama(hidden_size=16, num_layers=2, num_heads=2).build(vocab_size=6, sequence_length=5, seed=0), []
    model.eval().base_model.register_forward_hook(lambda *_: passes.append(1))
    layers = (None, 0, 2, 1)
    every = task.features(model, None, "train", layers=layers)
    assert len(passes) == 3
    alone = [task.features(model, None, "train", layers=(layer,))[0] for layer in layers]
    for together, each in zip(every, alone, strict=True):
        assert torch.equal(together.states, each.states)
        assert torch.equal(together.labels, each.labels)
    assert not torch.equal(every[1].states, every[3].states)
    with pytest.raises(ValueError, match="layer 3: the model has 2 blocks"):
        task.features(model, None, "train", layers=(0, 3))


def test_labels_that_a_task_has_not_are_an_error():
    tasks = {"state": HMMState(form="hmm_state", position=2, num_train=100).bind(CHAIN)}
    with pytest.raises(SpaceError, match="200 labels: task state has 100 training examples; raise its num_train"):
        Probes(num_labels=(200,)).bind(Subject(CHAIN, CausalLM(), 5, tasks))
    two_blocks = Subject(CHAIN, CausalLM(), 5, tasks, model=Llama(hidden_size=16, num_layers=2, num_heads=2))
    assert Probes(num_labels=(64,), layers=(0, 2)).bind(two_blocks).layers == (0, 2)
    with pytest.raises(SpaceError, match="layers: 3: the model has 2 blocks; layers are 0 to 2"):
        Probes(num_labels=(64,), layers=(0, 3)).bind(two_blocks)
    with pytest.raises(ValidationError, match="give different numbers"):
        Probes(num_labels=(200, 200))
