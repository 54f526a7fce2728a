"""(a) Overhead per trial against Tune + TorchTrainer, (b) per stage in a warm gang, (b2) empty trials per second."""

from __future__ import annotations

import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

NUM_TRIALS = 12

SWEEP = """\
name: overhead
pretrain:
  data: {name: pcfg, vocabulary: 64, num_nonterminals: 8, num_rules: 2, num_words: 8, sentence_length: 16,
         num_train_sentences: 2000, num_valid_sentences: 64}
  model: {name: llama, hidden_size: 64, num_layers: 2, num_heads: 2}
  optimizer: {name: adamw, lr: 1e-3}
  steps: 20
  batch_sequences: 16
  sequence_length: 17
sweep:
  pretrain.optimizer.lr: {grid: [%s]}
resources: {workers: 2, zero_stage: 2}
"""


def lrs(num: int) -> list[float]:
    return [1e-3 + 1e-6 * index for index in range(num)]


def ours(folder: Path) -> dict[str, Any]:
    """Twelve trials through `run_sweep`; ends of trials and seconds of their training steps."""
    from raysweep.runners import run_sweep
    from raysweep.space import load
    from raysweep.store import Store

    (folder / "sweep.yaml").write_text(SWEEP % ", ".join(map(str, lrs(NUM_TRIALS))))
    began = time.perf_counter()
    store = Store(folder / "store")
    run = run_sweep(load(folder / "sweep.yaml"), store)
    assert not run.failures()
    records = [record for record in store.records() if record.kind == "pretrain"]
    ends = sorted((folder / "store/stages" / record.id / "record.json").stat().st_mtime for record in records)
    training = [record.metrics["num_tokens"] / record.provenance["tokens_per_second"] for record in records]
    return {"seconds": time.perf_counter() - began, "ends": ends, "training": training}


def peer(folder: Path) -> dict[str, Any]:
    """The same through Tune and TorchTrainer (Train V2), as its documentation has it: a trainer in a Tune function."""
    import ray
    from ray import train, tune
    from ray.train.torch import TorchTrainer

    log = folder / "peer.jsonl"

    def train_loop(config: dict[str, Any]) -> None:
        import deepspeed
        import torch

        from raysweep.objectives.causal_lm import CausalLM
        from raysweep.train.models import Llama

        torch.set_num_threads(1)
        model = Llama(hidden_size=64, num_layers=2, num_heads=2).build(vocab_size=65, sequence_length=17, seed=0)
        settings = {
            "train_micro_batch_size_per_gpu": 8,
            "zero_optimization": {"stage": 2},
            "zero_allow_untested_optimizer": True,
            "gradient_clipping": 1.0,
        }
        optimizer = torch.optim.AdamW(model.parameters(), lr=config["lr"])
        engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings)
        ids = torch.randint(0, 65, (8, 17))
        began = time.time()
        for _ in range(20):
            loss = CausalLM().loss_sum(engine, {"input_ids": ids, "labels": ids}) / (8 * 16)
            engine.backward(loss)
            engine.step()
        if train.get_context().get_world_rank() == 0:
            with log.open("a") as file:
                file.write(json.dumps({"began": began, "ended": time.time()}) + "\n")
        train.report({"loss": float(loss)})

    def trial(config: dict[str, Any]) -> None:
        trainer = TorchTrainer(
            train_loop,
            train_loop_config=config,
            scaling_config=train.ScalingConfig(num_workers=2, resources_per_worker={"CPU": 1}),
            run_config=train.RunConfig(storage_path=str(folder / "peer"), name=f"trial-{config['lr']}"),
        )
        trainer.fit()
        tune.report({"done": 1})

    began = time.perf_counter()
    # One CPU more than there are, for the Tune function itself: it only waits, and must not take a worker's place.
    ray.init(
        num_cpus=3, include_dashboard=False, log_to_driver=False, runtime_env={"env_vars": {"DS_ACCELERATOR": "cpu"}}
    )
    tuner = tune.Tuner(
        tune.with_resources(trial, {"CPU": 1}),
        param_space={"lr": tune.grid_search(lrs(NUM_TRIALS))},
        tune_config=tune.TuneConfig(max_concurrent_trials=1),
        run_config=tune.RunConfig(storage_path=str(folder / "tune"), name="peer", verbose=0),
    )
    assert tuner.fit().num_errors == 0
    rows = [json.loads(line) for line in log.read_text().splitlines()]
    assert len(rows) == NUM_TRIALS
    return {
        "seconds": time.perf_counter() - began,
        "ends": [row["ended"] for row in rows],
        "training": [row["ended"] - row["began"] for row in rows],
    }


def stages(folder: Path) -> dict[str, Any]:
    """Seconds of stages that do nothing, in a warm gang of two, commit included."""
    import noop
    import ray
    from ray.util.placement_group import placement_group
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

    from raysweep.plan import Stage
    from raysweep.resources import Resources
    from raysweep.runners.gang import RayGang
    from raysweep.runners.trainable import _rank_starter
    from raysweep.store import Store

    ray.init(include_dashboard=False, log_to_driver=False)
    resources = Resources(workers=2, zero_stage=2)
    group = placement_group([{"CPU": 1}] * 2)
    ray.get(group.ready())

    def measure() -> dict[str, list[float]]:
        store = Store(folder / "stages")
        gang = RayGang(store, resources, report=lambda event: None, start_rank=_rank_starter(resources, store, None))
        seconds: dict[str, list[float]] = {"wide": [], "split": []}
        for index in range(60):
            began = time.perf_counter()
            gang.wide(Stage(noop.WideNoop(index=index), {}))
            seconds["wide"].append(time.perf_counter() - began)
        for index in range(30):
            began = time.perf_counter()
            list(gang.split([Stage(noop.SplitNoop(index=2 * index + rank), {}) for rank in range(2)]))
            seconds["split"].append((time.perf_counter() - began) / 2)
        gang.close()
        return seconds

    strategy = PlacementGroupSchedulingStrategy(
        placement_group=group, placement_group_bundle_index=0, placement_group_capture_child_tasks=True
    )
    found = ray.get(ray.remote(measure).options(num_cpus=1, scheduling_strategy=strategy).remote())
    return {kind: statistics.median(values[10:]) for kind, values in found.items()}


def empty_trials(folder: Path) -> dict[str, Any]:
    """Trials whose stages are all in the store, sent through Tune one by one all the same."""
    from raysweep.record import Record
    from raysweep.runners.journal import Journal
    from raysweep.runners.tune import run_tune
    from raysweep.runs import Run
    from raysweep.space import load
    from raysweep.store import Store

    num = 200
    path = folder / "empty.yaml"
    text = SWEEP.replace("workers: 2, zero_stage: 2", "workers: 1")
    path.write_text(text % ", ".join(map(str, lrs(num))))
    space, store = load(path), Store(folder / "empty")
    for point in space.points():
        for stage in space.trial(point, 0).stages:
            if store.get(stage.id) is None:
                record = Record(
                    stage.id, stage.kind, "done", {}, dict(stage.inputs), {}, {"wall_seconds": 0, "world_size": 1}, {}
                )
                store.commit(record, store.work_dir(stage.id))
    run = Run.create(store, "empty", sweep_text="", identity="{}")
    ends: list[float] = []
    journal = Journal(run, lambda event: ends.append(time.perf_counter()) if event.event == "trial" else None)
    configs = [{**point, "seed": 0} for point in space.points()]
    run_tune(space, store, run, journal, configs=configs)
    assert len(run.trials()) == num
    return {"trials_per_second": (num - 1) / (ends[-1] - ends[0])}


def overhead(result: dict[str, Any]) -> tuple[float, float]:
    """(median seconds from one trial's end to the next, its training taken off; seconds of the whole)."""
    ends = result["ends"]
    gaps = [after - before for before, after in itertools.pairwise(ends)]
    return statistics.median(gaps[1:]) - statistics.median(result["training"]), result["seconds"]


def in_process(what: str, folder: Path) -> dict[str, Any]:
    out = folder / f"{what}.json"
    env = os.environ | {"OMP_NUM_THREADS": "1", "RAY_TRAIN_V2_ENABLED": "1"}
    subprocess.run([sys.executable, __file__, what, str(folder), str(out)], check=True, env=env)
    return dict(json.loads(out.read_text()))


def main() -> list[tuple[str, str]]:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        our_overhead, our_seconds = overhead(in_process("ours", folder))
        peer_overhead, peer_seconds = overhead(in_process("peer", folder))
        per_stage = in_process("stages", folder)
        empty = in_process("empty_trials", folder)
    return [
        (
            "(a) overhead per warm trial, ours / Tune + TorchTrainer",
            f"{our_overhead:.3f} s / {peer_overhead:.1f} s: {peer_overhead / our_overhead:.0f}x less (bar 20x)",
        ),
        (
            f"(a) {NUM_TRIALS} trials, ours / Tune + TorchTrainer",
            f"{our_seconds:.1f} s / {peer_seconds:.1f} s: {our_seconds / peer_seconds:.2f} of the time (bar 0.25)",
        ),
        (
            "(b) overhead per stage in a warm gang of 2, wide / split",
            f"{per_stage['wide'] * 1e3:.1f} ms / {per_stage['split'] * 1e3:.1f} ms (bar 50 ms)",
        ),
        ("(b2) 200 empty trials", f"{empty['trials_per_second']:.1f} trials/s (bar 5)"),
    ]


if __name__ == "__main__":
    if len(sys.argv) > 1:
        what, folder, out = sys.argv[1:]
        Path(out).write_text(json.dumps(globals()[what](Path(folder))))
    else:
        for row in main():
            print(*row, sep=": ")
