"""What every member of the family owes: one that forgets a part is refused, and what it trains is what is measured."""

from typing import Literal, get_args

import numpy as np
import pytest
import torch
from tiny_models import build

from raysweep.curvature.language import mean_token_loss
from raysweep.objectives.adversary import Adversary
from raysweep.objectives.base import IGNORED, ObjectiveSpec, Specials, add_extra_tokens
from raysweep.objectives.causal_lm import CausalLM
from raysweep.objectives.families import Mixture, Objective
from raysweep.objectives.loss_check import check_loss
from raysweep.objectives.masked_lm import MaskedLM
from raysweep.objectives.prefix_lm import PrefixLM
from raysweep.objectives.soft_targets import SoftTargets
from raysweep.objectives.span_corruption import SpanCorruption
from raysweep.objectives.ul2 import UL2

CAUSAL, PREFIX, UL2_PAPER = CausalLM(), PrefixLM(name="prefix_lm"), UL2(name="ul2")
CAUSAL_SPANS = SpanCorruption(name="span_corruption", attention="causal")
OBJECTIVES: list[ObjectiveSpec] = [
    CAUSAL,
    MaskedLM(name="masked_lm"),
    PREFIX,
    SpanCorruption(name="span_corruption"),
    UL2_PAPER,
    Adversary(name="adversary", strength=0.05),
    SoftTargets(name="soft_targets"),
    Mixture(name="mixture", objectives={"causal": CAUSAL, "prefix": PREFIX, "spans": CAUSAL_SPANS, "ul2": UL2_PAPER}),
]
LENGTH = 12
NUM_WORDS = 12


def specials_for(objective: ObjectiveSpec) -> Specials:
    """Words 1 to 11 and a reserved 0; extra tokens behind."""
    ids = {token: NUM_WORDS + index for index, token in enumerate(objective.extra_tokens())}
    return Specials(ids, NUM_WORDS, reserved=(0, *ids.values()), eos=0, pad=0)


def prepared(objective: ObjectiveSpec, *, num: int = 5, seed: int = 0):
    ids = np.random.default_rng(seed).integers(1, NUM_WORDS, size=(num, LENGTH))
    ids[:, 0] = 0
    before = ids.copy()
    rows = objective.prepare(ids, np.random.default_rng(seed), specials_for(objective))
    assert np.array_equal(ids, before), "the text is another's"
    return rows


def model_for(objective: ObjectiveSpec):
    vocab = NUM_WORDS + len(objective.extra_tokens())
    return build("llama" if objective.head == "causal" else "bert", vocab=max(23, vocab))


def tensors(rows):
    return {name: torch.from_numpy(values) for name, values in rows.items() if name != "lengths"}


@pytest.fixture(params=OBJECTIVES, ids=lambda objective: objective.name)
def objective(request):
    return request.param


def test_a_member_that_forgets_to_count_is_refused():
    with pytest.raises(TypeError, match="Forgetful lacks num_predicted, which ObjectiveSpec asks for"):

        class Forgetful(ObjectiveSpec):
            head = "causal"
            name: Literal["forgetful"] = "forgetful"
            predicts = CausalLM.predicts
            extra_tokens = CausalLM.extra_tokens
            input_length = CausalLM.input_length
            mean_predicted = CausalLM.mean_predicted
            prepare = CausalLM.prepare
            loss_sum = CausalLM.loss_sum


def test_a_member_that_names_no_model_is_refused():
    with pytest.raises(TypeError, match="Headless lacks head, which"):

        class Headless(ObjectiveSpec):
            name: Literal["headless"] = "headless"
            predicts = CausalLM.predicts
            extra_tokens = CausalLM.extra_tokens
            input_length = CausalLM.input_length
            mean_predicted = CausalLM.mean_predicted
            prepare = CausalLM.prepare
            num_predicted = CausalLM.num_predicted
            loss_sum = CausalLM.loss_sum


def test_rows_are_whole(objective):
    rows = prepared(objective)
    assert rows["input_ids"].shape == rows["labels"].shape
    assert len(rows["input_ids"]) == 5
    assert rows["input_ids"].shape[1] <= objective.input_length(LENGTH)
    assert all(values.dtype == np.int64 for values in rows.values())
    assert objective.num_predicted(rows) > 0
    assert rows["labels"].max() < NUM_WORDS + len(objective.extra_tokens())


@pytest.mark.parametrize("length", [2, 12, 33])
@pytest.mark.parametrize("objective", [*OBJECTIVES, MaskedLM(name="masked_lm", mask="one")], ids=lambda each: each.name)
def test_a_row_predicts_as_many_as_a_plan_says(objective, length):
    ids = np.random.default_rng(0).integers(1, NUM_WORDS, size=(2000, length))
    rows = objective.prepare(ids, np.random.default_rng(1), specials_for(objective))
    labels = rows["labels"][:, 1:] if objective.head == "causal" else rows["labels"]
    counts = (labels != IGNORED).sum(axis=1)
    # Within four standard errors of the mean of what was drawn; exact where each row predicts as many.
    room = 4 * counts.std() / len(counts) ** 0.5
    assert objective.mean_predicted(length) == pytest.approx(counts.mean(), abs=room + 1e-9)


def test_nothing_is_predicted_that_is_seen(objective):
    rows = prepared(objective)
    if "prefix_lengths" in rows:
        in_prefix = np.arange(rows["labels"].shape[1]) < rows["prefix_lengths"][:, None]
        assert (rows["labels"][in_prefix] == IGNORED).all()


def test_the_check_before_training_passes(objective):
    check_loss(objective, prepared(objective), sequence_length=LENGTH)


def test_what_is_drawn_follows_from_the_generator(objective):
    first, again, other = (prepared(objective, seed=seed) for seed in (0, 0, 1))
    assert all(np.array_equal(first[name], again[name]) for name in first)
    assert not np.array_equal(first["input_ids"], other["input_ids"])


def test_the_loss_is_a_sum_over_what_is_counted(objective):
    """One row at a time, one label at a time: the sum is that of the whole, and each counted label is one term."""
    model, rows = model_for(objective).double(), prepared(objective)
    whole = float(objective.loss_sum(model, tensors(rows)))
    terms = []
    for row, column in zip(*np.nonzero(rows["labels"] != IGNORED), strict=True):
        alone = {name: values[row : row + 1] for name, values in rows.items()}
        alone["labels"] = np.full_like(alone["labels"], IGNORED)
        alone["labels"][0, column] = rows["labels"][row, column]
        if objective.num_predicted(alone):
            terms.append(float(objective.loss_sum(model, tensors(alone))))
    assert len(terms) == objective.num_predicted(rows)
    # float64 sums of some 60 terms of a few nats
    assert whole == pytest.approx(sum(terms), rel=1e-10)
    assert all(term > 0 for term in terms)


def test_padding_changes_no_loss(objective):
    """The sum over rows that are padded is that of each row alone, without padding."""
    model, rows = model_for(objective).double(), prepared(objective)
    lengths = rows.get("lengths", np.full(5, rows["input_ids"].shape[1]))
    each = [{name: values[r : r + 1] for name, values in rows.items()} for r in range(5)]
    cut = [
        row | {name: row[name][:, :length] for name in ("input_ids", "labels")}
        for row, length in zip(each, lengths, strict=True)
    ]
    alone = sum(float(objective.loss_sum(model, tensors(row))) for row in cut)
    assert float(objective.loss_sum(model, tensors(rows))) == pytest.approx(alone, rel=1e-10)
    assert objective.num_predicted(rows) == sum(map(objective.num_predicted, cut))


def test_what_is_measured_is_what_is_trained(objective):
    """The curvature's loss of the same rows is the objective's."""
    model, rows = model_for(objective).double(), prepared(objective)
    own = float(objective.loss_sum(model, tensors(rows))) / objective.num_predicted(rows)
    assert float(mean_token_loss(model, tensors(rows))) == pytest.approx(own, rel=1e-10)


def test_a_tokenizer_gets_what_it_lacks_and_text_stays(objective, tokens_dir):
    from raysweep.data.tokenizers import load_tokenizer

    tokenizer = load_tokenizer(tokens_dir / "tokenizer")
    before = tokenizer("w1 w2 w3")["input_ids"]
    specials = add_extra_tokens(tokenizer, objective)
    assert len(tokenizer) == 17 + len(objective.extra_tokens())
    assert specials.num_text_tokens == 17
    assert list(specials.ids.values()) == list(range(17, len(tokenizer)))
    assert list(specials.words) == list(range(1, 17))
    assert tokenizer("w1 w2 w3")["input_ids"] == before
    # Once more, as a later stage does with the checkpoint's own.
    again = add_extra_tokens(tokenizer, objective)
    assert (again.ids, list(again.words)) == (specials.ids, list(specials.words))


def test_all_of_the_family_are_tried_here():
    assert {type(each) for each in OBJECTIVES} == set(get_args(get_args(Objective)[0]))
