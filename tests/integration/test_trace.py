"""`raysweep trace` on models of every style, as a user runs it."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import build
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

import raysweep.trace
from raysweep.cli import main
from raysweep.curvature.rescaling import rescale
from raysweep.data.tokenizers import Bpe

WORDS = ["flat", " where", " its", " loss", " bends", " little", ".", " steep", " small", " steps", " change", " much"]


@pytest.fixture(autouse=True)
def measured_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """What was told as JSON is told to a reader without being measured once more."""
    known: dict[str, Any] = {}
    measure = raysweep.trace.measure

    def look_up(request: raysweep.trace.Request, **how: Any) -> Any:
        if (asked := repr(request)) not in known:
            known[asked] = measure(request, **how)
        return known[asked]

    monkeypatch.setattr(raysweep.trace, "measure", look_up)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.jsonl"
    draw = torch.Generator().manual_seed(0)
    documents = ("".join(WORDS[index] for index in torch.randint(len(WORDS), (60,), generator=draw)) for _ in range(60))
    path.write_text("".join(json.dumps({"text": each}) + "\n" for each in documents))
    return path


@pytest.fixture(scope="module")
def tokenizer(text: Path) -> Any:
    lines = [json.loads(line)["text"] for line in text.read_text().splitlines()]
    return Bpe(vocab_size=300).build(lambda num_bytes: iter(lines))


@pytest.fixture(scope="module")
def checkpoints(tokenizer: Any, text: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root, made = tmp_path_factory.mktemp("models"), {}
    for style in ("llama", "gpt2", "bert"):
        model = build(style, vocab=300)
        if style == "bert":
            with torch.no_grad():
                model.cls.predictions.bias.copy_(-torch.arange(300.0) / 50)
                for parameter in model.bert.parameters():
                    parameter.mul_(0.3)
        else:
            _train(model, torch.tensor(tokenizer(text.read_text())["input_ids"]))
        own = tokenizer
        if style == "bert":
            own = PreTrainedTokenizerFast(
                tokenizer_object=tokenizer._tokenizer, mask_token="a", cls_token="<|endoftext|>", sep_token="b"
            )
        model.save_pretrained(root / style)
        own.save_pretrained(root / style)
        made[style] = root / style
    return made


def _train(model: Any, ids: torch.Tensor) -> None:
    """A little: an untrained model's curvature varies too much between texts for a short test."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    rows = ids[: len(ids) // 24 * 24].view(-1, 24)
    for step in range(60):
        batch = rows[step % 8 :: 8].contiguous()
        model(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def trace(capsys: pytest.CaptureFixture[str], *args: object) -> Any:
    code = main(["trace", *map(str, args), "--json"])
    out = capsys.readouterr().out
    assert code == 0, out
    return json.loads(out)


@pytest.mark.parametrize(("style", "rse"), [("llama", 0.2), ("gpt2", 0.2), ("bert", 0.4)])
def test_any_model_is_measured_and_its_products_agree(style, rse, checkpoints, text, capsys):
    asked = [checkpoints[style], "--data", text, "--sequence-length", 24, "--rse", rse]
    found = trace(capsys, *asked)
    assert found["target_reached"]
    assert found["objective"] == ("masked_lm" if style == "bert" else "causal_lm")
    assert found["hessian_trace_stderr"] <= rse * found["hessian_trace"]
    assert found["fisher_trace_stderr"] <= rse * found["fisher_trace"]
    low, high = found["hessian_trace_interval"]
    assert 0 < low < found["hessian_trace"] < high
    assert found["num_probes"] >= 12
    assert found["num_parameters_measured"] == found["num_parameters"]
    assert found["seconds"] > 0
    assert found["gradient_equivalents"] > found["num_probes"]
    assert found["num_fisher_draws"] == 0
    assert "blocks" not in found
    exact = trace(capsys, *asked, "--products", "exact", "--parts")
    off = abs(exact["hessian_trace"] - found["hessian_trace"])
    assert off < 3 * (exact["hessian_trace_stderr"] + found["hessian_trace_stderr"])
    # Blocks and layers add up alike; to the whole within an error, as they are of a few label draws, the whole is not.
    of_blocks, of_layers = (
        sum(part["fisher_trace"] for part in exact[level].values()) for level in ("blocks", "layers")
    )
    assert of_blocks == pytest.approx(of_layers)
    assert of_blocks == pytest.approx(exact["fisher_trace"], rel=0.5)
    assert len(exact["blocks"]) < len(exact["layers"])
    plain = exact["gauss_newton_trace"] + exact["residual_trace"]
    assert sum(block["hessian_trace"] for block in exact["blocks"].values()) == pytest.approx(plain)
    by_draws = trace(capsys, *asked, "--parts")
    assert by_draws["blocks"].keys() == exact["blocks"].keys()
    assert all(block["hessian_trace"] is None for block in by_draws["blocks"].values())
    assert all(block["fisher_trace_stderr"] > 0 for block in by_draws["blocks"].values())
    assert main(["trace", *map(str, asked), "--parts"]) == 0
    assert next(iter(exact["blocks"])) in capsys.readouterr().out


def test_several_models_get_differences_with_an_error_of_their_own(checkpoints, text, tmp_path, capsys):
    model = LlamaForCausalLM.from_pretrained(checkpoints["llama"])
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.01)
    model.save_pretrained(tmp_path / "near")
    for path in checkpoints["llama"].glob("tokenizer*"):
        (tmp_path / "near" / path.name).write_bytes(path.read_bytes())
    asked = ["--data", text, "--sequence-length", 24, "--rse", 0.2]
    found = trace(capsys, checkpoints["llama"], tmp_path / "near", *asked)
    left, right = found["traces"]
    (difference,) = found["differences"]
    assert difference["less"] == str(checkpoints["llama"])
    both = (left["hessian_trace_stderr"] ** 2 + right["hessian_trace_stderr"] ** 2) ** 0.5
    assert difference["hessian_trace_difference_stderr"] < both
    low, high = difference["hessian_trace_difference_interval"]
    assert low < difference["hessian_trace_difference"] < high
    assert [each["measure"] for each in difference["changes"]] == ["hessian_trace", "fisher_trace"]
    assert main(["trace", str(checkpoints["llama"]), str(tmp_path / "near"), *map(str, asked)]) == 0
    said = capsys.readouterr().out
    assert "less that of" in said
    assert "None of these survives a change of scale" in said


def test_of_two_models_the_flatter_one_is_named_by_what_survives_a_change_of_scale(checkpoints, text, tmp_path, capsys):
    # The same function at another scale.
    model = LlamaForCausalLM.from_pretrained(checkpoints["llama"])
    rescale(model, torch.Generator().manual_seed(0))
    model.save_pretrained(tmp_path / "scaled")
    for path in checkpoints["llama"].glob("tokenizer*"):
        (tmp_path / "scaled" / path.name).write_bytes(path.read_bytes())
    pair = checkpoints["llama"], tmp_path / "scaled"
    asked = ["--data", text, "--sequence-length", 16, "--rse", 0.1, "--shape", 4]
    (difference,) = trace(capsys, *pair, *asked)["differences"]
    found = {each["measure"]: each for each in difference["changes"]}
    trace_change = found["fisher_trace"]
    assert abs(trace_change["difference"]) > 0.05 * trace_change["of_other"]
    surviving = [each for each in found.values() if each["survives_rescaling"]]
    assert len(surviving) == 4
    # The same probe vectors, scaled with the weights.
    assert all(abs(each["difference"]) < 1e-2 * abs(each["value"]) and not each["is_sure"] for each in surviving)
    assert main(["trace", *map(str, pair), *map(str, asked)]) == 0
    said = capsys.readouterr().out
    assert "On these 4 sequences" in said
    assert "4 related measures that survive a change of scale" in said
    assert "beyond the chance of probe vectors none says which is flatter" in said
    assert "Their losses differ" not in said
    assert "sequence by sequence" in said
    assert abs(difference["loss_difference"]) < 1e-5


def test_a_model_that_fails_does_not_take_the_others_along(checkpoints, text, tmp_path, capsys):
    model = LlamaForCausalLM.from_pretrained(checkpoints["llama"])
    model.model.norm.weight.data[:] = torch.nan
    model.save_pretrained(tmp_path / "nan")
    for path in checkpoints["llama"].glob("tokenizer*"):
        (tmp_path / "nan" / path.name).write_bytes(path.read_bytes())
    asked = ["trace", str(checkpoints["llama"]), str(tmp_path / "nan"), "--data", str(text), "--sequence-length", "24"]
    assert main([*asked, "--rse", "0.3", "--json"]) == 1
    out, err = capsys.readouterr()
    document = json.loads(out)
    assert [each["model"] for each in document["traces"]] == [str(checkpoints["llama"])]
    (failure,) = document["failures"]
    assert "nan" in failure
    assert f"DataError: {failure}" in err


def test_without_text_the_models_own_is_measured(checkpoints, text, capsys):
    alone = trace(capsys, checkpoints["llama"], "--samples", 24, "--sequence-length", 16, "--rse", 0.3)
    assert alone["measured_on"] == "samples"
    assert "samples" not in alone
    both = trace(capsys, checkpoints["llama"], "--samples", 24, "--data", text, "--sequence-length", 16, "--rse", 0.3)
    assert both["measured_on"] == "text"
    assert both["samples"]["hessian_trace"] == alone["hessian_trace"]
    distance = both["samples"]["hessian_trace"] / both["hessian_trace"] - 1
    assert both["samples"]["relative_distance"] == pytest.approx(distance)
    assert both["samples"]["relative_distance_stderr"] > 0
    assert main(["trace", str(checkpoints["llama"]), "--samples", "24", "--data", str(text), "--rse", "0.3"]) == 0
    assert "its own samples give" in capsys.readouterr().out


def test_the_shape_of_the_loss_beyond_its_trace(checkpoints, text, capsys):
    asked = ["--data", text, "--sequence-length", 16, "--rse", 0.5, "--shape", 2]
    for style in ("llama", "bert"):
        shape = trace(capsys, checkpoints[style], *asked)["shape"]
        assert abs(shape["eigenvalue_1"]) >= abs(shape["eigenvalue_2"]) > 0
        # No less than the rounding of float32.
        assert shape["eigenvalue_1_error"] >= 1e-7 * abs(shape["eigenvalue_1"])
        assert abs(shape["eigenvalue_1"]) <= shape["frobenius_norm"] + 4 * shape["frobenius_norm_stderr"]
        assert 1 <= shape["stable_rank"] <= shape["effective_rank"]
        assert shape["worst_sharpness"] > 0
        assert {"adaptive_trace", "relative_flatness_stderr", "average_sharpness_adaptive"} <= set(shape)
        assert shape["worst_sharpness_geodesic"] > 0
    assert main(["trace", str(checkpoints["llama"]), *map(str, asked)]) == 0
    said = capsys.readouterr().out
    assert "effective rank" in said
    assert re.search("stderr +converged to", said)


def test_a_budget_that_ends_first_is_flagged(checkpoints, text, capsys):
    asked = [checkpoints["llama"], "--data", text, "--sequence-length", 24, "--rse", 0.001, "--max-units", 12]
    found = trace(capsys, *asked)
    assert not found["target_reached"]
    assert found["stopped_by"] == "units"
    assert found["hessian_trace_stderr"] > 0
    assert main(["trace", *map(str, asked), "--samples", "24"]) == 0
    said = capsys.readouterr().out
    assert "the target error was not reached: it takes more units (--max-units)" in said
    assert "the target error was not reached on its own samples: it takes more samples (--samples)" in said


def test_parameters_are_chosen_by_pattern(checkpoints, text, capsys):
    asked = [checkpoints["llama"], "--data", text, "--sequence-length", 24, "--rse", 0.3]
    asked += ["--parameters", "*.mlp.*", "--products", "gradient_differences", "--parts"]
    found = trace(capsys, *asked)
    assert found["num_parameters_measured"] < found["num_parameters"]
    assert set(found["blocks"]) == {"model.layers.0", "model.layers.1"}
    assert all(".mlp." in name for name in found["layers"])
    assert main(["trace", *map(str, asked)]) == 0
    assert "model.layers.1" in capsys.readouterr().out


def test_the_hub_s_library_is_imported_after_it_is_told_to_be_quiet(monkeypatch):
    """Else a model that is not there is told of twice for each of five tries."""
    monkeypatch.delenv("HF_HUB_VERBOSITY", raising=False)
    first = "import raysweep.cli, raysweep.comparing, raysweep.screen, raysweep.stages.flatness, raysweep.trace"
    quiet = "from raysweep.runners.journal import quiet_libraries; quiet_libraries()"
    then = "from huggingface_hub.utils import logging; print(logging.get_verbosity() == logging.ERROR)"
    assert subprocess.check_output([sys.executable, "-c", f"{first}; {quiet}; {then}"], text=True) == "True\n"


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["{llama}"], "nothing to measure on"),
        (["{tmp}/none", "--data", "{text}"], "cannot be opened as a model"),
        (["{llama}", "--data", "{tmp}/*.txt"], "no file matches"),
        (["{gpt2}", "--data", "{text}", "--sequence-length", "4096"], "takes 64 at most"),
        (["{llama}", "--data", "{short}"], "two sequences at least"),
        (["{bert}", "--samples", "8"], "has no text of its own"),
        (["{llama}", "--data", "{text}", "--sequence-length", "24", "--parameters", "*.mpl.*"], "nearest name"),
        (["{headless}", "--data", "{text}", "--sequence-length", "24"], "missing lm_head.weight"),
        (["{pickled}", "--data", "{text}", "--sequence-length", "24"], "weights cannot be loaded"),
        (["{nan}", "--data", "{text}", "--sequence-length", "24"], "batch"),
    ],
)
def test_mistakes_are_told_in_one_line(args, message, checkpoints, text, tmp_path, capsys):
    (tmp_path / "short.txt").mkdir()
    (tmp_path / "short.txt" / "text.txt").write_text("too short")
    broken = {"headless": lambda m: m.model, "pickled": lambda m: m, "nan": lambda m: m}
    for name, part in broken.items():
        model = build("llama", vocab=300, tied=False)
        if name == "nan":
            model.model.norm.weight.data[:] = torch.nan
        part(model).save_pretrained(tmp_path / name)
        for path in checkpoints["llama"].glob("tokenizer*"):
            (tmp_path / name / path.name).write_bytes(path.read_bytes())
    config = json.loads((tmp_path / "pickled" / "config.json").read_text())
    (tmp_path / "headless" / "config.json").write_text(json.dumps(config))
    weights = tmp_path / "pickled" / "model.safetensors"
    torch.save({}, tmp_path / "pickled" / "pytorch_model.bin")
    weights.unlink()
    places = {name: str(path) for name, path in checkpoints.items()} | {name: str(tmp_path / name) for name in broken}
    places |= {"text": str(text), "tmp": str(tmp_path / "empty"), "short": str(tmp_path / "short.txt" / "text.txt")}
    assert main(["trace", *(arg.format(**places) for arg in args)]) == 2
    err = capsys.readouterr().err
    assert "DataError" in err
    assert message in err
