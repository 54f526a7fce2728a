"""A corpus that builds other tokens than it says, or whose shares are none, is refused before anything reads it."""

from typing import ClassVar

import pytest

from raysweep.data.exact import ExactCorpus
from raysweep.data.pcfg import PCFG
from raysweep.data.text import Text
from raysweep.errors import StageError
from raysweep.objectives.causal_lm import CausalLM
from raysweep.stages.heldout import Heldout
from raysweep.stages.tokenize import Tokenize
from raysweep.worker import Worker

SIZES = {"num_words_total": 16, "num_nonterminals": 4, "num_words": 3, "sentence_length": 4}


class LongRows(PCFG):
    @property
    def row_length(self):
        return 8


class OtherDomain(PCFG):
    @property
    def domains(self):
        return ("grammar",)


class WithBytes(PCFG):
    counts_bytes: ClassVar[bool] = True


class WithoutLeast(PCFG):
    def build(self, out, **given):
        metrics = super().build(out, **given)
        del metrics["optimal_loss_nats_per_token"]
        return metrics


@pytest.mark.parametrize(
    ("corpus", "said"),
    [
        (LongRows, "corpus pcfg: its tokens have rows 5, and it says 8"),
        (OtherDomain, r"its tokens have domains \['pcfg'\], and it says \['grammar'\]"),
        (WithBytes, "its tokens have numbers of bytes False, and it says True"),
        (WithoutLeast, r"metrics \['num_tokens'\], and it says \['num_tokens', 'optimal_loss_nats_per_token'\]"),
    ],
)
def test_a_corpus_that_builds_something_else_is_refused(tmp_path, corpus, said):
    made = corpus(**SIZES, num_train_sentences=20, num_valid_sentences=5)
    with pytest.raises(StageError, match=said):
        Tokenize.model_construct(corpus=made).run({}, tmp_path, Worker())


def test_a_corpus_that_leaves_something_out_is_refused():
    with pytest.raises(TypeError, match="Silent lacks at_temperature, emissions, sample, which ExactCorpus asks for"):

        class Silent(ExactCorpus):
            name: str = "silent"
            label_form = None
            contexts = PCFG.contexts


def test_shares_that_are_not_of_a_whole_are_refused():
    with pytest.raises(ValueError, match=r"shares of the domains sum to 0\.7, not 1; see CorpusSpec\.mix"):
        Heldout(objective=CausalLM(), mix={"a": 0.5, "b": 0.2}, sequence_length=4)


def test_bits_per_byte_are_announced_of_text_alone():
    """A search by a metric that never comes would find nothing."""
    heldout = Heldout(objective=CausalLM(), mix={"a": 1.0}, sequence_length=4)
    named = {
        corpus.name: "bits_per_byte" in {metric.name for metric in heldout.metrics(corpus)}
        for corpus in (PCFG(), Text(domains_={"a": {"train": "x"}}))
    }
    assert named == {"pcfg": False, "text": True}
