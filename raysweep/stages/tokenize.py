"""Turn a corpus into tokens: once, for all variants that share it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar

from raysweep.data.corpora import Corpus
from raysweep.objectives.causal_lm import CausalLM
from raysweep.spec import StageSpec
from raysweep.worker import Worker


class Tokenize(StageSpec):
    """Write a tokens folder. With an input "checkpoint", its tokenizer is used in place of the corpus's own."""

    kind: ClassVar[str] = "tokenize"
    wide: ClassVar[bool] = False

    corpus: Corpus

    def run(self, inputs: Mapping[str, Path], out: Path, worker: Worker) -> dict[str, float]:
        """See `CorpusSpec.build`."""
        return self.corpus.build(out, tokenizer_dir=inputs.get("checkpoint"))

    def metric_names(self, corpus: Corpus) -> tuple[str, ...]:
        """See `StageSpec.metric_names`."""
        return ("num_tokens", *(("optimal_loss_nats_per_token",) if corpus.knows_optimum(CausalLM()) else ()))
