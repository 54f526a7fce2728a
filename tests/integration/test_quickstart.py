"""The shipped quickstart's fine-tuning is worth its name: not below a linear probe of the same checkpoint."""

from pathlib import Path

import pytest

from raysweep.runners.chain import run_chain
from raysweep.runners.gang import Gang
from raysweep.scores import FinetuningRun, pick
from raysweep.space import load

QUICKSTART = Path(__file__).parents[2] / "search_spaces/quickstart.yaml"


@pytest.mark.parametrize(("optimizer", "task", "other"), [("adamw", "span-8", "span-4"), ("sgd", "span-4", "span-8")])
def test_fine_tuning_is_not_below_its_linear_probe(optimizer, task, other, tmp_path, store):
    text = QUICKSTART.read_text()
    for old, new in {
        "steps: 600": "steps: 300",
        "checkpoints: [300, 600]": "checkpoints: [300]",
        "flatness: {batch_sequences: 8}\n": "",
        f"    {other}: {{form: pcfg_span, span: {other[-1]}, num_train: 600, num_valid: 300, num_test: 600}}\n": "",
    }.items():
        assert old in text
        text = text.replace(old, new)
    path = tmp_path / "quickstart.yaml"
    path.write_text(text)
    space = load(path)
    trial = space.trial({"pretrain.optimizer": optimizer, "pretrain.model.num_layers": 1}, 0)
    gang = Gang(store, space.resources.default.with_(workers=1), report=lambda event: None)
    (leg,) = run_chain(trial, gang, max_retries=0, report=lambda event: None)
    gang.close()
    tuned, probed = leg.metrics[f"sft/{task}/score"], leg.metrics[f"probe/{task}/score"]
    # Each of 600 other sentences: the difference of two accuracies near 0.85 has a standard error of 0.02.
    assert tuned > probed - 0.04
    runs = [
        FinetuningRun(
            stage.spec.lr, stage.spec.seed, record.status == "diverged", record.metrics.get("valid_score"), stage.id
        )
        for stage in trial.stages
        if stage.kind == "sft" and (record := store.get(stage.id))
    ]
    assert pick(runs).edge is None
