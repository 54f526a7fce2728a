"""An optimizer that schedules, saved states, ZeRO or plans would get wrong is refused before it trains."""

from typing import ClassVar, Literal

import pytest
import torch

from raysweep.errors import StageError
from raysweep.train.optimizer_check import check_optimizer
from raysweep.train.optimizers import SGD, AdamW, Lion, Muon, OptimizerSpec


@pytest.mark.parametrize("is_cut", [False, True])
@pytest.mark.parametrize(
    "spec", [AdamW(lr=1e-3), SGD(name="sgd", lr=0.1), Lion(name="lion", lr=1e-3), Muon(name="muon", lr=1e-2)]
)
def test_those_of_the_family_pass(spec, is_cut):
    check_optimizer(spec, is_cut=is_cut)


class Stepped(torch.optim.Optimizer):
    """Plain gradient descent, with one mistake."""

    def __init__(self, weights, mistake: str, lr: float) -> None:
        super().__init__(weights, {"lr": lr})
        self.mistake, self.num_steps = mistake, 0

    @torch.no_grad()
    def step(self):
        self.num_steps += 1
        for group in self.param_groups:
            for weight in group["params"]:
                scale = group["lr"]
                if self.mistake == "deaf":
                    scale = 0.01
                elif self.mistake == "forgetful":  # A count that is in no weight's state.
                    scale /= self.num_steps
                elif self.mistake == "by norms":  # As LARS (You et al., 2017).
                    scale *= float(weight.norm() / weight.grad.norm())
                elif self.mistake == "shapes":
                    self.state[weight]["columns"] = weight.grad.sum(dim=0, keepdim=True)
                elif self.mistake == "heavy":
                    self.state[weight] |= {"first": torch.zeros_like(weight), "second": torch.zeros_like(weight)}
                elif self.mistake == "matrices" and weight.ndim == 1 and weight.numel() > 7:
                    raise IndexError("no columns")
                weight -= scale * weight.grad


class Wrong(OptimizerSpec):
    name: Literal["wrong"] = "wrong"
    lr: float = 0.1
    mistake: str
    state_floats: ClassVar[int] = 1

    def build(self, model):
        return Stepped(model.parameters(), self.mistake, self.lr)


@pytest.mark.parametrize(
    ("mistake", "is_cut", "said"),
    [
        ("deaf", False, "optimizer wrong: weights move at a rate of 0, so no schedule reaches it"),
        ("forgetful", False, "a resumed run takes other steps; keep what a step leaves in `state`"),
        ("shapes", False, r"state 'columns' of a weight \[7, 5\] is \[1, 5\]"),
        ("heavy", False, r"it keeps 2 numbers per parameter \(first, second\), and state_floats.* is 1"),
        ("by norms", True, "cut over ranks is stepped otherwise than a whole one; derive it from PartitionedOptimizer"),
        ("matrices", True, r"cannot step a part of a weight \(IndexError: no columns\)"),
    ],
)
def test_what_would_show_in_no_loss_is_refused(mistake, is_cut, said):
    with pytest.raises(StageError, match=said):
        check_optimizer(Wrong(mistake=mistake), is_cut=is_cut)


def test_what_steps_whole_weights_may_train_without_partitions():
    check_optimizer(Wrong(mistake="by norms"), is_cut=False)


def test_a_member_that_does_not_say_what_it_keeps_is_refused():
    with pytest.raises(TypeError, match="Silent lacks state_floats, which OptimizerSpec asks for"):

        class Silent(OptimizerSpec):
            name: Literal["silent"] = "silent"
            lr: float = 0.1
            build = AdamW.build
