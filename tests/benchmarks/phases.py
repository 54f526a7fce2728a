"""One trunk and eight decays of a tenth of it, in one sweep of two gangs: steps computed, and what gangs wait.

    python tests/benchmarks/phases.py [--steps 6000] [--at-once]

A gang is held from a trial's first event to its last; it is idle while none of the trial's stages is being made.
With --at-once trials are handed out as soon as a gang is free, and wait in it for a trunk that another one makes.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections import defaultdict
from pathlib import Path

from raysweep.events import Event, StageEnded, StageProgress, TrialStarted
from raysweep.runners import run_sweep
from raysweep.runners.queue import Beginnings
from raysweep.space import load
from raysweep.store import Store
from raysweep.worker import Reached

SWEEP = """\
name: decays
pretrain:
  data: {{name: pcfg, vocabulary: 64, num_nonterminals: 12, num_rules: 3, num_words: 4, sentence_length: 16,
         num_train_sentences: 40000, num_valid_sentences: 200}}
  model: {{name: llama, hidden_size: 64, num_layers: 2, num_heads: 2}}
  optimizer: {{name: adamw, lr: 3e-3}}
  schedule: {{name: constant}}
  batch_sequences: 32
  sequence_length: 17
  phases:
    - {{name: trunk, steps: {trunk}}}
    - {{name: decay, steps: {decay}, schedule: {{name: wsd, decay: 1.0}}}}
sweep:
  pretrain.phases.decay.optimizer.lr: {{grid: [3e-3, 2.5e-3, 2e-3, 1.5e-3, 1e-3, 7e-4, 5e-4, 3e-4]}}
resources: {{workers: 1, cpus_per_worker: 1, max_concurrent: 2}}
"""
TOKENS_OF_A_STEP = 32 * 17


class Clock:
    """The events of a run, with their times."""

    def __init__(self) -> None:
        self.times: dict[str, list[float]] = defaultdict(list)
        self.worked: dict[str, float] = defaultdict(float)
        self.tokens: dict[str, int] = {}

    def __call__(self, event: Event) -> None:
        is_start = isinstance(event, TrialStarted)
        trial = event.row.trial if is_start else getattr(event, "trial", "")
        if not is_start or trial not in self.times:  # A gang that never came to it may have told it, too.
            self.times[trial].append(time.monotonic())
        match event:
            case StageEnded(event="finished"):
                self.worked[event.stage] = event.wall_seconds  # Told by all that have waited for it, too.
            case StageProgress(at=Reached(num_tokens=int(num_tokens))):
                self.tokens[event.stage] = num_tokens


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=6000, help="of the trunk")
    parser.add_argument("--at-once", action="store_true", help="hand trials out whatever others are making")
    given = parser.parse_args()
    if given.at_once:
        Beginnings.first_ready = lambda self, trials: next(iter(trials), None)
    trunk, decay = given.steps, given.steps // 10
    with tempfile.TemporaryDirectory() as folder:
        sweep = Path(folder) / "decays.yaml"
        sweep.write_text(SWEEP.format(trunk=trunk, decay=decay))
        clock, began = Clock(), time.monotonic()
        run = run_sweep(load(sweep), Store(Path(folder) / "store"), show=clock)
        assert not run.failures(), run.failures()
    steps, least = sum(clock.tokens.values()) / TOKENS_OF_A_STEP, trunk + 8 * decay
    held = {trial: times[-1] - times[0] for trial, times in clock.times.items() if trial}
    idle = sum(held.values()) - sum(clock.worked.values())
    print(f"steps computed  {steps:,.0f}: {steps / least:.3f} of trunk + 8 decays, {least:,}")
    print(f"gangs held      {sum(held.values()):.1f} s in {len(held)} trials, {time.monotonic() - began:.1f} s in all")
    print(f"of it idle      {idle:.1f} s")


if __name__ == "__main__":
    main()
