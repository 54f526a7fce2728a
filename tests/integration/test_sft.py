"""Fine-tuning on text: it learns, repeats to the bit, and stays within what any checkpoint can read."""

import json

import pytest
import torch
from pydantic import ValidationError
from tokenizers import ByteLevelBPETokenizer
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from raysweep.data.tokenizers import load_tokenizer
from raysweep.errors import DataError, StageError
from raysweep.spec import fingerprint
from raysweep.stages.sft import Hyperparameters, Sft
from raysweep.tasks.multiple_choice import MultipleChoice
from raysweep.tasks.qa import QA
from raysweep.train.checkpoints import load_model
from raysweep.worker import Worker

CONTEXT = 64


@pytest.fixture
def checkpoint(tmp_path):
    """Makes a tiny checkpoint: a Llama, or a GPT-2, whose learned positions end at `CONTEXT`."""

    def make(kind="llama", eos="<e>"):
        torch.manual_seed(0)
        ends = {"bos_token_id": 0, "eos_token_id": 0}
        if kind == "gpt2":
            config = GPT2Config(vocab_size=280, n_embd=32, n_layer=2, n_head=2, n_positions=CONTEXT, **ends)
            model = GPT2LMHeadModel(config)
        else:
            sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
            model = LlamaForCausalLM(LlamaConfig(vocab_size=280, max_position_embeddings=CONTEXT, **sizes, **ends))
        bpe = ByteLevelBPETokenizer()
        bpe.train_from_iterator(["the cat sat on the mat Question Answer"] * 5, 280, special_tokens=["<e>"])
        model.save_pretrained(tmp_path / kind)
        PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, eos_token=eos).save_pretrained(tmp_path / kind)
        return tmp_path / kind

    return make


def tuned(checkpoint, task, tmp_path, *, lr=1e-2, epochs=2.0):
    out = tmp_path / "out"
    out.mkdir(exist_ok=True)
    stage = Sft(task=task, lr=lr, seed=0, hyperparameters=Hyperparameters(epochs=epochs))
    return stage.run({"checkpoint": checkpoint}, out, Worker())


def pinned(kind, lines, tmp_path, **fields):
    (tmp_path / "task.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return kind(train="task.jsonl", test="task.jsonl", **fields).pin(tmp_path)


def choices(num, *, words=1):
    return [
        {"id": str(at), "question": "the cat " * words, "choices": ["sat", "mat"], "answer": 1} for at in range(num)
    ]


def test_a_task_is_learnt_and_its_score_repeats_to_the_bit(checkpoint, tmp_path):
    folder = checkpoint()
    lines = [{"id": str(at), "question": "the cat", "answers": ["sat"]} for at in range(40)]
    task = pinned(QA, lines, tmp_path, form="qa", primary="exact_match")
    first = tuned(folder, task, tmp_path, epochs=8.0)
    assert first["score"] == 1.0
    assert first["valid_score"] == 1.0
    lines = [json.loads(line) for line in (tmp_path / "out" / "predictions.jsonl").read_text().splitlines()]
    assert [line["id"] for line in lines] == [example["id"] for example in task.examples("test")]
    assert all(line == lines[0] | {"id": line["id"]} for line in lines)
    assert lines[0] | {"id": ""} == {"id": "", "output": "sat", "score": 1.0, "exact_match": 1.0, "f1": 1.0}
    assert first["chance_score"] == task.chance() == 1.0
    assert tuned(folder, task, tmp_path, epochs=8.0) == first


def test_each_seed_may_have_examples_of_its_own(checkpoint, tmp_path, monkeypatch):
    folder, train, seen = checkpoint(), Sft._train, []

    def recorded(self, model, batch, **given):
        def kept(rows):
            seen.extend(map(int, rows))
            return batch(rows)

        return train(self, model, kept, **given)

    monkeypatch.setattr(Sft, "_train", recorded)
    lines = [{"id": str(at), "question": f"the cat {at}", "answers": ["sat"]} for at in range(60)]
    task = pinned(QA, lines, tmp_path, form="qa", primary="exact_match")

    def trained_on(seed, examples):
        seen.clear()
        given = Hyperparameters(epochs=3.0, batch_sequences=4, max_examples=8, examples=examples)
        spec = Sft(task=task, lr=1e-2, seed=seed, hyperparameters=given)
        assert len(spec.fit(load_model(folder), load_tokenizer(folder), Worker()).losses) == 6
        return set(seen)  # Of all epochs.

    assert trained_on(0, "first") == trained_on(1, "first") == set(range(8))
    ours, theirs = trained_on(0, "by_seed"), trained_on(1, "by_seed")
    assert not ours & theirs
    assert len(ours) == len(theirs) == 8
    assert 8 <= max(ours | theirs) < len(task.examples("train"))
    assert trained_on(0, "by_seed") == ours


def test_examples_by_seed_are_some_of_those_there_are():
    assert fingerprint(Hyperparameters(examples="first")) == fingerprint(Hyperparameters())
    with pytest.raises(ValidationError, match="by_seed draws max_examples of a task's examples: set that"):
        Hyperparameters(examples="by_seed")


@pytest.mark.parametrize("form", ["multiple_choice", "qa"])
def test_a_long_prompt_is_cut_to_the_models_positions(checkpoint, tmp_path, form):
    if form == "qa":
        lines = [{"question": f"{at} " + "the cat " * 60, "answers": ["sat"]} for at in range(20)]
        task = pinned(QA, lines, tmp_path, form="qa", max_new_tokens=512)
    else:
        task = pinned(MultipleChoice, choices(20, words=60), tmp_path, form="multiple_choice")
    assert 0 <= tuned(checkpoint("gpt2"), task, tmp_path)["score"] <= 1


def test_a_tokenizer_that_cannot_end_an_answer(checkpoint, tmp_path):
    task = pinned(MultipleChoice, choices(20), tmp_path, form="multiple_choice")
    with pytest.raises(StageError, match="tokenizer has no eos_token"):
        tuned(checkpoint(eos=None), task, tmp_path)


def test_one_example_is_too_few_to_hold_any_out(tmp_path):
    with pytest.raises(DataError, match=r"task\.jsonl: one example; give two or more"):
        pinned(MultipleChoice, choices(1), tmp_path, form="multiple_choice")


@pytest.mark.parametrize("answer", [-1, True, "1"])
def test_an_answer_out_of_range(tmp_path, answer):
    lines = [*choices(1), choices(1)[0] | {"answer": answer}]
    with pytest.raises(DataError, match=r"task\.jsonl:2: field 'answer' must be an index from 0 to 1"):
        pinned(MultipleChoice, lines, tmp_path, form="multiple_choice")
