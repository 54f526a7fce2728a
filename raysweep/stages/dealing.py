"""Work of a stage dealt over the ranks of a gang, what is finished saved piece by piece."""

from __future__ import annotations

import json
import math
import re
import time
import uuid
from collections.abc import Callable, Sequence
from typing import Any

from raysweep.curvature.dealing import Deal, Item, Value
from raysweep.worker import Reached, StateDir, Worker

# So much work is lost at most where finished work is sent to a store that no other host sees.
SEND_EVERY_SECONDS = 10.0


class RankDeal:
    """Work dealt over the ranks of a gang; each rank appends what it has finished to a file of its own.

    What earlier attempts have saved under the same name is not done again. With `together`, which runs a piece on all
    ranks at once, nothing is dealt.
    """

    def __init__(self, worker: Worker, name: str, together: Deal | None = None) -> None:
        self._worker = worker
        self._name = name
        self._together = together
        self._num = 0
        self._file = f"{name}-{worker.rank}-{uuid.uuid4().hex[:12]}.jsonl"
        self._sent_at = -math.inf
        saved = _read(worker.state_dir, name) if worker.rank == 0 and worker.state_dir else {}
        # Rank 0's reading is everyone's: what is saved must not differ between those who deal by it.
        self._saved: dict[str, Any] = worker.gather(saved)[0]

    def __call__(self, items: Sequence[Item], run: Callable[[Item], Value]) -> list[Value]:
        """What `run` gives for each item, in order, whoever ran it; see `curvature.dealing.Deal`."""
        worker = self._worker
        # In the same order on every rank, so that each knows without a word which are its own.
        missing = [item for item in items if str(item) not in self._saved]
        mine = missing if self._together else missing[worker.rank :: worker.world_size]
        outcomes: dict[str, Any] = {}
        for item in mine:
            outcomes[str(item)] = self._together([item], run)[0] if self._together else run(item)
            if not self._together or worker.rank == 0:
                self._save(str(item), outcomes[str(item)])
            self._num += 1
            worker.report(Reached(self._num * (1 if self._together else worker.world_size)))
        for part in worker.gather(outcomes):
            self._saved |= part
        return [self._saved[str(item)] for item in items]

    def _save(self, item: str, value: Any) -> None:
        if (states := self._worker.state_dir) is not None:
            states.path.mkdir(parents=True, exist_ok=True)
            with (states.path / self._file).open("a") as file:
                file.write(json.dumps({"item": item, "value": value}) + "\n")
            if time.monotonic() - self._sent_at > SEND_EVERY_SECONDS:
                states.send(self._file)
                self._sent_at = time.monotonic()


def _read(states: StateDir, name: str) -> dict[str, Any]:
    """What earlier attempts have saved; a line that was cut off is left out."""
    outcomes: dict[str, Any] = {}
    for file in sorted(states.names()):
        if not re.fullmatch(rf"{re.escape(name)}-\d+-[0-9a-f]+\.jsonl", file):
            continue
        for line in states.read(file).splitlines():
            try:
                entry = json.loads(line)
            except ValueError:
                continue
            outcomes[entry["item"]] = entry["value"]
    return outcomes
