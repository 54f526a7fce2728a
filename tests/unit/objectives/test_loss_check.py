"""An objective whose loss is not the sum that it counts is refused before it trains or measures."""

from typing import Literal

import numpy as np
import pytest
import torch.nn.functional as F

from raysweep.errors import StageError
from raysweep.objectives.base import IGNORED, DecoderObjective
from raysweep.objectives.causal_lm import CausalLM
from raysweep.objectives.loss_check import check_loss
from raysweep.objectives.prefix_lm import PrefixLM

LENGTH = 12
IDS = np.random.default_rng(0).integers(1, 50, size=(3, LENGTH))


class Wrong(DecoderObjective):
    """A prefix LM with one mistake."""

    name: Literal["wrong"] = "wrong"
    mistake: str

    def predicts(self):
        return "what comes"

    def extra_tokens(self):
        return ()

    def input_length(self, sequence_length):
        return sequence_length

    def mean_predicted(self, sequence_length):
        return (sequence_length + 1) / 2

    def prepare(self, ids, draw, specials):
        rows = PrefixLM(name="prefix_lm").prepare(ids, draw, specials)
        if self.mistake == "longer rows":
            rows |= {name: np.pad(rows[name], ((0, 0), (0, 3))) for name in ("input_ids", "labels")}
        return rows

    def num_predicted(self, batch):
        return batch["input_ids"].size if self.mistake == "counts all" else super().num_predicted(batch)

    def loss_sum(self, model, batch):
        loss = super().loss_sum(model, batch)
        if self.mistake == "mean":
            return loss / self.num_predicted(batch)
        if self.mistake == "bits":
            return loss / np.log(2)
        if self.mistake == "of the text":
            return CausalLM().loss_sum(model, batch | {"labels": batch["input_ids"]})
        if self.mistake == "in place":
            logits, labels = model(input_ids=batch["input_ids"]).logits, batch["labels"]
            return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction="sum")
        return loss


def checked(mistake: str) -> None:
    objective = Wrong(mistake=mistake)
    rows = objective.prepare(IDS, np.random.default_rng(0), None)
    check_loss(objective, rows, sequence_length=LENGTH)


@pytest.mark.parametrize("mistake", ["counts all", "mean", "bits", "of the text", "in place"])
def test_a_loss_that_is_not_the_sum_it_counts_is_refused(mistake):
    with pytest.raises(StageError, match=r"objective wrong: of \d+ labels whose cross-entropies sum to .* nats"):
        checked(mistake)


def test_rows_that_are_longer_than_said_are_refused():
    with pytest.raises(StageError, match=r"its rows have 15 tokens, and input_length\(12\), .* is 12"):
        checked("longer rows")


def test_without_a_mistake_it_passes():
    checked("none")
