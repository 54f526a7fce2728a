"""Fine-tuning stages beside those of an earlier revision, stage by stage in turn, and beside TRL's SFTTrainer.

    python tests/benchmarks/sft.py --before 8662b97 --store STORE [--trl-python /path/to/python] [--seeds 5]

Two models are pretrained first, once for a store. RAYSWEEP_DATA names the data pack; `--trl-python` an environment that
has TRL beside raysweep's own packages (the `bench` extra); one thread a process. Prints Markdown for RESULTS.md.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]

SWEEP = """\
name: sft-benchmark
pretrain:
  data:
    name: text
    domains:
      stories: {{train: "${{RAYSWEEP_DATA}}/pretrain/stories.train.jsonl.gz",
                valid: "${{RAYSWEEP_DATA}}/pretrain/stories.valid.jsonl.gz"}}
      wiki: {{train: "${{RAYSWEEP_DATA}}/pretrain/wiki.train.jsonl.gz",
             valid: "${{RAYSWEEP_DATA}}/pretrain/wiki.valid.jsonl.gz"}}
    mix: {{stories: 0.5, wiki: 0.5}}
    tokenizer: {{name: bpe, vocab_size: 4096}}
  model: {{name: llama, hidden_size: 128, num_layers: 4, num_heads: 4}}
  optimizer: {{name: adamw, lr: 3e-3, weight_decay: 0.1}}
  schedule: {{name: cosine, warmup: 0.05}}
  tokens: 600_000
  batch_sequences: 32
  sequence_length: 128
sweep:
  pretrain.model:
    grid:
      small: {{name: llama, hidden_size: 128, num_layers: 4, num_heads: 4}}
      large: {{name: llama, hidden_size: 160, num_layers: 4, num_heads: 5}}
{sft}
"""

# Tasks, sizes and hyperparameters are those of search_spaces/text.yaml.
SFT = """\
sft:
  tasks:
    arc_easy: {{form: multiple_choice, train: "${{RAYSWEEP_DATA}}/cms/arc_easy.train.jsonl.gz",
               test: "${{RAYSWEEP_DATA}}/cms/arc_easy.test.jsonl.gz",
               max_train_examples: 400, max_valid_examples: 100, max_test_examples: 300}}
    fairytaleqa: {{form: qa, train: "${{RAYSWEEP_DATA}}/rag/fairytaleqa.train.jsonl.gz",
                  test: "${{RAYSWEEP_DATA}}/rag/fairytaleqa.test.jsonl.gz",
                  max_train_examples: 200, max_valid_examples: 40, max_test_examples: 100, max_new_tokens: 12}}
    webquestions: {{form: qa, train: "${{RAYSWEEP_DATA}}/cbq/webquestions.train.jsonl.gz",
                   test: "${{RAYSWEEP_DATA}}/cbq/webquestions.test.jsonl.gz",
                   max_train_examples: 400, max_valid_examples: 60, max_test_examples: 200, max_new_tokens: 12}}
  seeds: {seeds}
  lrs: [1e-3]
  hyperparameters: {{epochs: 1}}
"""
TASKS = ("arc_easy", "fairytaleqa", "webquestions")
TRL_TASK = "fairytaleqa"
BATCH, LR, TRL_BATCHES, TRL_ROUNDS = 16, 1e-3, 4, 3


class Server:
    """A process of one tree and one interpreter that answers requests, a line of JSON each."""

    def __init__(self, role: str, *, tree: Path, python: str = sys.executable) -> None:
        environment = os.environ | {"PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
        self._process = subprocess.Popen(
            [python, __file__, "--serve", role],
            env=environment,
            text=True,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )

    def ask(self, **request: Any) -> Any:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        for line in self._process.stdout:
            # Other lines are what libraries print.
            if line.startswith("answer "):
                return json.loads(line.removeprefix("answer "))
        raise RuntimeError(f"the process ended; run {__file__} --serve by hand with {request}")

    def close(self) -> None:
        self._process.communicate()


def serve(role: str) -> None:
    """Answer requests until there are no more."""
    answer = {"stages": run_stage, "ours": train_ours, "trl": train_trl}[role]
    for line in sys.stdin:
        print("answer " + json.dumps(answer(**json.loads(line))), flush=True)


def run_stage(sweep: str, point: int, index: int, checkpoint: str, _spaces: dict[str, Any] = {}) -> dict[str, float]:  # noqa: B006
    """Seconds, CPU seconds and metrics of the fine-tuning stage `index` of a point."""
    from raysweep.space import load
    from raysweep.worker import Worker

    space = _spaces.setdefault(sweep, load(sweep))
    stage = sft_stages(space, point)[index]
    with tempfile.TemporaryDirectory() as out:
        began, cpu_began = time.perf_counter(), time.process_time()
        metrics = stage.spec.run({"checkpoint": Path(checkpoint)}, Path(out), Worker())
        spent = {"seconds": time.perf_counter() - began, "cpu_seconds": time.process_time() - cpu_began}
    return {**metrics, **spent}


def sft_stages(space: Any, point: int) -> list[Any]:
    """Of the first pretraining seed, in an order of their own: that of a plan may change."""
    trial = space.trial(list(space.points())[point], space.declared.seeds[0])
    stages = [stage for stage in trial.stages if stage.kind == "sft"]
    return sorted(stages, key=lambda stage: (stage.spec.seed, stage.task))


def tokenized(sweep: str, checkpoint: str) -> list[tuple[list[int], int]]:
    """(token ids, how many are prompt) of `TRL_TASK`'s training examples."""
    from transformers import AutoTokenizer

    from raysweep.space import load
    from raysweep.tasks.rows import ask

    task, tokenizer = load(sweep).declared.sft.tasks[TRL_TASK], AutoTokenizer.from_pretrained(checkpoint)
    examples = task.examples("train")
    prompts, answers = [task.prompt(example) for example in examples], [[task.answer(example)] for example in examples]
    asked = ask(tokenizer, prompts, answers, max_length=512, end=[tokenizer.eos_token_id])
    return [([*each.prompt, *each.answers[0]], len(each.prompt)) for each in asked]


def train_ours(checkpoint: str, rows: list[tuple[list[int], int]]) -> float:
    """Seconds of an epoch, in batches as `Sft` makes them."""
    import numpy as np
    from transformers import AutoModelForCausalLM

    from raysweep.objectives.causal_lm import IGNORED, AnswerLM
    from raysweep.tasks.rows import pad
    from raysweep.train.loop import train
    from raysweep.train.optimizers import AdamW
    from raysweep.train.schedules import Cosine
    from raysweep.worker import Worker

    order = np.random.default_rng(0).permutation(len(rows))

    def batch_at(step: int) -> dict[str, Any]:
        chosen = [rows[row] for row in order[step * BATCH : (step + 1) * BATCH]]
        ids, mask = pad([ids for ids, _ in chosen], value=0)
        prompts = np.array([[num_prompt] for _, num_prompt in chosen])
        is_answer = (mask == 1) & (np.arange(ids.shape[1]) >= prompts)
        return {"input_ids": ids, "labels": np.where(is_answer, ids, IGNORED), "lengths": mask.sum(axis=1)}

    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    began = time.perf_counter()
    train(
        model,
        batch_at,
        objective=AnswerLM(),
        optimizer=AdamW(lr=LR, weight_decay=0.01, betas=(0.9, 0.999)),
        schedule=Cosine(warmup=0.06, final=0.0),
        num_steps=len(rows) // BATCH,
        seed=0,
        worker=Worker(),
    )
    return time.perf_counter() - began


def train_trl(checkpoint: str, rows: list[tuple[list[int], int]], by_length: bool) -> float:
    """The same by TRL: loss on the answers alone, batches padded to their longest row, of like length if `by_length`.

    Its padding-free batches and packing by best fit need FlashAttention, which a CPU has not.
    """
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    data = [{"input_ids": ids, "completion_mask": [0] * num + [1] * (len(ids) - num)} for ids, num in rows]
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    with tempfile.TemporaryDirectory() as folder:
        config = SFTConfig(
            output_dir=folder, per_device_train_batch_size=BATCH, max_steps=len(rows) // BATCH, max_length=512,
            completion_only_loss=True, learning_rate=LR, lr_scheduler_type="cosine", warmup_steps=1, weight_decay=0.01,
            optim="adamw_torch_fused", bf16=False, gradient_checkpointing=False, use_cpu=True, save_strategy="no",
            logging_strategy="no", report_to=[], disable_tqdm=True,
            train_sampling_strategy="group_by_length" if by_length else "random",
        )  # fmt: skip
        model = AutoModelForCausalLM.from_pretrained(checkpoint)
        trainer = SFTTrainer(
            model=model, args=config, train_dataset=Dataset.from_list(data), processing_class=tokenizer
        )
        began = time.perf_counter()
        trainer.train()
        return time.perf_counter() - began


@contextmanager
def worktree(revision: str) -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder) / "before"
        git = ["git", "-C", str(ROOT), "worktree"]
        subprocess.run([*git, "add", "--quiet", "--detach", str(tree), revision], check=True)
        try:
            yield tree
        finally:
            subprocess.run([*git, "remove", "--force", str(tree)], check=True)


def pretrained(store: str, folder: Path) -> list[str]:
    """Folders of the two checkpoints, made if the store lacks them."""
    import raysweep
    from raysweep.store import Store

    path = folder / "pretrain.yaml"
    path.write_text(SWEEP.format(sft=""))
    space = raysweep.load(path)
    results = raysweep.run(space, store=store, runner="inline")
    assert not results.failures, results.failures
    trials = [space.trial(point, space.declared.seeds[0]) for point in space.points()]
    return [str(Path(Store(store).root) / "stages" / trial.stages[-1].id) for trial in trials]


def compare_stages(sweep: str, checkpoints: list[str], before: Path, *, num_seeds: int) -> list[dict[str, Any]]:
    """A row for each stage, run by both trees one after the other, each first every second time."""
    servers = {"before": Server("stages", tree=before), "now": Server("stages", tree=ROOT)}
    rows = []
    try:
        for server in servers.values():
            # Imports and first allocations are not timed.
            server.ask(sweep=sweep, point=0, index=2, checkpoint=checkpoints[0])
        for index in range(len(TASKS) * num_seeds):
            for point, checkpoint in enumerate(checkpoints):
                names = list(servers) if (index + point) % 2 else list(servers)[::-1]
                request = {"sweep": sweep, "point": point, "index": index, "checkpoint": checkpoint}
                row = {name: servers[name].ask(**request) for name in names}
                rows.append({"task": TASKS[index % len(TASKS)], "point": point, **row})
                print(rows[-1]["task"], *(f"{row[name]['seconds']:.1f} s" for name in servers), file=sys.stderr)
    finally:
        for server in servers.values():
            server.close()
    return rows


def stage_table(rows: list[dict[str, Any]]) -> Iterator[str]:
    yield "| stages | before, s (CPU s) | now, s (CPU s) | now / before: of the sums (CPU), median of pairs |"
    yield "| --- | --- | --- | --- |"
    for name in (*TASKS, "all"):
        of = [row for row in rows if name in (row["task"], "all")]
        sums = {
            (side, what): sum(row[side][what] for row in of)
            for side in ("before", "now")
            for what in ("seconds", "cpu_seconds")
        }
        cells = [f"{sums[side, 'seconds']:.1f} ({sums[side, 'cpu_seconds']:.1f})" for side in ("before", "now")]
        ratio = sums["now", "seconds"] / sums["before", "seconds"]
        cpu = sums["now", "cpu_seconds"] / sums["before", "cpu_seconds"]
        median = statistics.median(row["now"]["seconds"] / row["before"]["seconds"] for row in of)
        yield f"| {name}, {len(of)} | {cells[0]} | {cells[1]} | {ratio:.2f} ({cpu:.2f}), {median:.2f} |"


def score_table(rows: list[dict[str, Any]]) -> Iterator[str]:
    yield "| task, model | mean test score before | now | difference, paired over seeds | largest of one seed |"
    yield "| --- | --- | --- | --- | --- |"
    for name in TASKS:
        for point, model in enumerate(("small", "large")):
            pairs = [
                (row["before"]["score"], row["now"]["score"])
                for row in rows
                if row["task"] == name and row["point"] == point
            ]
            gaps = [now - before for before, now in pairs]
            before, now = (statistics.fmean(column) for column in zip(*pairs, strict=True))
            error = statistics.stdev(gaps) / math.sqrt(len(gaps)) if len(gaps) > 1 else math.nan
            largest = max(gaps, key=abs)
            yield (
                f"| {name}, {model} | {before:.4f} | {now:.4f} | {statistics.fmean(gaps):+.4f} ± {error:.4f} "
                f"| {largest:+.4f} |"
            )


def compare_trl(sweep: str, checkpoint: str, python: str) -> Iterator[str]:
    yield f"| training on {TRL_TASK} | tokens/s, ours | TRL | TRL, rows of like length | ours / the better of TRL |"
    yield "| --- | --- | --- | --- | --- |"
    ours, peer = Server("ours", tree=ROOT), Server("trl", tree=ROOT, python=python)
    try:
        rows = tokenized(sweep, checkpoint)[: BATCH * TRL_BATCHES]
        first = {"checkpoint": checkpoint, "rows": rows[:BATCH]}
        ours.ask(**first)
        peer.ask(**first, by_length=False)
        request = {"checkpoint": checkpoint, "rows": rows}
        rounds = [
            (ours.ask(**request), peer.ask(**request, by_length=False), peer.ask(**request, by_length=True))
            for _ in range(TRL_ROUNDS)
        ]
    finally:
        ours.close()
        peer.close()
    num_tokens = sum(len(ids) for ids, _ in rows)
    rates = [num_tokens / statistics.median(column) for column in zip(*rounds, strict=True)]
    ratio = statistics.median(min(plain, grouped) / mine for mine, plain, grouped in rounds)
    cells = " | ".join(f"{rate:,.0f}" for rate in rates)
    yield f"| {TRL_BATCHES} batches of {BATCH}, the small model | {cells} | {ratio:.2f}x (bar 1.1x) |"


def main(arguments: argparse.Namespace) -> Iterable[str]:
    with tempfile.TemporaryDirectory() as folder, worktree(arguments.before) as before:
        checkpoints = pretrained(arguments.store, Path(folder))
        sweep = Path(folder) / "sft.yaml"
        sweep.write_text(SWEEP.format(sft=SFT.format(seeds=list(range(arguments.seeds)))))
        if arguments.trl_python:
            yield from compare_trl(str(sweep), checkpoints[0], arguments.trl_python)
            yield ""
        rows = compare_stages(str(sweep), checkpoints, before, num_seeds=arguments.seeds)
        yield from stage_table(rows)
        yield ""
        yield from score_table(rows)


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--before", default="8662b97", help="revision to compare with")
    parser.add_argument("--store", default="raysweep-store", help="where the pretrained models are kept")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--trl-python", help="interpreter of an environment with TRL")
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    given: Mapping[str, Any] = vars(parsed())
    if given["serve"]:
        serve(given["serve"])
    else:
        for text in main(argparse.Namespace(**given)):
            print(text, flush=True)
