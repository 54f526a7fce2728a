"""Secrets: planted in the environment, in URLs and in errors, and looked for in all that a sweep writes and shows."""

import io
import logging
from pathlib import Path

import pytest
from tiny import TINY

from raysweep.cli import main
from raysweep.errors import StoreError
from raysweep.secrets import without_secrets
from raysweep.stages.probe import Probe
from raysweep.store import Store

PLANTED = {
    "AWS_SECRET_ACCESS_KEY": "planted/aws+4f1c9a",
    "HF_TOKEN": "hf_planted5b2e",
    "WANDB_API_KEY": "planted-wandb-77aa",
    "RAY_AUTH_TOKEN": "planted-ray-90cc",
    "AZURE_STORAGE_SAS_TOKEN": "sv=2026&sig=planted-azure-13dd",
}
IN_ERRORS = ("planted-password", "planted-signature", "planted-bearer-token")


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("s3://me:pa55word@host/x", "s3://me:***@host/x"),
        ("https://h/x?X-Amz-Signature=ab12&a=1", "https://h/x?X-Amz-Signature=***&a=1"),
        ("Authorization: Bearer abcdefgh.ij", "Authorization: Bearer ***"),
        ("https://host:8080/path and user@host", "https://host:8080/path and user@host"),
        ("num_tokens=5 token_seconds=3", "num_tokens=5 token_seconds=3"),
        ("'Authorization': 'Basic dXNlcjpwYXNz'", "'Authorization': 'Basic ***'"),
        ("a basic language model", "a basic language model"),
    ],
)
def test_what_is_hidden_and_what_is_not(text, shown):
    assert without_secrets(text) == shown


def test_variables_that_are_no_secrets_stay(monkeypatch):
    values = {"RAY_AUTH_MODE": "disabled", "TOKENIZERS_PARALLELISM": "parallel", "GIT_AUTHOR_NAME": "Somebody Else"}
    values |= {"HF_TOKEN_PATH": "/home/me/token", "MY_KEYBOARD": "english-us"}
    for name, value in values.items():
        monkeypatch.setenv(name, value)
    assert without_secrets(str(values)) == str(values)


@pytest.mark.parametrize(
    "url", ["s3://me:pa55word@bucket/x", "https://host/x?sig=pa55word", "abfs://x@y/z?token=pa55word"]
)
def test_a_store_is_not_named_with_its_password(url):
    with pytest.raises(StoreError, match="leave the password or key out of it") as met:
        Store(url)
    assert "pa55word" not in str(met.value)


def test_no_secret_is_written_or_shown(tmp_path, sweep_file, monkeypatch, capsys):
    for name, value in PLANTED.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    def fails(self, inputs, out, worker):
        raise RuntimeError(
            f"401 of https://user:planted-password@host/?sig=planted-signature, headers "
            f"{{'Authorization': 'Bearer planted-bearer-token'}}, environment {PLANTED}"
        )

    monkeypatch.setattr(Probe, "run", fails)
    logs = io.StringIO()
    monkeypatch.setattr(logging.root, "handlers", [])  # So that the command sets up its own.
    store = ["--store", f"local://{tmp_path}/url"]
    assert main(["run", str(sweep_file(TINY)), "--runner", "inline", "--run", "r", "-v", *store]) == 1
    for command in (["status", "r"], ["rank", "r"], ["report", "r"], ["status", "r", "--json"]):
        main([*command, *store])
    shown = "".join(capsys.readouterr()) + logs.getvalue()
    assert "401 of https://user:***@host/?sig=***" in shown
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert any(path.name == "report.html" for path in written)
    everything = {Path("terminal"): shown.encode()} | {path: path.read_bytes() for path in written}
    for secret in (*PLANTED.values(), *IN_ERRORS):
        assert [str(path) for path, content in everything.items() if secret.encode() in content] == []
