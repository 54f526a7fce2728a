"""Span corruption, UL2 and mixtures against worked examples, a naive reference and all the ways there are."""

from collections import Counter
from itertools import combinations, pairwise
from math import comb

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raysweep.objectives.base import IGNORED, Specials
from raysweep.objectives.causal_lm import CausalLM
from raysweep.objectives.families import Mixture
from raysweep.objectives.masked_lm import MaskedLM
from raysweep.objectives.mixture import mixed
from raysweep.objectives.span_corruption import SpanCorruption, corrupted, count_noise, random_spans
from raysweep.objectives.ul2 import MODES, UL2, Denoiser
from raysweep.stages.pretrain import Recipe
from raysweep.train.models import Llama
from raysweep.train.optimizers import AdamW

SENTINEL, PAD = 1000, 999
"""Id of the first sentinel; text is below."""
IDS = {f"<extra_id_{i}>": SENTINEL + i for i in range(300)} | {"[NLU]": 2000, "[S2S]": 2001, "[NLG]": 2002}
SPECIALS = Specials(IDS, num_text_tokens=900, reserved=tuple(IDS.values()), eos=0, pad=PAD)


def naive_row(ids: list[int], noise: list[bool], opening: list[int]) -> tuple[list[int], list[int], int]:
    """Input, labels and length of the prefix of one row, token by token."""
    inputs, targets, num_spans = list(opening), [], 0
    for t, (token, is_noise) in enumerate(zip(ids, noise, strict=True)):
        if not is_noise:
            inputs.append(token)
            continue
        if not noise[t - 1]:
            inputs.append(SENTINEL + num_spans)
            targets.append(SENTINEL + num_spans)
            num_spans += 1
        targets.append(token)
    targets.append(SENTINEL + num_spans)
    return inputs + targets, [IGNORED] * len(inputs) + targets, len(inputs)


def restored(row: list[int], labels: list[int]) -> list[int]:
    """The text, from the row's own tokens: each sentinel of the prefix gives way to what follows it in the target."""
    num_prefix = next(t for t, label in enumerate(labels) if label != IGNORED)
    spans: dict[int, list[int]] = {}
    for token in row[num_prefix:]:
        if SENTINEL <= token < 2000:
            spans[token] = last = []
        else:
            last.append(token)
    prefix = [token for token in row[:num_prefix] if token < 2000]
    return [piece for token in prefix for piece in (spans[token] if token >= SENTINEL else [token])]


def num_runs(noise) -> int:
    return int(noise[0]) + sum(not a and b for a, b in pairwise(noise))


def test_worked_example_of_t5s_paper():
    """Raffel et al. (2020), Figure 2: "thank you [for inviting] me to your party [last] week"."""
    words = ["Thank", "you", "for", "inviting", "me", "to", "your", "party", "last", "week"]
    noise = np.array([[word in ("for", "inviting", "last") for word in words]])
    rows = corrupted(np.arange(10)[None], noise, SPECIALS, attention="both_ways")
    x, y, z = 1000, 1001, 1002
    assert rows["input_ids"].tolist() == [[0, 1, x, 4, 5, 6, 7, y, 9, x, 2, 3, y, 8, z]]
    assert rows["labels"].tolist() == [[IGNORED] * 9 + [x, 2, 3, y, 8, z]]
    assert rows["prefix_lengths"].tolist() == [9]


def test_worked_example_of_a_mode_and_a_causal_prefix():
    noise = np.array([[False, True, True, False], [False, False, True, True]])
    rows = corrupted(np.array([[5, 6, 7, 8], [1, 2, 3, 4]]), noise, SPECIALS, attention="causal", mode="[NLG]")
    assert rows["input_ids"].tolist() == [[2002, 5, 1000, 8, 1000, 6, 7, 1001], [2002, 1, 2, 1000, 1000, 3, 4, 1001]]
    assert rows["labels"].tolist() == [[IGNORED] * 4 + [1000, 6, 7, 1001], [IGNORED] * 4 + [1000, 3, 4, 1001]]
    assert "prefix_lengths" not in rows


def test_counts_of_the_papers():
    # Raffel et al., section 3.3.4: of 500 tokens, 15 % in 25 spans of 3 tokens.
    assert count_noise(500, density=0.15, mean_span_length=3.0) == (75, 25)
    # T5's own rows: 512 tokens of text.
    assert count_noise(512, density=0.15, mean_span_length=3.0) == (77, 26)
    # Never nothing, never all, and a kept token before every span.
    assert count_noise(2, density=0.01, mean_span_length=3.0) == (1, 1)
    assert count_noise(10, density=0.99, mean_span_length=1.0) == (9, 1)


@settings(max_examples=200)
@given(
    num=st.integers(1, 6),
    length=st.integers(2, 90),
    density=st.floats(0.01, 0.99),
    mean_span_length=st.floats(1.0, 70.0),
    attention=st.sampled_from(["both_ways", "causal"]),
    seed=st.integers(0, 2**31),
)
def test_span_corruption_is_its_definition(num, length, density, mean_span_length, attention, seed):
    objective = SpanCorruption(
        name="span_corruption",
        density=density,
        mean_span_length=mean_span_length,
        attention=attention,
        num_sentinels=len(IDS) - 3,
    )
    ids = np.random.default_rng(seed).integers(0, 900, (num, length))
    before = ids.copy()
    rows = objective.prepare(ids, np.random.default_rng([seed, 1]), SPECIALS)
    assert (ids == before).all()

    num_noise, num_spans = count_noise(length, density=density, mean_span_length=mean_span_length)
    assert num_noise == np.clip(np.round(length * density), 1, length - 1)
    noise = random_spans(num, length, num_noise=num_noise, num_spans=num_spans, draw=np.random.default_rng([seed, 1]))
    assert rows["input_ids"].shape == rows["labels"].shape == (num, objective.input_length(length))
    for r in range(num):
        assert noise[r].sum() == num_noise
        assert num_runs(noise[r]) == num_spans
        inputs, labels, num_prefix = naive_row(ids[r].tolist(), noise[r].tolist(), [])
        assert rows["input_ids"][r].tolist() == inputs
        assert rows["labels"][r].tolist() == labels
        if attention == "both_ways":
            assert rows["prefix_lengths"][r] == num_prefix
        else:
            assert "prefix_lengths" not in rows
        assert restored(inputs, labels) == ids[r].tolist()
        # Every token of the text once, in the prefix or in the target, beside each sentinel twice and the end once.
        marks = [SENTINEL + i for i in range(num_spans)]
        assert Counter(inputs) == Counter([*ids[r].tolist(), *marks, *marks, SENTINEL + num_spans])


@pytest.mark.parametrize(("length", "num_noise", "num_spans"), [(8, 3, 2), (7, 2, 1), (7, 3, 3)])
def test_all_ways_to_hide_are_equally_likely(length, num_noise, num_spans):
    places = combinations(range(length), num_noise)
    masks = [tuple(t in chosen for t in range(length)) for chosen in places]
    ways = [mask for mask in masks if not mask[0] and num_runs(mask) == num_spans]
    num = 4000 * len(ways)
    drawn = random_spans(num, length, num_noise=num_noise, num_spans=num_spans, draw=np.random.default_rng(7))
    counts = Counter(map(tuple, drawn.tolist()))
    assert set(counts) == set(ways)
    # The number of compositions: of noise into spans, of the rest and a possible end into what stands between.
    assert len(ways) == comb(num_noise - 1, num_spans - 1) * comb(length - num_noise, num_spans)
    # Chi-square: mean dof, variance 2 dof; this seed's draw must be within four standard deviations.
    dof = len(ways) - 1
    chi2 = sum((count - 4000) ** 2 / 4000 for count in counts.values())
    assert abs(chi2 - dof) < 4 * np.sqrt(2 * dof)


def test_too_few_sentinels():
    with pytest.raises(ValueError, match=r"num_sentinels 20 are too few for sequence_length 500: 25 spans .* need 26"):
        SpanCorruption(name="span_corruption", num_sentinels=20).input_length(500)
    assert SpanCorruption(name="span_corruption", num_sentinels=26).input_length(500) == 500 + 2 * 25 + 1
    with pytest.raises(ValueError, match=r"num_sentinels 100 are too few for sequence_length 1024: 171 spans"):
        UL2(name="ul2").input_length(1024)


def test_a_recipe_with_too_few_sentinels_is_refused(grammar):
    given = {"data": grammar, "optimizer": AdamW(lr=1e-2), "steps": 1, "batch_sequences": 1, "sequence_length": 5}
    model = Llama(hidden_size=16, num_layers=1, num_heads=2)
    many = SpanCorruption(name="span_corruption", density=0.4, mean_span_length=1.0, num_sentinels=2)
    with pytest.raises(ValueError, match=r"num_sentinels 2 are too few for sequence_length 5: 2 spans"):
        Recipe(**given, model=model, objective=many)


def test_ul2_is_the_papers_table():
    """Tay et al. (2022), Table 1, at a length of 512: tokens and spans of R (mean 3, 8), S and X (3, 8, 64, 64)."""
    found = [(each.mode, *each.count_noise(512)) for each in UL2(name="ul2").denoisers]
    assert found == [
        ("R", 77, 26),
        ("R", 77, 10),
        ("S", 128, 1),
        ("X", 256, 85),
        ("X", 256, 32),
        ("X", 77, 1),
        ("X", 256, 4),
    ]
    assert UL2(name="ul2").input_length(512) == 1 + 512 + 2 * 85 + 1


def test_worked_example_of_an_s_denoiser():
    objective = UL2(name="ul2", denoisers=(Denoiser(mode="S", density=0.25),))
    rows = objective.prepare(np.arange(8)[None], np.random.default_rng(0), SPECIALS)
    assert rows["input_ids"].tolist() == [[2001, 0, 1, 2, 3, 4, 5, 1000, 1000, 6, 7, 1001]]
    assert rows["labels"].tolist() == [[IGNORED] * 8 + [1000, 6, 7, 1001]]
    assert rows["prefix_lengths"].tolist() == [8]
    assert rows["lengths"].tolist() == [12]


denoisers = st.builds(
    lambda mode, density, mean, weight: Denoiser(
        mode=mode, density=density, mean_span_length=None if mode == "S" else mean, weight=weight
    ),
    st.sampled_from(["R", "S", "X"]),
    st.floats(0.05, 0.9),
    st.floats(1.0, 70.0),
    st.floats(0.1, 3.0),
)


@settings(max_examples=100)
@given(
    num=st.integers(1, 12),
    length=st.integers(2, 60),
    ways=st.lists(denoisers, min_size=1, max_size=4),
    seed=st.integers(0, 2**31),
)
def test_ul2_is_its_definition(num, length, ways, seed):
    objective = UL2(name="ul2", denoisers=tuple(ways), num_sentinels=100)
    ids = np.random.default_rng(seed).integers(0, 900, (num, length))
    rows = objective.prepare(ids, np.random.default_rng([seed, 1]), SPECIALS)
    assert rows["input_ids"].shape[1] <= objective.input_length(length)
    assert rows["input_ids"].shape[1] == rows["lengths"].max()
    counts = {(MODES[each.mode], *each.count_noise(length)) for each in ways}
    names = {number: name for name, number in IDS.items()}
    for r in range(num):
        end, num_prefix = int(rows["lengths"][r]), int(rows["prefix_lengths"][r])
        inputs, labels = rows["input_ids"][r].tolist(), rows["labels"][r].tolist()
        assert inputs[end:] == [PAD] * (len(inputs) - end)
        assert labels == [IGNORED] * num_prefix + inputs[num_prefix:end] + [IGNORED] * (len(inputs) - end)
        inputs, labels = inputs[:end], labels[:end]
        assert restored(inputs, labels) == ids[r].tolist()
        num_spans = sum(SENTINEL <= token < 2000 for token in inputs[:num_prefix])
        num_noise = sum(token < SENTINEL for token in inputs[num_prefix:])
        mode = names[inputs[0]]
        assert (mode, num_noise, num_spans) in counts
        if mode == "[S2S]":
            assert inputs[1 : num_prefix - 1] == ids[r, :-num_noise].tolist()


def test_denoisers_are_drawn_by_weight():
    ways = (
        Denoiser(mode="R", density=0.15, mean_span_length=3.0, weight=1.0),
        Denoiser(mode="S", density=0.25, weight=3.0),
    )
    rows = UL2(name="ul2", denoisers=ways).prepare(np.zeros((40_000, 8), np.int64), np.random.default_rng(3), SPECIALS)
    share = (rows["input_ids"][:, 0] == IDS["[S2S]"]).mean()
    # Four standard errors of a share of 0.75 in 40,000 draws.
    assert abs(share - 0.75) < 4 * np.sqrt(0.75 * 0.25 / 40_000)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mode": "S", "density": 0.25, "mean_span_length": 3.0}, "S is one span at the end; leave it out"),
        ({"mode": "X", "density": 0.5}, "mean_span_length is missing; X takes one"),
    ],
)
def test_denoisers_that_contradict_themselves(settings, message):
    with pytest.raises(ValueError, match=message):
        Denoiser(**settings)


def test_a_row_is_a_function_of_the_generator_alone():
    ids = np.random.default_rng(0).integers(0, 900, (20, 40))
    first, again, other = (UL2(name="ul2").prepare(ids, np.random.default_rng(seed), SPECIALS) for seed in (1, 1, 2))
    assert all((first[name] == again[name]).all() for name in first)
    assert first["input_ids"].shape != other["input_ids"].shape or (first["input_ids"] != other["input_ids"]).any()


def test_worked_example_of_a_mixture():
    """Rows of a causal LM and of span corruption: padded, labelled and seen as each one's own."""
    ids = np.arange(1, 41).reshape(10, 4)
    spans = SpanCorruption(name="span_corruption", density=0.5, mean_span_length=2.0)
    makers = [
        lambda ids, draw: CausalLM().prepare(ids, draw, SPECIALS),
        lambda ids, draw: spans.prepare(ids, draw, SPECIALS),
    ]
    rows = mixed(ids, makers, [1, 1], np.random.default_rng(0), pad=PAD)
    assert rows["input_ids"].shape == (10, 4 + 2 + 1)
    assert set(rows["lengths"]) == {4, 7}
    for r in range(10):
        inputs, labels = rows["input_ids"][r].tolist(), rows["labels"][r].tolist()
        if rows["lengths"][r] == 4:
            assert inputs == [*ids[r], PAD, PAD, PAD]
            assert labels == [*ids[r], IGNORED, IGNORED, IGNORED]
            assert rows["prefix_lengths"][r] == 0
        else:
            assert labels == [IGNORED] * 3 + inputs[3:]
            assert restored(inputs, labels) == ids[r].tolist()
            assert rows["prefix_lengths"][r] == 3


def test_objectives_are_mixed_by_weight():
    spans = SpanCorruption(name="span_corruption", density=0.5, mean_span_length=2.0)
    parts = {"causal": CausalLM(), "spans": spans, "unused": UL2(name="ul2")}
    objective = Mixture(name="mixture", objectives=parts, mix={"causal": 1.0, "spans": 3.0})
    assert set(objective.extra_tokens()) == set(UL2(name="ul2").extra_tokens())
    rows = objective.prepare(np.zeros((40_000, 4), np.int64), np.random.default_rng(5), SPECIALS)
    assert set(rows["lengths"]) == {4, 7}
    # Four standard errors of a share of 0.75 in 40,000 draws.
    assert abs((rows["lengths"] == 7).mean() - 0.75) < 4 * np.sqrt(0.75 * 0.25 / 40_000)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"objectives": {"hidden": MaskedLM(name="masked_lm")}}, "'hidden' is masked_lm, of masked models; mix those"),
        ({"objectives": {"causal": CausalLM()}, "mix": {"casual": 1.0}}, "mix names 'casual', which is no objective"),
        ({"objectives": {"causal": CausalLM()}, "mix": {"causal": 0.0}}, "at least one weight must be above 0"),
    ],
)
def test_mixtures_that_cannot_be(settings, message):
    with pytest.raises(ValueError, match=message):
        Mixture(name="mixture", **settings)


def test_what_is_predicted_in_words():
    spans, ways = (
        SpanCorruption(name="span_corruption"),
        (Denoiser(mode="S", density=0.25), UL2(name="ul2").denoisers[0]),
    )
    assert spans.predicts() == (
        "0.15 of the tokens, cut out in spans of 3 on average, and their sentinels, "
        "from what is left of a sequence, seen both ways"
    )
    assert UL2(name="ul2", denoisers=ways, attention="causal").predicts() == (
        "what 2 denoisers cut out (S 0.25, R 0.15 in 3s), and its sentinels, "
        "from what is left of a sequence, seen causally"
    )
    # A loss over other shares of the rows is another quantity.
    unequal = UL2(name="ul2", denoisers=(ways[0].with_(weight=3.0), ways[1]))
    assert "what 2 denoisers cut out (0.75 of rows S 0.25, 0.25 of rows R 0.15 in 3s)" in unequal.predicts()
    mixture = Mixture(name="mixture", objectives={"next": CausalLM(), "spans": spans}, mix={"next": 3, "spans": 1})
    assert mixture.predicts() == (
        f"next, 0.75 of rows: {CausalLM().predicts()}; spans, 0.25 of rows: {spans.predicts()}"
    )
