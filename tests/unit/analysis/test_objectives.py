"""The report says what a perplexity is of, and that those of several objectives do not compare."""

import pytest
from columns import COLUMNS, CORPUS

from raysweep.analysis.findings import cautions, how_to_read
from raysweep.analysis.objectives import FLATNESS_OF, PERPLEXITY_OF, losses_of
from raysweep.analysis.ranking import rank
from raysweep.objectives.causal_lm import CausalLM
from raysweep.objectives.masked_lm import MaskedLM
from raysweep.objectives.prefix_lm import PrefixLM
from raysweep.spec import canonical
from raysweep.stages.base import Subject
from raysweep.stages.flatness import Flatness
from raysweep.stages.heldout import Heldout

MASKED = MaskedLM(name="masked_lm", mask="one")
NEXT = "causal_lm (every token but the first, from those before it)"
HIDDEN = "masked_lm (one token of a sequence, hidden, from all that is left)"


@pytest.mark.parametrize(("objective", "words"), [(CausalLM(), NEXT), (MASKED, HIDDEN)])
def test_recorded_specs_say_it(objective, words):
    heldout = Heldout(objective=objective, mix={}, sequence_length=8)
    assert losses_of("heldout", canonical(heldout)) == {PERPLEXITY_OF: words}
    assert losses_of("flatness", canonical(Flatness().bind(Subject(CORPUS, objective, 33, tasks={})))) == {
        FLATNESS_OF: words
    }
    assert losses_of("sft", {}) == {}


def test_flatness_of_causal_lm_is_called_so():
    spec = canonical(Flatness(objective="causal_lm").bind(Subject(CORPUS, PrefixLM(name="prefix_lm"), 33, tasks={})))
    assert losses_of("flatness", spec) == {FLATNESS_OF: NEXT}


def test_what_another_version_declared_is_named():
    assert losses_of("heldout", {"objective": {"name": "of_later_days", "rate": 3}}) == {PERPLEXITY_OF: "of_later_days"}


def ranked(words):
    import pandas as pd

    names = [f"c{index}" for index in range(len(words))]
    table = pd.DataFrame({"trial": names, "variant": names, "checkpoint": names, "status": "done", "step": 1})
    table = table.assign(**{"sft/mean_score": 0.5, PERPLEXITY_OF: words, FLATNESS_OF: [NEXT] * len(words)})
    return rank(table, columns=COLUMNS)


def test_one_objective_is_named_without_a_caution():
    ranking = ranked([HIDDEN, HIDDEN])
    lines = how_to_read(ranking)
    assert f"Held-out loss and perplexity are those of {HIDDEN}." in lines
    assert f"Traces and other numbers of flatness are those of {NEXT}." in lines
    assert not any("do not compare" in line for line in cautions(ranking))


def test_several_objectives_do_not_compare():
    ranking = ranked([NEXT, HIDDEN, NEXT])
    line = (
        f"Held-out loss and perplexity are those of {NEXT}, on 2 of 3 checkpoints; of {HIDDEN}, on 1 of 3 checkpoints."
    )
    assert line in how_to_read(ranking)
    [caution] = [line for line in cautions(ranking) if "do not compare" in line]
    assert caution.startswith("Held-out loss and perplexity are of 2 objectives (causal_lm, masked_lm)")
