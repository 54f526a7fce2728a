"""A model that several workers fine-tune together: the stage, and its scores, of one worker."""

import json
import os
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import run_ranks
from tiny import free_port, pretrain, recipe_of

from raysweep.costs import Size
from raysweep.resources import Resources
from raysweep.runners.processes import join_process_group, leave_process_group, make_worker
from raysweep.stages.sft import Hyperparameters, Sft
from raysweep.tasks.classification import Classification
from raysweep.tasks.mixture import Mixture
from raysweep.tasks.qa import QA
from raysweep.train import loop
from raysweep.train.methods import LoRA
from raysweep.worker import Worker

CASES = {
    "qa": (2, "fp32"),  # Decoded by the language model itself.
    "classification": (3, "fp32"),  # By a new head on it.
    "bf16": (2, "bf16"),
    "mixture": (2, "fp32"),
    "lora": (3, "fp32"),
    "lora, bf16": (2, "bf16"),
    "lora, whole": (0, "fp32"),
    "lora, optimizer sharded": (1, "fp32"),
    "lora, dropout": (1, "fp32"),  # Which each rank draws for its own sequences.
}
"""Name of a stage -> the ZeRO stage of the gang, and its precision."""
TRAIN = loop.train
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
    others = QA(form="qa", train="answers.jsonl", test="answers.jsonl", max_new_tokens=2, max_length=16).pin(tmp_path)
    mixture = Mixture(tasks={"others": others, "qa": qa})
    tasks = {"classification": labelled, "bf16": labelled, "mixture": mixture, "lora, bf16": labelled}

    def method(name: str) -> dict[str, object]:
        if not name.startswith("lora"):
            return {"lr": 3e-3}
        # Adapters begin at 0: a rate at which scores come to be other than the checkpoint's.
        return {"method": LoRA(name="lora", r=4, lora_dropout=0.2 if "dropout" in name else 0.0), "lr": 3e-2}

    return {
        name: Sft(
            task=tasks.get(name, qa),
            seed=0,
            hyperparameters=Hyperparameters(precision=precision, epochs=6 if name == "lora" else 2),
            **method(name),
        )
        for name, (_, precision) in CASES.items()
    }


def run(stage: Sft, root: Path, name: str, worker: Worker) -> tuple[dict[str, float], list[float], list[float]]:
    """Metrics, the loss of each step, and what this rank's own weights that are trained came to, one after another."""
    out = root / name
    out.mkdir(exist_ok=True)
    losses: list[float] = []
    learnt: list[float] = []

    def watched(model: torch.nn.Module, *args: Any, **given: Any) -> loop.Training:
        training = TRAIN(model, *args, **given)
        losses.extend(training.losses)
        # Under ZeRO-3 a rank holds parts, and of what is sharded of no size.
        for weights in model.parameters():
            learnt.extend(weights.detach().float().flatten().tolist() if weights.requires_grad else [])
        return training

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "train", watched)
        return stage.run({"checkpoint": root / "checkpoint"}, out, worker), losses, learnt


def rank_main(rank: int, port: int, stages: dict[str, str], folder: str) -> None:
    os.environ["OMP_NUM_THREADS"] = "1"
    resources, root = Resources(workers=2, zero_stage=2, fine_tuning="wide"), Path(folder)
    worker = make_worker(resources, rank=rank, world_size=2)
    join_process_group(worker, resources, "127.0.0.1", port)
    for name, text in stages.items():
        stage = Sft.model_validate_json(text)
        assert stage.is_wide(resources)
        metrics, losses, learnt = run(stage, root, f"{name} of two", replace(worker, zero_stage=CASES[name][0]))
        assert bool(metrics) == (rank == 0)
        assert worker.gather(losses) == [losses, losses]
        if CASES[name][0] < 3:
            assert learnt
            assert worker.gather(learnt) == [learnt, learnt], name
        if rank == 0:
            (root / f"{name}.json").write_text(json.dumps([metrics, losses]))
    leave_process_group()


@pytest.mark.slow
def test_two_workers_fine_tune_as_one_does(grammar, tokens_dir, tmp_path, stages):
    pretrain(recipe_of(grammar), tokens_dir, tmp_path / "checkpoint", step=12)
    written = {name: stage.model_dump_json(by_alias=True) for name, stage in stages.items()}
    run_ranks(rank_main, (free_port(), written, str(tmp_path)))
    for name, stage in stages.items():
        alone, alone_losses, _ = run(stage, tmp_path, f"{name} alone", Worker())
        metrics, losses = json.loads((tmp_path / f"{name}.json").read_text())
        if "dropout" in name:
            # Other draws: like losses, and not the same.
            assert losses != alone_losses
            assert losses == pytest.approx(alone_losses, rel=0.2), name
            continue
        loss, score = (2e-2, 0.1) if "bf16" in name else (1e-5, 1e-9)
        assert metrics.keys() == alone.keys()
        assert metrics["loss_nats_per_token"] == pytest.approx(alone["loss_nats_per_token"], rel=loss), name
        assert losses == pytest.approx(alone_losses, rel=loss), name
        scores = [metric for metric in alone if metric.rpartition("/")[2] == "score"]
        assert [metrics[each] for each in scores] == pytest.approx([alone[each] for each in scores], abs=score), name
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
