"""Task forms: scoring does not depend on batches, answers are scored as published, labels are the grammar's."""

import json
import math
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import ByteLevelBPETokenizer, Tokenizer
from tokenizers.models import Unigram
from tokenizers.pre_tokenizers import Metaspace
from tokenizers.processors import TemplateProcessing
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from raysweep.data.exact import TASK
from raysweep.data.formats import read_jsonl
from raysweep.data.hmm import HMM
from raysweep.data.pcfg import PCFG
from raysweep.errors import DataError, SpaceError
from raysweep.tasks import files
from raysweep.tasks.base import Answered
from raysweep.tasks.multiple_choice import MultipleChoice
from raysweep.tasks.qa import QA, normalise, token_f1
from raysweep.tasks.rows import ask, fit, in_batches, pad
from raysweep.tasks.spans import PCFGSpan
from raysweep.tasks.states import HMMState


@pytest.fixture(scope="module")
def tokenizer():
    """Byte-level BPE of a few merges."""
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(["the cat sat on the mat", "Question Answer Context"] * 5, 280, special_tokens=["<e>"])
    return PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, eos_token="<e>")


@pytest.fixture(scope="module")
def model():
    """A tiny Llama with weights large enough that its answers differ."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=280, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, initializer_range=0.3, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def test_choices_are_ranked_by_mean_likelihood(model, tokenizer):
    task = MultipleChoice(form="multiple_choice", train="x", test="x")
    examples = [
        {"question": "the cat", "choices": ["sat", "mat on the mat", "on"], "answer": index} for index in range(3)
    ]
    scores = [row.scores["score"] for row in task.evaluate(model, tokenizer, examples, max_length=64)]
    assert sorted(scores) == [0.0, 0.0, 1.0]


def test_likelihoods_of_right_answers_are_those_of_a_naive_loop(model, tokenizer, tmp_path):
    """Per token; of several right answers the likeliest."""
    lines = {
        "multiple_choice": {"question": "the cat", "choices": ["sat", "mat on the mat"], "answer": 1},
        "qa": {"question": "the cat", "answers": ["sat", "sat on the mat"]},
    }
    for kind, line in lines.items():
        path = tmp_path / f"{kind}.jsonl"
        path.write_text("\n".join(json.dumps(line | {"question": f"the cat {index}"}) for index in range(12)))
        task = (MultipleChoice if kind == "multiple_choice" else QA)(form=kind, train=str(path), test=str(path))
        task = task.pin(tmp_path)
        found = task.log_likelihoods(model, tokenizer, "test")
        rights = [" mat on the mat"] if kind == "multiple_choice" else [" sat", " sat on the mat"]
        guesses = task.score_untrained(model, tokenizer, num_shots=2, max_examples=4)
        shots = "".join(f"{task.prompt(shot)} {task.right_answers(shot)[0]}\n\n" for shot in task.examples("train")[:2])
        cases = [("", value, example) for value, example in zip(found, task.examples("test"), strict=True)]
        for guess, example in zip(guesses, task.examples("indicator"), strict=True):
            cases.append((shots, guess.log_likelihood, example))
        for before, value, example in cases:
            each = []
            for right in rights:
                prompt = tokenizer(before + task.prompt(example))["input_ids"]
                answer = tokenizer(right)["input_ids"]
                with torch.no_grad():
                    logits = model(torch.tensor([prompt + answer])).logits[0].double().log_softmax(dim=-1)
                each.append(np.mean([logits[len(prompt) - 1 + at, token] for at, token in enumerate(answer)]))
            assert value == pytest.approx(max(each), abs=1e-5)


def test_a_prompt_loses_its_beginning_where_a_task_allows_fewer_tokens(model, tokenizer, tmp_path):
    """In training, in scoring and in likelihoods."""
    (path := tmp_path / "qa.jsonl").write_text(
        "\n".join(
            json.dumps({"question": f"the cat {index}", "context": f"{index} " * 40, "answers": ["sat"]})
            for index in range(12)
        )
    )
    task = QA(form="qa", train=str(path), test=str(path), max_length=32, max_new_tokens=4).pin(tmp_path)
    read: list[int] = []

    def train(model, batch, *, loss, num_examples):
        read.extend(batch(range(num_examples))["input_ids"].shape)
        return [0.0]

    task.fit(model, tokenizer, train, seed=0)
    assert read[1] == 32
    example = task.examples("test")[0]
    prompt, answer = (tokenizer(text)["input_ids"] for text in (task.prompt(example), " sat"))
    kept = prompt[-(32 - len(answer)) :]
    with torch.no_grad():
        logits = model(torch.tensor([kept + answer])).logits[0].double().log_softmax(dim=-1)
    likelihood = np.mean([logits[len(kept) - 1 + at, token] for at, token in enumerate(answer)])
    assert task.log_likelihoods(model, tokenizer, "test")[0] == pytest.approx(likelihood, abs=1e-5)
    assert task.workload().length == 32


def test_a_model_whose_numbers_are_none_gets_no_score(model, tokenizer):
    """Not that of always picking the first choice."""
    broken = LlamaForCausalLM(model.config).eval()
    torch.nn.init.constant_(broken.model.norm.weight, math.nan)
    choices = MultipleChoice(form="multiple_choice", train="x", test="x")
    words = QA(form="qa", train="x", test="x")
    for task, example in (
        (choices, {"question": "the cat", "choices": ["sat", "on"], "answer": 0}),
        (words, {"question": "the cat", "answers": ["sat"]}),
    ):
        [row] = task.evaluate(broken, tokenizer, [example], max_length=64)
        assert row.scores.keys() == set(task.score_names)
        assert all(map(math.isnan, row.scores.values()))


def test_a_score_is_a_share():
    with pytest.raises(ValueError, match=r"score 'score' is -1\.5; scores of all tasks lie in \[0, 1\]"):
        Answered("3", {"score": -1.5})


@pytest.mark.parametrize(
    ("answer", "right", "f1"),
    [
        ("The Cat!", "cat", 1.0),
        ("a black cat", "the cat", 2 / 3),
        ("dog", "cat", 0.0),
        ("", "cat", 0.0),
        ("cat cat", "cat", 2 / 3),
    ],
)
def test_f1_is_squads(answer, right, f1):
    assert token_f1(answer, right) == pytest.approx(f1)


def test_normalisation_is_squads():
    assert normalise("  The, quick.  an Apple ") == "quick apple"


def test_qa_takes_the_best_of_the_right_answers(model, tokenizer, monkeypatch):
    import raysweep.tasks.decoding as decoding

    monkeypatch.setattr(decoding, "first_lines", lambda *args, **kwargs: ["the black cat"])
    task = QA(form="qa", train="x", test="x")
    row = task.evaluate(model, tokenizer, [{"question": "q", "answers": ["dog", "black cat"]}], max_length=64)[0]
    assert row == Answered("the black cat", {"score": 1.0, "exact_match": 1.0, "f1": 1.0})


def test_a_prompt_too_long_loses_its_beginning():
    assert fit([1, 2, 3, 4], 2) == [3, 4]
    assert fit([1, 2], 7) == [1, 2]


def as_llamas(*pieces):
    """A tokenizer that puts a blank and <s> before a text; its tokens are characters, <s> and these pieces."""
    vocabulary = [
        ("<unk>", -9.0),
        *((char, -5.0) for char in "▁:abc"),
        *((piece, -1.0) for piece in pieces),
        ("<s>", 0),
    ]
    tokenizer = Tokenizer(Unigram(vocabulary, unk_id=0))
    tokenizer.pre_tokenizer = Metaspace(prepend_scheme="always", split=False)
    start = len(vocabulary) - 1
    tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", start)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", unk_token="<unk>")


def test_an_answer_goes_on_from_its_prompt_without_what_a_text_begins_with():
    tokenizer = as_llamas("▁a", "▁b")
    (asked,) = ask(tokenizer, ["a:"], [[" b", " bc"]], max_length=9)
    assert tokenizer.convert_ids_to_tokens(asked.prompt) == ["<s>", "▁a", ":"]
    # By itself " b" would be "▁", "▁b".
    assert [tokenizer.convert_ids_to_tokens(ids) for ids in asked.answers] == [["▁b"], ["▁b", "c"]]
    assert not asked.is_cut


def test_a_prompt_ends_before_a_token_that_reaches_into_an_answer():
    tokenizer = as_llamas("▁a", ":▁b")
    (asked,) = ask(tokenizer, ["a:"], [[" b", " c"]], max_length=9)
    assert tokenizer.convert_ids_to_tokens(asked.prompt) == ["<s>", "▁a"]
    assert [tokenizer.convert_ids_to_tokens(ids) for ids in asked.answers] == [[":▁b"], [":", "▁", "c"]]


def test_a_prompt_that_does_not_fit_with_its_longest_answer_is_cut(tokenizer):
    texts = [("one two three:", [" a", " aaa"]), ("one:", [" a"])]
    whole = ask(tokenizer, *zip(*texts, strict=True), max_length=99, end=[0])
    assert [each.is_cut for each in whole] == [False, False]
    longest = max(len(each.prompt) + max(map(len, each.answers)) for each in whole)
    cut, other = ask(tokenizer, *zip(*texts, strict=True), max_length=longest - 2, end=[0])
    assert (cut.is_cut, other.is_cut) == (True, False)
    assert cut.prompt == whole[0].prompt[2:]
    assert cut.answers == whole[0].answers
    (short,) = ask(tokenizer, ["one two"], [[" abc abc"]], max_length=3, end=[0])
    # One token of the prompt is left, one of the answer, and what closes it.
    assert [len(short.prompt), len(short.answers[0]), short.answers[0][-1], short.is_cut] == [1, 2, 0, True]


def test_batches_keep_the_order():
    batches = []
    lengths = [5, 1, 9, 3, 3]
    got = in_batches(lengths, lambda batch: batches.append(batch) or [-lengths[at] for at in batch], max_tokens=9)
    assert got == [-5, -1, -9, -3, -3]
    assert batches == [[1, 3, 4], [0], [2]]
    values, mask = pad([[1, 2], [3]], value=0, left=True)
    assert values.tolist() == [[1, 2], [0, 3]]
    assert mask.tolist() == [[1, 1], [0, 1]]


def test_splits_do_not_meet_and_do_not_depend_on_the_files_order(tmp_path):
    lines = [{"id": str(i), "question": f"q{i}", "answers": ["a"]} for i in range(50)]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, lines)))
    (tmp_path / "b.jsonl").write_text("\n".join(map(json.dumps, reversed(lines))))
    one, two = (QA(form="qa", train=name, test=name).pin(tmp_path) for name in ("a.jsonl", "b.jsonl"))
    train, valid = one.examples("train"), one.examples("valid")
    assert len(valid) == 5
    assert len(train) == 40
    assert not {line["id"] for line in train} & {line["id"] for line in valid}
    assert two.examples("valid") == valid


def test_examples_have_names_of_their_own(tmp_path):
    lines = [{"id": "one", "question": "q0"}, {"id": 2, "question": "q1"}, {"question": "q2"}, {"question": "q2"}]
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps(line | {"answers": ["a"]}) for line in lines))
    task = QA(form="qa", train="a.jsonl", test="a.jsonl").pin(tmp_path)
    names = dict(zip(task.ids("test"), (line["question"] for line in task.examples("test")), strict=True))
    assert names.pop("one") == "q0"
    assert names.pop("2") == "q1"
    first, second = sorted(names)
    assert second == f"{first}#2"
    assert len(first) == 12


def test_pinned_files_are_read_once_for_all_stages_of_a_task(tmp_path):
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"question": f"q{i}", "answers": ["a"]}) for i in range(9)))
    task = QA(form="qa", train="a.jsonl", test="a.jsonl").pin(tmp_path)
    another = task.with_(max_test_examples=3)
    assert another.examples("test")[0] is task.examples("test")[0]


def test_each_file_of_many_tasks_is_read_once_until_it_changes(tmp_path, monkeypatch):
    read = []
    monkeypatch.setattr(files, "read_jsonl", lambda path, want: [read.append(path), *read_jsonl(path, want)][1:])

    def write(split, at, answer):
        lines = [{"question": f"q{at} {split} {row}", "answers": [answer]} for row in range(9)]
        (tmp_path / f"{split}{at}.jsonl").write_text("\n".join(map(json.dumps, lines)))

    def looked_at():
        """As loading a sweep file does: pins all tasks first, and then asks for all splits of each."""
        tasks = [QA(form="qa", train=f"train{at}.jsonl", test=f"test{at}.jsonl").pin(tmp_path) for at in range(6)]
        for task in tasks:
            task.check_indicator()
        assert not [found for task in tasks for found in task.warnings()]
        return tasks[3].examples("test")[0]["answers"]

    for at in range(6):
        write("train", at, "a")
        write("test", at, "a")
    assert looked_at() == ["a"]
    assert len(read) == len(set(read)) == 12
    state = (tmp_path / "test3.jsonl").stat()
    write("test", 3, "b")
    os.utime(tmp_path / "test3.jsonl", ns=(state.st_atime_ns, state.st_mtime_ns))
    assert looked_at() == ["b"]
    assert len(read) == 13


def test_of_many_examples_those_read_last_stay_in_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "_KEPT", {})
    monkeypatch.setattr(files, "MAX_KEPT_EXAMPLES", 0)
    for at in range(3):
        for split in ("train", "test"):
            (tmp_path / f"{split}{at}.jsonl").write_text(f'{{"question": "q", "answers": ["{at}"]}}\n' * 2)
        QA(form="qa", train=f"train{at}.jsonl", test=f"test{at}.jsonl").pin(tmp_path)
    assert [Path(path).name for each in files._KEPT for path, _ in each.digests] == [
        *("train1.jsonl", "test1.jsonl"),
        *("train2.jsonl", "test2.jsonl"),
    ]


def test_answers_must_be_there(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"question": "q", "answers": []}')
    with pytest.raises(DataError, match=r"a\.jsonl:1: field 'answers' must be a list of one or more texts"):
        QA(form="qa", train="a.jsonl", test="a.jsonl").pin(tmp_path)


def test_spans_are_the_grammars_labels():
    grammar = PCFG(num_words_total=16, num_nonterminals=4, num_rules=2, num_words=3, sentence_length=8)
    task = PCFGSpan(form="pcfg_span", span=4, num_train=20, num_valid=10, num_test=15).bind(grammar)
    ids, labels = task.examples("train")
    assert ids.shape == (20, 9)
    assert (ids[:, 0] == 0).all()
    assert set(labels) <= set(range(4))
    parts = [task.examples(split)[0] for split in ("train", "valid", "test")]
    assert [len(part) for part in parts] == [20, 10, 15]
    words, spans = grammar.sample(45, seed=0, stream=2)
    assert (np.concatenate(parts)[:, 1:] - 1 == words).all()
    assert (labels == spans[4][:20, -1]).all()


def test_states_are_the_chains_labels():
    chain = HMM(num_words_total=16, num_states=4, sentence_length=6)
    task = HMMState(form="hmm_state", position=5, num_train=20, num_valid=10, num_test=15, seed=3).bind(chain)
    assert task.num_classes == 4
    parts = [task.examples(split) for split in ("train", "valid", "test")]
    assert [part[0].shape for part in parts] == [(20, 7), (10, 7), (15, 7)]
    words, states = chain.sample(45, seed=3, stream=TASK)
    np.testing.assert_array_equal(np.concatenate([ids for ids, _ in parts])[:, 1:] - 1, words)
    np.testing.assert_array_equal(np.concatenate([labels for _, labels in parts]), states[:, 4])


@pytest.mark.parametrize(
    ("corpus", "position", "words"),
    [
        (PCFG(), 1, "form hmm_state needs pretrain.data hmm, not pcfg"),
        (HMM(sentence_length=6), 7, "7 is no position of a sentence of 6 words"),
        (HMM(sentence_length=4096), 1, "num_train, num_valid and num_test sentences take 158,105,600 numbers"),
    ],
)
def test_states_that_cannot_be_asked_for(corpus, position, words):
    task = HMMState(form="hmm_state", position=position, num_train=18_000)
    with pytest.raises(SpaceError, match=words):
        task.bind(corpus)


def test_nearest_centroid_of_separable_states(model, tokenizer):
    grammar = PCFG(num_words_total=16, num_nonterminals=3, num_rules=2, num_words=3, sentence_length=8)
    task = PCFGSpan(form="pcfg_span", span=1, num_train=60, num_valid=10, num_test=60).bind(grammar)
    guesses = task.score_untrained(model, tokenizer, num_shots=8, max_examples=40)
    assert len(guesses) == 40
    assert np.mean([guess.score for guess in guesses]) > 1 / 3  # The last word alone tells more than chance.


def test_a_choice_of_blanks_is_no_choice(tmp_path):
    """Tokenizers that drop blanks would leave nothing to take the likelihood of."""
    (tmp_path / "a.jsonl").write_text(json.dumps({"question": "q", "choices": [" ", "b"], "answer": 1}))
    with pytest.raises(DataError, match=r"a\.jsonl:1: field 'choices' must be a list of two or more texts"):
        MultipleChoice(form="multiple_choice", train="a.jsonl", test="a.jsonl").pin(tmp_path)
