"""Turn a corpus into tokens: once, for all variants that share it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar

from raysweep.data.corpora import Corpus
from raysweep.objectives.causal_lm import CausalLM
from raysweep.spec import Metric, StageSpec
from raysweep.train.checkpoints import load_model
from raysweep.worker import Worker

SAMPLER = "sampler"
"""The role of the model that a corpus's text is drawn from."""


class Tokenize(StageSpec):
    """Write a tokens folder. With an input "checkpoint" or "tokens", that one's tokenizer is used, not the corpus's."""

    kind: ClassVar[str] = "tokenize"
    wide: ClassVar[bool] = False

    corpus: Corpus

    def run(self, inputs: Mapping[str, Path], out: Path, worker: Worker) -> dict[str, float]:
        """See `CorpusSpec.build`."""
        if SAMPLER in inputs:
            sampler = load_model(inputs[SAMPLER]).to(worker.device).eval()
            return self.corpus.build(out, tokenizer_dir=inputs[SAMPLER], sampler=sampler)
        earlier = inputs["tokens"] / "tokenizer" if "tokens" in inputs else None
        return self.corpus.build(out, tokenizer_dir=inputs.get("checkpoint", earlier))

    def metrics(self, corpus: Corpus) -> tuple[Metric, ...]:
        """How much text there is, and the least causal loss that a model can have on it, where that is known."""
        is_known = corpus.knows_optimum(CausalLM())
        least = (Metric("optimal_loss_nats_per_token", unit="nats/token"),) if is_known else ()
        return (Metric("num_tokens", unit="tokens"), *least)
