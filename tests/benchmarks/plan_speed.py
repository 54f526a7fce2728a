"""(d) Seconds to plan 100,000 stages: the bar is under 10."""

from __future__ import annotations

import statistics
import tempfile
import time
from pathlib import Path

from raysweep.estimates import estimate
from raysweep.space import load
from raysweep.store import Store

SWEEP = """\
name: many
pretrain:
  data: {name: pcfg}
  model: {name: llama}
  optimizer: {name: adamw, lr: 1e-3}
  steps: 1000
  batch_sequences: 32
  sequence_length: 33
  checkpoints: [250, 500, 750, 1000]
sweep:
  pretrain.optimizer.lr: {uniform: [1e-4, 1e-2]}
search: {name: random, num_trials: 1000}
flatness: {}
indicators: {}
sft:
  tasks: {a: {form: pcfg_span, span: 8}, b: {form: pcfg_span, span: 16}}
  seeds: [0, 1]
  lrs: [1e-4, 3e-4, 1e-3, 3e-3, 1e-2]
"""


def main() -> list[tuple[str, str]]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "many.yaml"
        path.write_text(SWEEP)
        seconds = []
        for _ in range(3):
            began = time.perf_counter()
            plan = estimate(load(path), Store(folder), mfu=0.4, peak_flops=1e15)
            seconds.append(time.perf_counter() - began)
    num = sum(plan.stages.values())
    per = statistics.median(seconds) / num * 100_000
    return [(f"(d) plan of {num:,} stages", f"{statistics.median(seconds):.2f} s, so {per:.2f} s for 100,000 (bar 10)")]


if __name__ == "__main__":
    print(main())
