"""Weights are all the checkpoint's, or it is refused: what is random would be measured as if it were trained."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import build
from transformers import RobertaConfig, RobertaForMaskedLM

from raysweep.errors import DataError
from raysweep.objectives.heads import head_of, known_head, read_config
from raysweep.tasks.rows import context_length
from raysweep.train.checkpoints import load_model, max_tokens, reads_ahead


@pytest.fixture(params=["llama", "gpt2", "gpt_neox", "bert"])
def style(request) -> str:
    return request.param


def saved(folder, style, *, tied=True):
    build(style, tied=tied).save_pretrained(folder)
    return folder / "model.safetensors"


def rewrite(path, change) -> str:
    """Change the tensors of a file, beginning with the name of one that is a matrix of a block."""
    tensors = load_file(path)
    name = next(name for name in sorted(tensors) if tensors[name].ndim == 2 and "0" in name)
    change(tensors, name)
    save_file(tensors, path, metadata={"format": "pt"})
    return name


@pytest.mark.parametrize("tied", [True, False])
def test_a_whole_checkpoint_is_loaded_to_the_bit(tmp_path, style, tied):
    saved(tmp_path, style, tied=tied)
    loaded, built = load_model(tmp_path), build(style, tied=tied)
    assert all(torch.equal(value, built.state_dict()[name]) for name, value in loaded.state_dict().items())


def test_a_missing_tensor_is_named(tmp_path, style):
    name = rewrite(saved(tmp_path, style), lambda tensors, name: tensors.pop(name))
    with pytest.raises(DataError, match=rf"missing \S*{name}"):
        load_model(tmp_path)


def test_a_tensor_left_over_is_named(tmp_path, style):
    rewrite(saved(tmp_path, style), lambda tensors, _: tensors.update({"adapter.weight": torch.ones(2)}))
    with pytest.raises(DataError, match=r"unexpected \S*adapter\.weight"):
        load_model(tmp_path)


def test_a_tensor_of_another_shape_is_named(tmp_path, style):
    name = rewrite(saved(tmp_path, style), lambda tensors, name: tensors.update({name: tensors[name][:, :-1].clone()}))
    with pytest.raises(DataError, match=rf"of another shape \S*{name} \["):
        load_model(tmp_path)


def test_an_untied_head_is_no_tied_one(tmp_path):
    rewrite(saved(tmp_path, "llama", tied=False), lambda tensors, _: tensors.pop("lm_head.weight"))
    with pytest.raises(DataError, match=r"missing lm_head\.weight"):
        load_model(tmp_path)


def test_a_masked_model_may_bring_the_head_of_its_other_objective(tmp_path):
    from transformers import BertForPreTraining

    BertForPreTraining(build("bert").config).save_pretrained(tmp_path)
    assert load_model(tmp_path).num_parameters() > 0


def test_weights_that_cannot_be_read(tmp_path):
    path = saved(tmp_path, "llama")
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(DataError, match="weights cannot be loaded"):
        load_model(tmp_path)


@pytest.mark.parametrize(
    ("config", "is_taken"),
    [
        ({"architectures": ["LlamaForCausalLM"], "model_type": "llama"}, True),
        ({"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2"}, True),
        ({"architectures": ["BloomForCausalLM"]}, True),
        ({"model_type": "gpt_neox"}, True),
        ({}, True),  # Nothing is known yet: looked at when it is fetched.
        ({"architectures": ["BertForMaskedLM"], "model_type": "bert"}, True),
        ({"architectures": ["T5ForConditionalGeneration"], "model_type": "t5"}, False),
        ({"architectures": "SomeModel", "model_type": 7}, False),
    ],
)
def test_only_language_models_are_taken_by_their_configuration(config, is_taken):
    if is_taken:
        known_head(config)
    else:
        with pytest.raises(DataError, match="predicts no tokens; causal"):
            known_head(config)


@pytest.mark.parametrize(
    ("config", "head"),
    [
        ({"architectures": ["BertForMaskedLM"], "model_type": "bert"}, "masked"),
        ({"architectures": ["BertForPreTraining"], "model_type": "bert"}, "masked"),
        ({"architectures": ["BertLMHeadModel"], "model_type": "bert", "is_decoder": True}, "causal"),
        ({"architectures": ["FlaubertWithLMHeadModel"], "model_type": "flaubert"}, "masked"),
        ({"architectures": ["GPT2Model"], "model_type": "gpt2"}, "causal"),
        ({"model_type": "modernbert"}, "masked"),
        ({"architectures": ["BartForConditionalGeneration"], "model_type": "bart"}, None),
        ({"architectures": ["BertForSequenceClassification"], "model_type": "bert"}, None),
        ({"model_type": "vit"}, None),
    ],
)
def test_a_configuration_says_what_its_model_predicts(config, head):
    assert head_of(config) == head


def test_a_model_that_predicts_no_tokens_is_refused(tmp_path):
    from transformers import BertForSequenceClassification

    BertForSequenceClassification(build("bert").config).save_pretrained(tmp_path)
    with pytest.raises(DataError, match="BertForSequenceClassification is no causal or masked language model"):
        load_model(tmp_path)


def test_a_model_that_reads_ahead_is_told_by_what_it_does(style):
    assert reads_ahead(build(style)) == (style == "bert")


@pytest.mark.parametrize("content", [b"", b"\xff", b"[1]", b"[" * 100_000])
def test_a_damaged_configuration_is_named(tmp_path, content):
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(DataError, match=r"config\.json: not a configuration"):
        read_config(tmp_path)


@pytest.mark.parametrize(("style", "most"), [("llama", 2048), ("gpt2", 64), ("bert", 64)])
def test_a_model_reads_as_many_tokens_as_it_has_positions(style, most):
    assert max_tokens(build(style)) == most


def test_positions_that_are_counted_from_behind_the_padding_token_are_fewer():
    """RoBERTa's: of 18 rows those up to the padding token's id, 1, are never read."""
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
    model = RobertaForMaskedLM(RobertaConfig(vocab_size=9, max_position_embeddings=18, pad_token_id=1, **sizes))
    assert max_tokens(model) == context_length(model) == context_length(model.base_model) == 16
    model(input_ids=torch.full((1, 16), 5))
    with pytest.raises((IndexError, RuntimeError)):
        model(input_ids=torch.full((1, 17), 5))
