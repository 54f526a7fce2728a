"""Loss and perplexity of a checkpoint on held-out text, by the objective that it was pretrained with."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import numpy as np
from pydantic import Field, field_validator

from raysweep.costs import Size
from raysweep.data.corpora import Corpus, read_law
from raysweep.data.packing import Tokens
from raysweep.objectives.families import Objective
from raysweep.objectives.optimum import TabledLaw
from raysweep.resources import Resources
from raysweep.spec import Metric, Spec
from raysweep.stages.base import StageSpec
from raysweep.stages.specials import checkpoint_specials
from raysweep.train.checkpoints import load_model
from raysweep.train.evaluate import BATCH
from raysweep.worker import Worker

if TYPE_CHECKING:
    from raysweep.train.evaluate import HeldoutLosses

LOSSES = "losses.json"
"""The file of losses batch by batch, by which checkpoints are compared on the same text."""

# What an objective draws on held-out text comes from this, and not from the seed of a run.
DRAW = 5
# How far a held-out loss is above the lowest that any model can have, and the standard error of that.
ENTROPY_GAP = (
    Metric("entropy_gap_nats_per_token", "min", "nats/token"),
    Metric("entropy_gap_stderr", unit="nats/token"),
)


class HeldoutSection(Spec):
    """What a sweep file says of it; that it is measured goes without saying."""

    max_sequences: int = Field(ge=1)
    """Held-out sequences of each domain, as many as there are or spread evenly over them."""


class Heldout(StageSpec):
    """Held-out loss of a checkpoint, whether it was pretrained here or taken as it is.

    What the objective draws, and which sequences it reads, are the same for all models and all numbers of workers.
    """

    kind: ClassVar[str] = "heldout"
    # 2: the entropy gap is a divergence where it can be, without the chance of labels.
    VERSION: ClassVar[int] = 2
    reads_text: ClassVar[bool] = True

    objective: Objective
    """Whose loss it is."""
    mix: dict[str, float]
    """Domain -> its share of the mean loss."""
    sequence_length: int
    """Tokens of a sequence."""
    max_sequences: int = 256
    """Held-out sequences of each domain."""

    @field_validator("mix")
    @classmethod
    def _shares(cls, mix: dict[str, float]) -> dict[str, float]:
        if not math.isclose(total := sum(mix.values()), 1):
            raise ValueError(f"mix {mix}: shares of the domains sum to {total:g}, not 1; see CorpusSpec.mix")
        return mix

    @property
    def loss_of(self) -> Objective:
        """What the model was trained by."""
        return self.objective

    def run(self, inputs: Mapping[str, Path], out: Path, worker: Worker) -> dict[str, float]:
        """Losses are in nats per predicted token; each domain is read whole by one rank.

        `entropy_gap_nats_per_token`, where the text's law is known, is the loss above the lowest possible one of this
        objective on the same rows: where all conditionals are known, their mean divergence from the model's.
        `bits_per_byte` is of the text, where the loss is the text's own likelihood. Writes `LOSSES`.
        """
        from raysweep.train.evaluate import perplexity

        tokens = Tokens(inputs["tokens"])
        mine = self._measure(inputs["checkpoint"], tokens, worker)
        each = {name: pair for part in worker.gather(mine) for name, pair in part.items()}
        losses = {name: each[name][0].mean for name in sorted(each)}
        if worker.rank == 0:
            shares = {name: (self.mix.get(name, 0.0), each[name][0]) for name in losses}
            (out / LOSSES).write_text(
                json.dumps({name: {"share": s, **b.document()} for name, (s, b) in shares.items()})
            )
        mean = sum(share * losses[name] for name, share in self.mix.items())
        metrics = {"loss_nats_per_token": mean, "ppl": perplexity(mean)}
        metrics |= {f"ppl_{name}": perplexity(loss) for name, loss in losses.items()}
        for _, gap in each.values():
            if gap is not None:  # A corpus of a known law is one domain.
                metrics |= zip((metric.name for metric in ENTROPY_GAP), gap, strict=True)
        if self.objective.is_likelihood and all(tokens.meta.domains[name].valid_bytes for name in losses):
            metrics["bits_per_byte"] = self._bits_per_byte(losses, tokens)
        return metrics

    def metrics(self, corpus: Corpus) -> tuple[Metric, ...]:
        """Loss and perplexity, mixed and of each domain, and how far they are from the best where that is known."""
        is_known = corpus.knows_optimum(self.objective)
        has_bytes = self.objective.is_likelihood and corpus.counts_bytes
        return (
            Metric("loss_nats_per_token", "min", "nats/token"),
            Metric("ppl", "min"),
            *(Metric(f"ppl_{name}", "min") for name in sorted(corpus.domains)),
            *(ENTROPY_GAP if is_known else ()),
            *((Metric("bits_per_byte", "min", "bits/byte"),) if has_bytes else ()),
        )

    def flops(self, size: Size, corpus: Corpus) -> float:
        """A forward pass over each domain's sequences, as many as there may be."""
        row = self.objective.input_length(self.sequence_length)
        return size.forward_flops(self.max_sequences * row * len(corpus.domains), row)

    def memory_bytes(self, size: Size, resources: Resources) -> int:
        """Weights, one layer's activations and the logits of a batch, all in 32 bits and on each worker alike."""
        row = self.objective.input_length(self.sequence_length)
        rows = min(BATCH, self.max_sequences)
        return size.weights_bytes + rows * row * (size.forward_bytes + 4 * size.vocab_size)

    def disk_bytes(self, size: Size) -> int:
        """None: its numbers stand in its record."""
        return 0

    def _measure(
        self, checkpoint: Path, tokens: Tokens, worker: Worker
    ) -> dict[str, tuple[HeldoutLosses, tuple[float, float] | None]]:
        """This rank's domains -> losses, and how far it is above the lowest possible one, with the error of that."""
        from raysweep.objectives.loss_check import check_loss
        from raysweep.train.evaluate import divergence, heldout

        model = load_model(checkpoint).to(worker.device)
        law, specials = read_law(tokens.folder, self.objective), checkpoint_specials(checkpoint, self.objective)
        mine = {}
        for index, domain in enumerate(sorted(tokens.domains)):
            # A domain is read whole by one rank: its loss is a sum in one order, whatever the number of workers.
            if index % worker.world_size == worker.rank:
                length = self.sequence_length
                ids = tokens.valid(domain, sequence_length=length, max_sequences=self.max_sequences)
                rows = self.objective.prepare(ids, np.random.default_rng([DRAW, *domain.encode()]), specials)
                check_loss(self.objective, rows, sequence_length=length)
                measured = heldout(model, rows, self.objective)
                gap = None
                if isinstance(law, TabledLaw):
                    gap = divergence(model, rows, self.objective, law=law, ids=ids)
                if law is not None and gap is None:
                    gap = measured.above(self.objective.optimal_losses(law, ids, rows, specials))
                mine[domain] = (measured, gap)
        return mine

    def _bits_per_byte(self, losses: Mapping[str, float], tokens: Tokens) -> float:
        """Mixed by domains; a token's bits over the bytes of text that stand behind a token."""
        # By each domain's own bytes a token: a tokenizer packs some kinds of text more densely.
        total = 0.0
        for name, loss in losses.items():
            size = tokens.meta.domains[name]
            bits = loss / math.log(2) * size.num_valid_tokens / (size.valid_bytes or 1)
            total += self.mix.get(name, 0.0) * bits
        return total
