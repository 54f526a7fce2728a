"""One fine-tuning on a mixture of tasks: its stages, its steps, and what is told of each of its tasks."""

import json
from statistics import fmean

import numpy as np
import pytest
import torch
from tiny import NOTES

from raysweep.analysis.fixed_rates import fixed_rates
from raysweep.analysis.tables import columns_of
from raysweep.costs import Size
from raysweep.data.tokenizers import load_tokenizer
from raysweep.errors import DataError, SpaceError
from raysweep.objectives.base import IGNORED
from raysweep.resources import Resources
from raysweep.results import Results
from raysweep.runners import run_sweep
from raysweep.scores import Result
from raysweep.space import load
from raysweep.stages.sft import Hyperparameters, Sft
from raysweep.tasks.mixture import Mixture
from raysweep.tasks.multiple_choice import MultipleChoice
from raysweep.tasks.qa import QA
from raysweep.train.checkpoints import load_model
from raysweep.worker import Worker

SWEEP = (
    NOTES.replace("name: notes", "name: mixed", 1)
    + """\
  checkpoints: [2, 4]
early_sft: {hyperparameters: {epochs: 1, max_examples: 4}, max_examples: 2}
indicators: {kshot: 1, max_examples: 2}
sft:
  tasks:
    ask: {form: qa, train: ask.jsonl, test: ask_test.jsonl, max_new_tokens: 2, max_length: 32}
    pick: {form: multiple_choice, train: pick.jsonl, test: pick_test.jsonl}
    sort: {form: classification, train: sort.jsonl, test: sort_test.jsonl}
  families: {words: [ask, pick], every: [ask, sort]}
  mixtures: {all: [pick, ask]}
  seeds: [0, 1]
  lrs: [1e-3, 1e-2]
  hyperparameters: {epochs: 1, batch_sequences: 8}
"""
)
PLAIN = SWEEP.replace("  mixtures: {all: [pick, ask]}\n", "")


@pytest.fixture
def folder(tmp_path):
    def write(name, lines):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))

    (tmp_path / "notes.txt").write_text("Question: la si do re mi fa sol\nAnswer: la " * 200)
    for name, num in {"ask": 24, "ask_test": 6}.items():
        write(name, [{"question": f"{name} la {n}", "answers": ["la", "si"]} for n in range(num)])
    for name, num in {"pick": 48, "pick_test": 12}.items():
        write(name, [{"question": f"{name} {n}", "choices": ["la", "si do"], "answer": n % 2} for n in range(num)])
    for name, num in {"sort": 24, "sort_test": 6}.items():
        write(name, [{"text": f"{name} la {n}", "label": "la" if n % 2 else "si"} for n in range(num)])
    return tmp_path


def trained(space):
    """Name of a training's tasks -> its stages, of the last checkpoint."""
    trial = space.trial({}, 0)
    groups = {}
    for stage in trial.stages:
        if stage.kind == "sft" and stage.step == trial.last_step:
            groups.setdefault(stage.task, []).append(stage)
    return groups


def test_a_mixture_is_one_training_that_each_of_its_tasks_is_scored_on(folder, sweep_file, store):
    # Of another domain: the test examples once more, and in the third task all labels turned round.
    lines = [json.loads(line) for line in (folder / "sort_test.jsonl").read_text().splitlines()]
    other = {"la": "si", "si": "la"}
    (folder / "turned.jsonl").write_text(
        "".join(json.dumps(line | {"label": other[line["label"]]}) + "\n" for line in lines)
    )
    far = {"ask": "ask_test", "pick": "pick_test", "sort": "turned"}
    given = [f"sft.tasks.{task}.ood_test={name}.jsonl" for task, name in far.items()]
    space = load(sweep_file(SWEEP), ["sft.likelihood=true", *given])
    assert {name: len(stages) for name, stages in trained(space).items()} == {
        **dict.fromkeys(("ask", "pick", "sort"), 4),
        "all/ask+pick": 4,
    }
    run = run_sweep(space, store, runner="inline")
    assert run.failures() == []
    results = Results(run)
    table = results.checkpoints
    assert {name for name in table if name.startswith("sft/")} <= {column.name for column in columns_of(run)}
    assert {name for name in table if "all" in name.split("/")} == {
        name for name in table if name.startswith("sft/all/")
    }  # No indicator takes it for a task.
    both = [table["sft/all/ask/log_likelihood"], table["sft/all/pick/log_likelihood"]]
    assert list(table["sft/all/mean_log_likelihood"]) == [fmean(each) for each in zip(*both, strict=True)]
    for column in ("mean_score", "words/mean_score", "ask/f1", "pick/accuracy", "pick/chance_score", "mean_score_low"):
        assert table[f"sft/all/{column}"].notna().all(), column
    assert "sft/all/every/mean_score" not in table  # Of which it has but one task.
    assert list(table["sft/all/ask/lr"]) == list(table["sft/all/pick/lr"])
    assert list(table["sft/mean_score"]) == [
        fmean(row) for row in zip(*(table[f"sft/{name}/score"] for name in ("ask", "pick", "sort")), strict=True)
    ]
    # Paired, by each task's own test examples.
    lines = store.file(trained(space)["all/ask+pick"][0].id, "predictions.jsonl").read_text().splitlines()
    assert [json.loads(line).get("split") for line in lines].count("ood") == len(lines) / 2 == 18
    assert list(table["sft/sort/ood_score"]) == [1 - score for score in table["sft/sort/score"]]
    for name in ("ask", "all/ask", "all/pick"):
        for end in ("score", "score_stderr", "log_likelihood", "log_likelihood_low"):
            assert list(table[f"sft/{name}/ood_{end}"]) == list(table[f"sft/{name}/{end}"]), (name, end)
    second = Results(run, target="sft/all/mean_ood_score").ranking
    assert (second.target_tasks, second.errors) == (("all/ask", "all/pick"), "paired")
    assert {"sft/mean_ood_score_low", "sft/words/mean_ood_log_likelihood"} <= {*table}
    for task in ("ask", "pick"):
        assert results.noise[f"sft/all/{task}/score"].paired.all()
        assert results.noise[f"sft/all/{task}/log_likelihood"].knows_seeds
    ranking = Results(run, target="sft/all/mean_log_likelihood").ranking
    assert ranking.target_tasks == ("all/ask", "all/pick")
    assert ranking.errors == "paired"
    assert [each.lr for each in fixed_rates(ranking, results.stages)] == [1e-3, 1e-2]
    assert results.ranking.target == "sft/mean_log_likelihood"
    assert "all/pick" in results.write_report().read_text()


def test_stages_of_a_sweep_are_those_that_it_has_without_a_mixture(folder, sweep_file):
    alone, mixed = (load(sweep_file(text)) for text in (PLAIN, SWEEP))
    ids, more = ([stage.id for stage in space.trial({}, 0).stages] for space in (alone, mixed))
    assert [name for name in more if name in ids] == ids
    assert len(more) == len(ids) + 2 * 4
    [first, *_] = trained(mixed)["all/ask+pick"]
    turned = load(sweep_file(SWEEP.replace("[pick, ask]", "[ask, pick]")))
    assert trained(turned)["all/ask+pick"][0].id == first.id


def test_auto_rates_of_a_mixture_are_those_of_its_method(folder, sweep_file):
    space = load(sweep_file(SWEEP), ["sft.lrs=auto", "sft.seeds=[0]"])
    trial = space.trial({}, 0)
    valid = {1e-4: 0.1, 3e-4: 0.2, 1e-3: 0.3}
    results = {
        stage.id: Result(stage.id, "sft", "done", {"valid_score": valid[stage.spec.lr]}, stage.task, stage.spec.lr, 0)
        for stage in trial.stages
        if stage.task == "all/ask+pick"
    }
    added = [stage for stage in trial.widened(results).stages if stage not in trial.stages]
    assert [(stage.task, stage.spec.lr) for stage in added] == [("all/ask+pick", 3e-3)] * 2


def test_tasks_of_one_data_have_auto_rates_each(folder, sweep_file):
    """Their stages have the same ids, and what is known of one is known of the other."""
    twin = "    also: {form: qa, train: ask.jsonl, test: ask_test.jsonl, max_new_tokens: 2, max_length: 32}\n"
    text = PLAIN.replace("  families:", f"{twin}  families:")
    trial = load(sweep_file(text), ["sft.lrs=auto", "sft.seeds=[0]"]).trial({}, 0)
    stages = [stage for stage in trial.stages if stage.task in ("ask", "also") and stage.kind == "sft"]
    assert len({stage.id for stage in stages}) == len(stages) / 2
    valid = {1e-4: 0.1, 3e-4: 0.2, 1e-3: 0.3}
    results = {
        stage.id: Result(stage.id, "sft", "done", {"valid_score": valid[stage.spec.lr]}, stage.task, stage.spec.lr, 0)
        for stage in stages
    }
    added = [stage for stage in trial.widened(results).stages if stage not in trial.stages]
    assert sorted((stage.task, stage.spec.lr) for stage in added) == [("also", 3e-3)] * 2 + [("ask", 3e-3)] * 2


def test_what_one_task_of_a_mixture_is_scored_on_and_another_trains_on_is_warned_of(folder, sweep_file):
    def write(name, rows):
        lines = [{"question": f"{each}", "answers": ["la"]} for each in rows]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))

    assert not load(sweep_file(SWEEP)).warnings
    write("one", [f"one {n}" for n in range(20)])
    write("two", [*(f"two {n}" for n in range(20)), *(f"ONE  test {n}" for n in range(6))])
    write("one_test", [f"one test {n}" for n in range(8)])
    write("two_test", [f"two test {n}" for n in range(5)])
    tasks = "".join(
        f"    {name}: {{form: qa, train: {name}.jsonl, test: {name}_test.jsonl}}\n" for name in ("one", "two")
    )
    space = load(sweep_file(SWEEP.replace("  families:", f"{tasks}  families:")), ["sft.mixtures={both: [one, two]}"])
    trains = {each["question"].lower() for each in space.declared.sft.tasks["two"].examples("train")}
    num = sum(f"one  test {n}" in trains for n in range(6))
    assert num
    [warning] = space.warnings
    assert "sft.mixtures.both: of 13 test examples of its tasks, " in warning
    assert f" {num} are also training examples of another of them" in warning


def test_what_one_task_of_a_mixture_picks_rates_by_and_another_trains_on_is_warned_of(folder, sweep_file):
    twin = "    also: {form: qa, train: ask.jsonl, test: ask_test.jsonl, valid_fraction: 0.3}\n"
    text = SWEEP.replace("  families:", f"{twin}  families:").replace("[pick, ask]}", "[ask, also]}")
    [warning] = load(sweep_file(text)).warnings
    # Of 24 lines, in one order, the first 2 and the first 7 validate: 5 of these train the other.
    assert "sft.mixtures.all: of 9 validation examples of its tasks, 5 are also training examples" in warning


def test_a_plan_adds_up_its_tasks(folder, sweep_file):
    stages = trained(load(sweep_file(SWEEP)))
    size = Size(10**8, 12, 768, 12, inner_numbers=8192, vocab_size=32_000, num_bytes=4 * 10**8)
    ask, pick, both = (stages[name][0].spec for name in ("ask", "pick", "all/ask+pick"))
    assert both.training_flops(size) == ask.training_flops(size) + pick.training_flops(size)
    sizes = [each.memory_bytes(size, Resources()) for each in (ask, pick, both)]
    assert sizes[2] == max(sizes)


@pytest.mark.parametrize(
    ("mixtures", "words"),
    [
        ("{all: [ask, pik]}", r"sft\.mixtures\.all: sft has no task 'pik', did you mean 'pick'"),
        ("{all: [ask]}", r"all: \['ask'\]: name two or more tasks, each once"),
        ("{all: [ask, ask]}", r"name two or more tasks, each once"),
        ("{all: [ask, sort]}", r"sft\.mixtures\.all: sort is of form classification, whose classes are read by a head"),
        ("{ask: [ask, pick]}", r"sft\.mixtures\.ask: ask is a task of sft; call the mixture otherwise"),
        ("{words: [ask, pick]}", r"sft\.mixtures\.words: words is a family of sft"),
        ("{all: [ask, pick], again: [pick, ask]}", r"mixtures\.again: all has the same tasks, ask, pick; name it once"),
        ("{full: [ask, pick]}", r"'full' is a mixture and a method"),
        ("{a+b: [ask, pick]}", r"mixture name 'a\+b': use up to 64 letters"),
    ],
)
def test_mixtures_that_cannot_be_are_refused(folder, sweep_file, mixtures, words):
    with pytest.raises(SpaceError, match=words):
        load(sweep_file(SWEEP), [f"sft.mixtures={mixtures}"])


def test_examples_by_seed_are_of_one_task(folder, sweep_file):
    with pytest.raises(SpaceError, match="by_seed draws of one task's examples; leave mixtures out, or it"):
        load(sweep_file(SWEEP), ["sft.hyperparameters.examples=by_seed", "sft.hyperparameters.max_examples=4"])


@pytest.mark.parametrize(("size", "seeds", "most"), [(8, [0, 1, 2], 2), (4, [0, 5], 5), (1000, [0], 0)])
def test_examples_by_seed_are_enough_for_all_seeds(folder, sweep_file, size, seeds, most):
    given = ["sft.mixtures={}", "sft.hyperparameters.examples=by_seed", f"sft.hyperparameters.max_examples={size}"]
    with pytest.raises(
        DataError, match=rf"sft\.tasks\.ask: .* of 20 training examples the first {most} seeds from 0 on "
    ):
        load(sweep_file(SWEEP), [*given, f"sft.seeds={seeds}"])
    load(sweep_file(SWEEP), [*given[:2], "sft.hyperparameters.max_examples=4", "sft.seeds=[0, 1, 2]"])


@pytest.fixture
def checkpoint(folder, sweep_file, store):
    text = SWEEP[: SWEEP.index("early_sft:")].replace("[2, 4]", "[4]")
    run = run_sweep(load(sweep_file(text)), store, runner="inline")
    [stage] = [stage for stage in run.trials()[0].stages if stage.kind == "pretrain"]
    return store.folder(stage.id)


def test_a_step_on_a_mixture_is_one_on_the_same_examples_by_hand(folder, checkpoint, tmp_path):
    """Each example of every task stands in the batches of an epoch once; of many tasks the first so many of each."""
    tasks = {
        "pick": MultipleChoice(form="multiple_choice", train="pick.jsonl", test="pick_test.jsonl").pin(folder),
        "ask": QA(form="qa", train="ask.jsonl", test="ask_test.jsonl", max_length=32).pin(folder),
    }
    hyperparameters = Hyperparameters(
        epochs=1, batch_sequences=10, max_examples=5, warmup=0, optimizer="sgd", weight_decay=0, precision="fp32"
    )
    stage = Sft(task=Mixture(tasks=tasks), lr=0.5, seed=3, hyperparameters=hyperparameters)
    model, tokenizer = load_model(checkpoint), load_tokenizer(checkpoint)
    before = {name: weights.clone() for name, weights in model.state_dict().items()}
    [loss] = stage.fit(model, tokenizer, Worker()).losses

    texts = [
        (task.prompt(example), task.answer(example))
        for task in tasks.values()
        for example in task.examples("train")[:5]
    ]
    by_hand = load_model(checkpoint)
    losses, counts = [], []
    for prompt, answer in texts:
        start, whole = (tokenizer(text)["input_ids"] for text in (prompt, prompt + answer))
        ids = torch.tensor([[*whole, tokenizer.eos_token_id]])
        labels = ids.clone()
        labels[:, : len(start)] = IGNORED
        losses.append(by_hand(ids, labels=labels).loss)
        counts.append(int((labels != IGNORED).sum()))
    mean = sum(each * num for each, num in zip(losses, counts, strict=True)) / sum(counts)
    mean.backward()
    assert loss == pytest.approx(mean.item(), rel=1e-5)
    learnt = model.state_dict()
    norm = float(np.sqrt(sum(float(weights.grad.square().sum()) for weights in by_hand.parameters())))
    for name, weights in by_hand.named_parameters():
        # Gradients are clipped to a norm of 1.
        expected = before[name] - 0.5 * weights.grad / max(1.0, norm)
        assert torch.allclose(learnt[name], expected, atol=1e-5), name


def test_adapters_and_forgetting_go_with_a_mixture(folder, sweep_file, store):
    pytest.importorskip("peft", reason="PEFT, of the extra 'lora', is not installed")
    few = SWEEP.replace("[2, 4]", "[4]").replace("  seeds: [0, 1]\n  lrs: [1e-3, 1e-2]\n", "")
    few = few.replace("early_sft: {hyperparameters: {epochs: 1, max_examples: 4}, max_examples: 2}\n", "")
    space = load(
        sweep_file(few.replace("indicators: {kshot: 1, max_examples: 2}\n", "")),
        ["sft.methods={lora: {name: lora, r: 2}}", "sft.forgetting=true", "sft.linear_probe=false", "sft.lrs=[1e-2]"],
    )
    results = Results(run_sweep(space, store, runner="inline"))
    [row] = results.checkpoints.to_dict("records")
    assert row["sft/lora/all/mean_score"] == fmean(row[f"sft/lora/all/{name}/score"] for name in ("ask", "pick"))
    assert row["sft/lora/all/mean_forgetting"] == row["sft/lora/all/ask/forgetting_nats_per_token"]
    assert row["sft/lora/all/mean_forgetting_stderr"] > 0
    assert results.ranking.target == "sft/lora/mean_score"
    assert Results(results.run, target="sft/lora/all/mean_score").ranking.target_tasks == (
        "lora/all/ask",
        "lora/all/pick",
    )
