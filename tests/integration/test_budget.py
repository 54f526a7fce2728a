"""What to buy next, of a run that finished and of one that did not; and what each way of buying would have missed."""

import json
import re
import shutil
from pathlib import Path

import pytest
from chromium import needs_chromium, open_page
from tiny import TRUNK

from raysweep.cli import main
from raysweep.results import Results
from raysweep.runners import run_sweep
from raysweep.runs import Run
from raysweep.space import load
from raysweep.store import Store

pytest.importorskip("lightgbm", reason="LightGBM, of the extra 'compare', is not installed")
NUM = 42
SWEEP = f"""{TRUNK}  steps: 4
sweep:
  pretrain.optimizer.lr: {{grid: {[round(1e-4 * 1.2**place, 6) for place in range(NUM)]}}}
features: {{num_sequences: 8}}
sft:
  tasks:
    span: {{form: pcfg_span, span: 2, num_train: 160, num_valid: 20, num_test: 200}}
  lrs: [1e-2]
  seeds: [0, 1]
  linear_probe: false
"""


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Run:
    """A sweep of 42 variants: halves of it are just enough to learn from."""
    folder = tmp_path_factory.mktemp("budget")
    (folder / "tiny.yaml").write_text(SWEEP)
    return run_sweep(load(folder / "tiny.yaml"), Store(folder / "store"), runner="inline")


def asked(run: Run, capsys, *options: str) -> str:
    """What `rank --budget` says of a run."""
    assert main(["rank", run.name, "--store", run.store.url, *options]) == 0
    return capsys.readouterr().out


def test_a_finished_run_has_regrets_and_nothing_to_buy(finished, capsys):
    document = json.loads(asked(finished, capsys, "--budget", "20gpuh", "--json"))
    assert (document["num_checkpoints"], document["num_scored"], document["next"]) == (NUM, NUM, [])
    # What a stage took on one checkpoint, by the records.
    stages = Results(finished).stages
    spent = stages[stages["kind"] == "sft"]["wall_seconds"].sum() / NUM / 3600
    assert document["hours"]["sft"] == pytest.approx(spent)
    # Of 4 steps of 8 sequences of 5 tokens: 6 N + 12 L h s each.
    [flops] = stages[stages["kind"] == "pretrain"]["flops"].unique()
    assert flops == 160 * (6 * stages["pretrain/num_parameters"].max() + 12 * 1 * 16 * 5)
    assert (stages["flops"] > 0).groupby(stages["kind"]).any().drop("tokenize").all()
    curves = {each["strategy"]: each for each in document["strategies"]}
    assert {"fine-tune all", "elimination, 1 rung"} <= set(curves)
    for each in curves.values():
        # 20 hours are far more than all of it takes.
        assert each["regret_at_budget"] == 0
        assert all(
            low <= mean <= high for low, mean, high in zip(each["low"], each["regret"], each["high"], strict=True)
        )
    assert "every checkpoint is fine-tuned: nothing to buy" in asked(finished, capsys, "--budget", "1")
    # In the ranking, a row for each kind of stage.
    told = asked(finished, capsys)
    costs = told[told.index("What each kind of stage costs, by its best indicator") :]
    assert "planned" in costs, "what FLOPs are; the terminal breaks titles"
    assert set(re.findall(r"│ (\w+) +│ +[\d.]+ s │ +[\d.]+ │ +[\d.]+ [kMG] │", costs)) == {"heldout", "features"}


def test_an_unfinished_run_is_told_what_it_can_buy(finished, tmp_path, capsys):
    shutil.copytree(Path(finished.store.url), tmp_path / "store")
    run = Run.find(Store(tmp_path / "store"), finished.name)
    stages = Results(run).stages
    untuned, unmeasured = stages[stages["kind"] == "pretrain"]["id"].iloc[:2]
    of_both = stages["checkpoint"].isin([untuned, unmeasured])
    lost = stages[
        of_both & (stages["kind"] == "sft")
        | (stages["checkpoint"] == unmeasured) & stages["kind"].isin(["heldout", "features"])
    ]
    for stage in lost["id"]:
        shutil.rmtree(tmp_path / "store" / "stages" / stage)
    document = json.loads(asked(run, capsys, "--budget", "1", "--json"))
    assert (document["num_checkpoints"], document["num_scored"]) == (NUM, NUM - 2)
    bought = {each["kind"]: each["checkpoints"] for each in document["next"]}
    # What is measured already is not bought again; that one, to be fine-tuned, is compared with what this will tell.
    assert set(bought) <= {"heldout", "features"}
    assert {name for names in bought.values() for name in names} == {unmeasured}
    shutil.rmtree(tmp_path / "store" / "stages" / unmeasured)
    text = asked(run, capsys, "--budget", "1")
    labels = Results(run).ranking.labels
    label = {checkpoint: label for (_, checkpoint), label in labels.items()}
    assert re.search(
        rf"^buy next, by elimination, . rungs?:$(\n  .*)*\n  sft \(.* h\): {re.escape(label[untuned])}$", text, re.M
    )
    assert f"left out: {label[unmeasured]}: its pretraining: missing" in text
    assert "CPU worker hours are less than the next purchase takes" in asked(run, capsys, "--budget", "0.0000001")


@needs_chromium
def test_the_page_draws_what_each_way_of_buying_misses(finished, tmp_path):
    page = Results(finished).write_report()
    document, console = open_page(page.as_uri(), tmp_path / "profile")
    assert console == []
    drawn = document[document.index('id="regret-chart"') :]
    for name in ("fine-tune all", "elimination, 1 rung", "ASHA on (features|heldout)", "by heldout/"):
        assert re.search(name, drawn[: drawn.index("</section>")]), name
