"""Peak memory of training beside what the plan says it will be, over sizes, lengths and ways to save memory."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import numpy as np
from subjects import BF16, LENGTHS, ON_GPU, SUBJECTS, Subject, device_name, train_on
from table import Numbers, Table, in_words, peak_gib, release_memory, reserved_gib

from raysweep.costs import Size
from raysweep.memory import Step, training_bytes
from raysweep.objectives.base import IGNORED
from raysweep.objectives.masked_lm import MaskedLM
from raysweep.train.models import Bert, Transformers
from raysweep.train.optimizers import AdamW
from raysweep.worker import Worker

LONG, SHORT = LENGTHS
WIDTH, LAYERS, HEADS, WORDS = (768, 12, 12, 50304) if ON_GPU else (16, 2, 2, 256)
NO_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
GPT2 = {"n_embd": WIDTH, "n_layer": LAYERS, "n_head": HEADS, "n_positions": SHORT} | NO_DROPOUT
ALL = SUBJECTS | {
    "GPT-2": Subject(Transformers(name="transformers", architecture="GPT2LMHeadModel", fields=GPT2), WORDS, 0, 1),
    "BERT": Subject(
        Bert(name="bert", hidden_size=WIDTH, num_layers=LAYERS, num_heads=HEADS, num_positions=SHORT), WORDS, 0, 1
    ),
}
# One place in so many is predicted by BERT.
MASKED_EVERY = 7


@dataclass(frozen=True)
class Case:
    """A step of one micro-batch."""

    name: str
    length: int
    sequences: int
    recomputed: bool = False
    bf16: bool = BF16

    def __str__(self) -> str:
        how = f"{self.sequences} sequences of {self.length}" + ("" if self.bf16 else ", float32")
        return f"{self.name}, {how}" + (", gradient checkpointing" if self.recomputed else "")


CASES = [
    Case("124M", SHORT, 8),
    Case("124M", SHORT, 32),
    Case("124M", LONG, 4),
    Case("124M", SHORT, 32, recomputed=True),
    Case("124M", SHORT, 8, bf16=False),
    Case("350M", SHORT, 4),
    Case("350M", LONG, 4),
    Case("350M", LONG, 8, recomputed=True),
    Case("1B", LONG, 2),
    Case("1B", LONG, 8, recomputed=True),
    Case("1B", SHORT, 1, bf16=False),
    Case("GPT-2", SHORT, 8),
    Case("GPT-2", SHORT, 8, bf16=False),
    Case("GPT-2", SHORT, 32, recomputed=True),
    Case("BERT", SHORT // 2, 16),
    Case("BERT", SHORT // 2, 16, bf16=False),
    Case("BERT", SHORT // 2, 64, recomputed=True),
]


def main(table: Table) -> None:
    """A row of each case."""
    for case in CASES:
        table.measure(f"memory of a step of {case}", partial(_peak, case))


def _peak(case: Case) -> tuple[str, Numbers]:
    subject = ALL[case.name]
    ids = np.random.default_rng(0).integers(0, subject.vocab_size, size=(1, case.length)).repeat(case.sequences, axis=0)
    masked = subject.model.head == "masked"
    labels = np.where(np.arange(case.length) % MASKED_EVERY, IGNORED, ids) if masked else None
    objective = MaskedLM(name="masked_lm") if masked else None
    model = subject.build()
    release_memory()
    cuts = Worker(device=device_name(), gradient_checkpointing=case.recomputed)
    train_on(model, ids, num_steps=2, bf16=case.bf16, worker=cuts, objective=objective, labels=labels)
    gib, reserved, planned = peak_gib(), reserved_gib(), _planned(case) / 2**30
    off = f", {planned / gib - 1:+.0%}" if gib > 0 else ""  # On a CPU it is not counted.
    held = f" ({in_words(reserved)} reserved)" if gib > 0 else ""
    return f"{in_words(gib)}{held}; {planned:.2g} GiB planned{off}", {
        "gib": gib,
        "reserved": reserved,
        "planned": planned,
    }


def _planned(case: Case) -> float:
    """Of a step without accumulation."""
    subject = ALL[case.name]
    num = subject.model.num_parameters(subject.vocab_size)
    size = Size(num, *subject.model.dimensions(), vocab_size=subject.vocab_size, num_bytes=0)
    tokens = case.sequences * case.length
    step = Step(
        tokens=tokens,
        logit_tokens=tokens / MASKED_EVERY if subject.model.head == "masked" else None,
        optimizer_floats=AdamW.state_floats,
        in_half=case.bf16,
        on_gpu=ON_GPU,
        recomputed=case.recomputed,
    )
    return training_bytes(size, step)
