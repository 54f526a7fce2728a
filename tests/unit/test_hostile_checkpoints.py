"""Checkpoints of others: what would lead out of their folder, or take all the memory there is, is refused at once."""

import json
import time
from pathlib import Path

import pytest
from pydantic import ValidationError
from tiny_models import build

from raysweep.data.sources import checkpoint_files
from raysweep.errors import DataError, StageError
from raysweep.train.checkpoints import check_size
from raysweep.train.models import Llama, Transformers


@pytest.fixture
def checkpoint(tmp_path) -> Path:
    folder = tmp_path / "models" / "mine"
    build("llama").save_pretrained(folder)
    (folder / "tokenizer.json").write_text("{}")
    return folder


def test_a_link_out_of_the_folder_is_not_followed(checkpoint, tmp_path):
    secret = tmp_path / "secret.txt"
    secret.write_text("mine")
    (checkpoint / "notes.txt").symlink_to(secret)
    with pytest.raises(DataError, match=r"notes.txt: a link to .*secret.txt, outside of the checkpoint"):
        checkpoint_files(checkpoint)


def test_links_within_a_folder_and_in_the_cache_of_the_hub_are_followed(checkpoint, tmp_path):
    (checkpoint / "more.json").symlink_to(checkpoint / "tokenizer.json")
    linked = tmp_path / "linked"
    linked.symlink_to(checkpoint)
    assert len(checkpoint_files(linked)) == len(checkpoint_files(checkpoint)) == 5
    blobs, snapshot = tmp_path / "hub" / "blobs", tmp_path / "hub" / "snapshots" / "0123"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for number, path in enumerate(checkpoint_files(checkpoint)):
        (blobs / str(number)).write_bytes(path.read_bytes())
        (snapshot / path.name).symlink_to(Path("../../blobs") / str(number))
    assert len(checkpoint_files(snapshot)) == 5


@pytest.mark.parametrize(
    "index",
    [
        {"weight_map": {"w": "../../../weights.safetensors"}},
        {"weight_map": {"w": "/etc/passwd"}},
        {"weight_map": {"w": "missing.safetensors"}},
        {"weight_map": ["model.safetensors"]},
        {"weight_map": None},
        {},
        [],
    ],
)
def test_an_index_names_files_of_the_checkpoint_alone(checkpoint, index):
    (checkpoint / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(DataError, match=r"index.json: (names '.*', which is no file|no index of weights)"):
        checkpoint_files(checkpoint)


@pytest.mark.parametrize(
    "change",
    [
        {"hidden_size": 2**20},
        {"vocab_size": 2**40},
        {"intermediate_size": 2**40},
        {"num_hidden_layers": 2**40},
        {"num_attention_heads": 0},
        {"hidden_size": "all"},
    ],
)
def test_a_configuration_that_its_weights_do_not_fill_is_refused_at_once(checkpoint, change):
    path = checkpoint / "config.json"
    check_size(checkpoint)
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    started = time.monotonic()
    with pytest.raises(DataError, match=r"config.json asks for|layers in config.json|no model can be made"):
        check_size(checkpoint)
    assert time.monotonic() - started < 20


@pytest.mark.parametrize("change", [{"hidden_size": 2**20}, {"num_layers": 2**40}, {"intermediate_size": 2**40}])
def test_a_model_larger_than_the_machine_is_refused_before_it_is_made(change):
    with pytest.raises(StageError, match=r"parameters take [\d,.]+ GiB in float32, and this machine has"):
        Llama(**({"num_heads": 2} | change)).build(vocab_size=100, sequence_length=8, seed=0)


def test_a_configuration_of_a_billion_layers_is_no_model():
    with pytest.raises(ValidationError, match="num_hidden_layers 1,073,741,824: at most"):
        Transformers(name="transformers", architecture="GPT2LMHeadModel", fields={"n_layer": 2**30})
