"""Few-shot likelihoods are those of lm-evaluation-harness (Gao et al., 2024) on the same model and prompts.

Skipped where it is not installed: pip install 'raysweep[lm-eval]'.
"""

import json

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from raysweep.data.tokenizers import Bpe
from raysweep.tasks.multiple_choice import MultipleChoice
from raysweep.tasks.qa import QA
from raysweep.tasks.rows import ask

lm_eval = pytest.importorskip("lm_eval", reason="lm_eval is not installed")

from lm_eval.api.instance import Instance  # noqa: E402
from lm_eval.models.huggingface import HFLM  # noqa: E402
from lm_eval.tasks import TaskManager  # noqa: E402

ANIMALS = ("cat", "dog", "hen", "owl", "fox")
PLACES = ("on the mat", "in a barn", "by the old river", "here")
TEXT = [f"Question: where is the {animal} number?\nAnswer: {place}\n\n" for animal in ANIMALS for place in PLACES]
NUM = 40


def byte_level():
    """As raysweep trains one."""
    return Bpe(vocab_size=320).build(lambda num: iter(TEXT))


def sentence_piece():
    """As Llama 2's: a blank before the text, which a part of a text must not get, and <s> to begin with."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=True)
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="always", split=False)
    trainer = trainers.BpeTrainer(vocab_size=320, special_tokens=["<unk>", "<s>", "</s>"], show_progress=False)
    tokenizer.train_from_iterator([*TEXT, "0123456789"], trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


TOKENIZERS = {"byte level": byte_level, "sentence piece": sentence_piece}


@pytest.fixture(scope="module", params=TOKENIZERS)
def tokenizer(request):
    return TOKENIZERS[request.param]()


def llama(tokenizer):
    """Weights large enough that likelihoods of choices differ by nats."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), initializer_range=0.2, **sizes)).eval()


def short_gpt2(tokenizer):
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=len(tokenizer), n_embd=32, n_layer=2, n_head=2, n_positions=48)
    return GPT2LMHeadModel(config).eval()


def write(path, lines):
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def questions(number):
    return f"where is the {ANIMALS[number % 5]} number {number}?"


def pinned(form, name, folder, lines):
    """What is tested on is asked nowhere else, so that most of the rest is left for indicators."""
    train, test = write(folder / f"{name}.jsonl", lines[1:]), write(folder / f"{name}.test.jsonl", lines[:1])
    return form(form=name, train=str(train), test=str(test)).pin(folder)


def choices_task(folder):
    lines = [{"question": questions(n), "choices": list(PLACES), "answer": n % 4} for n in range(NUM)]
    return pinned(MultipleChoice, "multiple_choice", folder, lines)


def answers_task(folder):
    rights = [[PLACES[n % 4], PLACES[(n + 1) % 4]] for n in range(NUM)]
    lines = [{"question": questions(n), "context": "on the mat", "answers": of} for n, of in enumerate(rights)]
    return pinned(QA, "qa", folder, lines)


def theirs(harness, context, answers):
    """log p of each answer behind the context, in nats, by lm-evaluation-harness; and its number of tokens."""
    requests = [Instance("loglikelihood", {}, (context, f" {answer}"), index) for index, answer in enumerate(answers)]
    sums = [value for value, _ in harness.loglikelihood(requests, disable_tqdm=True)]
    return sums, [len(harness._encode_pair(context, f" {answer}")[1]) for answer in answers]


@pytest.mark.parametrize("num_shots", [0, 3])
def test_likelihoods_of_choices_and_answers_are_the_harnesss(tmp_path, tokenizer, num_shots):
    model = llama(tokenizer)
    harness = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=4, device="cpu")
    for task in (choices_task(tmp_path), answers_task(tmp_path)):
        before = task.shot_text(task.examples("train")[:num_shots])
        guesses = task.score_untrained(model, tokenizer, num_shots=num_shots, max_examples=4)
        assert len(guesses) == 4
        for guess, example in zip(guesses, task.examples("indicator"), strict=False):
            rights = task.right_answers(example)
            sums, nums = theirs(harness, before + task.prompt(example), rights)
            # The right answer in nats per token; of several the likeliest.
            want = max(value / num for value, num in zip(sums, nums, strict=True))
            assert guess.log_likelihood == pytest.approx(want, abs=1e-4)
            if isinstance(task, MultipleChoice):
                sums, nums = theirs(harness, before + task.prompt(example), example["choices"])
                means = [value / num for value, num in zip(sums, nums, strict=True)]
                assert guess.score == float(means.index(max(means)) == example["answer"])


def test_prompts_that_do_not_fit_are_cut_as_the_harness_cuts_them_and_counted(tmp_path, tokenizer):
    """It feeds no last token, so that with one position less it keeps as many tokens of prompt and answer."""
    model = short_gpt2(tokenizer)
    num_positions = model.config.n_positions
    harness = HFLM(pretrained=model, tokenizer=tokenizer, max_length=num_positions - 1, batch_size=4, device="cpu")
    task = choices_task(tmp_path)
    for num_shots in (0, 3):
        before = task.shot_text(task.examples("train")[:num_shots])
        guesses = task.score_untrained(model, tokenizer, num_shots=num_shots, max_examples=4)
        assert [guess.is_cut for guess in guesses] == [num_shots == 3] * 4
        for guess, example in zip(guesses, task.examples("indicator"), strict=False):
            (value,), (num,) = theirs(harness, before + task.prompt(example), task.right_answers(example))
            assert guess.log_likelihood == pytest.approx(value / num, abs=1e-4)


YAML = r"""
task: places
dataset_path: json
dataset_kwargs:
  data_files: {{train: {train}, test: {test}}}
  cache_dir: {cache}
output_type: multiple_choice
training_split: train
test_split: test
fewshot_split: train
fewshot_config: {{sampler: first_n}}
doc_to_text: "Question: {{{{question}}}}\nAnswer:"
doc_to_choice: choices
doc_to_target: answer
target_delimiter: " "
fewshot_delimiter: "\n\n"
num_fewshot: 2
metric_list: [{{metric: acc}}]
"""


def test_a_task_of_the_harness_with_the_same_prompts_has_the_same_likelihoods(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)  # The harness asks the hub about the model.
    model, task = llama(tokenizer), choices_task(tmp_path)
    examples = task.examples("indicator")
    (folder := tmp_path / "tasks").mkdir()
    files = {
        "train": write(tmp_path / "shots.jsonl", task.examples("train")[:2]),
        "test": write(tmp_path / "asked.jsonl", examples),
    }
    (folder / "places.yaml").write_text(YAML.format(cache=tmp_path / "cache", **files))
    found = lm_eval.simple_evaluate(
        HFLM(pretrained=model, tokenizer=tokenizer, batch_size=4, device="cpu"),
        tasks=["places"],
        task_manager=TaskManager(include_path=str(folder), include_defaults=False),
        bootstrap_iters=0,
    )
    samples = found["samples"]["places"]
    guesses = task.score_untrained(model, tokenizer, num_shots=2, max_examples=100)
    assert len(samples) == len(guesses) == len(examples)
    before = task.shot_text(task.examples("train")[:2])
    for sample, guess, example in zip(samples, guesses, examples, strict=True):
        assert sample["arguments"][0][0] == before + task.prompt(example)
        sums = [value for ((value, _),) in sample["resps"]]
        answers = [[f" {choice}" for choice in example["choices"]]]
        (asked,) = ask(tokenizer, [before + task.prompt(example)], answers, max_length=512)
        right = example["answer"]
        assert guess.log_likelihood == pytest.approx(sums[right] / len(asked.answers[right]), abs=1e-4)
