"""Linear probes of the indicator study's checkpoints on two classification tasks, beside the study's targets.

    python tests/benchmarks/study_probes.py                  # from the table in tests/data
    python tests/benchmarks/study_probes.py --store STORE    # measured on the study's checkpoints, and written there

The study's own tasks have no classes. These are the topic of a trivia question (12 classes) and the kind of a question
on a fairy tale (7).
"""

from __future__ import annotations

import argparse
import gzip
import os
import sys
import tempfile
import time
from itertools import islice
from pathlib import Path

import pandas as pd

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.indicators import DATA, KNOWN, TARGETS, read, read_noise, signed, wrong

from raysweep.analysis.ranking import rank
from raysweep.scores import Column
from raysweep.spec import Metric
from raysweep.stages.probes import Probes
from raysweep.tasks.classification import Classification
from raysweep.worker import Worker

TABLE = DATA / "indicators_cpu_probes.parquet"
TASKS = ("trivia_topic", "fairytale_qtype")
NUM_LINES = 1500


def measure(store: Path, folder: Path) -> None:
    """Accuracies of each checkpoint of the study, of 64 and 500 labels and five draws each.

    Args:
        store: of the study's run.
        folder: an empty one, for the first lines of the training files: probes read all of them.
    """
    data, rows, tasks = Path(os.environ["RAYSWEEP_DATA"]) / "cls", [], {}
    for name in TASKS:
        with gzip.open(data / f"{name}.train.jsonl.gz", "rt") as lines:
            (folder / f"{name}.jsonl").write_text("".join(islice(lines, NUM_LINES)))
        files = {"train": f"{name}.jsonl", "test": str(data / f"{name}.test.jsonl.gz")}
        task = Classification(form="classification", **files, valid_fraction=0.25, max_valid_examples=400)
        tasks[name] = task.pin(folder)
    probes = Probes(num_labels=(64, 500), tasks=tasks)
    start = time.process_time()
    for checkpoint in read()[0]["checkpoint"]:
        found = probes.run({"checkpoint": store / "stages" / checkpoint}, folder, Worker())
        rows.append({"checkpoint": checkpoint} | {f"probes/{name}": value for name, value in found.items()})
        print(rows[-1], f"{time.process_time() - start:.0f} s", flush=True)
    pd.DataFrame(rows).to_parquet(TABLE, index=False, compression="zstd")


def show() -> None:
    """Errors, as those of the study's indicators."""
    own = pd.read_parquet(TABLE)
    names = [name for name in own if name != "checkpoint" and "_draw_" not in name and not name.endswith("_stderr")]
    table, columns = read()
    others = {each.name for each in columns if each.name not in KNOWN and each.kind != "sft"}
    table = table.drop(columns=[name for name in table if name in others])
    table = table.merge(own, on="checkpoint", validate="one_to_one")
    columns = (*columns, *(Column("", Metric(name, "max")) for name in names))
    rankings = [rank(table, columns=columns, target=target, noise=read_noise()) for target in TARGETS]
    by_name = [{item.indicator: item for item in each.associations} for each in rankings]
    for name in names:
        cells = [wrong(each[name].accuracy) for each in by_name]
        values = f"{table[name].mean():.3f} ({table[name].std():.3f})"
        print(f"| {name} | {values} | {' | '.join(cells)} | {signed(by_name[0][name].added)} |")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--store", type=Path)
    if (given := parser.parse_args().store) is not None:
        with tempfile.TemporaryDirectory() as folder:
            measure(given, Path(folder))
    show()
