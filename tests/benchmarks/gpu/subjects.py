"""What is measured: Llamas of three sizes, and the steps they are trained by; on a CPU tiny ones in their place."""

from __future__ import annotations

import os
import platform
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import numpy as np
import torch

from raysweep.devices import peak_flops
from raysweep.objectives.base import Loss
from raysweep.objectives.causal_lm import CausalLM
from raysweep.train.flat import FlatSpec
from raysweep.train.loop import Training, train
from raysweep.train.model_spec import ModelSpec
from raysweep.train.models import Llama
from raysweep.train.optimizers import AdamW
from raysweep.train.schedules import Constant
from raysweep.worker import Worker

# cuda, or cpu, where everything is run at tiny sizes.
DEVICE = os.environ.get("DEVICE", "cuda")
ON_GPU = DEVICE != "cpu"


@dataclass(frozen=True)
class Subject:
    """A model, and a step of its training: `num_micro` micro-batches of `micro_tokens` tokens."""

    model: ModelSpec
    vocab_size: int
    micro_tokens: int
    num_micro: int

    def micro_sequences(self, length: int) -> int:
        """Of a micro-batch, in sequences of so many tokens."""
        return self.micro_tokens // length

    def batch_sequences(self, length: int) -> int:
        """Of a step."""
        return self.num_micro * self.micro_sequences(length)

    def step_tokens(self) -> int:
        """Tokens of a step."""
        return self.num_micro * self.micro_tokens

    def flops_per_token(self, length: int) -> float:
        """Forward and backward: 6 N + 12 L h s (Chowdhery et al., 2022, appendix B).

        Embeddings are tied, so that each parameter of N but a few norms is in one product. Attention counts whole, as
        in the paper, though half of it is masked.
        """
        layers, hidden, *_ = self.model.dimensions()
        return 6.0 * self.model.num_parameters(self.vocab_size) + 12.0 * layers * hidden * length

    def build(self) -> Any:
        """The model, with weights in float32 on the device: drawn there, as values make no difference to speed."""
        model_class, config = self.model.configure(vocab_size=self.vocab_size, sequence_length=2048)
        torch.manual_seed(0)
        with torch.device(device_name()):
            return model_class(config)

    def ids(self, length: int) -> np.ndarray[Any, Any]:
        """Token ids of a step's sequences: the same in every step."""
        return np.random.default_rng(0).integers(0, self.vocab_size, size=(self.batch_sequences(length), length))


# Vocabulary of GPT-2, rounded up to a multiple of 128. 124M and 350M as GPT-2's and GPT-3's.
_GPU = {
    "124M": Subject(Llama(hidden_size=768, num_layers=12, num_heads=12), 50304, 32768, 4),
    "350M": Subject(Llama(hidden_size=1024, num_layers=24, num_heads=16), 50304, 16384, 4),
    "1B": Subject(Llama(hidden_size=2048, num_layers=18, num_heads=16), 50304, 8192, 4),
}
_CPU = {
    name: Subject(Llama(hidden_size=hidden, num_layers=2, num_heads=2), 256, 64, 2)
    for name, hidden in (("124M", 16), ("350M", 24), ("1B", 32))
}
SUBJECTS = _GPU if ON_GPU else _CPU
LENGTHS = (2048, 1024) if ON_GPU else (32, 16)
# Steps that are not timed, and those that are; the training loop reports every ten.
WARM_UP, TIMED = 10, 20 if ON_GPU else 10
BF16 = ON_GPU
LR = 1e-4


def device_name() -> str:
    """As torch calls it."""
    return "cuda:0" if ON_GPU else "cpu"


@cache
def device_title() -> str:
    """The name that the table gives it, which its peak is looked up by."""
    if not ON_GPU:
        return f"a CPU ({platform.machine()}, {os.cpu_count()} cores), tiny sizes"
    if not torch.cuda.is_available():
        raise SystemExit("torch finds no GPU here; DEVICE=cpu runs everything at tiny sizes without one")
    return torch.cuda.get_device_name()


def worker(subject: Subject, length: int, **changes: Any) -> Worker:
    """A gang of one on the device, which compiles."""
    alone = Worker(device=device_name(), micro_batch_sequences=subject.micro_sequences(length), compile=True)
    return replace(alone, **changes)


def train_on(
    model: Any,
    ids: np.ndarray[Any, Any],
    *,
    num_steps: int,
    worker: Worker,
    bf16: bool = BF16,
    flat: FlatSpec | None = None,
    objective: Loss | None = None,
    labels: np.ndarray[Any, Any] | None = None,
) -> Training:
    """Some steps by the training loop of every pretraining stage, all on these sequences.

    Where `flat` compares domains, every second sequence is of another one. Without an objective, and labels, it is
    causal LM.
    """
    batch = {"input_ids": ids, "labels": ids if labels is None else labels}
    if flat and flat.needs_domains:
        batch["domains"] = np.arange(len(ids)) % 2
    return train(
        model,
        lambda step: batch,
        objective=objective or CausalLM(),
        optimizer=AdamW(lr=LR),
        schedule=Constant(name="constant", warmup=0.0),
        num_steps=num_steps,
        seed=0,
        bf16=bf16,
        worker=worker,
        flat=flat,
    )


def mfu(tokens_per_second: float, flops_per_token: float) -> str:
    """Model FLOPs utilization, such as 45.1 %."""
    peak = peak_flops(device_title())
    return f"{tokens_per_second * flops_per_token / peak:.1%}" if peak else "not known"
