"""Text that a model writes: drawn from its whole distribution, and its losses are the model's own."""

import json

import numpy as np
import pytest
import torch
from tiny_models import build
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import MambaConfig, MambaForCausalLM, PreTrainedTokenizerFast

from raysweep.data import sampled
from raysweep.data.corpora import read_law
from raysweep.data.packing import Tokens
from raysweep.data.sampled import Sampled, draw
from raysweep.data.sources import Source
from raysweep.errors import DataError
from raysweep.objectives.causal_lm import CausalLM
from raysweep.objectives.masked_lm import MaskedLM
from raysweep.stages.heldout import Heldout
from raysweep.stages.tokenize import Tokenize
from raysweep.worker import Worker

LENGTH = 9
VOCAB = 23


@pytest.fixture
def folder(tmp_path):
    """A folder with a tiny Llama and its tokenizer, whose token 0 opens a text."""
    return saved(build("llama"), tmp_path / "model")


def saved(model, folder):
    words = Tokenizer(WordLevel({"<s>": 0} | {f"w{index}": index for index in range(1, VOCAB)}, unk_token="<s>"))
    PreTrainedTokenizerFast(tokenizer_object=words, bos_token="<s>").save_pretrained(folder)
    model.save_pretrained(folder)
    return folder


def corpus(folder, **fields):
    counts = {"num_train_sequences": 30, "num_valid_sequences": 20}
    return Sampled(name="sampled", model=Source(source=str(folder)), sequence_length=LENGTH, **counts | fields)


def recurrent():
    torch.manual_seed(0)
    return MambaForCausalLM(MambaConfig(vocab_size=VOCAB, hidden_size=16, num_hidden_layers=2, initializer_range=0.3))


@pytest.mark.parametrize("make", [*(lambda style=style: build(style) for style in ("llama", "gpt2")), recurrent])
def test_each_token_is_drawn_by_the_models_conditional_of_all_before_it(make):
    model = make().eval()
    uniform = np.random.default_rng(0).random((12, LENGTH - 1))
    ids, losses = draw(model, 3, uniform)
    assert (ids[:, 0] == 3).all()
    assert (losses[:, 0] == 0).all()
    for row, numbers, lost in zip(ids, uniform, losses, strict=True):
        for place in range(1, LENGTH):
            with torch.no_grad():
                logits = model(input_ids=torch.tensor([row[:place].tolist()])).logits[0, -1].double()
            probabilities = logits.softmax(dim=0).numpy()
            below = probabilities[: row[place]].sum()
            # Logits in float32: what is drawn may differ by their rounding where a number falls on an edge.
            assert below - 1e-5 <= numbers[place - 1] <= below + probabilities[row[place]] + 1e-5
            assert lost[place] == pytest.approx(-np.log(probabilities[row[place]]), abs=1e-4)


def test_tokens_come_as_often_as_the_model_says():
    model, num = build("gpt2"), 20_000
    ids, _ = draw(model, 0, np.random.default_rng(1).random((num, 1)))
    with torch.no_grad():
        law = model(input_ids=torch.zeros(1, 1, dtype=torch.int64)).logits[0, -1].double().softmax(dim=0).numpy()
    shares = np.bincount(ids[:, 1], minlength=VOCAB) / num
    # 5 standard errors: one of 23 shares is beyond in 1 of 75,000 runs.
    assert (np.abs(shares - law) < 5 * np.sqrt(law * (1 - law) / num) + 1e-12).all()


def test_the_model_that_writes_is_at_the_optimum_and_another_is_not(folder, tmp_path):
    spec = corpus(folder).pin(tmp_path)
    out = tmp_path / "tokens"
    out.mkdir()
    told = Tokenize(corpus=spec).run({"sampler": folder}, out, Worker())
    assert told["num_tokens"] == 50 * LENGTH
    assert {metric.name for metric in Tokenize(corpus=spec).metrics(spec)} == told.keys()

    stage = Heldout(objective=CausalLM(), mix=spec.mix, sequence_length=LENGTH)
    own = stage.run({"checkpoint": folder, "tokens": out}, tmp_path, Worker())
    assert own["entropy_gap_nats_per_token"] == pytest.approx(0, abs=1e-5)
    assert own["loss_nats_per_token"] == pytest.approx(told["optimal_loss_nats_per_token"], abs=1e-5)
    assert {metric.name for metric in stage.metrics(spec)} == own.keys()
    other = saved(build("gpt2"), tmp_path / "other")
    assert stage.run({"checkpoint": other, "tokens": out}, tmp_path, Worker())["entropy_gap_nats_per_token"] > 0.1
    assert read_law(out, MaskedLM(name="masked_lm")) is None


def test_a_corpus_does_not_depend_on_what_is_drawn_side_by_side(folder, tmp_path, monkeypatch):
    spec = corpus(folder).pin(tmp_path)
    parts = []
    for rows in (64, 7):
        monkeypatch.setattr(sampled, "_BATCH_ROWS", rows)
        out = tmp_path / str(rows)
        out.mkdir()
        spec.build(out, tokenizer_dir=folder, sampler=build("llama"))
        assert sum(path.stat().st_size for path in out.glob("*.bin")) == spec.tokens_bytes()
        parts.append([Tokens(out).sequences("sampled", split, LENGTH).tolist() for split in ("train", "valid")])
    assert parts[0] == parts[1]
    train, valid = parts[0]
    assert not set(map(tuple, train)) & set(map(tuple, valid))


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"vocab_size_": 22}, r"vocab_size: 22 is less than the 23 tokens that it may write"),
        ({"sequence_length": 4096}, r"sequence_length: 4096 tokens are more than the model's 2048"),
    ],
)
def test_a_model_that_cannot_write_it_is_told_when_the_sweep_is_loaded(folder, tmp_path, fields, words):
    with pytest.raises(DataError, match=words):
        corpus(folder).with_(**fields).pin(tmp_path)


def test_a_masked_model_writes_nothing(tmp_path):
    with pytest.raises(DataError, match=r"model: .*a masked model writes no text"):
        corpus(saved(build("bert"), tmp_path / "model")).pin(tmp_path)


def test_its_vocabulary_is_the_models_and_its_identity_the_models_content(folder, tmp_path):
    spec = corpus(folder).pin(tmp_path)
    assert spec.vocab_size == VOCAB
    assert spec.model.fingerprint
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"vocab_size": 30}))
    assert corpus(folder).pin(tmp_path).model.fingerprint != spec.model.fingerprint
