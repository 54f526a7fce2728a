"""How a training is drawn to flat minima. To add a method: a spec that says what it changes, and its name below."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

import numpy as np
from pydantic import Field

from raysweep.objectives.base import IGNORED, Arrays, Ints, Specials
from raysweep.spec import Spec

if TYPE_CHECKING:
    import torch

    from raysweep.train.ascent import Step

Part = Annotated[float, Field(gt=0, le=1)]

AVERAGE = "average"
"""What keys of averages begin with, among the optimizer's states of a weight, with which they are saved and resumed."""


class FlatSpec(Spec):
    """A declared method, by what it changes of a training: nothing, as long as a member does not say so."""

    has_own_steps: ClassVar[bool] = False
    """Whether it takes gradients at other weights; see `take`."""
    needs_domains: ClassVar[bool] = False
    """Whether `Step.batch` has `domains` [n], the number of each row's."""

    name: str

    @property
    def passes(self) -> float:
        """Gradients of a whole batch that a step takes, on average."""
        return 1.0

    @property
    def saved_floats(self) -> int:
        """Numbers per parameter that are kept from step to step, beside the optimizer's; sharded as those are."""
        return 0

    @property
    def passing_floats(self) -> int:
        """Numbers per parameter that are held within a step; sharded as the optimizer's are."""
        return 0

    def relabel(self, rows: Arrays, draw: np.random.Generator, specials: Specials) -> Arrays:
        """The rows of a step as they are trained on: what is predicted may change, not where, nor what is read.

        Args:
            rows: what an objective has prepared; not to be changed.
            draw: made from the seed and the step, for this alone; what is drawn is the same on every rank.
            specials: as for `ObjectiveSpec.prepare`.
        """
        return rows

    def take(self, step: Step) -> tuple[torch.Tensor, torch.Tensor]:
        """Take a step: this rank's share of the loss at the weights before it, and the norm of what it goes along."""
        return step.plain()

    def end_step(
        self, tensors: Sequence[torch.Tensor], states: Sequence[dict[str, Any]], *, step: int, num_steps: int
    ) -> None:
        """See to averages of weights after step `step`, counted from 0.

        Args:
            tensors: what this rank steps.
            states: the optimizer's of each, where averages are kept, under keys that begin with `AVERAGE`.
            step, num_steps: of this phase.
        """

    def mean(self, states: Mapping[str, torch.Tensor]) -> torch.Tensor | None:
        """The average of a weight that a checkpoint has in its place, of its `states`; None: the weight itself."""
        return None


class LabelNoise(FlatSpec):
    """Some labels are others, drawn anew at each step (Blanc et al., 2020; Damian et al., 2021).

    Noise of the gradient stays where the loss is fitted, and drifts along minima towards those of a smaller trace of
    the Hessian. The loss of the curve is that of the noisy labels; held-out losses and flatness know of no noise.
    """

    name: Literal["label_noise"]
    """Which method."""
    probability: float = Field(default=0.1, gt=0, lt=1)
    """That a label is replaced by a word of the vocabulary, drawn evenly: at times by itself."""

    def relabel(self, rows: Arrays, draw: np.random.Generator, specials: Specials) -> Arrays:
        """See `FlatSpec.relabel`.

        >>> rows = {"input_ids": np.array([[7, 8, 9]]), "labels": np.array([[IGNORED, 8, 9]])}
        >>> noise = LabelNoise(name="label_noise", probability=0.999)
        >>> noise.relabel(rows, np.random.default_rng(0), Specials({}, 2))["labels"]
        array([[-100,    0,    0]])
        """
        labels, words = rows["labels"], specials.words
        replaced = (labels != IGNORED) & (draw.random(labels.shape) < self.probability)
        drawn: Any = words[draw.integers(len(words), size=labels.shape)]
        return rows | {"labels": np.where(replaced, drawn, labels)}


class _OneAverage(FlatSpec):
    """A checkpoint is one running average of the weights."""

    @property
    def saved_floats(self) -> int:
        """The average so far."""
        return 1

    def mean(self, states: Mapping[str, torch.Tensor]) -> torch.Tensor | None:
        """See `FlatSpec.mean`."""
        return states.get(AVERAGE)


class EMA(_OneAverage):
    """A checkpoint is an exponential moving average of the weights after each step (Polyak and Juditsky, 1992).

    a = decay a + (1 - decay) w, from the weights after the first step on. Training itself goes on with w, which the
    saved state has, and a later phase with the checkpoint, a.
    """

    name: Literal["ema"]
    """Which method."""
    decay: float = Field(default=0.99, gt=0, lt=1)
    """Part of the average that a step leaves: it is over some 1 / (1 - decay) steps."""

    def end_step(
        self, tensors: Sequence[torch.Tensor], states: Sequence[dict[str, Any]], *, step: int, num_steps: int
    ) -> None:
        """See `FlatSpec.end_step`."""
        _average(tensors, states, 1.0 if step == 0 else 1 - self.decay)


class SWA(_OneAverage):
    """A checkpoint is the mean of the weights over the end of training (Izmailov et al., 2018).

    Meant for a rate that stays high, such as a `constant` schedule; checkpoints before the first such step are weights
    as they are. Training itself goes on with the weights, which the saved state has.
    """

    name: Literal["swa"]
    """Which method."""
    start: float = Field(default=0.75, ge=0, lt=1)
    """Part of the phase's steps before the first that counts."""
    every: int = Field(default=1, ge=1)
    """Steps from one that counts to the next."""

    def end_step(
        self, tensors: Sequence[torch.Tensor], states: Sequence[dict[str, Any]], *, step: int, num_steps: int
    ) -> None:
        """See `FlatSpec.end_step`."""
        number, rest = divmod(step + 1 - round(self.start * num_steps), self.every)
        if number >= 1 and rest == 0:
            _average(tensors, states, 1 / number)


class LAWA(FlatSpec):
    """A checkpoint is the mean of the latest few weights, some steps apart (Kaddour, 2022).

    Training itself goes on with the weights, which the saved state has.
    """

    name: Literal["lawa"]
    """Which method."""
    num: int = Field(default=5, ge=2)
    """Weights that the mean is over, each of which is kept; fewer before there are as many."""
    every: int = Field(ge=1)
    """Steps from one of them to the next."""

    @property
    def saved_floats(self) -> int:
        """Each of the weights."""
        return self.num

    def end_step(
        self, tensors: Sequence[torch.Tensor], states: Sequence[dict[str, Any]], *, step: int, num_steps: int
    ) -> None:
        """See `FlatSpec.end_step`."""
        number, rest = divmod(step + 1, self.every)
        if number >= 1 and rest == 0:
            _average(tensors, states, 1.0, key=f"{AVERAGE}{number % self.num}")

    def mean(self, states: Mapping[str, torch.Tensor]) -> torch.Tensor | None:
        """See `FlatSpec.mean`."""
        kept = [states[key] for key in sorted(states) if key.startswith(AVERAGE)]
        return sum(kept[1:], start=kept[0]) / len(kept) if kept else None


def _average(
    tensors: Sequence[torch.Tensor], states: Sequence[dict[str, Any]], share: float, key: str = AVERAGE
) -> None:
    """Bring what is kept under `key` nearer to the weights by this share of the way; first, and at 1, it is them."""
    import torch

    if any(key not in state for state in states):
        for tensor, state in zip(tensors, states, strict=True):
            state[key] = tensor.detach().clone()
    else:
        torch._foreach_lerp_([state[key] for state in states], [each.detach() for each in tensors], share)


class _Ascending(FlatSpec):
    """Steps go down the gradient at the top of a ball around the weights, found by one step up."""

    has_own_steps: ClassVar[bool] = True

    every: int = Field(default=1, ge=1)
    """One step in so many is such; the others are plain."""
    part: Part = 1.0
    """Of the batch, the first rows of it, that the step up is of. With `every` or `part` it costs less than twice a
    plain step: 1 + part / every gradients."""

    @property
    def passes(self) -> float:
        """See `part`."""
        return 1 + self.part / self.every

    @property
    def passing_floats(self) -> int:
        """The weights that it comes back to."""
        return 1

    def _sharpness_aware(
        self, step: Step, *, rho: float, eta: float | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        from raysweep.train.ascent import sharpness_aware

        if step.number % self.every:
            return step.plain()
        return sharpness_aware(step, rho=rho, eta=eta, rows=_rows(step, self.part))


class SAM(_Ascending):
    """Sharpness-aware minimisation (Foret et al., 2021): down grad L(w + e), with e = rho grad L(w) / |grad L(w)|.

    Both gradients are of the global batch, so that e is the same however that is cut over ranks and micro-batches (the
    paper's e is of each accelerator's part, which is sharper). The curve has the loss at w.
    """

    name: Literal["sam"]
    """Which method."""
    rho: float = Field(default=0.05, gt=0)
    """Length of e over all weights together."""

    def take(self, step: Step) -> tuple[torch.Tensor, torch.Tensor]:
        """See `FlatSpec.take`."""
        return self._sharpness_aware(step, rho=self.rho)


class ASAM(_Ascending):
    """Adaptive SAM (Kwon et al., 2021): a weight moves in proportion to its size, so that rescaling changes nothing.

    With T = |w| + eta, elementwise, and g = grad L(w): down grad L(w + e), with e = rho T^2 g / |T g|.
    """

    name: Literal["asam"]
    """Which method."""
    rho: float = Field(default=0.5, gt=0)
    """Length of e / T."""
    eta: float = Field(default=0.01, ge=0)
    """By which a weight of 0 moves, too."""

    def take(self, step: Step) -> tuple[torch.Tensor, torch.Tensor]:
        """See `FlatSpec.take`."""
        return self._sharpness_aware(step, rho=self.rho, eta=self.eta)


class TracePenalty(FlatSpec):
    """L + weight T, where T estimates the trace of the Fisher matrix of the mean loss per token.

    T = N |s|^2, with s the mean over N tokens of grad -log p(y), each y drawn from the model's own prediction: over
    those draws it is unbiased for the trace, which for a softmax is that of the Gauss-Newton matrix too, as scores of
    different tokens have mean zero and are independent given what is read (Jastrzebski et al., 2021, penalise the same
    |s|^2). Its gradient 2 N H s is the difference of two gradients (Zhao et al., 2022):
    2 N |s| (s(w + rho s / |s|) - s(w)) / rho. It holds the drawn labels fixed, so it leaves out how the draws change
    with w, and is biased as a gradient of the trace; the difference is off by the order of rho.
    """

    has_own_steps: ClassVar[bool] = True
    # 2: labels are drawn by blocks of classes. 3: alike whatever the ranks and micro-batches.
    VERSION: ClassVar[int] = 3

    name: Literal["trace_penalty"]
    """Which method."""
    weight: float = Field(default=1e-3, gt=0)
    """Of the trace, which is in nats, beside the loss in nats per token."""
    rho: float = Field(default=0.01, gt=0)
    """Length of the move that the difference is over; in bfloat16, whose rounding hides short ones, rather 0.05."""
    part: Part = 0.5
    """Of the batch, the first rows of it, that the trace is estimated from: a step takes 1 + 2 part gradients."""

    @property
    def passes(self) -> float:
        """See `part`."""
        return 1 + 2 * self.part

    @property
    def passing_floats(self) -> int:
        """The weights that it comes back to, and two gradients."""
        return 3

    def take(self, step: Step) -> tuple[torch.Tensor, torch.Tensor]:
        """See `FlatSpec.take`."""
        from raysweep.train.ascent import trace_penalised

        return trace_penalised(step, weight=self.weight, rho=self.rho, rows=_rows(step, self.part))


class GradientAgreement(FlatSpec):
    """L - weight cos(a, b): a is the gradient of one domain's rows, b that of the others', domain after domain in turn.

    Minima of domains lie closer together where their gradients agree (the idea of Chen et al., 2026, arXiv 2604.09258;
    this is the plain cosine, not their optimizer). The cosine's gradient H_a (b/|b| - cos a/|a|) / |a| + H_b (a/|a| -
    cos b/|b|) / |b| is taken by differences of gradients over moves of length rho: 2 gradients of a batch in all. A
    batch that has one of the two sides only is stepped plainly.
    """

    has_own_steps: ClassVar[bool] = True
    needs_domains: ClassVar[bool] = True

    name: Literal["gradient_agreement"]
    """Which method."""
    weight: float = Field(default=0.1, gt=0)
    """Of the cosine, beside the loss in nats per token."""
    rho: float = Field(default=0.01, gt=0)
    """Length of the moves that differences are over; see `TracePenalty.rho`."""

    @property
    def passes(self) -> float:
        """Each side's at the weights and at a move."""
        return 2.0

    @property
    def passing_floats(self) -> int:
        """The weights that it comes back to, both sides' gradients and their sum."""
        return 4

    def take(self, step: Step) -> tuple[torch.Tensor, torch.Tensor]:
        """See `FlatSpec.take`."""
        from raysweep.train.ascent import agreeing

        domains = step.batch["domains"]
        is_one = domains == step.number % (domains.max() + 1)
        if is_one.all() or not is_one.any():
            return step.plain()
        return agreeing(step, weight=self.weight, rho=self.rho, is_one=is_one)


def _rows(step: Step, part: float) -> Ints | None:
    num = len(step.batch["input_ids"])
    return None if part == 1 else np.arange(math.ceil(part * num))


FlatMethod = Annotated[
    LabelNoise | EMA | SWA | LAWA | SAM | ASAM | TracePenalty | GradientAgreement, Field(discriminator="name")
]
