"""A model that several workers fine-tune together: the stage, and its scores, of one worker."""

import json
import os
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pytest
from ranks import run_ranks
from tiny import free_port, pretrain, recipe_of

from raysweep.costs import Size
from raysweep.resources import Resources
from raysweep.runners.processes import join_process_group, leave_process_group, make_worker
from raysweep.stages.sft import Hyperparameters, Sft
from raysweep.tasks.classification import Classification
from raysweep.tasks.qa import QA
from raysweep.train.methods import LoRA
from raysweep.worker import Worker

CASES = {
    "qa": (2, "fp32"),  # Decoded by the language model itself.
    "classification": (3, "fp32"),  # By a new head on it.
    "bf16": (2, "bf16"),
    "lora": (3, "fp32"),
    "lora, bf16": (2, "bf16"),
}
"""Name of a stage -> the ZeRO stage of the gang, and its precision."""
if find_spec("peft") is None:
    CASES = {name: case for name, case in CASES.items() if not name.startswith("lora")}


@pytest.fixture
def stages(tmp_path) -> dict[str, Sft]:
    """Answers that follow from the question, and labels that do in part."""
    answers = [{"id": str(at), "question": f"w{at % 7}", "answers": [f"w{at % 3}"]} for at in range(60)]
    labels = [{"id": str(at), "text": f"w{at % 7} w{at % 5}", "label": str(at % 3)} for at in range(60)]
    for name, lines in {"answers": answers, "labels": labels}.items():
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, lines)))
    qa = QA(form="qa", train="answers.jsonl", test="answers.jsonl", max_new_tokens=4).pin(tmp_path)
    labelled = Classification(form="classification", train="labels.jsonl", test="labels.jsonl").pin(tmp_path)
    tasks = {"qa": qa, "classification": labelled, "bf16": labelled, "lora": qa, "lora, bf16": labelled}
    # Adapters begin at 0: long enough for scores to be other than the checkpoint's.
    lora = {"method": LoRA(name="lora", r=4), "lr": 3e-2}
    return {
        name: Sft(
            task=tasks[name],
            seed=0,
            hyperparameters=Hyperparameters(precision=precision, epochs=6 if name == "lora" else 2),
            **(lora if name.startswith("lora") else {"lr": 3e-3}),
        )
        for name, (_, precision) in CASES.items()
    }


def run(stage: Sft, root: Path, name: str, worker: Worker) -> dict[str, float]:
    out = root / name
    out.mkdir(exist_ok=True)
    return stage.run({"checkpoint": root / "checkpoint"}, out, worker)


def rank_main(rank: int, port: int, stages: dict[str, str], folder: str) -> None:
    os.environ["OMP_NUM_THREADS"] = "1"
    resources, root = Resources(workers=2, zero_stage=2, fine_tuning="wide"), Path(folder)
    worker = make_worker(resources, rank=rank, world_size=2)
    join_process_group(worker, resources, "127.0.0.1", port)
    for name, text in stages.items():
        stage = Sft.model_validate_json(text)
        assert stage.is_wide(resources)
        metrics = run(stage, root, f"{name} of two", replace(worker, zero_stage=CASES[name][0]))
        assert bool(metrics) == (rank == 0)
        if rank == 0:
            (root / f"{name}.json").write_text(json.dumps(metrics))
    leave_process_group()


@pytest.mark.slow
def test_two_workers_fine_tune_as_one_does(grammar, tokens_dir, tmp_path, stages):
    pretrain(recipe_of(grammar), tokens_dir, tmp_path / "checkpoint", step=12)
    written = {name: stage.model_dump_json(by_alias=True) for name, stage in stages.items()}
    run_ranks(rank_main, (free_port(), written, str(tmp_path)))
    for name, stage in stages.items():
        alone = run(stage, tmp_path, f"{name} alone", Worker())
        metrics = json.loads((tmp_path / f"{name}.json").read_text())
        loss, score = (2e-2, 0.1) if "bf16" in name else (1e-5, 1e-9)
        assert metrics.keys() == alone.keys()
        assert metrics["loss_nats_per_token"] == pytest.approx(alone["loss_nats_per_token"], rel=loss), name
        assert metrics["score"] == pytest.approx(alone["score"], abs=score), name
        if "bf16" not in name:
            assert metrics == pytest.approx(alone, rel=loss), name
            predictions = [
                (tmp_path / f"{name} {who}" / "predictions.jsonl").read_text() for who in ("alone", "of two")
            ]
            assert predictions[0] == predictions[1], name


def test_a_plan_counts_what_is_sharded(stages):
    size = Size(10**9, 16, 2048, 16, inner_numbers=20_000, vocab_size=32_000, num_bytes=4 * 10**9)
    alone, split, wide = (
        stages["qa"].memory_bytes(size, resources)
        for resources in (
            Resources(workers=1, gpus_per_worker=1, fine_tuning="wide"),
            Resources(workers=8, gpus_per_worker=1, zero_stage=2),
            Resources(workers=8, gpus_per_worker=1, zero_stage=2, fine_tuning="wide"),
        )
    )
    assert alone == split
    # Of 16 bytes a weight, each worker holds the 2 that are multiplied, and shards of the others; scoring then takes
    # most, with whole weights and a batch of prompts.
    assert wide < 0.6 * split
