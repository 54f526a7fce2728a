"""One sweep on one machine and over two hosts, on a folder and on an S3 server: are all results equal to the bit?

    python tests/benchmarks/over_hosts.py [FOLDER]

As root. Hosts are namespaces of this machine: network, processes, shared memory, Ray's files and raysweep's cache are
each host's own. On the folder all hosts see one; on S3 they share nothing else. Prints a Markdown table.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from nodes import Nodes, events_in, finish, nodes, results_in
from s3_server import Server

QUICKSTART = Path(__file__).parents[2] / "search_spaces/quickstart.yaml"
SHORTER = {
    "num_train_sentences: 40000": "num_train_sentences: 4000",
    "num_valid_sentences: 1000": "num_valid_sentences: 200",
    "steps: 600": "steps: 60",
    "checkpoints: [300, 600]": "checkpoints: [30, 60]",
    "grid: [1, 3]": "grid: [1]",
    "adamw-hot: {name: adamw, lr: 1e-2, weight_decay: 0.1}": "",
    "flatness: {batch_sequences: 8}": "flatness: {num_sequences: 32, batch_sequences: 8, min_units: 4, max_units: 8}",
    "num_train: 600, num_valid: 300, num_test: 600": "num_train: 64, num_valid: 50, num_test: 50",
    "seeds: [0, 1]": "seeds: [0]",
    "epochs: 6": "epochs: 1",
}


def main() -> None:
    """Runs, and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path)
    home = parser.parse_args().folder or Path(tempfile.mkdtemp())
    text = QUICKSTART.read_text()
    for old, new in SHORTER.items():
        assert old in text, old
        text = text.replace(old, new)
    sweep = home / "quickstart.yaml"
    sweep.write_text(text)
    began = time.perf_counter()
    alone = str(home / "alone")
    subprocess.run([sys.executable, "-m", "raysweep", "run", str(sweep), "--store", alone, "--name", "run"], check=True)
    wanted = results_in(alone)
    print("| gangs of 2 | store | seconds | stages | that differ |\n| --- | --- | --- | --- | --- |")
    print(f"| on one machine | folder | {time.perf_counter() - began:.0f} | {len(wanted)} | - |", flush=True)
    for where, num_cpus in (("inside each of two hosts", 2), ("over two hosts", 1)):
        (home / where).mkdir()
        with nodes(home / where) as cluster:
            server = Server(cluster.network.ip)
            cluster.env = dict(server.env)
            os.environ.update(server.env)
            for _ in range(2):
                cluster.add(num_cpus=num_cpus)
            for kind, store in (("folder", str(home / where / "store")), ("S3", server.store(where.split()[0]))):
                _compare(cluster, sweep, where, kind, store, wanted)
            server.stop()


def _compare(cluster: Nodes, sweep: Path, where: str, kind: str, store: str, wanted: dict[str, object]) -> None:
    began, events = time.perf_counter(), cluster.home / f"{kind}.jsonl"
    finish(cluster.start(sweep, store, events))
    seconds = time.perf_counter() - began
    failed = [event for event in events_in(events) if event["event"] == "failed"]
    assert not failed, failed
    found = results_in(store)
    differing = [stage for stage in wanted.keys() | found.keys() if found.get(stage) != wanted.get(stage)]
    print(f"| {where} | {kind} | {seconds:.0f} | {len(found)} | {len(differing)} |", flush=True)


if __name__ == "__main__":
    main()
