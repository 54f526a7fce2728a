"""One sweep on one machine and over two hosts, on a folder and on an S3 server: are all results equal to the bit?

    python tests/benchmarks/over_hosts.py [--all-stages] [FOLDER]

As root. Hosts are namespaces of this machine: network, processes, shared memory, Ray's files and raysweep's cache are
each host's own. On the folder all hosts see one; on S3 they share nothing else, and one is killed as a trajectory is
under way: in its place comes a third. The sweep is the quickstart with shorter training and, without `--all-stages`,
with fewer variants, tasks and rates. Prints a Markdown table.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path

from s3fs import S3FileSystem

sys.path.insert(0, str(Path(__file__).parents[1]))

from nodes import RUN, Nodes, events_in, finish, nodes, results_in, wait_for

QUICKSTART = Path(__file__).parents[2] / "search_spaces/quickstart.yaml"
SHORTER = {
    "num_train_sentences: 40000": "num_train_sentences: 4000",
    "num_valid_sentences: 1000": "num_valid_sentences: 200",
    "steps: 600": "steps: 60",
    "checkpoints: [300, 600]": "checkpoints: [30, 60]",
    "flatness: {batch_sequences: 8}": "flatness: {num_sequences: 32, batch_sequences: 8, min_units: 4, max_units: 8}",
    "num_train: 600, num_valid: 300, num_test: 600": "num_train: 64, num_valid: 50, num_test: 50",
    "epochs: 6": "epochs: 1",
}
FEWER = {
    "grid: [1, 3]": "grid: [1]",
    "adamw-hot: {name: adamw, lr: 1e-2, weight_decay: 0.1}": "",
    "    span-8: {form: pcfg_span, span: 8, num_train: 64, num_valid: 50, num_test: 50}\n": "",
    "seeds: [0, 1]": "seeds: [0]",
    "lrs: [7e-4, 5e-3, 2e-2]": "lrs: [5e-3, 2e-2]",
}


def main() -> None:
    """Runs, and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path)
    parser.add_argument("--all-stages", action="store_true", help="of the quickstart, not two variants of it")
    given = parser.parse_args()
    home = given.folder or Path(tempfile.mkdtemp())
    home.mkdir(exist_ok=True)
    text = QUICKSTART.read_text()
    for old, new in (SHORTER | ({} if given.all_stages else FEWER)).items():
        assert old in text, old
        text = text.replace(old, new)
    sweep = home / "quickstart.yaml"
    sweep.write_text(text)
    began = time.perf_counter()
    alone = str(home / "alone")
    subprocess.run(
        [sys.executable, "-W", "ignore", "-c", RUN, str(sweep), alone, str(home / "alone.jsonl")],
        check=True,
        stderr=subprocess.DEVNULL,
    )
    wanted = results_in(alone)
    print("| gangs of 2 | store | seconds | stages | that differ |\n| --- | --- | --- | --- | --- |")
    print(f"| on one machine | folder | {time.perf_counter() - began:.0f} | {len(wanted)} | - |", flush=True)
    for where, num_cpus in (("over two hosts", 1), ("inside each of two hosts", 2)):
        (home / where).mkdir()
        with nodes(home / where) as cluster:
            server = cluster.server
            os.environ.update(server.env)
            S3FileSystem.clear_instance_cache()  # The one before was at another address.
            _, last = [cluster.add(num_cpus=num_cpus)[1] for _ in range(2)]
            run = partial(_compare, cluster, sweep, wanted)
            run(where, "S3", server.store(where.split()[0]))
            if num_cpus == 1:
                run(f"{where}, one of them lost", "S3", server.store("lost"), lost=last)
            run(where, "folder", str(home / where / "store"))


def _compare(
    cluster: Nodes,
    sweep: Path,
    wanted: Mapping[str, object],
    where: str,
    kind: str,
    store: str,
    *,
    lost: subprocess.Popen[bytes] | None = None,
) -> None:
    """One row; `lost`: a node whose host goes when a first checkpoint is there, before another one comes."""
    began, path = time.perf_counter(), cluster.home / f"{store.split('/')[2]}.jsonl"
    driver = cluster.start(sweep, store, path)
    if lost:
        trial = wait_for(path, driver, "finished", kind="pretrain", step=30)["trial"]
        before, killed_at = len(events_in(path)), time.time()
        cluster.cluster.lose(lost)
        cluster.add(num_cpus=1)
    finish(driver)
    seconds = time.perf_counter() - began
    events = events_in(path)
    assert not [event for event in events if event["event"] == "failed" and not event["retry"]]
    if lost:
        after = [event for event in events[before:] if event.get("trial") == trial]
        again = next(event["time"] for event in after if event["event"] == "found")
        progress = [event for event in after if event["event"] == "progress" and event["kind"] == "pretrain"]
        steps = [event["at"]["step"] for event in progress]
        where = f"{where}; at work again after {again - killed_at:.0f} s, from step {min(steps) - 10}"
    found = results_in(store)
    differing = [stage for stage in wanted.keys() | found.keys() if found.get(stage) != wanted.get(stage)]
    print(f"| {where} | {kind} | {seconds:.0f} | {len(found)} | {len(differing)} |", flush=True)


if __name__ == "__main__":
    main()
