"""The peers' traces of a trained model, in a process of their own: with no setting that ours makes for itself."""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from curvlinops import hutchinson_trace, hutchpp_trace, xtrace
from peers import Curvlinops, PyHessian, with_forward_mode
from transformers import AutoModelForCausalLM

from raysweep.allocator import keep_freed_memory

Tensor = torch.Tensor


@dataclass(frozen=True)
class Outcome:
    """A trace, the probes it took and the seconds."""

    trace: float
    num_probes: int
    seconds: float


class PeerProcess:
    """Makes traces in its process, one at a time.

    Args:
        checkpoint: the model's.
        keeps_freed_memory: lend it what `prepare` does for ours; see `raysweep.allocator`.
    """

    def __init__(self, checkpoint: Path, *, keeps_freed_memory: bool) -> None:
        self._pool = ProcessPoolExecutor(
            1, multiprocessing.get_context("spawn"), initializer=_begin, initargs=(checkpoint, keeps_freed_memory)
        )

    def trace(self, peer: str, ids: Tensor, num_probes: int | None, *, seed: int) -> Outcome:
        """By one of PEERS, of the mean token loss of one batch [n, L]; with None probes by its own rule."""
        return self._pool.submit(_trace, peer, ids, num_probes, seed).result()


def _pyhessian(ids: Tensor, num_probes: int | None) -> tuple[float, int]:
    peer = PyHessian(_models["plain"], ids)
    found = peer.trace(num_probes)
    peer.close()
    return found


def _curvlinops(estimator: Callable[[Curvlinops, int], Tensor]) -> Callable[[Tensor, int], tuple[float, int]]:
    def trace(ids: Tensor, num_probes: int) -> tuple[float, int]:
        return float(estimator(Curvlinops(_models["composed"], [ids]), num_probes)), num_probes

    return trace


PEERS: dict[str, Callable[[Tensor, Any], tuple[float, int]]] = {
    "PyHessian": _pyhessian,
    "Hutchinson": _curvlinops(hutchinson_trace),
    "Hutch++": _curvlinops(hutchpp_trace),
    "XTrace": _curvlinops(xtrace),
}
_models: dict[str, Any] = {}


def _begin(checkpoint: Path, keeps_freed_memory: bool) -> None:
    torch.set_num_threads(1)
    if keeps_freed_memory:
        keep_freed_memory()
    for name in ("plain", "composed"):
        _models[name] = AutoModelForCausalLM.from_pretrained(checkpoint, attn_implementation="eager").float()
    with_forward_mode(_models["composed"])


def _trace(peer: str, ids: Tensor, num_probes: int | None, seed: int) -> Outcome:
    torch.manual_seed(seed)
    began = time.perf_counter()
    trace, count = PEERS[peer](ids, num_probes)
    return Outcome(trace, count, time.perf_counter() - began)
