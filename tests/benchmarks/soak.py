"""A sweep of 200 stages whose processes are killed and stopped at random, until it is done: are its results the same?

    python tests/benchmarks/soak.py --seed 0 [--variants 14] [--folder DIR]

Real Ray, gangs of two workers on two processors. 3 to 25 seconds after stages are being made again, one process of the
run is picked: the driver, rank 0 of a gang or its other rank, each killed (SIGKILL) or stopped (SIGSTOP; the driver is
woken after five seconds, a rank never). A driver that was killed is started again by the same command. At the end
metrics, ranking and SHA-256 of every file of every stage are compared with those of a run that nothing happened to; it
is made first, in `DIR/whole`, and kept there for other seeds.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from processes import OTHER_RANK, RANK_0, gang_workers, title
from tiny import TINY

from raysweep.results import Results
from raysweep.runs import Run
from raysweep.store import Store

SWEEP = TINY.replace("steps: 12", "steps: 240").replace("checkpoints: [6, 12]", "checkpoints: [120, 240]")
# A trial is given up after so many gangs; here they are killed on purpose.
SWEEP += "resources: {workers: 2, zero_stage: 2, max_retries: 100, max_silence_seconds: 10}\n"

FAULTS = {
    ("driver", "killed"): 2,
    ("rank 0", "killed"): 3,
    ("rank 1", "killed"): 3,
    ("rank 0", "stopped"): 1,
    ("rank 1", "stopped"): 1,
    ("driver", "stopped 5 s"): 1,
}
"""Victim and what is done to it -> how often, relative to the others."""

MAX_SECONDS = 1200.0

# A process of a gang that was being replaced has nobody to miss it.
LOST_ON_NOBODY_SECONDS = 90.0


@dataclass
class Injected:
    """A fault, and what came of it; times by `time.time`."""

    fault: tuple[str, str]
    at: float
    noticed: float | None = None
    """When the driver said so; of a driver that was killed there is nobody to notice."""
    going_on: float | None = None
    """When a stage was begun again, or finished."""
    lost_seconds: float = 0.0
    """Since what was being made was begun or last saved: what has to be made again, at most."""


@dataclass
class Soak:
    """The run of one seed in `folder`."""

    folder: Path
    seed: int
    num_variants: int
    injected: list[Injected] = field(default_factory=list)
    num_drivers: int = 0

    def run(self) -> Run:
        """Until the sweep is done."""
        draws = random.Random(self.seed)
        deadline = time.monotonic() + MAX_SECONDS
        driver = self._start()
        next_at = math.inf
        while (code := driver.poll()) is None or code != 0:
            assert time.monotonic() < deadline, f"not done in {MAX_SECONDS:g} s: {self._log.read_text()[-3000:]}"
            if code is not None:
                assert code == -signal.SIGKILL, self._log.read_text()[-3000:]
                driver = self._start()
            self._look()
            if next_at == math.inf and self._goes_on():
                next_at = time.monotonic() + draws.uniform(3, 25)
            if time.monotonic() > next_at:
                self._inject(draws, driver)
                next_at = math.inf
            time.sleep(0.1)
        self._look()
        [run] = Run.all(Store(self.folder / "store"))
        return run

    @property
    def _log(self) -> Path:
        return self.folder / "stderr"

    def _start(self) -> subprocess.Popen[bytes]:
        self.num_drivers += 1
        return start(self.folder, self._log, self.num_variants)

    def _inject(self, draws: random.Random, driver: subprocess.Popen[bytes]) -> None:
        victims = {"driver": [driver.pid]}
        # The newest: those of gangs that were replaced may take a moment to go.
        victims |= {
            "rank 0": gang_workers(driver.pid, RANK_0)[-1:],
            "rank 1": gang_workers(driver.pid, OTHER_RANK)[-1:],
        }
        faults = [fault for fault in FAULTS if victims[fault[0]]]
        [fault] = draws.choices(faults, [FAULTS[each] for each in faults])
        [victim] = victims[fault[0]]
        self._said = len(self._log.read_bytes())
        self.injected.append(Injected(fault, time.time(), lost_seconds=self._unsaved_seconds()))
        self._last_event = self._num_events()
        if not title(victim):
            return
        os.kill(victim, signal.SIGKILL if fault[1] == "killed" else signal.SIGSTOP)
        if fault[1] == "stopped 5 s":
            time.sleep(5)
            os.kill(victim, signal.SIGCONT)
        if fault == ("driver", "killed"):
            driver.wait()

    def _look(self) -> None:
        """See what the run says of the last fault."""
        if not self.injected:
            return
        last = self.injected[-1]
        if last.noticed is None and last.fault[0] != "driver":
            news = self._log.read_bytes()[self._said :].decode(errors="replace")
            if any(words in news for words in ("gave no sign of life", "goes on in another gang", "failed")):
                last.noticed = time.time()
        if last.going_on is None:
            new = self._events()[self._last_event :]
            times = [event["time"] for event in new if event["event"] in ("started", "finished")]
            times = [when for when in times if when > (last.noticed or last.at)]
            if times and (last.noticed or last.fault[0] == "driver"):
                last.going_on = times[0]

    def _goes_on(self) -> bool:
        """Whether a stage has been begun, or finished, since the last fault; or that hit nobody."""
        if not self.injected:
            return self._num_events() > 0
        return self.injected[-1].going_on is not None or time.time() - self.injected[-1].at > LOST_ON_NOBODY_SECONDS

    def _unsaved_seconds(self) -> float:
        """Of the stages that are being made now, the longest time since one was begun or saved."""
        since: dict[str, float] = {}
        for event in self._events():
            if event["event"] == "started" or "saved_step" in event:
                since[event["stage"]] = event["time"]
            elif event["event"] in ("finished", "found", "failed"):
                since.pop(event["stage"], None)
        begun = max((each.going_on or each.at for each in self.injected), default=0.0)
        return max((time.time() - max(when, begun) for when in since.values()), default=0.0)

    def _events(self) -> list[dict]:
        runs = list(self.folder.glob("store/runs/*/events.jsonl"))
        lines = runs[0].read_text().splitlines() if runs else []
        return [json.loads(line) for line in lines if line.endswith("}")]

    def _num_events(self) -> int:
        return len(self._events())


def start(folder: Path, log: Path, num_variants: int) -> subprocess.Popen[bytes]:
    """The sweep, as a user starts it: 14 stages a variant, and the tokens."""
    folder.mkdir(exist_ok=True)
    lrs = [round(1e-2 * 0.8**index, 6) for index in range(num_variants)]
    (folder / "soak.yaml").write_text(SWEEP.replace("grid: [1e-2, 3e-3]", f"grid: {lrs}"))
    command = [sys.executable, "-m", "raysweep", "run", str(folder / "soak.yaml"), "--store", str(folder / "store")]
    with log.open("ab") as words:
        return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=words, start_new_session=True)


def tables(run: Run) -> dict[str, object]:
    """All that must not depend on how a run went: of each stage metrics and files, as recorded and as on the disk."""
    found: dict[str, object] = {
        "ranking": json.dumps(Results(run).ranking.to_dict(), default=str).replace(str(run.store.root), "")
    }
    for stage_id in sorted({stage.id for trial in run.trials() for stage in trial.stages}):
        record = run.store.get(stage_id)
        assert record is not None, f"{stage_id} is not finished"
        folder = run.store.root / "stages" / stage_id
        hashes = {
            str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
            for path in sorted(folder.rglob("*"))
            if path.is_file() and path.name != "record.json"  # It says when and where a stage was made.
        }
        recorded = {name: entry["sha256"] for name, entry in record.files.items()}
        found[stage_id] = (dict(record.metrics), recorded, hashes)
    return found


def main() -> None:
    """Print the table of one seed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--variants", type=int, default=14)
    parser.add_argument("--folder", type=Path, default=None)
    args = parser.parse_args()
    folder = args.folder or Path(tempfile.mkdtemp(prefix="soak-"))
    folder.mkdir(exist_ok=True)
    began = time.monotonic()
    whole = start(folder / "whole", folder / "whole.stderr", args.variants)
    assert whole.wait() == 0, (folder / "whole.stderr").read_text()[-3000:]
    [undisturbed] = Run.all(Store(folder / "whole" / "store"))
    want, whole_seconds = tables(undisturbed), time.monotonic() - began
    soak, began = Soak(folder / f"seed-{args.seed}", args.seed, args.variants), time.monotonic()
    found = tables(soak.run())
    seconds = time.monotonic() - began
    differing = [name for name in want.keys() | found.keys() if want.get(name) != found.get(name)]
    finished = [event["stage"] for event in soak._events() if event["event"] == "finished"]
    print(
        f"seed {args.seed}: {len(want) - 1} stages in {seconds:.0f} s (undisturbed, or found: {whole_seconds:.0f} s); "
    )
    print(f"{len(soak.injected)} faults, {soak.num_drivers} drivers; differ: {len(differing)} {differing[:5]}")
    print(f"stages made more than once: {len(finished) - len(set(finished))}")
    print("| injected | times | went on | noticed after, s: median (most) | going on after, s | work lost, s |")
    print("| --- | --- | --- | --- | --- | --- |")
    for fault in FAULTS:
        each = [one for one in soak.injected if one.fault == fault]
        noticed = [one.noticed - one.at for one in each if one.noticed]
        went_on = [one.going_on - one.at for one in each if one.going_on]
        lost = [one.lost_seconds for one in each]
        row = [" ".join(fault), str(len(each)), str(len(went_on)), *map(_spread, (noticed, went_on, lost))]
        print(f"| {' | '.join(row)} |")


def _spread(values: list[float]) -> str:
    return f"{statistics.median(values):.1f} ({max(values):.1f})" if values else "-"


if __name__ == "__main__":
    main()
