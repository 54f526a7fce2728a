"""Measures of a checkpoint's own loss around its weights: each against a naive reference, of every kind of model."""

import json
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import pytest
import torch
from tiny import GRAMMAR, TINY, pretrain, recipe_of, tokens_of

from raysweep.analysis.ranking import rank
from raysweep.analysis.terminal import format_terminal
from raysweep.cli import main
from raysweep.curvature.probes import key
from raysweep.data.brackets import Brackets
from raysweep.data.packing import Tokens
from raysweep.data.tokenizers import load_tokenizer
from raysweep.errors import SpaceError
from raysweep.objectives.adversary import Adversary
from raysweep.objectives.base import IGNORED
from raysweep.objectives.causal_lm import CausalLM
from raysweep.objectives.masked_lm import MaskedLM
from raysweep.objectives.prefix_lm import PrefixLM
from raysweep.objectives.span_corruption import SpanCorruption, random_spans
from raysweep.results import Results
from raysweep.runners import run_sweep
from raysweep.space import load
from raysweep.spec import Spec
from raysweep.stages.base import Subject
from raysweep.stages.early_sft import EarlySft
from raysweep.stages.features import FeatureRank
from raysweep.stages.gradient_noise import GradientNoise
from raysweep.stages.held_text import HeldText
from raysweep.stages.heldout import DRAW
from raysweep.stages.noise import Noise
from raysweep.stages.quantization import Quantization
from raysweep.stages.sft import Hyperparameters, Sft
from raysweep.stages.span_loss import SpanLoss
from raysweep.stages.updates import Updates
from raysweep.tasks.families import Task
from raysweep.train.checkpoints import load_model
from raysweep.train.models import Bert, Llama, Transformers
from raysweep.train.one_layer import OneLayer
from raysweep.validation import validate
from raysweep.worker import Worker


class Tasks(Spec):
    """Of which a task is read, as in a sweep file."""

    task: Task


BRACKETS = Brackets(
    name="brackets", num_words_total=8, sentence_length=4, num_train_sentences=400, num_valid_sentences=40
)
LLAMA = Llama(hidden_size=16, num_layers=1, num_heads=2)
MASKED = MaskedLM(name="masked_lm", mask="one")
CASES = {
    "llama": (GRAMMAR, LLAMA, CausalLM()),
    "prefix": (GRAMMAR, LLAMA, PrefixLM(name="prefix_lm")),
    "adversary": (GRAMMAR, LLAMA, Adversary(name="adversary", strength=0.05)),
    "bert": (GRAMMAR, Bert(name="bert", hidden_size=16, num_layers=1, num_heads=2), MASKED),
    "one_layer": (BRACKETS, OneLayer(name="one_layer", num_neurons=8, activation="linear"), MASKED),
}


class Case(NamedTuple):
    """A checkpoint, the text it was trained on, and what measurements are bound to."""

    inputs: dict
    subject: Subject


@pytest.fixture(scope="module", params=CASES)
def case(request, tmp_path_factory) -> Case:
    corpus, model, objective = CASES[request.param]
    folder = tmp_path_factory.mktemp(request.param)
    tokens, out = tokens_of(corpus, folder / "tokens"), folder / "checkpoint"
    recipe = recipe_of(corpus, model=model, objective=objective, steps=12, batch_sequences=8)
    pretrain(recipe, tokens, out, step=12)
    return Case({"tokens": tokens, "checkpoint": out}, Subject(corpus, objective, corpus.row_length, tasks={}))


def loss_of(model, rows: dict, objective) -> torch.Tensor:
    """Mean loss by torch's own cross-entropy of all logits."""
    batch = {name: torch.from_numpy(values) for name, values in rows.items() if name in ("input_ids", "labels")}
    given = {}
    if "prefix_lengths" in rows:
        places = torch.arange(batch["input_ids"].shape[1])
        prefix = torch.from_numpy(rows["prefix_lengths"])[:, None, None, None]
        sees = (places[None, :] <= places[:, None]) | (places < prefix)
        given["attention_mask"] = torch.where(sees, 0.0, torch.finfo(torch.float32).min)
    logits = model(input_ids=batch["input_ids"], **given).logits
    labels = batch["labels"]
    if objective.head == "causal":
        logits, labels = logits[:, :-1], labels[:, 1:]
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED)


def exact(model, rows: dict, objective, direction: dict) -> tuple[float, float]:
    """(u'Hu / u'u by two derivatives, loss), in float64."""
    parameters = dict(model.named_parameters())
    loss = loss_of(model, rows, objective)
    first = torch.autograd.grad(loss, list(parameters.values()), create_graph=True, allow_unused=True)
    slope = sum(
        (each * direction[name]).sum() for name, each in zip(parameters, first, strict=True) if each is not None
    )
    second = torch.autograd.grad(slope, list(parameters.values()), allow_unused=True)
    form = sum(
        (each * direction[name]).sum() for name, each in zip(parameters, second, strict=True) if each is not None
    )
    return float(form / sum(part.square().sum() for part in direction.values())), float(loss)


def first_rise(model, rows: dict, objective, direction: dict, *, near: float, target: float) -> float:
    """The first step along a direction at which the loss has risen by the target, by a coarse and a fine scan."""
    start = {name: weight.detach().clone() for name, weight in model.named_parameters()}

    def loss_at(step: float) -> float:
        with torch.no_grad():
            for name, weight in model.named_parameters():
                weight.copy_(start[name] + step * direction[name])
            return float(loss_of(model, rows, objective))

    before, low = loss_at(0.0), near / 5
    for ratio in (1.1, 1.005):
        step = low
        while loss_at(step) - before <= target:
            low, step = step, step * ratio
    loss_at(0.0)
    assert step > near / 5
    return step


def precise(folder) -> torch.nn.Module:
    """A checkpoint in float64, with attention that is differentiable twice."""
    model = load_model(folder).eval().double()
    model.set_attn_implementation("eager")
    return model


def task_of(corpus, **sizes: int):
    """The corpus's own labels, as a task of a sweep file."""
    form = {"pcfg": {"form": "pcfg_span", "span": 2}, "brackets": {"form": "bracket_balance", "label": "majority"}}
    return validate(Tasks, {"task": form[corpus.name] | sizes}).task.bind(corpus)


def test_sharpness_along_updates_is_that_of_two_derivatives_and_of_a_scan(case, tmp_path):
    task = task_of(case.subject.corpus, num_train=32, num_valid=8, num_test=8)
    spec = Updates(batch_sequences=20, num_batches=2, hyperparameters=Hyperparameters(epochs=1, batch_sequences=8))
    spec = spec.bind(replace(case.subject, tasks={"task": task}))
    metrics = spec.run(case.inputs, tmp_path, Worker())
    assert sorted(metrics) == sorted(metric.name for metric in spec.metrics(case.subject.corpus))

    whole = spec.text.rows(case.inputs["tokens"], case.inputs["checkpoint"], num_sequences=40)
    batches = [{name: values[half : half + 20] for name, values in whole.items()} for half in (0, 20)]
    tuned, model = load_model(case.inputs["checkpoint"]), precise(case.inputs["checkpoint"])
    sft = Sft(task=task, lr=spec.lr, seed=0, hyperparameters=spec.hyperparameters)
    weights = dict(tuned.named_parameters())
    sft.fit(tuned, load_tokenizer(case.inputs["checkpoint"]), Worker())
    update = {name: weights[name].detach().double() - weight.detach() for name, weight in model.named_parameters()}
    length = sum(float(part.square().sum()) for part in update.values()) ** 0.5
    update = {name: part / length for name, part in update.items()}
    found = {name: [] for name in metrics if "/" not in name and not name.endswith("_stderr")}
    for rows in batches:
        loss = loss_of(model, rows, spec.text.loss)
        gradients = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
        down = {
            name: torch.zeros_like(weight) if each is None else -each
            for (name, weight), each in zip(model.named_parameters(), gradients, strict=True)
        }
        found["directional_sharpness"].append(exact(model, rows, spec.text.loss, down)[0])
        found["finetuning_directional_sharpness"].append(exact(model, rows, spec.text.loss, update)[0])
        near = 2 / metrics["critical_sharpness"]
        rises = first_rise(model, rows, spec.text.loss, down, near=near, target=0.0)
        found["critical_sharpness"].append(2 / rises)
        near = (0.2 / metrics["finetuning_critical_sharpness"]) ** 0.5
        rises = first_rise(model, rows, spec.text.loss, update, near=near, target=0.1)
        found["finetuning_critical_sharpness"].append(0.2 / rises**2)
    for name, values in found.items():
        # A percent of the step, twice; differences of float32 gradients are about as good.
        assert metrics[name] == pytest.approx(np.mean(values), rel=0.05), name
        assert metrics[f"{name}_stderr"] == pytest.approx(
            np.std(values, ddof=1) / 2**0.5, rel=0.25, abs=0.03 * abs(np.mean(values))
        )
    assert metrics["task/finetuning_directional_sharpness"] == metrics["finetuning_directional_sharpness"]


def test_noise_raises_the_loss_by_as_much_as_a_naive_loop_says(case, tmp_path):
    spec = Noise(num_sequences=40, num_draws=2, absolute=(0.05,), per_tensor=(0.3,), per_row=(0.3,)).bind(case.subject)
    metrics = spec.run(case.inputs, tmp_path, Worker())
    assert sorted(metrics) == sorted(metric.name for metric in spec.metrics(case.subject.corpus))
    rows = spec.text.rows(case.inputs["tokens"], case.inputs["checkpoint"], num_sequences=40)
    scales = {
        "absolute_0.05": lambda weight: 0.05,
        "per_tensor_0.3": lambda weight: 0.3 * weight.square().mean() ** 0.5,
        # A vector is one row.
        "per_row_0.3": lambda weight: 0.3 * weight.view(-1, weight.shape[-1]).square().mean(dim=1) ** 0.5,
    }
    for name, scale in scales.items():
        losses = []
        for draw in range(2):
            for way in (1, -1):
                model = load_model(case.inputs["checkpoint"]).eval()
                with torch.no_grad():
                    before = loss_of(model, rows, spec.text.loss)
                    for of, weight in model.named_parameters():
                        stream = np.random.Generator(np.random.Philox(key=key(0, draw, of)))
                        normal = torch.from_numpy(stream.standard_normal(weight.numel())).float()
                        size = torch.as_tensor(scale(weight)).view(-1, *[1] * (weight.ndim - 1))
                        weight += way * size * normal.view(weight.shape)
                    losses.append(float(loss_of(model, rows, spec.text.loss) - before))
        # Losses of some nats in float32, whose differences are good to 1e-6.
        assert metrics[f"rise_{name}"] == pytest.approx(np.mean(losses), rel=1e-3, abs=3e-6)
        assert metrics[f"rise_{name}_stderr"] > 0


def test_rounded_weights_raise_the_loss_by_as_much_as_a_naive_loop_says(case, tmp_path):
    """Of all linear layers but the output layer; groups of five end within a row, and one is smaller."""
    spec = Quantization(bits=(2, 8), group=5, num_sequences=40).bind(case.subject)
    metrics = spec.run(case.inputs, tmp_path, Worker())
    assert sorted(metrics) == sorted(metric.name for metric in spec.metrics(case.subject.corpus))
    rows = spec.text.rows(case.inputs["tokens"], case.inputs["checkpoint"], num_sequences=40)
    for bits in spec.bits:
        model = load_model(case.inputs["checkpoint"]).eval()
        before = loss_of(model, rows, spec.text.loss)
        num_rounded = 0
        for layer in model.modules():
            if not isinstance(layer, torch.nn.Linear) or layer is model.get_output_embeddings():
                continue
            num_rounded += layer.weight.numel()
            for row in layer.weight.data:
                for start in range(0, len(row), 5):
                    group = row[start : start + 5]
                    low, high = min(0.0, float(group.min())), max(0.0, float(group.max()))
                    step = (high - low) / (2**bits - 1)
                    values = step * (torch.arange(2**bits) - round(-low / step))
                    group.copy_(values[(group[:, None] - values).abs().argmin(dim=1)])
        rise = float(loss_of(model, rows, spec.text.loss) - before)
        # Losses of some nats in float32, whose differences are good to 1e-6.
        assert metrics[f"rise_{bits}_bits"] == pytest.approx(rise, rel=1e-3, abs=5e-6)
        assert metrics["share_rounded"] == num_rounded / sum(weight.numel() for weight in model.parameters())
    assert abs(metrics["rise_8_bits"]) < 0.2 * abs(metrics["rise_2_bits"])
    assert metrics["rise_2_bits_stderr"] > 0


def test_experts_of_one_tensor_are_not_rounded_as_the_share_says(tmp_path):
    tokens, checkpoint = tokens_of(GRAMMAR, tmp_path / "tokens"), tmp_path / "checkpoint"
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1}
    experts = {"intermediate_size": 24, "num_local_experts": 2}
    model = Transformers(name="transformers", architecture="MixtralForCausalLM", fields=sizes | experts)
    pretrain(recipe_of(GRAMMAR, model=model, steps=1), tokens, checkpoint, step=1)
    spec = Quantization(num_sequences=8).bind(Subject(GRAMMAR, CausalLM(), GRAMMAR.row_length, tasks={}))
    metrics = spec.run({"tokens": tokens, "checkpoint": checkpoint}, tmp_path, Worker())
    # Queries and outputs [16, 16], keys and values [8, 16].
    assert metrics["share_rounded"] == 768 / load_model(checkpoint).num_parameters() < 0.25


def test_early_fine_tuning_is_scored_on_examples_that_the_target_never_sees(case, tmp_path):
    tasks = {
        name: task_of(case.subject.corpus, num_train=64, num_valid=8, num_test=60, seed=seed)
        for name, seed in (("a", 0), ("b", 1))
    }
    spec = EarlySft(lr=1e-2, hyperparameters=Hyperparameters(epochs=4, batch_sequences=8, max_examples=32))
    spec = spec.bind(replace(case.subject, tasks=tasks))
    metrics = spec.run(case.inputs, tmp_path, Worker())
    assert sorted(metrics) == sorted(metric.name for metric in spec.metrics(case.subject.corpus))
    errors = []
    for name, task in tasks.items():
        model, tokenizer = load_model(case.inputs["checkpoint"]), load_tokenizer(case.inputs["checkpoint"])
        sft = Sft(task=task, lr=1e-2, seed=0, hyperparameters=spec.hyperparameters)
        classifier = sft.fit(model, tokenizer, Worker()).model
        examples = task.encoded("indicator", tokenizer, max_length=64)
        ids, labels = torch.from_numpy(examples.ids), torch.from_numpy(examples.labels)
        with torch.no_grad():
            logits = classifier(ids)
        losses = torch.nn.functional.cross_entropy(logits, labels, reduction="none")
        assert metrics[f"{name}/score"] == pytest.approx(float((logits.argmax(dim=1) == labels).double().mean()))
        assert metrics[f"{name}/loss_nats"] == pytest.approx(float(losses.mean()), rel=1e-5)
        errors.append(float(losses.std()) / len(losses) ** 0.5)
    assert metrics["mean_loss_nats"] == pytest.approx((metrics["a/loss_nats"] + metrics["b/loss_nats"]) / 2)
    assert metrics["mean_loss_nats_stderr"] == pytest.approx((errors[0] ** 2 + errors[1] ** 2) ** 0.5 / 2, rel=1e-5)


def test_what_fine_tuning_forgets_is_the_rise_of_the_own_loss_and_changes_no_score(case, tmp_path):
    task = task_of(case.subject.corpus, num_train=32, num_valid=8, num_test=20)
    text = HeldText.of(case.subject)
    plain = Sft(task=task, lr=1e-2, seed=1, hyperparameters=Hyperparameters(epochs=4, batch_sequences=8))
    whole = plain.with_(forgetting=text)
    (out := tmp_path / "out").mkdir()
    metrics = whole.run(case.inputs, out, Worker())
    assert sorted(metrics) == sorted(metric.name for metric in whole.metrics(case.subject.corpus))
    before = load_model(case.inputs["checkpoint"]).eval()
    model, tokenizer = load_model(case.inputs["checkpoint"]), load_tokenizer(case.inputs["checkpoint"])
    plain.fit(model, tokenizer, Worker())
    rows = text.rows(case.inputs["tokens"], case.inputs["checkpoint"], num_sequences=512, draw=1)
    with torch.no_grad():
        rise = float(loss_of(model.eval(), rows, text.loss) - loss_of(before, rows, text.loss))
    assert metrics["forgetting_nats_per_token"] == pytest.approx(rise, rel=1e-3, abs=1e-6)
    assert metrics["forgetting_stderr"] > 0
    few = plain.with_(task=task.with_(max_labels=8))
    assert few.run({"checkpoint": case.inputs["checkpoint"]}, out, Worker())["num_steps"] == 4
    scored = plain.run({"checkpoint": case.inputs["checkpoint"]}, out, Worker())
    assert scored == {name: value for name, value in metrics.items() if not name.startswith("forgetting")}


def test_the_likelihood_of_right_answers_is_a_target_that_picks_the_rate(case, sweep_file, store, tmp_path, capsys):
    task = task_of(case.subject.corpus, num_train=32, num_valid=8, num_test=20)
    plain = Sft(task=task, lr=1e-2, seed=1, hyperparameters=Hyperparameters(epochs=4, batch_sequences=8))
    whole = plain.with_(likelihood=True)
    (out := tmp_path / "out").mkdir()
    metrics = whole.run(case.inputs, out, Worker())
    assert sorted(metrics) == sorted(metric.name for metric in whole.metrics(case.subject.corpus))
    lines = [json.loads(line) for line in (out / "predictions.jsonl").read_text().splitlines()]
    model, tokenizer = load_model(case.inputs["checkpoint"]), load_tokenizer(case.inputs["checkpoint"])
    fitted = plain.fit(model, tokenizer, Worker()).model
    for split, name in (("test", "log_likelihood"), ("valid", "valid_log_likelihood")):
        assert metrics[name] == pytest.approx(np.mean(task.log_likelihoods(fitted, tokenizer, split)))
    values = [line["log_likelihood"] for line in lines]
    assert metrics["log_likelihood"] == pytest.approx(np.mean(values))
    assert metrics["log_likelihood_stderr"] == pytest.approx(np.std(values, ddof=1) / 20**0.5)
    scored = plain.run(case.inputs, out, Worker())
    assert scored == {name: value for name, value in metrics.items() if "log_likelihood" not in name}

    text = TINY[: TINY.index("sweep:")] + TINY[TINY.index("sft:") :] + "  likelihood: true\n"
    plain_ids = {stage.id for stage in load(sweep_file(text)).trial({}, 0).stages}
    span = text[text.index("    span:") : text.index("  lrs:")]
    text = text.replace(span, span + span.replace("    span:", "    more:").replace("span: 2", "span: 1"))
    text += "  families: {both: [span, more], one: [span]}\n"
    assert plain_ids < {stage.id for stage in load(sweep_file(text)).trial({}, 0).stages}
    run = run_sweep(load(sweep_file(text)), store, runner="inline")
    results = Results(run)
    row, runs = results.checkpoints.iloc[-1], results.stages[results.stages["kind"] == "sft"]
    of_span = runs[(runs["checkpoint"] == row["checkpoint"]) & (runs["task"] == "span")]
    own = of_span.set_index("lr")["sft/valid_log_likelihood"]
    assert row["sft/span/lr"] == own.idxmax()
    assert row["sft/mean_log_likelihood"] == pytest.approx(
        (row["sft/span/log_likelihood"] + row["sft/more/log_likelihood"]) / 2
    )
    for end in ("", "_stderr", "_low", "_high"):
        assert row[f"sft/both/mean_log_likelihood{end}"] == row[f"sft/mean_log_likelihood{end}"]
        assert row[f"sft/one/mean_score{end}"] == row[f"sft/span/score{end}"]
    by_family = replace(results, target="sft/one/mean_log_likelihood").ranking
    by_task = replace(results, target="sft/span/log_likelihood").ranking
    assert (by_family.errors, by_family.gap) == ("paired, one seed", by_task.gap)
    assert "sft/mean_log_likelihood" in load(sweep_file(text)).metric_names()
    # What picks the rate is what is ranked by, with its error; the score may be asked for.
    ranking = results.ranking
    assert (ranking.target, ranking.errors) == ("sft/mean_log_likelihood", "paired, one seed")
    assert list(ranking.checkpoints[ranking.target]) == sorted(ranking.checkpoints[ranking.target], reverse=True)
    assert 0 < ranking.best["sft/mean_log_likelihood_stderr"] < ranking.best["sft/mean_log_likelihood_high"] + 10
    shown = format_terminal(ranking, width=200)
    assert "Checkpoints by sft/mean_log_likelihood, nats/token" in shown
    assert f"{ranking.best[ranking.target]:.3f} ± " in shown
    assert "mean log-likelihood" in results.write_report().read_text()
    assert replace(results, target="sft/mean_score").ranking.target == "sft/mean_score"
    assert main(["rank", str(run.folder), "--target", "sft/mean_score"]) == 0
    assert "Checkpoints by sft/mean_score, %" in capsys.readouterr().out
    assert main(["rank", str(run.folder), "--target", "sft/mean_scor"]) == 2
    assert "--target: no column 'sft/mean_scor', did you mean 'sft/mean_score'" in capsys.readouterr().err


def test_second_targets_have_errors_of_their_own(sweep_file, store, capsys):
    """Forgetting beside the score, and the loss that 4 bits a weight cost the checkpoint."""
    text = TINY[: TINY.index("sweep:")] + "quantization: {bits: [4], num_sequences: 16}\n"
    text += TINY[TINY.index("sft:") :].replace("  lrs:", "  seeds: [0, 1]\n  lrs:")
    plain = {stage.id for stage in load(sweep_file(text)).trial({}, 0).stages if stage.kind == "sft"}
    run = run_sweep(load(sweep_file(text + "  forgetting: true\n")), store, runner="inline")
    results = Results(run)
    assert not plain & set(results.stages["id"])
    row, runs = results.checkpoints.iloc[-1], results.stages[results.stages["kind"] == "sft"]
    picked = runs[(runs["checkpoint"] == row["checkpoint"]) & (runs["lr"] == row["sft/span/lr"])]
    rises, errors = picked["sft/forgetting_nats_per_token"], picked["sft/forgetting_stderr"]
    assert row["sft/mean_forgetting"] == row["sft/span/forgetting_nats_per_token"] == pytest.approx(rises.mean())
    assert row["sft/mean_forgetting_stderr"] == pytest.approx(max(rises.var(), (errors**2).mean()) ** 0.5 / 2**0.5)
    ranking = rank(results.checkpoints, columns=results.columns, target="sft/mean_forgetting").checkpoints
    assert list(ranking["sft/mean_forgetting"]) == sorted(results.checkpoints["sft/mean_forgetting"])
    assert list(ranking["rank"]) == [1, 2]
    assert "sft/mean_forgetting" in load(sweep_file(text + "  forgetting: true\n")).metric_names()
    rise = "quantization/rise_4_bits"
    by_rise = results.by(rise).ranking
    assert list(by_rise.checkpoints[rise]) == sorted(results.checkpoints[rise])
    assert (by_rise.sign, by_rise.target_tasks) == (-1.0, ())
    assert rise not in {item.indicator for item in by_rise.associations}
    assert rise in {item.indicator for item in results.ranking.associations}
    assert main(["rank", str(run.folder), "--target", rise]) == 0
    assert f"Checkpoints by {rise}" in capsys.readouterr().out


def test_the_loss_of_spans_is_that_of_a_naive_loop_whatever_a_model_was_trained_by(case, tmp_path):
    spec = SpanLoss(density=0.3, mean_span_length=1.0, num_sequences=24)
    if case.subject.objective.head == "masked":
        with pytest.raises(
            SpaceError, match="span_loss reads on, as a causal model does, and masked_lm trains a masked"
        ):
            spec.bind(case.subject)
        return
    spec = spec.bind(case.subject)
    metrics = spec.run(case.inputs, tmp_path, Worker())
    assert sorted(metrics) == sorted(metric.name for metric in spec.metrics(case.subject.corpus))
    assert spec.kept_length == 2  # Of 5, beside a sentinel, another and an end.
    text = Tokens(case.inputs["tokens"]).valid_mix({"pcfg": 1.0}, sequence_length=5, num_sequences=24)
    text = text[np.random.default_rng([DRAW, 1]).permutation(24)][:, :2]
    rows = spec.rows(text, case.inputs["checkpoint"])
    eos = load_tokenizer(case.inputs["checkpoint"]).eos_token_id
    assert rows["input_ids"].tolist() == [[first, eos, eos, second, eos] for first, second in text.tolist()]
    model = load_model(case.inputs["checkpoint"]).eval()
    with torch.no_grad():
        logits = model(input_ids=torch.from_numpy(rows["input_ids"])).logits.log_softmax(dim=-1)
    losses = -logits[torch.arange(24), 2, torch.from_numpy(text[:, 1])]
    assert metrics["loss_nats_per_token"] == pytest.approx(float(losses.mean()), rel=1e-5)


@pytest.mark.parametrize(
    ("objective", "kept", "num_hidden"),
    [(CausalLM(), 58, 9), (SpanCorruption(name="span_corruption", num_sentinels=4), 65, 10)],
    ids=["no_sentinels", "sentinels"],
)
def test_the_loss_of_several_spans_is_that_of_rows_that_a_loop_builds(objective, kept, num_hidden, tmp_path):
    """At the paper's density and length of spans: three in a row, each of several tokens."""
    corpus = GRAMMAR.with_(sentence_length=64)
    tokens, out = tokens_of(corpus, tmp_path / "tokens"), tmp_path / "checkpoint"
    recipe = recipe_of(corpus, model=LLAMA, objective=objective, sequence_length=65)
    pretrain(recipe, tokens, out, step=12)
    spec = SpanLoss(num_sequences=24).bind(Subject(corpus, objective, 65, tasks={}))
    metrics = spec.run({"tokens": tokens, "checkpoint": out}, tmp_path, Worker())
    tokenizer, model = load_tokenizer(out), load_model(out).eval()
    eos = tokenizer.eos_token_id
    marks = [tokenizer.get_vocab().get(f"<extra_id_{number}>", eos) for number in range(4)]
    assert len(set(marks)) == (4 if objective.extra_tokens() else 1)
    text = Tokens(tokens).valid_mix({"pcfg": 1.0}, sequence_length=65, num_sequences=24)
    text = text[np.random.default_rng([DRAW, 1]).permutation(24)][:, :kept]
    hidden = random_spans(24, kept, num_noise=num_hidden, num_spans=3, draw=np.random.default_rng([DRAW, 2]))
    losses = []
    for sentence, is_hidden in zip(text.tolist(), hidden.tolist(), strict=True):
        left, cut_out, counts, num_spans = [], [], [], 0
        for place, token in enumerate(sentence):
            if not is_hidden[place]:
                left.append(token)
                continue
            if not is_hidden[place - 1]:
                left.append(marks[num_spans])
                cut_out.append(marks[num_spans])
                counts.append(False)
                num_spans += 1
            cut_out.append(token)
            counts.append(True)
        assert (num_spans, sum(counts)) == (3, num_hidden)
        row = [*left, *cut_out, marks[3]]
        with torch.no_grad():
            chances = model(input_ids=torch.tensor([row])).logits[0].double().log_softmax(dim=-1)
        for place, (token, is_counted) in enumerate(zip(cut_out, counts, strict=True), start=len(left)):
            if is_counted:
                losses.append(-float(chances[place - 1, token]))
    assert metrics["loss_nats_per_token"] == pytest.approx(np.mean(losses), rel=1e-5)


def test_spans_of_a_mix_that_is_named_are_of_the_same_text_for_all(case):
    if case.subject.objective.head == "causal":
        [domain] = case.subject.corpus.domains
        assert SpanLoss(mix={domain: 2.0}).bind(case.subject).text == SpanLoss().bind(case.subject).text
        with pytest.raises(SpaceError, match=f"span_loss.mix names 'nowhere', which is no domain; domains: {domain}"):
            SpanLoss(mix={"nowhere": 1.0}).bind(case.subject)


def test_many_spans_are_cut_out_of_a_long_row_and_only_they_are_predicted():
    text = HeldText(loss=CausalLM(), mix={"a": 1.0}, sequence_length=64)
    spec = SpanLoss(num_sequences=24).with_(text=text)
    assert spec.kept_length == 57  # 9 tokens of 57 in 3 spans, and 7 sentinels.
    assert spec.objective.input_length(57) == 64
    assert spec.objective.mean_predicted(57) == 9 + 4


def test_the_noise_of_gradients_is_that_of_single_gradients(case, tmp_path):
    spec = GradientNoise(num_batches=4, batch_sequences=10).bind(case.subject)
    metrics = spec.run(case.inputs, tmp_path, Worker())
    assert sorted(metrics) == sorted(metric.name for metric in spec.metrics(case.subject.corpus))
    whole = spec.text.rows(case.inputs["tokens"], case.inputs["checkpoint"], num_sequences=40)
    model, gradients = load_model(case.inputs["checkpoint"]).eval(), []
    for start in range(0, 40, 10):
        loss = loss_of(model, {name: each[start : start + 10] for name, each in whole.items()}, spec.text.loss)
        parts = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
        gradients.append(torch.cat([part.flatten() for part in parts if part is not None]).double())
    trace = float(torch.stack(gradients).var(dim=0).sum())
    squared = float(torch.stack(gradients).mean(dim=0).square().sum()) - trace / 4
    assert metrics["trace"] == pytest.approx(10 * trace, rel=1e-4)
    assert metrics["signal"] == pytest.approx(squared / trace / 10, rel=1e-3, abs=1e-6)


def test_the_rank_of_features_is_that_of_their_singular_values(case, tmp_path):
    spec = FeatureRank(num_sequences=40).bind(case.subject)
    metrics = spec.run(case.inputs, tmp_path, Worker())
    assert sorted(metrics) == sorted(metric.name for metric in spec.metrics(case.subject.corpus))
    rows = spec.text.rows(case.inputs["tokens"], case.inputs["checkpoint"], num_sequences=40)
    model, states = load_model(case.inputs["checkpoint"]).eval(), []
    hook = model.base_model.register_forward_hook(lambda module, given, output: states.append(output.last_hidden_state))
    with torch.no_grad():
        loss_of(model, rows, spec.text.loss)
    hook.remove()
    matrix = states[0].flatten(0, 1).double()
    values = torch.linalg.svdvals(matrix)
    p = values / values.sum()
    assert metrics["effective_rank"] == pytest.approx(float(torch.exp(torch.special.entr(p).sum())), rel=1e-4)
    assert metrics["mean_square"] == pytest.approx(float(matrix.square().mean()), rel=1e-5)
    assert 0 <= metrics["effective_rank_stderr"] < 1
