"""Loss of a causal model on spans cut out of held-out text, whatever it was trained by."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, ClassVar

import numpy as np
from pydantic import Field

from raysweep.costs import Size
from raysweep.data.corpora import Corpus
from raysweep.data.packing import Tokens
from raysweep.data.tokenizers import load_tokenizer
from raysweep.errors import DataError, SpaceError
from raysweep.objectives.base import IGNORED, Arrays, Ints, Specials
from raysweep.objectives.span_corruption import SpanCorruption, count_noise, sentinel_names
from raysweep.resources import Resources
from raysweep.spec import Metric, Neutral
from raysweep.stages.base import StageSpec, Subject
from raysweep.stages.held_text import HeldText
from raysweep.stages.heldout import DRAW
from raysweep.train.checkpoints import load_model
from raysweep.train.evaluate import perplexity
from raysweep.worker import Worker


class SpanLoss(StageSpec):
    """PPL-SC of paper 2 (Zeng et al., 2025, arXiv 2504.12491): a span-corruption loss of models of any objective.

    Of each sequence spans are cut out, and read behind the rest (`objectives.span_corruption`, all seen causally); the
    loss is of their tokens alone, not of the sentinels, which a model that was trained otherwise cannot know to write.
    Where the tokenizer lacks sentinels the token that ends a text stands for each. Rows are no longer than those that
    pretraining reads: sequences lose their end for the sentinels.
    """

    kind: ClassVar[str] = "span_loss"
    wide: ClassVar[bool] = False
    reads_text: ClassVar[bool] = True
    filled: ClassVar[frozenset[str]] = frozenset({"text"})

    density: float = Field(default=0.15, gt=0, lt=1)
    """Part of the tokens that is cut out."""
    mean_span_length: float = Field(default=3.0, ge=1)
    """Tokens of a span, on average over those of a row."""
    num_sequences: int = Field(default=256, ge=2)
    """Held-out sequences, each domain's share by its mix; fewer where a domain has not its share."""
    mix: Annotated[dict[str, Annotated[float, Field(gt=0)]] | None, Neutral(None)] = Field(default=None, min_length=1)
    """Domain -> its share of the sequences; left out: that of pretraining. Where variants differ by their mix, one that
    is named here has all of them read the same text."""
    text: HeldText | None = None
    """Filled from pretrain."""

    def bind(self, subject: Subject) -> SpanLoss:
        """With the text.

        Raises:
            SpaceError: if the model predicts in place, its rows have no room for a span, or `mix` names no domains
                of the corpus.
        """
        text = HeldText.of(subject)
        if self.mix is not None:
            domains = subject.corpus.domains
            if unknown := sorted(self.mix.keys() - set(domains)):
                there = ", ".join(domains)
                raise SpaceError(f"span_loss.mix names {unknown[0]!r}, which is no domain; domains: {there}")
            total = sum(self.mix.values())
            text = text.with_(mix={name: share / total for name, share in self.mix.items()})
        if text.loss.head != "causal":
            raise SpaceError(f"span_loss reads on, as a causal model does, and {text.loss.name} trains a masked one")
        if text.input_length < 5:
            raise SpaceError(
                f"span_loss needs rows of 5 tokens, not {text.input_length}: raise pretrain.sequence_length"
            )
        return self.with_(text=text)  # type: ignore[no-any-return]

    def run(self, inputs: Mapping[str, Path], out: Path, worker: Worker) -> dict[str, float]:
        """Loss in nats per token that was cut out, its standard error over batches of sequences, and e to it."""
        from raysweep.train.evaluate import heldout

        assert self.text
        model = load_model(inputs["checkpoint"]).to(worker.device)
        text = Tokens(inputs["tokens"]).valid_mix(
            self.text.mix, sequence_length=self.text.sequence_length, num_sequences=self.num_sequences
        )
        text = text[np.random.default_rng([DRAW, 1]).permutation(len(text))][:, : self.kept_length]
        rows = self.rows(text, inputs["checkpoint"])
        loss, error = heldout(model, rows, self.objective).above(np.zeros(len(text)))
        return {"loss_nats_per_token": loss, "loss_stderr": error, "ppl": perplexity(loss)}

    def metrics(self, corpus: Corpus) -> tuple[Metric, ...]:
        """Of the tokens that were cut out."""
        nats = "nats/token"
        return Metric("loss_nats_per_token", "min", nats), Metric("loss_stderr", unit=nats), Metric("ppl", unit="")

    def flops(self, size: Size, corpus: Corpus) -> float:
        """A forward pass."""
        assert self.text
        return size.forward_flops(self.num_sequences * self.text.input_length, self.text.input_length)

    def memory_bytes(self, size: Size, resources: Resources) -> int:
        """Weights, one layer's activations and the logits of a batch, all in 32 bits."""
        assert self.text
        return size.weights_bytes + self.text.batch_bytes(size, self.num_sequences)

    def disk_bytes(self, size: Size) -> int:
        """None: its numbers stand in its record."""
        return 0

    @property
    def kept_length(self) -> int:
        """Tokens of a sequence that fit with their sentinels."""
        assert self.text
        most = min(self.text.sequence_length, self.text.input_length - 3)
        return max(length for length in range(2, most + 1) if self._row_length(length) <= self.text.input_length)

    @property
    def objective(self) -> SpanCorruption:
        """That makes rows of `kept_length` tokens."""
        return SpanCorruption(
            name="span_corruption",
            density=self.density,
            mean_span_length=self.mean_span_length,
            num_sentinels=self._num_spans(self.kept_length) + 1,
            attention="causal",
        )

    def rows(self, text: Ints, checkpoint: Path) -> Arrays:
        """Rows of tokens [n, `kept_length`] of which the tokens that were cut out are labelled.

        Raises:
            DataError: if the tokenizer has neither sentinels nor an end of text.
        """
        tokenizer = load_tokenizer(checkpoint)
        names, num_known = sentinel_names(self.objective.num_sentinels), len(tokenizer)
        # By ids that no token has, so that sentinels are told from what is cut out, which may hold an end of text.
        marks = dict(zip(names, range(num_known, num_known + len(names)), strict=True))
        rows = self.objective.prepare(
            text, np.random.default_rng([DRAW, 2]), Specials(marks, num_text_tokens=num_known)
        )
        known = tokenizer.get_vocab()
        ids = [known.get(name, tokenizer.eos_token_id) for name in names]
        if None in ids:
            raise DataError(f"checkpoint {checkpoint}: its tokenizer has neither {names[0]!r} nor an eos_token")
        table = np.concatenate([np.arange(num_known), np.array(ids, np.int64)])
        labels = np.where(rows["labels"] >= num_known, IGNORED, rows["labels"])
        return {"input_ids": table[rows["input_ids"]], "labels": labels}

    def _num_spans(self, length: int) -> int:
        return count_noise(length, density=self.density, mean_span_length=self.mean_span_length)[1]

    def _row_length(self, length: int) -> int:
        return length + 2 * self._num_spans(length) + 1
