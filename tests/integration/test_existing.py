"""Checkpoints that raysweep did not make: taken in, measured, fine-tuned and ranked."""

import json
import re
import shutil
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import results_of
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertLMHeadModel,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedTokenizerFast,
)

from raysweep.analysis.comparer import learn
from raysweep.analysis.comparer_files import IndicatorFile, save
from raysweep.analysis.findings import cautions
from raysweep.analysis.gaps import GapAccuracy
from raysweep.analysis.kept import version_of
from raysweep.analysis.pairwise import IntervalEstimate
from raysweep.analysis.ranking import rank
from raysweep.analysis.tables import checkpoint_table
from raysweep.cli import main
from raysweep.data.text import Text
from raysweep.errors import DataError
from raysweep.results import Results
from raysweep.runners import run_sweep
from raysweep.space import load
from raysweep.spec import fingerprint
from raysweep.store import Store

TESTED = (GapAccuracy(0.0, 3.0, 200, IntervalEstimate(0.9)),)

SWEEP = """\
name: theirs
pretrain:
  from: one
  data: {name: text, domains: {notes: {train: notes.txt, valid: notes.txt}}}
  sequence_length: 16
sweep:
  pretrain.from: {grid: [one, two]}
flatness: {num_sequences: 8, batch_sequences: 2, min_units: 4, max_units: 8}
indicators: {kshot: 1, max_examples: 4}
sft:
  tasks: {quiz: {form: multiple_choice, train: quiz.jsonl, test: quiz.test.jsonl, max_test_examples: 6}}
  hyperparameters: {epochs: 1, batch_sequences: 4}
"""


NOTES = "The quick brown fox jumps over the lazy dog. " * 60


def save_tokenizer(folder, size):
    from tokenizers import ByteLevelBPETokenizer

    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator([NOTES], size, special_tokens=["<e>"])
    PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, eos_token="<e>").save_pretrained(folder)


@pytest.fixture
def folder(tmp_path):
    """Two GPT-2 style folders, text, a task and a sweep over them."""
    (tmp_path / "notes.txt").write_text(NOTES)
    for seed, name in enumerate(("one", "two")):
        torch.manual_seed(seed)
        config = GPT2Config(vocab_size=300, n_embd=16, n_layer=1, n_head=2, n_positions=64)
        GPT2LMHeadModel(config).save_pretrained(tmp_path / name)
        save_tokenizer(tmp_path / name, 300)
    lines = [{"question": f"fox {i}", "choices": ["dog", "fox"], "answer": i % 2} for i in range(24)]
    (tmp_path / "quiz.jsonl").write_text("\n".join(map(json.dumps, lines)))
    tested = [{"question": f"dog {i}", "choices": ["dog", "fox"], "answer": i % 2} for i in range(12)]
    (tmp_path / "quiz.test.jsonl").write_text("\n".join(map(json.dumps, tested)))
    (tmp_path / "quiz.test.jsonl").write_text("\n".join(map(json.dumps, lines[:8])).replace("fox", "cat"))
    (tmp_path / "theirs.yaml").write_text(SWEEP)
    return tmp_path


def test_two_folders_are_ranked(folder, store):
    run = run_sweep(load(folder / "theirs.yaml"), store, runner="inline")
    assert run.failures() == []
    table = checkpoint_table(run)
    assert len(table) == 2
    assert table["sft/mean_score"].notna().all()
    assert table["flatness/hessian_trace"].nunique() == 2
    assert Results(run).ranking.best["point.pretrain.from"] in ("one", "two")
    assert table["vocabulary"].nunique() == 1


def test_losses_by_token_of_two_vocabularies_are_not_compared(folder, store):
    shutil.copytree(folder / "two", folder / "three")
    save_tokenizer(folder / "three", 280)
    sweep = SWEEP.replace("[one, two]", "[one, two, three]").replace("sft:", "sft:\n  likelihood: true")
    sweep += "other_text: {texts: {fables: {files: notes.txt}}, num_sequences: 8}\n"
    (folder / "theirs.yaml").write_text(sweep)
    run = run_sweep(load(folder / "theirs.yaml"), store, runner="inline")
    assert run.failures() == []
    table = checkpoint_table(run).set_index("point.pretrain.from")
    assert [name.partition(" (")[0] for name in table["vocabulary"][["one", "three"]]] == ["291 tokens", "280 tokens"]
    assert table["vocabulary"]["one"] == table["vocabulary"]["two"]
    # Not by the likelihood, which would be taken within one vocabulary.
    by_score = Results(run).ranking
    assert by_score.target == "sft/mean_score"
    assert by_score.num_comparisons == 3
    nums = {item.indicator: item.pairs.num_pairs for item in by_score.associations}
    by_tokens = {
        "heldout/ppl",
        "other_text/loss_fables",
        "flatness/hessian_trace",
        "indicators/kshot_log_likelihood_mean",
    }
    assert {nums[name] for name in by_tokens & nums.keys()} == {1}
    assert {"heldout/bits_per_byte", "other_text/bits_per_byte_fables"} < nums.keys()
    assert {nums[name] for name in nums if "bits_per_byte" in name or name == "indicators/kshot_mean"} == {3}
    said = " ".join(cautions(by_score))
    assert "Checkpoints have 2 vocabularies: 280 tokens (" in said
    assert "(one has 11 tokens more)" in said
    with pytest.raises(DataError, match=r"sft/mean_log_likelihood is by token, .* as with --target sft/mean_score"):
        _ = Results(run).by("sft/mean_log_likelihood").ranking
    same = checkpoint_table(run).query("`point.pretrain.from` != 'three'")
    assert rank(same, columns=Results(run).columns, target="sft/mean_log_likelihood").num_comparisons == 1


def test_identity_is_the_content_not_the_path(folder):
    before = [load(folder / "theirs.yaml").trial({"pretrain.from": name}, 0).id for name in ("one", "two")]
    (folder / "one").rename(folder / "spare")
    (folder / "two").rename(folder / "one")
    (folder / "spare").rename(folder / "two")
    after = [load(folder / "theirs.yaml").trial({"pretrain.from": name}, 0).id for name in ("one", "two")]
    assert after == before[::-1]


def test_a_label_stands_for_a_folder(folder):
    path = folder / "theirs.yaml"
    listed = load(path).trial({"pretrain.from": "two"}, 0)
    path.write_text(SWEEP.replace("[one, two]", "{first: one, second: two}"))
    assert load(path).trial({"pretrain.from": "second"}, 0).id == listed.id


def ids_of(path, text, point):
    path.write_text(text)
    return [stage.id for stage in load(path).trial(point, 0).stages]


def test_a_zip_moves_checkpoints_together_with_what_suits_them(folder):
    path, axis = folder / "theirs.yaml", "pretrain.from: {grid: [one, two]}"
    zipped = SWEEP.replace(axis, "both: {zip: {pretrain.from: {a: one, b: two}, pretrain.sequence_length: [16, 8]}}")
    by_hand = SWEEP.replace("from: one", "from: two").replace("sequence_length: 16", "sequence_length: 8")
    assert ids_of(path, zipped, {"both": "b"}) == ids_of(path, by_hand.replace(axis, "{}"), {})
    path.write_text(zipped.replace("b: two", "b: three"))
    with pytest.raises(DataError, match=r"theirs.yaml:7: sweep\.both\.zip\.pretrain\.from\.b: .*three"):
        load(path)


def test_a_zip_moves_what_training_starts_from(folder):
    path = folder / "theirs.yaml"
    base = SWEEP.replace(
        "from: one", "start: one\n  optimizer: {name: adamw, lr: 1e-3}\n  steps: 4\n  batch_sequences: 2"
    )
    zipped = base.replace("pretrain.from: {grid:", "both: {zip: {pretrain.optimizer.lr: [1e-3, 1e-2], pretrain.start:")
    by_hand = base.replace("start: one", "start: two").replace("1e-3", "1e-2").replace("sweep:\n", "sweep: {}\n")
    by_hand = by_hand.replace("  pretrain.from: {grid: [one, two]}\n", "")
    ids = ids_of(path, zipped.replace("[one, two]}", "[one, two]}}"), {"both": "0.01 / two"})
    assert ids == ids_of(path, by_hand, {})


def test_an_axis_of_objectives_holds_wherever_it_stands(folder):
    """A checkpoint brings an objective of its own, which may not take the place of the axis'."""
    objectives = "pretrain.objective: {grid: {next: {name: causal_lm}, prefix: {name: prefix_lm}}}"
    axis = "pretrain.from: {grid: [one, two]}"
    point = {"pretrain.objective": "prefix", "pretrain.from": "two"}
    first, last = (
        ids_of(folder / "theirs.yaml", SWEEP.replace(axis, "\n  ".join(axes)), dict(order))
        for axes, order in (((objectives, axis), point.items()), ((axis, objectives), reversed(point.items())))
    )
    assert first == last
    assert first != ids_of(folder / "theirs.yaml", SWEEP, {"pretrain.from": "two"})


def test_pickled_weights_are_refused(folder):
    (folder / "one" / "model.safetensors").rename(folder / "one" / "pytorch_model.bin")
    with pytest.raises(DataError, match=r"no \*\.safetensors.*never read: pytorch_model\.bin"):
        load(folder / "theirs.yaml")


def save_bert(folder, kind=BertForMaskedLM):
    config = {"vocab_size": 300, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    kind(BertConfig(intermediate_size=24, max_position_embeddings=64, **config)).save_pretrained(folder)


WITHOUT_TASKS = SWEEP.partition("indicators:")[0]


def test_a_masked_model_is_measured_as_one(folder, store):
    """By what its configuration says it is, beside one that predicts next tokens."""
    save_bert(folder / "two")
    PreTrainedTokenizerFast.from_pretrained(folder / "one", mask_token="<e>").save_pretrained(folder / "two")
    (folder / "theirs.yaml").write_text(WITHOUT_TASKS)
    run = run_sweep(load(folder / "theirs.yaml"), store, runner="inline")
    assert run.failures() == []
    table = checkpoint_table(run).set_index("point.pretrain.from")
    assert table["heldout/ppl"].notna().all()
    for column in ("perplexity_of", "flatness_of"):
        assert [table.loc[name, column].partition(" ")[0] for name in ("one", "two")] == ["causal_lm", "masked_lm"]


def test_a_tokenizer_without_a_mask_is_named(folder, store):
    save_bert(folder / "two")
    (folder / "theirs.yaml").write_text(WITHOUT_TASKS)
    run = run_sweep(load(folder / "theirs.yaml"), store, runner="inline")
    assert {failure["kind"] for failure in run.failures()} == {"heldout", "flatness"}
    assert all("masked_lm needs '<mask>', which is not in its" in failure["cause"] for failure in run.failures())


def test_the_objective_that_a_folder_records_is_its_own(folder):
    (folder / "two" / "objective.json").write_text('{"name": "prefix_lm"}')
    space = load(folder / "theirs.yaml")

    def measured(name):
        specs = {stage.kind: stage.spec for stage in space.trial({"pretrain.from": name}, 0).stages}
        return specs["heldout"].objective.name, specs["flatness"].loss.name

    assert measured("one") == ("causal_lm", "causal_lm")
    assert measured("two") == ("prefix_lm", "prefix_lm")
    (folder / "theirs.yaml").write_text(SWEEP.replace("  from: one", "  from: one\n  objective: {name: causal_lm}"))
    space = load(folder / "theirs.yaml")
    assert measured("two") == ("causal_lm", "causal_lm")


def test_an_objective_of_another_kind_of_model_is_refused(folder):
    save_bert(folder / "two")
    (folder / "theirs.yaml").write_text(SWEEP.replace("  from: one", "  from: one\n  objective: {name: causal_lm}"))
    with pytest.raises(DataError, match="objective causal_lm needs a causal model, and two is a masked one"):
        load(folder / "theirs.yaml")


def test_an_encoder_that_calls_itself_causal_is_not_measured(folder, store):
    save_bert(folder / "two", BertLMHeadModel)
    run = run_sweep(load(folder / "theirs.yaml"), store, runner="inline")
    (failure,) = run.failures()
    assert "what follows a token changes what it predicts" in failure["cause"]


def test_a_checkpoint_that_lacks_a_tensor_is_not_measured(folder, store):
    path = folder / "one" / "model.safetensors"
    tensors = load_file(path)
    del tensors["transformer.h.0.attn.c_attn.weight"]
    save_file(tensors, path, metadata={"format": "pt"})
    run = run_sweep(load(folder / "theirs.yaml"), store, runner="inline")
    (failure,) = run.failures()
    assert failure["kind"] == "fetch"
    assert f"checkpoint '{folder / 'one'}' does not fit its own config.json" in failure["cause"]
    assert "missing transformer.h.0.attn.c_attn.weight" in failure["cause"]
    assert checkpoint_table(run)["sft/mean_score"].notna().sum() == 1  # The other is whole.


def test_weights_cut_short_are_refused_before_anything_is_computed(folder):
    path = folder / "one" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(DataError, match=r"one/model\.safetensors: not whole \(.*\); copy it again"):
        load(folder / "theirs.yaml")


@pytest.mark.parametrize(
    ("name", "kind", "old", "new"),
    [
        ("two/config.json", "fetch", b"{", b"{ "),
        ("notes.txt", "tokenize", b"fox", b"dog"),
        ("quiz.test.jsonl", "sft", b'"answer": 1', b'"answer": 0'),
    ],
)
def test_what_was_changed_after_loading_is_not_read(folder, store, name, kind, old, new):
    """The file is named, and nothing measured; put back, the numbers are those of an untouched run."""
    space = load(folder / "theirs.yaml")
    right = results_of(run_sweep(space, Store(folder / "untouched"), runner="inline"))
    original = (folder / name).read_bytes()
    (folder / name).write_bytes(original.replace(old, new))
    failures = [each for each in run_sweep(space, store, runner="inline").failures() if each["kind"] == kind]
    assert failures
    assert all(f"{name}: was changed since the sweep was loaded" in failure["cause"] for failure in failures)
    (folder / name).write_bytes(original)
    run = run_sweep(space, store, runner="inline")
    assert run.failures() == []
    assert results_of(run) == right


@pytest.fixture
def hub(monkeypatch):
    """A hub that knows one model, of which `main` and the tag `v1` are commits of their own; what it was asked for."""
    asked = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            _, _, revision = self.path.partition("/revision/")
            known = self.path.startswith("/api/models/owner/name")
            known |= (is_other := self.path.startswith("/api/models/owner/classifier"))
            config = {"architectures": ["BertForSequenceClassification" if is_other else "LlamaForCausalLM"]}
            sha = {"v1": "1" * 40}.get(revision, "0" * 40)
            body = json.dumps({"id": "owner/name", "sha": sha, "config": config}).encode()
            self.send_response(200 if known else 404)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *given):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    yield asked
    server.shutdown()
    server.server_close()


def test_a_hub_id_is_pinned_to_its_commit(folder, hub):
    def pin(given):
        text = SWEEP.replace("sweep:\n  pretrain.from: {grid: [one, two]}\n", "")
        # That it was trained by another objective is a file of the hub's: asked for, where nothing is said.
        text = text.replace("from: one", f"from: {given}\n  objective: {{name: causal_lm}}")
        (folder / "hub.yaml").write_text(text)
        return load(folder / "hub.yaml").declared.pretrain.from_

    assert pin("owner/name") == "owner/name@" + "0" * 40
    # A branch or a tag may be moved: it is no pin.
    assert pin("owner/name@main") == "owner/name@" + "0" * 40
    assert pin("owner/name@v1") == "owner/name@" + "1" * 40
    before = len(hub)
    assert pin("owner/name@" + "a" * 40) == "owner/name@" + "a" * 40
    assert len(hub) == before
    with pytest.raises(DataError, match="BertForSequenceClassification predicts no tokens"):
        pin("owner/classifier")
    with pytest.raises(DataError, match=r"'no/model@v2'.*looked up as a hub id.*owner/name@commit"):
        pin("no/model@v2")


def test_no_such_folder(folder):
    path = folder / "theirs.yaml"
    path.write_text(SWEEP.replace("from: one", "from: ./nowhere").replace("[one, two]", "[./nowhere]"))
    with pytest.raises(DataError, match="no folder here"):
        load(path)


def test_the_command_line_runs_ranks_and_reports(folder, capsys):
    store = str(folder / "store")
    sweep = str(folder / "theirs.yaml")
    assert main(["plan", sweep, "--store", store, "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["num_variants"] == 2
    assert plan["num_stages_done"] == 0
    assert main(["run", sweep, "--store", store, "--runner", "inline", "--json"]) == 0
    done = json.loads(capsys.readouterr().out)
    assert done["failures"] == []
    assert len(done["ranking"]["checkpoints"]) == 2
    assert main(["status", sweep, "--store", store, "--json"]) == 0
    status = json.loads(capsys.readouterr().out)
    assert status["stages"]["sft"]["done"] == 2
    assert main(["rank", done["folder"]]) == 0
    assert "sft/mean_score" in capsys.readouterr().out
    assert main(["plan", sweep, "--store", store, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["num_stages_to_do"] == 0


def test_the_command_line_says_what_to_mend(folder, capsys):
    path = folder / "theirs.yaml"
    path.write_text(SWEEP.replace("kshot", "kshots"))
    assert main(["plan", str(path)]) == 2
    assert "theirs.yaml:9: indicators.kshots: no field 'kshots', did you mean 'kshot'" in capsys.readouterr().err
    assert main(["rank", "nothing", "--store", str(folder / "store")]) == 2
    assert "no run 'nothing'" in capsys.readouterr().err
    assert main(["schema"]) == 0
    assert "properties" in json.loads(capsys.readouterr().out)


def test_a_tokenizer_of_a_folder_is_pinned_to_its_content(folder, tmp_path, hub):
    declared = {
        "name": "text",
        "domains": {"notes": {"train": "notes.txt", "valid": "notes.txt"}},
        "tokenizer": {"name": "pretrained", "path": "one", "vocab_size": 300},
    }
    pinned = Text.model_validate(declared).pin(folder)
    # Found from wherever the worker runs; known by its content, not its place.
    (tmp_path / "tokens").mkdir()
    assert pinned.build(tmp_path / "tokens")["num_tokens"] > 100
    other = Text.model_validate(declared | {"tokenizer": declared["tokenizer"] | {"path": "two"}}).pin(folder)
    assert fingerprint(other) == fingerprint(pinned)
    config = json.loads((folder / "two" / "tokenizer.json").read_text())
    (folder / "two" / "tokenizer.json").write_text(json.dumps(config | {"padding": None}, indent=1))
    assert fingerprint(Text.model_validate(declared).pin(folder)) == fingerprint(pinned)
    changed = Text.model_validate(declared | {"tokenizer": declared["tokenizer"] | {"path": "two"}}).pin(folder)
    assert fingerprint(changed) != fingerprint(pinned)
    at_hub = Text.model_validate(declared | {"tokenizer": declared["tokenizer"] | {"path": "owner/name@v1"}})
    assert at_hub.pin(folder).tokenizer.path == "owner/name@" + "1" * 40
    (folder / "empty").mkdir()
    nothing = Text.model_validate(declared | {"tokenizer": declared["tokenizer"] | {"path": "empty"}})
    with pytest.raises(DataError, match=r"empty: no tokenizer; save it there"):
        nothing.pin(folder)


BY_TOKENIZER = """\
name: axis
pretrain:
  data: {name: text, domains: {notes: {train: notes.txt, valid: notes.txt}}, tokenizer: TOKENIZER}
  model: {name: llama, hidden_size: 16, num_layers: 1, num_heads: 2}
  optimizer: {name: adamw, lr: 1e-3}
  steps: 2
  batch_sequences: 2
  sequence_length: 16
sweep: {AXIS}
"""


def test_an_axis_over_a_part_of_the_data_that_names_files_is_refused(folder):
    """By its path alone, a tokenizer that is changed later would go unseen; that of a whole corpus is pinned."""
    one, two = (f"{{name: pretrained, path: {name}, vocab_size: 300}}" for name in ("one", "two"))

    def num_points(axis):
        (folder / "axis.yaml").write_text(BY_TOKENIZER.replace("TOKENIZER", one).replace("AXIS", axis))
        return len(list(load(folder / "axis.yaml").points()))

    for axis in (
        "pretrain.data.tokenizer.path: {grid: [one, two]}",
        f"pretrain.data.tokenizer: {{grid: {{a: {two}, b: {{name: bpe}}}}}}",
    ):
        with pytest.raises(
            DataError, match=r"names data, whose content would not be seen: sweep pretrain\.data \(named"
        ):
            num_points(axis)
    assert num_points("pretrain.data.tokenizer.vocab_size: {grid: [300, 400]}") == 2
    text = "{name: text, domains: {notes: {train: notes.txt, valid: notes.txt}}, tokenizer: %s}"
    assert num_points(f"pretrain.data: {{grid: {{a: {text % one}, b: {text % two}}}}}") == 2


def test_two_folders_are_compared_by_what_was_learnt_from_others(folder, capsys):
    """Without fine-tuning either; turned round the probability is the other one."""
    pytest.importorskip("lightgbm", reason="LightGBM, of the extra 'compare', is not installed")
    names = ("heldout/ppl", "flatness/hessian_trace", "flatness/mean_eigenvalue", "indicators/zeroshot_mean")
    generator = np.random.default_rng(0)
    one, two = str(folder / "one"), str(folder / "two")
    places = {"with": "model", "measure": "theirs.yaml", "store": "store"}
    options = [part for name, place in places.items() for part in (f"--{name}", str(folder / place))]
    # Without a comparer all that is measured is said; it is learnt from others of that kind.
    assert main(["compare", one, two, *options[2:], "--json"]) == 0
    measured = {each["indicator"]: each["first"] for each in json.loads(capsys.readouterr().out)["indicators"]}
    like = np.array([measured[name] or 0.1 for name in names])
    values = like * np.exp(generator.normal(size=(20, 4)))
    variants = [f"{row}" for row in range(20)]
    comparer = learn(values, -values[:, 0], indicators=names, variants=variants, target="sft/quiz/score")
    needed = {name: IndicatorFile() for name in names}
    save(folder / "model", {comparer.target: (comparer, TESTED)}, learnt_from="r", indicators=needed)
    assert main(["compare", one, two, *options, "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert main(["compare", two, one, *options, "--json"]) == 0
    turned = json.loads(capsys.readouterr().out)
    [answer], [other] = document["answers"], turned["answers"]
    assert answer["probability"] == 1 - other["probability"]
    assert {reason["indicator"] for reason in answer["reasons"]} == set(names)
    assert all(min(document[unit][name]) > 0 for unit in ("seconds", "flops") for name in names)
    # Measured once.
    assert turned["seconds"] == {name: spent[::-1] for name, spent in document["seconds"].items()}
    assert not list((folder / "store" / "stages").glob("sft-*"))
    assert document["unchecked"] == list(names)
    assert main(["compare", one, two, *options]) == 0
    text = capsys.readouterr().out
    right = r"\(of 200 comparisons of unseen variants of the same sweep 0 to 3 times as far 0\.90 were right\)"
    assert re.search(rf"sft/quiz/score: A fine-tunes better with probability 0\.\d\d {right}\n", text)
    assert re.search(r"\n  A [\d.]+ and B [\d.]+ times as far from what was learnt from as that lies apart\n", text)
    assert "\nreasons are in log-odds, and add up to that of the probability; (!): " in text
    # Too far from what was learnt from no probability is one to go by; what speaks for either is said all the same.
    far = learn(values * 1e6, -values[:, 0], indicators=names, variants=variants, target="sft/quiz/score")
    save(folder / "far", {far.target: (far, TESTED)}, learnt_from="r", indicators=needed)
    assert main(["compare", one, two, "--with", str(folder / "far"), *options[2:]]) == 0
    said = capsys.readouterr().out
    assert re.search(r"score: no probability: beyond 5 times as far none is to go by\n  far: A [\d. ]+ and B ", said)
    assert "with probability" not in said
    assert re.search(r"\n  flatness/hessian_trace +for [AB] by ", said)
    assert "not checked: whether 4 of 4 indicators were measured as here, which r does not say (heldout/ppl, " in text
    spent = r"[\d.]+ s \(about [\d.]+ [MG] FLOPs\)"
    assert re.search(rf"hessian_trace .* measured in {spent} and {spent}\n", text)
    versions = {name: IndicatorFile(versions=("0123456789ab",)) for name in names}
    save(folder / "model", {comparer.target: (comparer, TESTED)}, learnt_from="r", indicators=versions)
    assert main(["compare", one, two, *options[:-1], str(folder / "new")]) == 2
    assert "heldout/ppl was measured as version" in capsys.readouterr().err
    assert not list((folder / "new" / "stages").glob("*"))  # Nothing was measured for that.
    stages = [Store(str(folder / "store")).get(path.name) for path in (folder / "store" / "stages").iterdir()]
    of = {stage.kind: version_of(stage.spec) for stage in stages}
    versions = {name: IndicatorFile(versions=(of[name.partition("/")[0]],)) for name in names}
    save(folder / "model", {comparer.target: (comparer, TESTED)}, learnt_from="r", indicators=versions)
    assert main(["compare", one, two, *options]) == 0
    assert "not checked" not in capsys.readouterr().out
    # What is by token is another quantity by another vocabulary, and what is not is not.
    shutil.copytree(two, folder / "three")
    save_tokenizer(folder / "three", 280)
    assert main(["compare", one, str(folder / "three"), *options[:-1], str(folder / "new")]) == 2
    said = capsys.readouterr().err
    assert "one has a vocabulary of 291 tokens and " in said
    assert "another, of 280: 3 of the comparer's 4 indicators are of losses by token" in said
    assert "(--without heldout,flatness)" in said
    assert not list((folder / "new" / "stages").glob("*"))
    comparer = learn(values[:, 3:], values[:, 3], indicators=names[3:], variants=variants, target="sft/quiz/score")
    save(
        folder / "model",
        {comparer.target: (comparer, TESTED)},
        learnt_from="r",
        indicators={names[3]: needed[names[3]]},
    )
    assert main(["compare", one, str(folder / "three"), *options]) == 0
    capsys.readouterr()
    # With no comparer all that was measured is said, by its declared direction.
    assert main(["compare", one, two, *options[2:], "--json"]) == 0
    plain = json.loads(capsys.readouterr().out)
    said = {each["indicator"]: each for each in plain["indicators"]}
    assert set(names) <= set(said)
    assert not any(name.startswith("sft/") for name in said)
    values = {reason["indicator"]: (reason["first"], reason["second"]) for reason in answer["reasons"]}
    assert (said["heldout/ppl"]["first"], said["heldout/ppl"]["second"]) == values["heldout/ppl"]
    assert said["heldout/ppl"]["lead"] == values["heldout/ppl"][1] - values["heldout/ppl"][0]
    assert main(["compare", one, str(folder / "three"), *options[2:]]) == 0
    text = capsys.readouterr().out
    assert "no comparer is given (--with DIR), so no probability" in text
    assert re.search(r"\n  indicators/zeroshot_mean +for (A\?|B\?|neither) +[\d.]+ against [\d.]+, measured in", text)
    assert re.search(r"\n  indicators/quiz/zeroshot +for (A\?|B\?|neither) ", text)
    assert re.search(r"different vocabularies: \d+ losses by token, such as", text)
    assert "heldout/ppl " not in text
    assert main(["compare", one, two, *options[:2]]) == 2
    assert "compare: measured how? Give --measure SWEEP.yaml: with --with DIR, the sweep" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("names", "change", "said"),
    [
        (("one", "one"), ("", ""), "A and B are one checkpoint: .*one"),
        (("one", "none"), ("", ""), "B: '[^']*none' is no folder here"),
        (("none", "one"), ("", ""), "A: '[^']*none' is no folder here"),
        (
            ("one", "two"),
            ("train: notes", "train: note"),
            r"theirs.yaml: pretrain\.data\.domains\.notes\.train: no file",
        ),
        (
            ("one", "two"),
            ("length: 16", "length: 16\n  stepz: 8"),
            r"theirs.yaml:\d+: pretrain\.stepz: no field 'stepz'",
        ),
        (
            ("one", "two"),
            ("sweep:", "sweep:\n  pretrain.objective: {grid: {next: {name: causal_lm}, prefix: {name: prefix_lm}}}"),
            r"theirs.yaml:7: sweep\.pretrain\.objective: compare .* give pretrain\.objective the one that both are",
        ),
        (
            ("one", "two"),
            ("sweep:", "sweep:\n  text: {zip: {pretrain.sequence_length: [16, 8], pretrain.data.mix: [null, null]}}"),
            r"theirs.yaml:7: sweep\.text: compare .* leave it out, and give pretrain\.sequence_length the one that",
        ),
    ],
)
def test_what_cannot_be_compared_is_said_of_a_of_b_or_of_the_file(folder, capsys, names, change, said):
    sweep = folder / "theirs.yaml"
    sweep.write_text(sweep.read_text().replace(*change))
    assert main(["compare", *(str(folder / name) for name in names), "--measure", str(sweep)]) == 2
    error = capsys.readouterr().err
    assert re.search(f"Error: {said}", error), error
    assert error.count("\n") == 1


def test_the_objective_that_a_sweep_file_says_is_that_which_is_measured(folder, capsys):
    sweep, said = folder / "theirs.yaml", []
    text = SWEEP.replace("  sequence_length: 16", "  sequence_length: 16OBJECTIVE").partition("flatness")[0]
    for objective in ("", "\n  objective: {name: prefix_lm}"):
        sweep.write_text(text.replace("OBJECTIVE", objective))
        pair = [str(folder / name) for name in ("one", "two")]
        assert main(["compare", *pair, "--measure", str(sweep), "--store", str(folder / "store"), "--json"]) == 0
        said.append({each["indicator"]: each["first"] for each in json.loads(capsys.readouterr().out)["indicators"]})
    assert said[0]["heldout/ppl"] != said[1]["heldout/ppl"]


STUDY = """\
name: study
pretrain:
  data:
    {name: text, domains: {notes: {train: notes.txt, valid: notes.txt}}, tokenizer: {name: bpe, vocab_size: 300}TAGS}
  model: {name: llama, hidden_size: 16, num_layers: 1, num_heads: 2}
  optimizer: {name: adamw, lr: 1e-3}
  steps: 2
  batch_sequences: 2
  sequence_length: 16
sweep: {pretrain.optimizer.lr: {grid: [1e-3, 3e-3]}}
REPLICATES
"""


@pytest.mark.parametrize(
    ("tags", "replicates"),
    [("", "replicates: {seeds: [1], of: {pretrain.optimizer.lr: [1e-3]}}"), (", later_tags: [<tale>]", "")],
    ids=["replicates", "later tags"],
)
def test_a_study_says_how_checkpoints_of_others_are_measured(folder, capsys, tags, replicates):
    """Its replicates are of variants that are not compared, its later tags tokens that other checkpoints lack."""
    pytest.importorskip("lightgbm", reason="LightGBM, of the extra 'compare', is not installed")
    (folder / "study.yaml").write_text(STUDY.replace("TAGS", tags).replace("REPLICATES", replicates))
    values = 300 * np.exp(np.random.default_rng(0).normal(size=(20, 1)))  # Of 300 words, by a model that knows none.
    comparer = learn(
        values,
        -values[:, 0],
        indicators=["heldout/ppl"],
        variants=[f"{row}" for row in range(20)],
        target="sft/quiz/score",
    )
    save(
        folder / "model",
        {comparer.target: (comparer, TESTED)},
        learnt_from="study",
        indicators={"heldout/ppl": IndicatorFile()},
    )
    places = {"with": "model", "measure": "study.yaml", "store": "store"}
    options = [part for name, place in places.items() for part in (f"--{name}", str(folder / place))]
    assert main(["compare", str(folder / "one"), str(folder / "two"), *options, "--json"]) == 0
    [answer] = json.loads(capsys.readouterr().out)["answers"]
    assert 0 < answer["probability"] < 1
