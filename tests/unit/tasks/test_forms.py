"""Task forms: scoring does not depend on batches, answers are scored as published, labels are the grammar's."""

import json

import numpy as np
import pytest
import torch
from tokenizers import ByteLevelBPETokenizer
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from raysweep.data.pcfg import PCFG
from raysweep.errors import DataError
from raysweep.tasks.base import fit, in_batches, pad
from raysweep.tasks.multiple_choice import MultipleChoice, mean_log_likelihoods
from raysweep.tasks.qa import QA, generate, normalise, token_f1
from raysweep.tasks.spans import PCFGSpan, nearest_centroid


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


def test_likelihood_is_the_definition_and_batches_do_not_matter(model):
    draw = np.random.default_rng(0)
    pairs = [(draw.integers(1, 280, size=length).tolist(), length // 2) for length in (4, 9, 17, 6, 30, 12)]
    together = mean_log_likelihoods(model, pairs)
    for (ids, num_prompt), got in zip(pairs, together, strict=True):
        logits = model(torch.tensor([ids])).logits[0].log_softmax(dim=-1)
        want = np.mean([float(logits[at - 1, ids[at]]) for at in range(num_prompt, len(ids))])
        # float32 sums over 32 dimensions and two layers
        assert got == pytest.approx(want, abs=1e-4)


def test_generation_in_a_batch_is_generation_alone(model, tokenizer):
    draw = np.random.default_rng(1)
    prompts = [draw.integers(1, 280, size=length).tolist() for length in (3, 20, 8, 8, 13)]
    together = generate(model, tokenizer, prompts, max_new_tokens=8)
    assert together == [generate(model, tokenizer, [prompt], max_new_tokens=8)[0] for prompt in prompts]
    assert len(set(together)) > 1


def test_choices_are_ranked_by_mean_likelihood(model, tokenizer):
    task = MultipleChoice(form="multiple_choice", train="x", test="x")
    examples = [
        {"question": "the cat", "choices": ["sat", "mat on the mat", "on"], "answer": index} for index in range(3)
    ]
    scores = [row["score"] for row in task.evaluate(model, tokenizer, examples, max_length=64)]
    assert sorted(scores) == [0.0, 0.0, 1.0]


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
    import raysweep.tasks.qa as qa

    monkeypatch.setattr(qa, "generate", lambda *args, **kwargs: ["the black cat"])
    task = QA(form="qa", train="x", test="x")
    row = task.evaluate(model, tokenizer, [{"question": "q", "answers": ["dog", "black cat"]}], max_length=64)[0]
    assert row == {"score": 1.0, "exact_match": 1.0, "f1": 1.0}


def test_a_prompt_too_long_loses_its_beginning():
    assert fit([1, 2, 3, 4], [9, 8], 4) == ([3, 4, 9, 8], 2)
    assert fit([1, 2], [9], 8) == ([1, 2, 9], 2)


def test_batches_keep_the_order():
    rows = [[1] * length for length in (5, 1, 9, 3, 3)]
    sizes = []
    got = in_batches(rows, lambda batch: sizes.append(len(batch)) or [len(row) for row in batch], max_tokens=10)
    assert got == [5, 1, 9, 3, 3]
    assert max(sizes) > 1
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


def test_nearest_centroid_of_separable_states(model):
    grammar = PCFG(num_words_total=16, num_nonterminals=3, num_rules=2, num_words=3, sentence_length=8)
    task = PCFGSpan(form="pcfg_span", span=1, num_train=60, num_valid=10, num_test=60).bind(grammar)
    hits = nearest_centroid(model, task, shots=8, max_examples=40)
    assert len(hits) == 40
    assert np.mean(hits) > 1 / 3  # The last word alone tells more than chance.
