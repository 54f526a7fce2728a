"""Bar 4: a flatness stage on one worker and on two, with a thread each; the same units to the bit."""

from __future__ import annotations

import json
import os
import socket
import statistics
import tempfile
import time
from pathlib import Path

import torch.multiprocessing as mp
from subjects import LENGTH, STORE, trained

from raysweep.resources import Resources
from raysweep.runners.processes import join_process_group, leave_process_group, make_worker
from raysweep.stages.flatness import Flatness

ROUNDS = 3
MEASURED = {"mix": {"wiki": 0.5, "news": 0.5}, "sequence_length": LENGTH, "num_sequences": 1024}
WARM = Flatness(min_units=2, max_units=6, rse=1.0, **MEASURED)
STAGE = Flatness(rse=0.012, **MEASURED)


def rank_main(rank: int, world_size: int, port: int, checkpoint: str, tokens: str, out: str) -> None:
    os.environ["OMP_NUM_THREADS"] = "1"
    resources = Resources(workers=world_size)
    worker = make_worker(resources, rank=rank, world_size=world_size)
    join_process_group(worker, resources, "127.0.0.1", port)
    inputs = {"checkpoint": Path(checkpoint), "tokens": Path(tokens)}
    WARM.run(inputs, Path(out), worker)
    began = time.perf_counter()
    metrics = STAGE.run(inputs, Path(out), worker)
    if rank == 0:
        found = {"seconds": time.perf_counter() - began, "metrics": metrics}
        (Path(out) / "found.json").write_text(json.dumps(found))
    leave_process_group()


def once(world_size: int, checkpoint: Path, tokens: Path) -> tuple[float, str]:
    with tempfile.TemporaryDirectory() as out, socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
        probe.close()
        mp.spawn(rank_main, (world_size, port, str(checkpoint), str(tokens), out), nprocs=world_size)
        found = json.loads((Path(out) / "found.json").read_text())
        return found["seconds"], (Path(out) / "units.jsonl").read_text()


def main() -> list[tuple[str, str]]:
    checkpoint = trained()
    tokens = next((Path(STORE) / "stages").glob("tokenize-*"))
    pairs = [(once(1, checkpoint, tokens), once(2, checkpoint, tokens)) for _ in range(ROUNDS)]
    same = len({units for pair in pairs for _, units in pair}) == 1
    one, two = (statistics.median(pair[index][0] for pair in pairs) for index in (0, 1))
    faster = statistics.median(left[0] / right[0] for left, right in pairs)
    units = pairs[0][0][1].count("\n")
    what = f"(4) flatness stage of {units} units on 1 / 2 workers, a thread each, model loading included"
    return [(what, f"{one:.1f} s / {two:.1f} s: {faster:.2f}x; units {'identical' if same else 'DIFFER'} (bar 1.8x)")]


if __name__ == "__main__":
    for row in main():
        print(*row, sep=": ")
