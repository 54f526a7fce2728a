"""The theory's study, cut to seconds: every mode runs, controls stay, and the report draws what checkpoints measure."""

import json
import re
from pathlib import Path

import pytest

from raysweep.results import Results
from raysweep.runners import run_sweep
from raysweep.space import load
from raysweep.store import Store

SWEEP = Path(__file__).parents[2] / "search_spaces/theory.yaml"
SHORTER = {
    "num_train: 4096, num_valid: 500, num_test: 4000": "num_train: 600, num_valid: 20, num_test: 150",
    "vocabulary: 24": "vocabulary: 8",
    "num_neurons: 96": "num_neurons: 32",
    "3072000": "20000",
    "65536": "1024",
    "12000": "80",
    " 400": " 20",
    "5120": "512",
    "lr: 2.0": "lr: 0.5",
    ": 2.0": ": 0.5",
    "[0.001, 0.25, 0.5, 0.75, 1.0]": "[0.25, 1.0]",
    "num_draws: 32": "num_draws: 4",
    "batch_sequences: 256, rse": "batch_sequences: 64, rse",
    "[0, 1, 2, 3, 4]": "[0]",
}


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("theory")
    text = SWEEP.read_text()
    for old, new in SHORTER.items():
        assert old in text, old
        text = text.replace(old, new)
    (folder / "theory.yaml").write_text(text)
    return Results(run_sweep(load(folder / "theory.yaml"), Store(folder / "store"), runner="inline"))


def test_controls_stay_and_the_transferable_solution_is_flat(results):
    table = results.checkpoints.sort_values("step").set_index("point.mode")
    trace, gap = table["flatness/gauss_newton_trace"], table["heldout/entropy_gap_nats_per_token"]
    assert set(table.index) == {"sgd", "label-noise", "soft-targets", "eta/8", "full-batch", "transferable"}
    assert trace.notna().all()
    for mode in ("soft-targets", "full-batch"):
        before, after = trace[mode]
        assert abs(after / before - 1) < 0.03  # On one text, by one set of probes.
        assert gap[mode].iloc[1] < gap[mode].iloc[0] < 1e-2
    # Noise of labels moves the model off the lowest loss at once; without it there is none.
    assert gap["sgd"].iloc[1] > 2 * gap["soft-targets"].iloc[1]
    assert 1.5 * trace["transferable"].iloc[1] < trace["soft-targets"].iloc[1]
    unbalanced = table["probes/unbalanced/labels_32"]
    assert unbalanced["transferable"].iloc[1] > 0.95 > unbalanced["soft-targets"].iloc[1]


def test_the_report_draws_them_over_steps(results):
    page = results.write_report().read_text()
    charts = json.loads(re.search(r'<script type="application/json" id="charts">(.*?)</script>', page, re.S).group(1))
    steps = charts["steps"]
    # The Hessian's differences see the kinks of its ReLU.
    assert steps["titles"][:2] == ["flatness/gauss_newton_trace", "heldout/entropy_gap_nats_per_token"]
    assert len(steps["lines"]) == 6
    assert steps["scores"][0] == "probes/labels_8"
    assert "each is shown over its own" in page
