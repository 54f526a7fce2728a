"""Tasks of a language with headroom: sentences out of distribution, inner spans, few labels."""

import numpy as np
import pytest

from raysweep.data.brackets import Brackets
from raysweep.data.exact import TASK
from raysweep.data.hmm import HMM
from raysweep.data.pcfg import PCFG
from raysweep.errors import SpaceError
from raysweep.tasks.balance import BracketBalance
from raysweep.tasks.spans import PCFGSpan
from raysweep.tasks.states import HMMState

SIZES = {"num_train": 200, "num_valid": 50, "num_test": 400}
TASKS = {
    "hmm": (HMMState(form="hmm_state", position=3, **SIZES), HMM(num_words_total=20, num_states=8, sentence_length=8)),
    "pcfg": (
        PCFGSpan(form="pcfg_span", span=2, **SIZES),
        PCFG(num_words_total=20, num_nonterminals=8, num_rules=2, num_words=6, sentence_length=8),
    ),
    "brackets": (
        BracketBalance(form="bracket_balance", label="majority", **SIZES),
        Brackets(name="brackets", num_words_total=8, sentence_length=8, beta=1.0),
    ),
}


@pytest.mark.parametrize("name", TASKS)
def test_only_what_is_scored_is_of_another_temperature(name):
    task, language = TASKS[name]
    plain, hot = task.bind(language), task.with_(test_temperature=3.0).bind(language)
    for split in ("train", "valid"):
        for ours, theirs in zip(plain.examples(split), hot.examples(split), strict=True):
            np.testing.assert_array_equal(ours, theirs)
    likely = {}
    for split in ("test", "indicator"):
        likely[split] = [language.log_probability(each.examples(split)[0][:, 1:] - 1) for each in (plain, hot)]
        # To the language that models are pretrained on, these sentences are less likely, and it shows in hundreds.
        mean = [np.mean(values[np.isfinite(values)]) for values in likely[split]]
        assert mean[1] < mean[0] - 0.3
    assert hot.ids("test") != plain.ids("test")
    known = {row.tobytes() for split in ("train", "valid", "test") for row in hot.examples(split)[0]}
    assert not any(row.tobytes() in known for row in hot.examples("indicator")[0])


def test_a_temperature_that_a_language_cannot_have_is_refused():
    task, language = TASKS["brackets"]
    with pytest.raises(SpaceError, match=r"0\.001: the language cannot have it") as caught:
        task.with_(test_temperature=0.001).bind(language.with_(sentence_length=16))
    assert caught.value.findings[0][0] == ("test_temperature",)


def test_labels_of_other_temperatures_are_that_languages_own():
    task, language = TASKS["hmm"]
    hot = task.with_(test_temperature=2.0).bind(language)
    words, states = language.at_temperature(2.0).sample(650, seed=0, stream=TASK)
    ids, labels = hot.examples("test")
    np.testing.assert_array_equal(ids[:, 1:], words[250:] + 1)
    np.testing.assert_array_equal(labels, states[250:, 2])


def test_inner_spans_are_asked_for_by_their_place():
    task, language = TASKS["pcfg"]
    _, spans = language.sample(650, seed=0, stream=TASK)
    for place in range(4):
        _, labels = task.with_(place=place).bind(language).examples("test")
        np.testing.assert_array_equal(labels, spans[2][250:, place])
    with pytest.raises(SpaceError, match="4: a sentence has 4 spans of 2 words, from 0"):
        task.with_(place=4).bind(language)


def test_few_labels_are_those_of_fine_tuning_alone():
    task, language = TASKS["hmm"]
    few = task.with_(max_labels=16).bind(language)
    assert few.num_finetuned == 16
    assert few.workload().num_train == 200
    assert task.with_(max_labels=10_000).bind(language).num_finetuned == 200
