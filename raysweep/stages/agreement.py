"""How far the gradients of a checkpoint's domains agree, on held-out text."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Annotated, ClassVar

import numpy as np
from pydantic import Field

from raysweep.costs import Size
from raysweep.data.corpora import Corpus
from raysweep.data.packing import Tokens
from raysweep.errors import DataError, SpaceError
from raysweep.memory import Step, training_bytes
from raysweep.objectives.families import Objective
from raysweep.resources import Resources
from raysweep.spec import Metric, Provenance
from raysweep.stages.base import StageSpec, Subject
from raysweep.stages.heldout import DRAW
from raysweep.stages.specials import checkpoint_specials
from raysweep.train.checkpoints import load_model
from raysweep.train.evaluate import BATCH
from raysweep.worker import Worker

if TYPE_CHECKING:
    import torch

    Halves = tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]


class Agreement(StageSpec):
    """The cosine between the gradients of each two domains' mean losses, and its mean over pairs of domains.

    Domains whose gradients agree have minima closer together (the idea of Chen et al., 2026, arXiv 2604.09258). With
    a1 and a2 the gradients of the two halves of a domain's sequences, and a their mean, the cosine is
    a.b / sqrt(a1.a2 b1.b2): noise of halves that share no sequence is independent, so that each product is unbiased,
    where |a| |b| would be too large and the cosine too near 0. It may leave [-1, 1], and is NaN where noise is all
    there is and a1.a2 is not above 0.
    """

    kind: ClassVar[str] = "agreement"
    wide: ClassVar[bool] = False
    reads_text: ClassVar[bool] = True
    filled: ClassVar[frozenset[str]] = frozenset({"sequence_length", "loss", "num_domains"})

    num_sequences: Annotated[int, Field(ge=2)] = 128
    """Held-out sequences of each domain, as far as there are so many."""
    sequence_length: int = 0
    """Tokens of a sequence; filled from pretrain."""
    loss: Objective | None = None
    """Whose gradients they are; filled from pretrain."""
    num_domains: Annotated[int, Provenance()] = 0
    """Filled from pretrain, for plans of memory."""

    def bind(self, subject: Subject) -> Agreement:
        """With the text's sequence length and the objective."""
        if len(subject.corpus.domains) < 2:
            raise SpaceError(f"agreement compares domains, and data {subject.corpus.name} has one: remove agreement")
        return self.with_(  # type: ignore[no-any-return]
            sequence_length=subject.sequence_length,
            loss=subject.objective.measured,
            num_domains=len(subject.corpus.domains),
        )

    @property
    def loss_of(self) -> Objective | None:
        """`loss`."""
        return self.loss

    def run(self, inputs: Mapping[str, Path], out: Path, worker: Worker) -> dict[str, float]:
        """A cosine of each pair of domains, and their mean.

        Raises:
            DataError: if a domain has one held-out sequence alone.
        """
        from raysweep.train.gradients import gradient

        assert self.loss
        model = load_model(inputs["checkpoint"]).to(worker.device).eval()
        tokens, specials = Tokens(inputs["tokens"]), checkpoint_specials(inputs["checkpoint"], self.loss)
        # Not beside the model: of seven domains they are 14 times its weights.
        gradients: dict[str, Halves] = {}
        for domain in sorted(tokens.domains):
            ids = tokens.valid(domain, sequence_length=self.sequence_length, max_sequences=self.num_sequences)
            if len(ids) < 2:
                raise DataError(
                    f"domain {domain!r} has one held-out sequence of {self.sequence_length} tokens; agreement takes "
                    "two: give it more text, or a smaller pretrain.sequence_length"
                )
            rows = self.loss.prepare(ids, np.random.default_rng([DRAW, *domain.encode()]), specials)
            one, other = ({name: each[half::2] for name, each in rows.items()} for half in range(2))
            one_half, other_half = (_on_host(gradient(model, half, self.loss)) for half in (one, other))
            gradients[domain] = one_half, other_half
        names = list(gradients)
        found = cosines(list(gradients.values()), device=worker.device)
        metrics = {f"cosine_{names[left]}_{names[right]}": value for (left, right), value in found.items()}
        return metrics | {"mean_cosine": fmean(metrics.values())}

    def metrics(self, corpus: Corpus) -> tuple[Metric, ...]:
        """The mean is an indicator; single pairs say where it comes from."""
        pairs = itertools.combinations(sorted(corpus.domains), 2)
        return (Metric("mean_cosine", "max"), *(Metric(f"cosine_{left}_{right}") for left, right in pairs))

    def flops(self, size: Size, corpus: Corpus) -> float:
        """A gradient over each domain's sequences."""
        return size.gradient_flops(len(corpus.domains) * self.num_sequences * self._length, self._length)

    def memory_bytes(self, size: Size, resources: Resources) -> int:
        """Those of a gradient's pass; and, without a GPU, two gradients of each domain."""
        on_gpu = resources.gpus_per_worker > 0
        tokens = min(BATCH, -(-self.num_sequences // 2)) * self._length
        kept = 0 if on_gpu else 2 * self.num_domains
        return training_bytes(size, Step(tokens=tokens, logit_tokens=tokens, optimizer_floats=kept, on_gpu=on_gpu))

    def host_bytes(self, size: Size, resources: Resources) -> int:
        """The model as it is loaded, and two gradients of each domain."""
        return size.weights_bytes * (1 + 2 * self.num_domains)

    def disk_bytes(self, size: Size) -> int:
        """None: its numbers stand in its record."""
        return 0

    @property
    def _length(self) -> int:
        return self.loss.input_length(self.sequence_length) if self.loss else self.sequence_length


def cosines(gradients: Sequence[Halves], *, device: str = "cpu") -> dict[tuple[int, int], float]:
    """Of each two, between the means of two pairs of independent gradients; see `Agreement`.

    Args:
        gradients: two of each domain, by the name of a weight.
        device: where products are taken, of one weight's parts at a time.

    >>> one, two, other = ({"w": torch.tensor(row)} for row in ([1.0, 0.0], [3.0, 0.0], [0.0, 2.0]))
    >>> cosines([(one, two), (one, one), (other, other)])
    {(0, 1): 1.1547005383792517, (0, 2): 0.0, (1, 2): 0.0}
    """
    halves = [half for both in gradients for half in both]
    parts: dict[tuple[int, int], list[float]] = {pair: [] for pair in itertools.combinations(range(len(halves)), 2)}
    for name in halves[0]:
        there = [half[name].to(device).double() for half in halves]
        for (left, right), products in parts.items():
            products.append((there[left] * there[right]).sum().item())
    dot = {pair: math.fsum(products) for pair, products in parts.items()}
    found = {}
    for left, right in itertools.combinations(range(len(gradients)), 2):
        between = fmean(dot[2 * left + i, 2 * right + j] for i in range(2) for j in range(2))
        sizes = [dot[2 * each, 2 * each + 1] for each in (left, right)]
        found[left, right] = between / math.sqrt(sizes[0] * sizes[1]) if min(sizes) > 0 else math.nan
    return found


def _on_host(gradient: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: part.cpu() for name, part in gradient.items()}
