"""A run opened again: its best checkpoint's folder, its export, and the command line around them."""

import base64
import json
import re
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch
from tiny_models import build as tiny_model

import raysweep
from raysweep.cli import main
from raysweep.errors import StoreError
from raysweep.export import export
from raysweep.record import Record
from raysweep.results import Results
from raysweep.run_files import StageRow, TrialRow
from raysweep.runs import Run
from raysweep.search import Choose, Within
from raysweep.store import Store

KNOWN = {"started": "2026-01-01T00:00:00+00:00", "wall_seconds": 1.0, "peak_memory_bytes": 2**20, "world_size": 1,
         "device": "cpu", "host": "h", "git_commit": None, "versions": {}}  # fmt: skip


def save_checkpoint(folder) -> None:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    tiny_model("llama").save_pretrained(folder)
    words = WordLevel({"a": 0, "b": 1, "[UNK]": 2}, unk_token="[UNK]")
    PreTrainedTokenizerFast(tokenizer_object=Tokenizer(words), unk_token="[UNK]").save_pretrained(folder)


@pytest.fixture
def results(store: Store) -> Results:
    """Two trials of one checkpoint each; `hot` scores 0.8, `cold` 0.6."""
    run = Run.create(store, "first-run", sweep_text="x", identity="{}")
    for name, score in (("hot", 0.8), ("cold", 0.6)):
        out = store.work_dir(f"pretrain-{name}")
        save_checkpoint(out)
        store.commit(Record(f"pretrain-{name}", "pretrain", "done", {}, {}, {}, KNOWN, {}), out)
        metrics = {"score": score, "valid_score": score}
        record = Record(f"sft-{name}", "sft", "done", {"lr": 0.1, "seed": 0}, {}, metrics, KNOWN, {})
        store.commit(record, store.work_dir(record.id))
        stages = (
            StageRow(f"pretrain-{name}", "pretrain", 1, f"pretrain-{name}", None, {}),
            StageRow(f"sft-{name}", "sft", 1, f"pretrain-{name}", "t", {}),
        )
        run.add_trial(TrialRow(name, f"variant-{name}", {"pretrain.x": name}, 0, stages))
    return Results(run)


def test_the_best_checkpoints_folder_is_everywhere(results, capsys):
    best = str(results.run.store.root / "stages" / "pretrain-hot")
    assert results.ranking.best["location"] == best
    assert main(["rank", str(results.run.folder)]) == 0
    assert best in capsys.readouterr().out
    assert main(["rank", str(results.run.folder), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["checkpoints"][0]["location"] == best
    assert best in results.write_report().read_text()


def test_a_run_of_which_stages_failed_is_told_by_every_exit_code(results, capsys):
    run = results.run
    run.add_failure("sft-cold", kind="sft", trial="cold", cause="no room", log="")
    for command in ("status", "rank", "report"):
        assert main([command, str(run.folder)]) == 1, command
    assert capsys.readouterr().err.count("FAILED sft-cold: no room") == 2  # `status` tells it in its table.


def test_a_stage_of_a_url_lies_below_it():
    assert Store("memory://bucket/sweeps/").location("sft-1") == "memory://bucket/sweeps/stages/sft-1"


def test_a_run_is_opened_by_name_and_by_folder(results):
    for opened in (
        raysweep.Results.open("first-run", store=results.run.store.root),
        raysweep.Results.open(results.run.folder),
    ):
        assert opened.ranking.best["checkpoint"] == "pretrain-hot"
    with pytest.raises(StoreError, match=r"no run 'second' .*first-run"):
        raysweep.Results.open("second", store=results.run.store.root)


def test_a_notebook_shows_the_ranking(results):
    page = results._repr_html_()
    assert "Best after fine-tuning" in page
    assert re.search(r"<td[^>]*>1</td>.*hot", page, re.S)
    assert "<script" not in page


def test_tables_are_computed_once_for_a_command(results, monkeypatch, capsys):
    from raysweep.analysis import tables

    calls = []
    real = tables.stage_table
    monkeypatch.setattr(tables, "stage_table", lambda run: calls.append(run) or real(run))
    assert main(["report", str(results.run.folder)]) == 0
    assert len(calls) == 1


@pytest.mark.parametrize(
    ("which", "taken"), [("1", "hot"), ("2", "cold"), ("pretrain-cold", "cold"), ("x cold · step 1", "cold")]
)
def test_export_opens_elsewhere(results, tmp_path, which, taken):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    target = tmp_path / "deep" / "model"
    exported = export(results.ranking, results.run.store, to=str(target), which=which)
    assert exported.checkpoint == f"pretrain-{taken}"
    assert AutoModelForCausalLM.from_pretrained(target).num_parameters() == tiny_model("llama").num_parameters()
    assert AutoTokenizer.from_pretrained(target)("b")["input_ids"] == [1]
    assert "record.json" not in {path.name for path in target.iterdir()}
    assert [path.name for path in target.parent.iterdir()] == ["model"]


def test_export_takes_what_the_sweep_file_chooses(results, tmp_path):
    nearly_best = Within(metric="sft/mean_score", mode="max", part=0.5)
    worst = Choose(metric="sft/mean_score", mode="min", within=nearly_best)
    given = {"to": str(tmp_path / "chosen"), "which": "chosen"}
    assert export(results.ranking, results.run.store, **given, choose=worst).checkpoint == "pretrain-cold"
    with pytest.raises(StoreError, match=r"has no search\.choose"):
        export(results.ranking, results.run.store, **given)
    unmeasured = worst.with_(metric="flatness/hessian_trace")
    with pytest.raises(StoreError, match="no checkpoint of this run has both flatness/hessian_trace and sft/mean"):
        export(results.ranking, results.run.store, **given, choose=unmeasured)


def test_export_overwrites_nothing(results, tmp_path):
    target = tmp_path / "mine"
    target.mkdir()
    (target / "thesis.txt").write_text("years of work")
    with pytest.raises(StoreError, match="mine' is there already and not an empty folder"):
        export(results.ranking, results.run.store, to=str(target))
    with pytest.raises(StoreError, match=r"thesis.txt' is there already"):
        export(results.ranking, results.run.store, to=str(target / "thesis.txt"))
    with pytest.raises(StoreError, match="cannot be written: File exists"):
        export(results.ranking, results.run.store, to=str(target / "thesis.txt" / "model"))
    assert (target / "thesis.txt").read_text() == "years of work"


def test_export_names_what_there_is(results, tmp_path):
    for which, words in (
        ("3", "no checkpoint '3' in this run; there are: 'x hot · step 1', 'x cold · step 1'"),
        ("x hot", "did you mean x hot · step 1"),
    ):
        with pytest.raises(StoreError, match=re.escape(words)):
            export(results.ranking, results.run.store, to=str(tmp_path / "m"), which=which)


def test_export_to_the_hub_says_in_one_line_what_is_in_the_way(results, monkeypatch):
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(StoreError, match=r"hub:me/mine cannot be written \(OfflineModeIsEnabled: .*HF_TOKEN") as caught:
        export(results.ranking, results.run.store, to="hub:me/mine")
    assert "\n" not in str(caught.value)


class Hub(BaseHTTPRequestHandler):
    """As much of a hub as an upload needs: creates repositories, lists and takes files, to whoever has the token."""

    repositories: dict[str, dict[str, bytes]]

    def do_GET(self):
        if self.path.startswith("/api/models/me/mine/tree/"):
            files = self.repositories["me/mine"].items()
            self._answer([{"type": "file", "path": name, "size": len(data), "oid": "0"} for name, data in files])
        else:
            self._answer({"error": "no such file"}, status=404)

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.headers["Authorization"] != "Bearer mine":
            self._answer({"error": "Invalid username or password."}, status=401)
        elif self.path == "/api/repos/create":
            asked = json.loads(body)
            assert asked["visibility"] == "private"
            self.repositories.setdefault(f"{asked['organization']}/{asked['name']}", {})
            self._answer({"url": f"http://{self.headers['Host']}/me/mine"})
        elif self.path == "/api/models/me/mine/preupload/main":
            files = [{**file, "uploadMode": "regular", "shouldIgnore": False} for file in json.loads(body)["files"]]
            self._answer({"files": files})
        elif self.path == "/api/models/me/mine/commit/main":
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    content = base64.b64decode(line["value"]["content"])
                    self.repositories["me/mine"][line["value"]["path"]] = content
            self._answer({"commitUrl": f"http://{self.headers['Host']}/me/mine/commit/1", "commitOid": "1"})
        else:
            self._answer({"error": self.path}, status=404)

    def _answer(self, value, *, status=200):
        body = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args):
        pass


@pytest.fixture
def hub():
    """The repositories of a hub, and its address."""
    kind = type("OwnHub", (Hub,), {"repositories": {}})
    with ThreadingHTTPServer(("127.0.0.1", 0), kind) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield kind.repositories, f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_export_to_the_hub_opens_elsewhere(results, hub, tmp_path, monkeypatch, capsys):
    import huggingface_hub.constants
    from transformers import AutoModelForCausalLM

    repositories, address = hub
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", address)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("NO_PROXY", "*")
    command = ["export", str(results.run.folder), "--to", "hub:me/mine"]
    monkeypatch.setenv("HF_TOKEN", "another")
    assert main(command) == 2
    assert "HF_TOKEN" in capsys.readouterr().err
    monkeypatch.setenv("HF_TOKEN", "mine")
    assert main(command) == 0
    assert f"{address}/me/mine" in capsys.readouterr().out
    for name, content in repositories["me/mine"].items():
        (tmp_path / name).write_bytes(content)
    ours = AutoModelForCausalLM.from_pretrained(results.ranking.best["location"])
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert all(map(torch.equal, ours.state_dict().values(), theirs.state_dict().values()))
    assert main(command) == 2
    assert "file(s) already" in capsys.readouterr().err


@pytest.mark.parametrize(
    "command",
    [
        "status first-run",
        "rank first-run",
        "report first-run",
        "export first-run --to {folder}/model",
        "export first-run --to {folder}",  # Refused: there is a store in it.
        "rank unknown",
        "schema",
    ],
)
def test_json_is_one_document(results, tmp_path, capsys, command):
    store = str(results.run.store.root)
    main([*command.format(folder=tmp_path).split(), "--store", store, "--json"])
    assert isinstance(json.loads(capsys.readouterr().out), dict)


def test_python_dash_m_and_version():
    done = subprocess.run([sys.executable, "-m", "raysweep", "--version"], capture_output=True, text=True, check=True)
    assert re.fullmatch(r"raysweep \d+\.\d+\.\d+\n", done.stdout)


@pytest.mark.parametrize("shell", ["bash", "zsh", "tcsh"])
def test_completion_knows_the_commands(shell, capsys):
    pytest.importorskip("shtab")
    with pytest.raises(SystemExit, match="0"):
        main(["--print-completion", shell])
    script = capsys.readouterr().out
    assert "export" in script
    assert {"bash": "compgen_files", "zsh": "_files", "tcsh": "f"}[shell] in script
