"""Few-shot likelihoods on RAG with a solved example really there, of the indicator study's checkpoints.

    python tests/benchmarks/rag_shots.py                  # from the table in tests/data
    python tests/benchmarks/rag_shots.py --store STORE    # measured on the study's checkpoints, and written there

The study's `max_length` cut all solved examples off. Here prompts are whole, with none and one: up to 1,712 tokens,
where pretraining's rows had 128. Two would not fit into the models' 2,048 positions.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from statistics import fmean

import pandas as pd

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.indicators import DATA, KNOWN, TARGETS, read, read_noise, signed, wrong

from raysweep.analysis.ranking import rank
from raysweep.data.tokenizers import load_tokenizer
from raysweep.scores import Column
from raysweep.spec import Metric
from raysweep.tasks.qa import QA
from raysweep.train.checkpoints import load_model

TABLE = DATA / "indicators_cpu_rag_shots.parquet"
TASKS = ("fairytaleqa", "webq_retrieved")
SHOTS = (0, 1)
MAX_LENGTH = 2048


def measure(store: Path) -> None:
    """Mean log-likelihood of right answers of 40 examples, in nats a token, of each checkpoint of the study."""
    data, rows = Path(os.environ["RAYSWEEP_DATA"]) / "rag", []
    tasks = {
        name: QA(
            form="qa", train=str(data / f"{name}.train.jsonl.gz"), test=str(data / f"{name}.test.jsonl.gz"),
            max_train_examples=80, max_valid_examples=40, max_test_examples=80, max_new_tokens=6, max_length=MAX_LENGTH,
        )
        for name in TASKS
    }  # fmt: skip
    for checkpoint in read()[0]["checkpoint"]:
        place = store / "stages" / checkpoint
        model, tokenizer, row = load_model(place).eval(), load_tokenizer(place), {"checkpoint": checkpoint}
        for name, task in tasks.items():
            for num in SHOTS:
                guesses = task.score_untrained(model, tokenizer, num_shots=num, max_examples=40)
                assert not any(guess.is_cut for guess in guesses)
                row[f"{name}, {num} solved"] = fmean(guess.log_likelihood for guess in guesses)
        rows.append(row)
        print(row, flush=True)
    pd.DataFrame(rows).to_parquet(TABLE, index=False, compression="zstd")


def show() -> None:
    """Errors, as those of the study's indicators; beside them those of prompts that were cut."""
    own = pd.read_parquet(TABLE)
    for num in SHOTS:
        own[f"both, {num} solved"] = own[[f"{name}, {num} solved" for name in TASKS]].mean(axis=1)
    names = [name for name in own if name != "checkpoint"]
    table, columns = read()
    cut = [f"indicators/{name}/zeroshot_log_likelihood" for name in (*TASKS, "rag")]
    others = {each.name for each in columns if each.name not in {*KNOWN, *cut} and each.kind != "sft"}
    table = table.drop(columns=[name for name in table if name in others])
    table = table.merge(own, on="checkpoint", validate="one_to_one")
    columns = (*columns, *(Column("", Metric(name, "max")) for name in names))
    rankings = [rank(table, columns=columns, target=target, noise=read_noise()) for target in TARGETS]
    by_name = [{item.indicator: item for item in each.associations} for each in rankings]
    for name in (*names, *cut):
        cells = [wrong(each[name].accuracy) for each in by_name]
        print(f"| {name} | {table[name].mean():.2f} | {' | '.join(cells)} | {signed(by_name[0][name].added)} |")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--store", type=Path)
    if (given := parser.parse_args().store) is not None:
        measure(given)
    show()
