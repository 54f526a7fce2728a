"""Any model of transformers by its configuration: named, counted without weights, refused where it would be another."""

import json

import pytest
from pydantic import ValidationError
from tiny import TINY

from raysweep.errors import DataError, SpaceError, StageError
from raysweep.estimates import size_of
from raysweep.space import load
from raysweep.train.architectures import configured, described
from raysweep.train.models import Bert, Llama, Transformers

GPT2 = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32}
SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}

TINY_ONES = {
    "GPT2LMHeadModel": GPT2,
    "GPTNeoXForCausalLM": SIZES,
    "Qwen3ForCausalLM": SIZES | {"num_key_value_heads": 1, "head_dim": 8},
    "Gemma2ForCausalLM": SIZES | {"num_key_value_heads": 1, "head_dim": 8},
    "Olmo2ForCausalLM": SIZES,
    "MixtralForCausalLM": SIZES | {"num_key_value_heads": 1, "num_local_experts": 2},
    "MambaForCausalLM": {"hidden_size": 16, "num_hidden_layers": 2, "state_size": 4},
    "BloomForCausalLM": {"hidden_size": 16, "n_layer": 2, "n_head": 2},
    "BertForMaskedLM": SIZES,
    "ModernBertForMaskedLM": SIZES,
    "ElectraForMaskedLM": SIZES | {"embedding_size": 8},
}


def spec_of(architecture: str, fields: dict | None = None) -> Transformers:
    return Transformers(name="transformers", architecture=architecture, fields=fields or {})


@pytest.mark.parametrize("architecture", TINY_ONES)
def test_what_is_told_without_weights_is_so_of_the_model(architecture):
    spec = spec_of(architecture, TINY_ONES[architecture])
    model = spec.build(vocab_size=50, sequence_length=8, seed=0)
    assert type(model).__name__ == architecture
    assert spec.num_parameters(50) == model.num_parameters()
    assert spec.head == ("masked" if "Masked" in architecture else "causal")
    assert spec.dimensions()[:2] == (2, 16)
    assert model.get_input_embeddings().num_embeddings == 50
    # End of text is a word as any other, and learns as they do.
    assert model.get_input_embeddings().padding_idx is None


@pytest.mark.parametrize(
    "spec",
    [
        Llama(hidden_size=16),
        Llama(hidden_size=16, tie_embeddings=False),
        Bert(name="bert", hidden_size=16),
        *(spec_of(name, TINY_ONES[name]) for name in ("GPT2LMHeadModel", "GPTNeoXForCausalLM", "ElectraForMaskedLM")),
        spec_of("Qwen2ForCausalLM", SIZES | {"num_key_value_heads": 1}),
        spec_of("MistralForCausalLM", SIZES | {"num_key_value_heads": 1, "tie_word_embeddings": True}),
    ],
)
def test_whether_one_matrix_embeds_and_predicts_is_known_without_weights(spec):
    model = spec.build(vocab_size=50, sequence_length=8, seed=0)
    assert spec.is_tied == (model.get_output_embeddings().weight is model.get_input_embeddings().weight)


def test_a_configuration_that_does_not_speak_of_tying_is_of_two_matrices():
    assert not spec_of("InklingForCausalLM").is_tied


@pytest.mark.parametrize(
    ("architecture", "fields", "words"),
    [
        ("GPT2LMHeadModl", {}, "no language model 'GPT2LMHeadModl', did you mean 'GPT2LMHeadModel'"),
        ("BertModel", {}, "no language model 'BertModel'"),
        ("os", {}, "no language model 'os'"),
        ("GPT2LMHeadModel", {"n_layers": 2}, "GPT2Config has no 'n_layers', did you mean 'n_layer'"),
        ("GPT2LMHeadModel", {"vocab_size": 9}, "vocab_size is the tokenizer's to say"),
        ("LlamaForCausalLM", {"hidden_size": "a"}, r"cannot be made of these fields: .*expected int, got str"),
        ("LlamaForCausalLM", SIZES | {"num_attention_heads": 3}, "not a multiple of the number of attention heads"),
        ("RobertaForMaskedLM", SIZES, "does not read text that has no padding token"),
    ],
)
def test_what_would_be_another_model_is_refused(architecture, fields, words):
    with pytest.raises(ValidationError, match=words):
        spec_of(architecture, fields)


def test_a_decoder_that_reads_ahead_is_refused():
    with pytest.raises(StageError, match="is_decoder, set it to true"):
        spec_of("BertLMHeadModel", SIZES).build(vocab_size=20, sequence_length=8, seed=0)
    spec_of("BertLMHeadModel", SIZES | {"is_decoder": True}).build(vocab_size=20, sequence_length=8, seed=0)


def test_a_configuration_is_told_by_the_fields_that_differ():
    config = {"model_type": "llama", "rope_theta": 5e5, "x": 1, "vocab_size": 99, "eos_token_id": 7, **SIZES}
    architecture, fields = described(config)
    assert architecture == "LlamaForCausalLM"
    # A field of older files is told as today's; the width of a head follows from the others.
    rope = {"rope_type": "default", "rope_theta": 5e5}
    assert fields == SIZES | {"num_attention_heads": 2, "rope_parameters": rope}
    whole = configured(architecture, fields, 20)[1]
    assert (whole.head_dim, whole.num_key_value_heads, whole.vocab_size, whole.eos_token_id) == (8, 2, 20, 0)


@pytest.mark.parametrize("config", [{"model_type": "vit"}, {"architectures": ["BertForSequenceClassification"]}])
def test_a_configuration_of_no_language_model_is_refused(config):
    with pytest.raises(ValueError, match="is no causal or masked language model"):
        described(config)


def with_model(model: str, **replaced: str) -> str:
    text = TINY.replace("{name: llama, hidden_size: 16, num_layers: 1, num_heads: 2}", model)
    for old, new in replaced.items():
        text = text.replace(old, new)
    return text


def test_a_sweep_file_may_name_a_folder_and_change_fields_of_it(sweep_file, tmp_path):
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "config.json").write_text(json.dumps({"architectures": ["GPT2LMHeadModel"], **GPT2}))
    named = load(sweep_file(with_model("{name: transformers, config: theirs, fields: {n_layer: 1}}")))
    written = load(
        sweep_file(
            with_model("{name: transformers, architecture: GPT2LMHeadModel, fields: %s}" % (GPT2 | {"n_layer": 1}))
        )
    )
    point = {"pretrain.optimizer.lr": 0.01}
    ids = [[stage.id for stage in space.trial(point, 0).stages] for space in (named, written)]
    assert ids[0] == ids[1]
    size = size_of(named.trial(point, 0))
    assert (size.num_layers, size.hidden_size, size.num_heads) == (1, 16, 2)
    # What workers are handed needs the folder no more.
    (tmp_path / "theirs" / "config.json").unlink()
    deeper = named.trial({"pretrain.optimizer.lr": 0.003}, 0)
    assert size_of(deeper).num_parameters == size.num_parameters


def test_models_and_their_fields_are_axes(sweep_file, tmp_path):
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "config.json").write_text(json.dumps({"architectures": ["GPT2LMHeadModel"], **GPT2}))
    axes = "pretrain.model: {grid: {gpt2: {name: transformers, config: theirs}, llama: {name: llama, hidden_size: 16}}}"
    space = load(sweep_file(TINY.replace("pretrain.optimizer.lr: {grid: [1e-2, 3e-3]}", axes)))
    names = [space.bind(point).model.name for point in space.points()]
    assert names == ["transformers", "llama"]
    axes = "pretrain.model.fields.n_layer: {grid: [1, 2]}"
    text = with_model("{name: transformers, config: theirs}", **{"pretrain.optimizer.lr: {grid: [1e-2, 3e-3]}": axes})
    space = load(sweep_file(text))
    assert [space.bind(point).model.dimensions().num_layers for point in space.points()] == [1, 2]


@pytest.mark.parametrize(
    ("model", "kind", "words"),
    [
        ("{name: transformers, config: nowhere}", DataError, "5: pretrain.model: .nowhere. is no folder here"),
        (
            "{name: transformers, config: theirs}",
            DataError,
            "pretrain.model.config: 'theirs': config.json: .* is no causal",
        ),
        ("{name: transformers, architecture: GPT2}", SpaceError, "pretrain.model: .*no language model 'GPT2'"),
        ("{name: transformers}", SpaceError, "pretrain.model: config or architecture is missing"),
    ],
)
def test_mistakes_are_named_with_their_line(sweep_file, tmp_path, monkeypatch, model, kind, words):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "config.json").write_text('{"model_type": "vit"}')
    with pytest.raises(kind, match=words):
        load(sweep_file(with_model(model)))


def test_a_model_whose_formula_is_not_of_its_weights_is_refused():
    class Miscounted(Llama):
        def num_parameters(self, vocab_size):
            return super().num_parameters(vocab_size) + 1

    with pytest.raises(StageError, match=r"model llama: it has [\d,]+ parameters, and num_parameters, .* says"):
        Miscounted(hidden_size=16, num_layers=1, num_heads=2).build(vocab_size=20, sequence_length=8, seed=0)
