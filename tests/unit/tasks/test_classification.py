"""Classification of texts: learnt by causal and masked models, whatever stands in a batch beside a text."""

import copy
import json
import math

import numpy as np
import pytest
import torch
from tiny_models import build
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.normalizers import Replace
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerFast

from raysweep.data.pcfg import PCFG
from raysweep.data.text import Text
from raysweep.errors import DataError, SpaceError
from raysweep.finetuning import Finetuning
from raysweep.stages.probe import Probe
from raysweep.stages.sft import Hyperparameters, Sft
from raysweep.tasks.classification import Classification
from raysweep.tasks.prototypes import fitted_temperature
from raysweep.tasks.qa import QA
from raysweep.train.classifier import Classifier
from raysweep.worker import Worker

WORDS = ["<pad>", *"abcdefghijklmnopqrst"]


@pytest.fixture(scope="module")
def tokenizer():
    """A token a letter, the last three ids unused."""
    words = Tokenizer(WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="<pad>"))
    words.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>")


@pytest.fixture
def task(tmp_path):
    """Whether a text has an "a" in it; texts are of 3 to 12 words."""
    draw = np.random.default_rng(0)

    def line(number):
        has, words = number % 2 == 0, draw.choice(WORDS[2:], size=draw.integers(3, 13))
        if has:
            words[draw.integers(len(words))] = "a"
        return {"text": " ".join(words), "label": ["no", "yes"][int(has)]}

    for name, num in (("train", 240), ("test", 60)):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(json.dumps(line(number)) for number in range(num)))
    return Classification(form="classification", train="train.jsonl", test="test.jsonl").pin(tmp_path)


@pytest.fixture(params=["llama", "bert"])
def checkpoint(request, tmp_path, tokenizer):
    """A folder with a tiny model of either kind."""
    folder = tmp_path / request.param
    build(request.param, hidden=32).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("worker", [Worker(), Worker(gradient_checkpointing=True)], ids=["plain", "checkpointing"])
def test_causal_and_masked_models_learn_it(checkpoint, task, tmp_path, worker):
    out = tmp_path / "out"
    out.mkdir()
    stage = Sft(task=task, lr=3e-3, seed=0, hyperparameters=Hyperparameters(epochs=8))
    metrics = stage.run({"checkpoint": checkpoint}, out, worker)
    assert metrics["score"] > 0.8
    assert metrics["chance_score"] == task.chance() < 0.6
    lines = [json.loads(line) for line in (out / "predictions.jsonl").read_text().splitlines()]
    assert {line["output"] for line in lines} == {"no", "yes"}
    assert [line["id"] for line in lines] == task.ids("test")


def test_a_linear_probe_reads_it(checkpoint, task, tmp_path):
    metrics = Probe(task=task, seed=0).run({"checkpoint": checkpoint}, tmp_path, Worker())
    assert metrics["train_loss_nats"] < 0.6


@pytest.mark.parametrize("style", ["llama", "gpt2", "bert"])
def test_a_state_is_the_mean_over_a_texts_own_tokens(style, task, tokenizer):
    model = build(style)
    ((states, labels),) = task.features(model, tokenizer, "test")
    assert [task.classes[label] for label in labels] == [line["label"] for line in task.examples("test")]
    for row, line in zip(states, task.examples("test"), strict=True):
        ids = torch.tensor([tokenizer(line["text"])["input_ids"]])
        with torch.no_grad():
            alone = model.base_model(input_ids=ids).last_hidden_state[0]
        torch.testing.assert_close(row, alone.mean(dim=0), rtol=1e-4, atol=1e-5)


def test_predictions_do_not_depend_on_the_batch(task, tokenizer):
    classifier = Classifier(build("bert"), length=None, num_classes=2, seed=0).eval()
    examples = task.encoded("test", tokenizer, max_length=64)
    together = classifier.predict(examples.batch(slice(None)))
    alone = [classifier.predict(examples.batch([row]))[0] for row in range(len(examples.ids))]
    assert together.tolist() == alone


def test_untrained_scores_are_those_of_the_nearest_class(task, tokenizer):
    model = build("bert")
    guesses = task.score_untrained(model, tokenizer, num_shots=5, max_examples=20)
    train, asked = (task.features(model, tokenizer, split)[0] for split in ("train", "indicator"))
    means = torch.stack([train.states[train.labels == label][:5].mean(dim=0) for label in range(2)])
    nearest = (asked.states[:20, None] - means).square().sum(dim=-1).argmin(dim=1)
    assert [guess.score for guess in guesses] == (nearest == asked.labels[:20]).double().tolist()
    shown = [torch.nonzero(train.labels == label)[:5, 0] for label in range(2)]
    temperature = fitted_temperature(train.states[torch.cat(shown)], train.labels[torch.cat(shown)])
    squares = (asked.states[:20, None].double() - means.double()).square().sum(dim=-1)
    expected = (-temperature * squares).log_softmax(dim=1)[range(20), asked.labels[:20]]
    # By distances in float32 of states of some units.
    assert [guess.log_likelihood for guess in guesses] == pytest.approx(expected.tolist(), abs=1e-3)


def test_a_model_whose_numbers_are_none_gets_no_score(task, tokenizer):
    """Not that of always naming the first class."""
    model = build("bert")
    torch.nn.init.constant_(next(model.base_model.encoder.parameters()), math.nan)
    classifier = Classifier(model, length=None, num_classes=2, seed=0).eval()
    assert all(math.isnan(row.scores["score"]) for row in task.score(classifier, tokenizer, "test"))
    guesses = task.score_untrained(model, tokenizer, num_shots=5, max_examples=20)
    assert all(math.isnan(guess.score) and math.isnan(guess.log_likelihood) for guess in guesses)


def test_long_texts_lose_their_end_and_texts_of_no_tokens_have_a_state(tmp_path, tokenizer):
    lines = [{"text": "a b c d", "label": 0}, {"text": "a", "label": 1}]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, lines)))
    task = Classification(form="classification", train="a.jsonl", test="a.jsonl").pin(tmp_path)
    examples = task.encoded("test", tokenizer, max_length=3)
    assert sorted(examples.ids.tolist()) == [[1, 0, 0], [1, 2, 3]]
    assert sorted(examples.batch([0, 1])["attention_mask"].tolist()) == [[1, 0, 0], [1, 1, 1]]
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.backend_tokenizer.normalizer = Replace("a", "")
    assert 0 not in task.encoded("test", tokenizer, max_length=3).lengths


@pytest.mark.parametrize(
    ("train", "test", "words"),
    [
        ([("a", 1), ("b", 1)], [("c", 1)], r"train: all 2 examples have the label '1'"),
        ([("a", 1), ("b", 2)], [("c", 3)], r"test: label '3' is of no training example; labels there: 1, 2"),
        ([("a", 1), ("b", True)], [("c", 1)], r":2: field 'label' must be a text that is not empty or a whole number"),
        ([("a", 1), (" ", 2)], [("c", 1)], r":2: field 'text' must be a text that is not empty"),
    ],
)
def test_labels_that_cannot_be(tmp_path, train, test, words):
    for name, lines in (("train", train), ("test", test)):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(json.dumps({"text": t, "label": y}) for t, y in lines))
    with pytest.raises(DataError, match=words):
        Classification(form="classification", train="train.jsonl", test="test.jsonl").pin(tmp_path)


def test_tasks_answered_in_words_need_a_causal_model(task):
    corpus = Text(domains_={"a": {"train": "x"}})
    both = Finetuning(tasks={"words": QA(form="qa", train="x", test="x"), "classes": task})
    assert both.bind(corpus, "causal") == both.tasks
    with pytest.raises(SpaceError, match=r"tasks\.words: form qa needs a causal model.*masked one; .*classification"):
        both.bind(corpus, "masked")
    with pytest.raises(SpaceError, match=r"tasks\.classes: a task in English needs pretrain.data text, not a pcfg"):
        Finetuning(tasks={"classes": task}).bind(PCFG(), "masked")
