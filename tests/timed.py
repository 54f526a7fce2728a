"""Trials of one stage whose FLOPs are given: what a queue reckons by, without a model."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

from raysweep.costs import Size
from raysweep.data.corpora import Corpus
from raysweep.data.pcfg import PCFG
from raysweep.plan import Stage, Trial
from raysweep.resources import Resources
from raysweep.spec import Metric
from raysweep.stages.base import StageSpec
from raysweep.stages.tokenize import Tokenize
from raysweep.worker import Worker


class Timed(StageSpec):
    """Work of `predicted` FLOPs."""

    kind: ClassVar[str] = "timed"
    index: int
    predicted: float

    def run(self, inputs: Mapping[str, Path], out: Path, worker: Worker) -> dict[str, float]:
        return {}

    def metrics(self, corpus: Corpus) -> tuple[Metric, ...]:
        return ()

    def flops(self, size: Size, corpus: Corpus) -> float:
        return self.predicted

    def memory_bytes(self, size: Size, resources: Resources) -> int:
        return 0

    def disk_bytes(self, size: Size) -> int:
        return 0


def timed_trials(flops: Sequence[float], spec: type[Timed] = Timed) -> list[Trial]:
    """A trial for each number of FLOPs."""
    corpus = PCFG(vocabulary=16, num_nonterminals=4, num_rules=2, num_words=3, sentence_length=4)
    tokens = Stage(Tokenize(corpus=corpus), {})
    trials = []
    for index, each in enumerate(flops):
        stage = Stage(spec(index=index, predicted=each), {"tokens": tokens.id}, step=1)
        trials.append(Trial({"index": index}, seed=0, stages=(tokens, replace(stage, checkpoint=stage.id))))
    return trials
