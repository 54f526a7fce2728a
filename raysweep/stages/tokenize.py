"""Turn a corpus into tokens: once, for all variants that share it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar

import numpy as np

from raysweep.costs import UNKNOWN, Size, size_of_folder
from raysweep.data.corpora import Corpus
from raysweep.data.packing import TokensMeta, dtype_of
from raysweep.errors import StageError
from raysweep.objectives.causal_lm import CausalLM
from raysweep.resources import Resources
from raysweep.spec import Metric
from raysweep.stages.base import StageSpec
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
        """Writes a tokens folder by `CorpusSpec.build`; a sampled text is drawn on this worker's device.

        Raises:
            StageError: if what the corpus has built is not what it says of itself.
        """
        if SAMPLER in inputs:
            sampler = load_model(inputs[SAMPLER]).to(worker.device).eval()
            built = self.corpus.build(out, tokenizer_dir=inputs[SAMPLER], sampler=sampler)
        else:
            # A later phase reads with the tokenizer of the first: the model's embedding knows no other.
            earlier = inputs["tokens"] / "tokenizer" if "tokens" in inputs else None
            built = self.corpus.build(out, tokenizer_dir=inputs.get("checkpoint", earlier))
        self._check(out, built)
        return built

    def _check(self, out: Path, built: Mapping[str, float]) -> None:
        corpus, meta = self.corpus, TokensMeta.read(out)
        rows = None if meta.sentence_length is None else meta.sentence_length + 1
        counts_bytes = all(domain.valid_bytes for domain in meta.domains.values())
        declared = {metric.name for metric in self.metrics(corpus)}
        for what, found, said in (
            ("rows", rows, corpus.row_length),
            ("domains", sorted(meta.domains), sorted(corpus.domains)),
            ("numbers of bytes", counts_bytes, corpus.counts_bytes),
            ("metrics", sorted(built), sorted(declared)),
        ):
            if found != said:
                raise StageError(f"corpus {corpus.name}: its tokens have {what} {found}, and it says {said}")

    def metrics(self, corpus: Corpus) -> tuple[Metric, ...]:
        """How much text there is, and the least causal loss that a model can have on it, where that is known."""
        is_known = corpus.knows_optimum(CausalLM())
        least = (Metric("optimal_loss_nats_per_token", unit="nats/token"),) if is_known else ()
        return (Metric("num_tokens", unit="tokens"), *least)

    def flops(self, size: Size, corpus: Corpus) -> float:
        """Of a model that writes the text, which reads all of it; to read what people wrote takes none to speak of."""
        if self.corpus.sampler is None:
            return 0.0
        num_tokens = self.corpus.tokens_bytes() // np.dtype(dtype_of(self.corpus.vocab_size)).itemsize
        return self._sampler_size().forward_flops(num_tokens, self.corpus.row_length or 0)

    def memory_bytes(self, size: Size, resources: Resources) -> int:
        """The weights of a model that writes the text; people's text goes through in pieces."""
        return self._sampler_size().weights_bytes

    def disk_bytes(self, size: Size) -> int:
        """The tokens folder, by what is declared and the sizes of files."""
        return self.corpus.tokens_bytes()

    def _sampler_size(self) -> Size:
        sampler = self.corpus.sampler
        return (size_of_folder(Path(sampler.source)) if sampler else None) or UNKNOWN
