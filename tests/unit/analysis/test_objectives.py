"""The report says what a perplexity is of, and those of several objectives are not compared."""

import json
import math
from dataclasses import replace
from itertools import combinations

import numpy as np
import pandas as pd
import pytest
from columns import COLUMNS, CORPUS, RECIPE

from raysweep.analysis.baselines import credit, design
from raysweep.analysis.earlier import EARLIER_LOSS, earlier_losses
from raysweep.analysis.findings import cautions, headline, how_to_read
from raysweep.analysis.objectives import (
    FLATNESS_OF,
    OTHER_TEXT_OF,
    PERPLEXITY_OF,
    SPANS_OF,
    TRAINING_LOSS_OF,
    loss_groups,
    losses_of,
    objective_cautions,
    objective_lines,
)
from raysweep.analysis.ranking import rank
from raysweep.analysis.sections import agreement_table
from raysweep.analysis.terminal import format_terminal
from raysweep.data.text import Domain, Text
from raysweep.objectives.causal_lm import CausalLM
from raysweep.objectives.masked_lm import MaskedLM
from raysweep.objectives.prefix_lm import PrefixLM
from raysweep.scores import Column
from raysweep.spec import Metric, canonical
from raysweep.stages.base import Subject
from raysweep.stages.flatness import Flatness
from raysweep.stages.heldout import Heldout
from raysweep.stages.pretrain import Pretrain
from raysweep.stages.span_loss import SpanLoss

MASKED = MaskedLM(name="masked_lm", mask="one")
NEXT = "causal_lm (every token but the first, from those before it)"
HIDDEN = "masked_lm (one token of a sequence, hidden, from all that is left)"


@pytest.mark.parametrize(("objective", "words"), [(CausalLM(), NEXT), (MASKED, HIDDEN)])
def test_recorded_specs_say_it(objective, words):
    heldout = Heldout(objective=objective, mix={"text": 1.0}, sequence_length=8)
    assert losses_of("heldout", canonical(heldout)) == {PERPLEXITY_OF: words}
    assert losses_of("flatness", canonical(Flatness().bind(Subject(CORPUS, objective, 33, tasks={})))) == {
        FLATNESS_OF: words
    }
    assert losses_of("sft", {}) == {}


def test_flatness_of_causal_lm_is_called_so():
    spec = canonical(Flatness(objective="causal_lm").bind(Subject(CORPUS, PrefixLM(name="prefix_lm"), 33, tasks={})))
    assert losses_of("flatness", spec) == {FLATNESS_OF: NEXT}


def test_what_another_version_declared_is_named():
    recipe = RECIPE.with_(objective=PrefixLM(name="prefix_lm"))
    assert losses_of("pretrain", canonical(Pretrain(recipe=recipe, seed=0, step=1)))["training_loss_of"].startswith(
        "prefix"
    )
    one, other = ({"objective": {"name": "of_later_days", "rate": rate}} for rate in (3, 4))
    assert losses_of("heldout", one) == {PERPLEXITY_OF: 'of_later_days ({"name": "of_later_days", "rate": 3})'}
    assert losses_of("heldout", other) != losses_of("heldout", one)


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


def test_what_is_of_the_same_objectives_is_said_once_and_kinds_of_one_name_are_counted():
    import pandas as pd

    other = "masked_lm (0.15 of the tokens of a sequence, hidden, from all that is left)"
    words = [NEXT, HIDDEN, other]
    [line] = objective_lines(pd.DataFrame({PERPLEXITY_OF: words, FLATNESS_OF: words}))
    assert line.startswith(
        f"Held-out loss and perplexity, traces and other numbers of flatness are those of {NEXT}, on 1"
    )
    [caution] = objective_cautions(pd.DataFrame({PERPLEXITY_OF: words, FLATNESS_OF: words}))
    assert "are of 3 objectives (causal_lm, 2 of masked_lm), whose" in caution


def two_objectives(flatness_of):
    """Perplexity and trace order the checkpoints of each objective rightly, and those of different ones wrongly."""
    import pandas as pd

    words, names = [NEXT] * 5 + [HIDDEN] * 4 + [None], [f"c{index}" for index in range(10)]
    falling = [9.0, 8.0, 7.0, 6.0, 5.0, 4.0, 3.0, 2.0, 1.0, 0.5]
    table = pd.DataFrame({"trial": names, "variant": names, "checkpoint": names, "status": "done", "step": 1})
    table["sft/mean_score"] = [0.5, 0.6, 0.7, 0.8, 0.9, 0.1, 0.2, 0.3, 0.4, 0.05]
    table["sft/mean_score_stderr"] = 1e-3
    table["heldout/ppl"] = table["flatness/hessian_trace"] = table["indicators/kshot_mean"] = falling
    table["point.x"] = ["a", "a", "b", "b", "b", "a", "a", "b", "b", "a"]
    return rank(table.assign(**{PERPLEXITY_OF: words, FLATNESS_OF: flatness_of or words}), columns=COLUMNS)


def test_pairs_of_two_objectives_are_not_counted_for_their_losses():
    ranking = two_objectives(flatness_of=None)
    of = {item.indicator: item for item in ranking.associations}
    for name in ("heldout/ppl", "flatness/hessian_trace"):
        # 10 pairs of the five and 6 of the four, all in order; the one of an unknown objective is in none.
        assert (of[name].accuracy.value, of[name].clear_accuracy.value, of[name].kendall.value) == (1, 1, 1)
        assert (of[name].pairs.num_pairs, of[name].pairs.num_clear) == (16, 16)
        assert math.isnan(of[name].spearman.value)
    # A few-shot score is one quantity for all: 16 of 45 pairs are in order the other way round.
    assert of["indicators/kshot_mean"].pairs.num_pairs == 45
    assert of["indicators/kshot_mean"].accuracy.value == pytest.approx(29 / 45)
    places = ranking.checkpoints.set_index("checkpoint")["rank/heldout/ppl"]
    assert list(places[["c4", "c0", "c8", "c5"]]) == [1, 5, 1, 4]
    assert places.isna()["c9"]


def test_flatness_of_one_common_objective_compares_all_checkpoints():
    ranking = two_objectives(flatness_of=[NEXT] * 10)
    of = {item.indicator: item for item in ranking.associations}
    assert of["flatness/hessian_trace"].pairs.num_pairs == 45
    assert of["flatness/hessian_trace"].accuracy.value == pytest.approx(16 / 45)
    assert of["heldout/ppl"].pairs.num_pairs == 16


def test_training_curves_compare_within_one_objective_and_text():
    import pandas as pd

    table = pd.DataFrame({TRAINING_LOSS_OF: [NEXT, NEXT, HIDDEN, NEXT], "point.pretrain.data.mix": [*"aaab"]})
    for name in ("slope", "curvature"):
        assert list(loss_groups(table, Column("curve", Metric(name, "min")))) == [0, 0, 1, 2]


def test_an_earlier_loss_is_of_the_same_measurement():
    """Of another phase it may be of another objective, or on another text."""
    import pandas as pd

    rows = [(5, "a", "t", 5.0), (10, "a", "t", 4.0), (15, "b", "t", 3.0), (20, "b", "u", 2.0), (30, "b", "u", 1.0)]
    stages = pd.DataFrame(
        {
            "trial": "x",
            "kind": "heldout",
            "checkpoint": f"c{step}",
            "step": step,
            "settings": settings,
            "inputs": json.dumps({"checkpoint": f"c{step}", "tokens": tokens}),
            "heldout/loss_nats_per_token": loss,
        }
        for step, settings, tokens, loss in reversed(rows)
    )
    found = earlier_losses(stages)
    assert {key: values[EARLIER_LOSS.name] for key, values in found.items()} == {("x", "c10"): 5.0, ("x", "c30"): 2.0}
    # That of two checkpoints before is not taken for it.
    gone = stages.assign(settings="a", inputs=stages["inputs"].iloc[-1])
    gone.loc[gone["step"] == 15, ["settings", "heldout/loss_nats_per_token"]] = None
    assert {name for _, name in earlier_losses(gone)} == {"c10", "c30"}
    assert earlier_losses(stages.drop(columns="heldout/loss_nats_per_token")) == {}


def test_the_gain_over_the_sweep_file_is_on_the_same_pairs():
    ranking = two_objectives(flatness_of=None)
    table = ranking.checkpoints
    shares = credit([design(table["point.x"])], table["sft/mean_score"].to_numpy(), list(table["variant"]), block=0)
    words = table[PERPLEXITY_OF].to_numpy()
    pairs = [(i, j) for i, j in combinations(range(10), 2) if words[i] is not None and words[i] == words[j]]
    baseline = sum(shares[pair] for pair in pairs) / len(pairs)
    [perplexity] = [item for item in ranking.associations if item.indicator == "heldout/ppl"]
    [config] = [item for item in ranking.associations if item.indicator == "point.x"]
    assert len(pairs) == 16
    assert perplexity.gain.value == pytest.approx(1 - baseline)
    assert config.pairs.num_pairs == 45
    assert config.accuracy.value != pytest.approx(baseline)
    # A gain that is not clear: the headline names the baseline's share of these pairs, not of all.
    unclear = [replace(item, gain=replace(item.gain, low=-0.1)) for item in ranking.associations]
    text = headline(replace(ranking, associations=tuple(unclear)))
    assert f"not shown to be better than point.x alone ({baseline:.2f})" in text
    adding = [replace(item, added=replace(item.added, low=0.1)) for item in ranking.associations]
    assert "to add to the configuration" not in headline(replace(ranking, associations=tuple(adding)))
    nothing = [replace(item, added=replace(item.added, low=0.0)) for item in ranking.associations]
    text = headline(replace(ranking, associations=tuple(nothing)))
    assert ", though not shown to add to the configuration" in text


def test_the_gain_is_over_what_the_sweep_file_says_best_within_an_objective():
    import pandas as pd

    words, names = [NEXT] * 4 + [HIDDEN] * 4, [f"c{index}" for index in range(8)]
    table = pd.DataFrame({"trial": names, "variant": names, "checkpoint": names, "status": "done", "step": 1})
    table["sft/mean_score"] = [0.58, 0.58, 0.59, 0.64, 0.06, 0.14, 0.0, 0.07]
    table["heldout/ppl"] = [8.0, 7.0, 6.0, 5.0, 4.0, 3.0, 2.0, 1.0]
    table["point.objective"], table["point.lr"] = words, ["low", "high"] * 4
    ranking = rank(table.assign(**{PERPLEXITY_OF: words, "point.warmup": list("xxyy") * 2}), columns=COLUMNS)
    perplexity, *config = sorted(ranking.associations, key=lambda item: item.source == "config")
    # Over all pairs the objective says most, and of those within one nothing: the rate says as much as perplexity.
    assert [item.indicator for item in config] == ["all together", "point.objective", "point.lr", "point.warmup"]
    assert perplexity.baseline == "point.lr"
    assert perplexity.gain.value == pytest.approx(0)


def test_tables_say_how_many_pairs_are_compared():
    table = agreement_table(two_objectives(flatness_of=None))
    at = [heading.name for heading in table.columns].index("pairs")
    assert {row.cells[0].sort: row.cells[at].text for row in table.rows}["flatness/hessian_trace"] == "16"
    assert "pairs" in format_terminal(two_objectives(flatness_of=None), width=140, color=False)


def test_where_every_checkpoint_has_its_own_objective_no_pair_is_compared():
    import pandas as pd

    table = pd.DataFrame({"trial": list("ab"), "variant": list("ab"), "checkpoint": list("ab"), "status": "done"})
    values = {"step": 1, "sft/mean_score": [0.1, 0.2], "heldout/ppl": [2.0, 1.0], PERPLEXITY_OF: [NEXT, HIDDEN]}
    ranking = rank(table.assign(**values), columns=COLUMNS)
    [perplexity] = ranking.associations
    assert perplexity.pairs.num_pairs == 0
    assert math.isnan(perplexity.accuracy.value)
    assert "no indicator was measured on enough checkpoints" in headline(ranking)
    assert ranking.to_dict()["indicators"][0]["accuracy"]["value"] is None


def test_how_tokens_are_hidden_is_part_of_what_is_predicted():
    bert = MaskedLM(name="masked_lm", replacement="80/10/10")
    assert bert.predicts() == "0.15 of the tokens of a sequence, hidden (80/10/10), from all that is left"


TEXT_CORPUS = Text(domains={name: Domain(train=(f"{name}.txt",)) for name in ("wiki", "news")})
OTHERS = [
    Column("heldout", Metric("ppl_wiki", "min")),
    Column("heldout", Metric("bits_per_byte", "min", "bits/byte")),
    Column("other_text", Metric("mean_loss", "min", "nats/token")),
    Column("features", Metric("effective_rank", "max")),
    Column("agreement", Metric("mean_cosine", "max")),
    Column("indicators", Metric("kshot_log_likelihood_mean", "max", "nats")),
]
BY_NAME = {column.name: column for column in [*COLUMNS, *OTHERS]}


def groups(name, **swept):
    """Of one objective, by what the sweep sets."""
    import pandas as pd

    num = len(next(iter(swept.values())))
    told = {PERPLEXITY_OF: [NEXT] * num, FLATNESS_OF: [NEXT] * num, OTHER_TEXT_OF: [NEXT] * num}
    return list(loss_groups(pd.DataFrame(swept | told), BY_NAME[name]))


MIX, SAME_MIX = '{"mix": {"wiki": 0.5, "news": 0.5}}', '{"mix": {"news": 0.5, "wiki": 0.5}}'
TAGGED = '{"mix": {"wiki": 0.5, "news": 0.5}, "domains": {"wiki": {"tag": "<|w|>"}}}'
ALONE = '{"mix": {"wiki": 1.0}}'


def test_what_is_measured_on_the_own_text_compares_within_a_text():
    of = {"setting.variant:pretrain.phases.continued.data": [MIX, SAME_MIX, TAGGED, ALONE, None]}
    for name in ("heldout/ppl", "flatness/hessian_trace"):
        assert groups(name, **of) == [0, 0, 1, 2, 3]
    # The shares of a mix take no part in the perplexity of a domain; tags do.
    assert groups("heldout/ppl_wiki", **of)[:4] == [0, 0, 1, 0]
    assert groups("other_text/mean_loss", **of) == groups("indicators/kshot_mean", **of) == [0] * 5
    # What features a model makes of a text hangs on the text, if it is no loss of it.
    assert groups("features/effective_rank", **of) == [0, 0, 1, 2, 3]
    # Gradients of two domains have no part of the shares.
    assert groups("agreement/mean_cosine", **of)[:4] == [0, 0, 1, 0]


def test_what_is_by_token_compares_within_a_vocabulary_and_bits_per_byte_over_all():
    small, large = '{"name": "bpe", "vocab_size": 300}', '{"name": "bpe", "vocab_size": 400}'
    of = {"point.pretrain.data.tokenizer": [small, large, small], "vocabulary": ["300", "400", "300"]}
    for name in ("heldout/ppl", "other_text/mean_loss", "indicators/kshot_log_likelihood_mean"):
        assert groups(name, **of) == [0, 1, 0]
    assert groups("heldout/bits_per_byte", **of) == groups("indicators/kshot_mean", **of) == [0, 0, 0]
    # Where only the data as a whole says it.
    data = [json.dumps({"mix": {"wiki": 1.0}, "tokenizer": {"vocab_size": num}}) for num in (300, 400, 300)]
    of = {"point.pretrain.data": data, "vocabulary": [None, "400", "300"]}
    assert groups("heldout/bits_per_byte", **of) == [0, 0, 0]
    assert groups("other_text/mean_loss", **of) == [0, 1, 2]


def test_losses_on_spans_compare_within_a_text_and_over_mixes_where_one_is_named():
    """Tags, and lengths of documents, are in the held-out text that spans are cut out of."""
    named, own = (
        losses_of("span_loss", canonical(SpanLoss(mix=mix).bind(Subject(TEXT_CORPUS, CausalLM(), 33, tasks={}))))
        for mix in ({"wiki": 1.0}, None)
    )
    of = {"setting.variant:pretrain.phases.continued.data": [MIX, SAME_MIX, TAGGED, ALONE]}
    assert groups("span_loss/loss_nats_per_token", **of, **{SPANS_OF: [named[SPANS_OF]] * 4}) == [0, 0, 1, 0]
    assert groups("span_loss/loss_nats_per_token", **of, **{SPANS_OF: [own[SPANS_OF]] * 4}) == [0, 0, 1, 2]
    # One that was not measured does not keep the others apart.
    for missing in (None, float("nan")):
        some = {SPANS_OF: [named[SPANS_OF], missing, named[SPANS_OF], named[SPANS_OF]]}
        assert groups("span_loss/loss_nats_per_token", **of, **some) == [0, 1, 2, 0]
    assert groups("span_loss/loss_nats_per_token", **of) == [0, 0, 1, 2]  # It is not known.


@pytest.mark.parametrize(
    ("path", "num"),
    [
        ("pretrain.data.mix", 2),
        ("pretrain.phases.decay.sequence_length", 2),
        ("pretrain.data.num_train_sentences", 1),
        ("pretrain.optimizer.lr", 1),
        ("sft.data", 1),
    ],
)
def test_only_settings_of_the_text_set_checkpoints_apart(path, num):
    assert len(set(groups("heldout/ppl", **{f"point.{path}": ["a", "b", "a"]}))) == num
    apart = 1 if path.endswith(".mix") else num
    assert len(set(groups("heldout/ppl_wiki", **{f"point.{path}": ["a", "b", "a"]}))) == apart


def test_several_texts_are_told_of():
    import pandas as pd

    names = list("abcd")
    table = pd.DataFrame({"trial": names, "variant": names, "checkpoint": names, "status": "done", "step": 1})
    table["sft/mean_score"], table["heldout/ppl"] = [0.1, 0.2, 0.3, 0.4], [2.0, 1.0, 9.0, 8.0]
    table["point.pretrain.data"], table[PERPLEXITY_OF] = [MIX, SAME_MIX, ALONE, ALONE], NEXT
    ranking = rank(table, columns=COLUMNS)
    [perplexity] = [item for item in ranking.associations if item.indicator == "heldout/ppl"]
    assert (perplexity.pairs.num_pairs, perplexity.accuracy.value) == (2, 1)
    [caution] = [line for line in cautions(ranking) if "own text" in line]
    assert "(heldout) is on 2 texts: pairs of checkpoints of different texts are not counted" in caution
    # What is of each domain by itself hangs on no shares of a mix.
    assert "Perplexities of a domain, agreement, and losses on spans" in caution


def test_three_variants_with_a_text_in_common_tell_no_interval_however_many_have_one_of_their_own():
    draw, num = np.random.default_rng(3), 15
    scores = draw.normal(size=num)
    table = pd.DataFrame(
        {
            **{name: [f"{name} {row:02}" for row in range(num)] for name in ("trial", "variant", "checkpoint")},
            **{"seed": 0, "step": 100, "status": "done", PERPLEXITY_OF: NEXT},
            "point.pretrain.data.mix": ["common"] * 3 + [f"own {row}" for row in range(num - 3)],
            "sft/mean_score": scores,
            "heldout/ppl": 20 - scores,
        }
    )
    ranking = rank(table, columns=[Column("heldout", Metric("ppl", "min"))])
    [found] = [each for each in ranking.associations if each.indicator == "heldout/ppl"]
    assert (found.pairs.num_pairs, found.accuracy.value) == (3, 1.0)
    for estimate in (found.accuracy, found.clear_accuracy, found.kendall, found.added, found.gain):
        assert math.isnan(estimate.low)
