"""Answers and likelihoods behind prompts read once are those of the plain way, for models of every style."""

import pytest
import torch
from tiny_models import CAUSAL, build
from tokenizers import ByteLevelBPETokenizer
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM, PreTrainedTokenizerFast

from raysweep.tasks.decoding import _generate, first_lines
from raysweep.tasks.likelihoods import mean_log_likelihoods
from raysweep.tasks.prompts import can_go_on, read

VOCAB = 280
# Some of one length, so that a batch has rows with and without padding.
LENGTHS = (3, 20, 8, 8, 13, 1)


@pytest.fixture(scope="module")
def tokenizer():
    """Byte-level BPE of a few merges, with the line break among its tokens."""
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(
        ["the cat sat on the mat", "Question Answer\n\n Context"] * 5, VOCAB, special_tokens=["<e>"]
    )
    return PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, eos_token="<e>")


@pytest.fixture
def windowed():
    """A model whose attention sees four tokens back, and whose cache keeps no more."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = MistralConfig(vocab_size=VOCAB, num_key_value_heads=1, sliding_window=4, initializer_range=0.3, **sizes)
    return MistralForCausalLM(config).eval().double()


def some_rows(lengths, *, seed=1):
    draw = torch.Generator().manual_seed(seed)
    return [torch.randint(1, VOCAB, (length,), generator=draw).tolist() for length in lengths]


def naive_likelihood(model, prompt, choice):
    logits = model(input_ids=torch.tensor([[*prompt, *choice]])).logits[0].log_softmax(dim=-1)
    places = range(len(prompt) - 1, len(prompt) + len(choice) - 1)
    return sum(float(logits[at, token].detach()) for at, token in zip(places, choice, strict=True)) / len(choice)


def check_likelihoods(model):
    prompts = some_rows(LENGTHS)
    choices = [some_rows((1, 4, 2, 9)[: 2 + index % 3], seed=index) for index in range(len(prompts))]
    choices[3] = some_rows((1, 1))
    got = mean_log_likelihoods(model, prompts, choices)
    for prompt, of_prompt, values in zip(prompts, choices, got, strict=True):
        want = [naive_likelihood(model, prompt, choice) for choice in of_prompt]
        # logsumexp is taken in float32: 6e-8 relative to logits of some tens
        assert values == pytest.approx(want, abs=1e-5)


def check_answers(model, tokenizer):
    prompts = some_rows(LENGTHS)
    with torch.inference_mode():
        alone = [_generate(model, tokenizer, [prompt], max_new_tokens=8)[0] for prompt in prompts]
    texts = tokenizer.batch_decode(alone, skip_special_tokens=True)
    got = first_lines(model, tokenizer, prompts, max_new_tokens=8)
    assert got == [text.strip().split("\n")[0].strip() for text in texts]
    assert len(set(got)) > 2


@pytest.mark.parametrize("style", CAUSAL)
def test_likelihoods_of_choices_are_the_definition(style):
    model = build(style, vocab=VOCAB).double()
    assert can_go_on(model)
    check_likelihoods(model)


def test_prompt_and_choice_may_fill_all_positions_beside_longer_choices():
    model = build("gpt2", vocab=VOCAB).double()
    num_positions = model.config.max_position_embeddings
    prompts = some_rows((num_positions - 2, num_positions - 9))
    choices = [some_rows((1, 2)), some_rows((9, 3))]
    got = mean_log_likelihoods(model, prompts, choices)
    for prompt, of_prompt, values in zip(prompts, choices, got, strict=True):
        assert values == pytest.approx([naive_likelihood(model, prompt, choice) for choice in of_prompt], abs=1e-5)


@pytest.mark.parametrize("style", CAUSAL)
def test_answers_are_those_of_generate(style, tokenizer):
    model = build(style, vocab=VOCAB).double()
    assert can_go_on(model)
    check_answers(model, tokenizer)


def test_a_model_with_a_sliding_window_is_read_the_plain_way(windowed, tokenizer):
    assert not can_go_on(windowed)
    check_likelihoods(windowed)
    check_answers(windowed, tokenizer)


@pytest.mark.parametrize("style", CAUSAL)
def test_prompts_go_on_token_by_token_or_several_at_once(style):
    model = build(style, vocab=VOCAB).double()
    prompts, more = some_rows((5, 2, 7)), torch.tensor(some_rows((3, 3, 3), seed=2))
    whole = [
        model(input_ids=torch.tensor([[*p, *m.tolist()]])).logits[0, -1] for p, m in zip(prompts, more, strict=True)
    ]
    rows, last = torch.arange(3), torch.full((3,), 2)
    with torch.inference_mode():
        _, kept = read(model, prompts)
        at_once, _ = kept.select([0, 1, 2]).extend(more, rows=rows, columns=last)
        kept = kept.select([2, 0, 1])
        for column in more[[2, 0, 1]].T:
            one_by_one, kept = kept.extend(column[:, None], rows=rows, columns=torch.zeros_like(rows))
    # Rounding of float64 in two layers of 16 dimensions.
    torch.testing.assert_close(at_once, torch.stack(whole), rtol=1e-9, atol=1e-9, check_device=False)
    torch.testing.assert_close(one_by_one, torch.stack(whole)[[2, 0, 1]], rtol=1e-9, atol=1e-9)


def chain_model(tokenizer, links):
    """A model whose next token follows from the last one: links[i] = (character, what is said next)."""
    sizes = {"hidden_size": VOCAB, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=VOCAB, bos_token_id=0, eos_token_id=0, **sizes)).eval()
    (layer,) = model.model.layers
    with torch.no_grad():
        layer.self_attn.o_proj.weight.zero_()
        layer.mlp.down_proj.weight.zero_()
        model.model.embed_tokens.weight.copy_(torch.eye(VOCAB))
        model.lm_head.weight.zero_()
        for links_from, links_to in links:
            (first,), (then,) = (tokenizer(text)["input_ids"] for text in (links_from, links_to))
            model.lm_head.weight[then, first] = 1.0
    return model


def test_an_answer_costs_nothing_after_its_first_line(tokenizer):
    links = [("P", "a"), ("a", "\n"), ("\n", "c"), ("c", "<e>"), ("Q", "\n"), ("R", "d"), ("d", "d")]
    model = chain_model(tokenizer, links)
    sizes = []
    model.register_forward_pre_hook(
        lambda module, args, given: sizes.append(tuple(given["input_ids"].shape)), with_kwargs=True
    )
    prompts = [tokenizer(text)["input_ids"] for text in "PQR"]
    # A line that is blank does not count: Q's answer begins with one.
    assert first_lines(model, tokenizer, prompts, max_new_tokens=6) == ["a", "c", "dddddd"]
    look, *passes = sizes
    assert look == (1, 1)
    assert passes == [(3, 1), (3, 1), (2, 1), (1, 1), (1, 1), (1, 1)]


def test_a_prompt_is_read_once_for_all_its_choices():
    model = build("llama", vocab=VOCAB)
    num_tokens = []
    model.register_forward_pre_hook(
        lambda module, args, given: num_tokens.append(given["input_ids"].numel()), with_kwargs=True
    )
    mean_log_likelihoods(model, some_rows((50,)), [some_rows((3, 3, 1, 3))])
    # A look at the cache, the prompt, and the choices but for their last tokens, which nothing follows.
    assert num_tokens == [1, 50, 3 * 2]
