"""Splits: what an indicator is scored on is no example of its target, whatever stands twice in whatever file."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raysweep.data.pcfg import PCFG
from raysweep.errors import DataError
from raysweep.space import load
from raysweep.spec import fingerprint
from raysweep.tasks.base import TARGET_SPLITS
from raysweep.tasks.multiple_choice import MultipleChoice
from raysweep.tasks.qa import QA
from raysweep.tasks.spans import PCFGSpan


def questions(numbers) -> list[dict]:
    """Lines of a file, each with an id of its own; equal numbers ask the same."""
    return [{"id": str(at), "question": f"What is {number}?", "answers": ["a"]} for at, number in enumerate(numbers)]


def pinned(folder, train, test, ood=None, **limits) -> QA:
    for name, lines in (("train", train), ("test", test), ("ood", ood or [])):
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, lines)))
    far = {"ood_test": "ood.jsonl"} if ood else {}
    return QA(form="qa", train="train.jsonl", test="test.jsonl", **far, **limits).pin(folder)


@settings(max_examples=60)
@given(
    train=st.lists(st.integers(0, 60), min_size=2, max_size=80),
    test=st.lists(st.integers(0, 60), min_size=1, max_size=30),
    ood=st.lists(st.integers(0, 60), max_size=30),
    limit=st.integers(1, 80),
)
def test_no_indicator_example_is_one_of_the_targets(tmp_path_factory, train, test, ood, limit):
    """Near chance, a score is mostly the noise of its examples: shared ones would pass for agreement."""
    lines = [questions(numbers) for numbers in (train, test, ood)]
    task = pinned(tmp_path_factory.mktemp("t"), *lines, max_train_examples=limit)
    indicator = {line["question"] for line in task.examples("indicator")}
    for split in TARGET_SPLITS:
        assert task.examples(split)
        assert not indicator & {line["question"] for line in task.examples(split)}
    assert not indicator & {f"What is {number}?" for number in [*test, *ood]}
    assert len(task.examples("ood")) == len(ood)


def test_examples_of_another_domain_are_another_task_and_none_leave_it_as_it_was(tmp_path):
    train, test = questions(range(20)), questions(range(100, 110))
    plain, far, farther = (pinned(tmp_path, train, test, ood) for ood in (None, questions([200]), questions([201])))
    assert len({fingerprint(task) for task in (plain, far, farther)}) == 3
    assert plain.fingerprint == far.fingerprint.rpartition(":")[0]
    assert not plain.examples("ood")
    assert plain.workload().num_ood == 0 < far.workload().num_ood
    with pytest.raises(DataError, match=r"no file matches 'none\.jsonl'"):
        far.with_(ood_test="none.jsonl").pin(tmp_path)


def test_indicators_take_what_training_leaves_and_at_least_as_many_as_validate(tmp_path):
    test = questions(range(1000, 1010))
    small = pinned(tmp_path, questions(range(100)), test)
    assert [len(small.examples(split)) for split in ("train", "valid", "indicator")] == [80, 10, 10]
    large = small.with_(max_train_examples=40)
    assert [len(large.examples(split)) for split in ("train", "valid", "indicator")] == [40, 10, 50]


def test_test_examples_that_are_trained_on_are_counted(tmp_path):
    task = pinned(tmp_path, questions(range(20)), questions([*range(15, 20), *range(100, 110)]))
    trained = {line["question"] for split in ("train", "valid") for line in task.examples(split)}
    num = len(trained & {f"What is {number}?" for number in range(15, 20)})
    assert num > 2
    [(place, text)] = task.warnings()
    assert place == ("test",)
    assert f"of 15 test examples, {num} are also in train" in text
    far = pinned(tmp_path, questions(range(20)), questions(range(100, 110)), questions([*range(15, 20), 200]))
    [(place, text)] = far.warnings()
    assert (place, text[:20]) == (("ood_test",), "of 6 test examples, ")
    assert not list(pinned(tmp_path, questions(range(20)), questions(range(100, 110))).warnings())


def test_blanks_case_and_the_order_of_choices_make_no_other_example(tmp_path):
    lines = [
        {"question": f"Which one of {at}?", "choices": [f"the {at}", "none", "all"], "answer": 0} for at in range(40)
    ]
    again = [
        line | {"question": line["question"].upper() + "  ", "choices": line["choices"][::-1], "answer": 2}
        for line in lines
    ]
    for name, part in (("train", lines), ("test", again[:39])):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, part)))
    task = MultipleChoice(form="multiple_choice", train="train.jsonl", test="test.jsonl").pin(tmp_path)
    assert len(task.examples("indicator")) <= 1
    others = task.with_(test="train.jsonl").pin(tmp_path)
    assert others.examples("indicator") == []


def test_a_file_that_leaves_none_is_refused_where_indicators_need_them(tmp_path, sweep_file):
    (tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, questions(range(30)))))
    text = """\
name: small
pretrain:
  data: {name: text, domains: {a: {train: texts.jsonl}}, tokenizer: {name: bpe, vocab_size: 300}}
  model: {name: llama, hidden_size: 16, num_layers: 1, num_heads: 2}
  optimizer: {name: adamw, lr: 1e-2}
  steps: 12
  batch_sequences: 8
  sequence_length: 16
  checkpoints: [12]
sft: {tasks: {t: {form: qa, train: train.jsonl, test: train.jsonl}}}
"""
    (tmp_path / "texts.jsonl").write_text("".join(f'{{"text": "words of text {at}"}}\n' for at in range(100)))
    (warning,) = load(sweep_file(text)).warnings
    assert "tiny.yaml:10: sft.tasks.t.test: of 30 test examples, 27 are also in train, and fine-tuned on" in warning
    with pytest.raises(DataError, match=r"sft\.tasks\.t\.train: of its 30 examples none is left"):
        load(sweep_file(text + "indicators: {kshot: 1}\n"))


def grammar(length: int) -> PCFG:
    return PCFG(num_words_total=16, num_nonterminals=4, num_rules=2, num_words=3, sentence_length=length)


@pytest.mark.parametrize("length", [2, 4, 16])
def test_no_indicator_sentence_is_one_of_the_targets(length):
    task = PCFGSpan(form="pcfg_span", span=1, num_train=30, num_valid=10, num_test=200).bind(grammar(length))
    words, labels = task.examples("indicator")
    assert 0 < len(words) == len(labels) <= 200
    known = np.concatenate([task.examples(split)[0] for split in TARGET_SPLITS])
    assert not {row.tobytes() for row in words} & {row.tobytes() for row in known}
    task.check_indicator()


def test_a_grammar_of_few_sentences_has_none_left():
    few = PCFG(num_words_total=2, num_nonterminals=2, num_rules=1, num_words=1, sentence_length=2)
    task = PCFGSpan(form="pcfg_span", span=1, num_train=30, num_valid=10, num_test=20).bind(few)
    with pytest.raises(DataError, match=r"none is left to score indicators on of 20 sentences more"):
        task.check_indicator()


def test_chance_is_the_score_of_who_reads_nothing(tmp_path):
    task = PCFGSpan(form="pcfg_span", span=1, num_train=50, num_valid=10, num_test=40).bind(grammar(4))
    labels, right = task.examples("train")[1], task.examples("test")[1]
    assert task.chance() == np.mean(right == np.bincount(labels).argmax())
    lines = [line | {"answers": ["red" if at % 3 else "blue"]} for at, line in enumerate(questions(range(60)))]
    assert pinned(tmp_path, lines, lines[:30]).chance() == pytest.approx(20 / 30)
    choices = [{"question": f"{at}", "choices": ["a"] * (2 + 2 * (at % 2)), "answer": 0} for at in range(10)]
    (tmp_path / "c.jsonl").write_text("\n".join(map(json.dumps, choices)))
    task = MultipleChoice(form="multiple_choice", train="c.jsonl", test="c.jsonl").pin(tmp_path)
    assert task.chance() == pytest.approx((1 / 2 + 1 / 4) / 2)


def test_of_models_that_guess_the_indicator_says_nothing_of_the_target(tmp_path):
    """Each model answers a question by a coin of its own: on shared examples, its luck passes for skill."""
    draw = np.random.default_rng(0)
    train, test = draw.integers(0, 400, 600), draw.integers(200, 600, 120)
    task = pinned(tmp_path, questions(train), questions(test), max_train_examples=100)

    def scores(split: str) -> np.ndarray:
        asked = [line["question"] for line in task.examples(split)]
        coins = {question: np.random.default_rng(list(question.encode())).random(300) < 0.5 for question in asked}
        return np.mean([coins[question] for question in asked], axis=0)

    # Over 300 models an independent correlation is within 0.15 with a probability of 99 %.
    assert abs(np.corrcoef(scores("indicator"), scores("test"))[0, 1]) < 0.15


def test_sentences_of_two_grammars_are_not_taken_for_the_same_examples():
    task = PCFGSpan(form="pcfg_span", span=4, num_train=10, num_valid=5, num_test=20)
    one, two = (task.bind(PCFG(grammar_seed=seed)).ids("test") for seed in (0, 1))
    assert len(set(one)) == 20
    assert not set(one) & set(two)
    assert task.bind(PCFG(grammar_seed=0)).ids("test") == one
