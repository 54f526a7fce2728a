"""What a step is made of: forms of the loss, kernels of attention, and whether the host waits for the device."""

from __future__ import annotations

import time
import warnings
from collections import Counter
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import torch
import torch.nn.functional as F
from subjects import BF16, LENGTHS, ON_GPU, SUBJECTS, device_name, worker
from table import Numbers, Table, in_words, peak_gib, release_memory, synchronize
from torch.nn.attention import SDPBackend, sdpa_kernel

from raysweep.objectives import output_loss
from raysweep.objectives.base import IGNORED
from raysweep.objectives.causal_lm import CausalLM
from raysweep.train.loop import train
from raysweep.train.optimizers import AdamW
from raysweep.train.schedules import Constant

SUBJECT, LENGTH = SUBJECTS["1B"], LENGTHS[0]
REPEATS = 10 if ON_GPU else 1
Loss = Callable[..., torch.Tensor]


def main(table: Table) -> None:
    """Rows of a micro-batch at 1B."""
    forms: dict[str, Loss] = {"torch's, of whole logits": _whole, "ours": output_loss.linear_cross_entropy_sum}
    forms["ours, compiled"] = partial(output_loss.linear_cross_entropy_sum, compiled=True)
    if ON_GPU and find_spec("liger_kernel"):
        forms["liger's"] = output_loss.liger_sum
    exact = _loss_and_gradients(_whole, torch.float32)
    for name, loss in forms.items():
        table.measure(f"loss of {SUBJECT.micro_tokens} tokens of 1B: {name}", partial(_of_loss, loss, exact))
    backends = {
        "flash": SDPBackend.FLASH_ATTENTION,
        "cuDNN": SDPBackend.CUDNN_ATTENTION,
        "memory-efficient": SDPBackend.EFFICIENT_ATTENTION,
    }
    if ON_GPU:
        for name, backend in backends.items():
            table.measure(f"attention of a layer of 1B: {name}", partial(_attention, backend))
        table.measure("waits of the host in ten steps of 124M", _waits)


def _timed(run: Callable[[], object]) -> float:
    """Seconds of one, the mean of several after a first one."""
    run()
    synchronize()
    began = time.perf_counter()
    for _ in range(REPEATS):
        run()
    synchronize()
    return (time.perf_counter() - began) / REPEATS


def _whole(states: torch.Tensor, weight: torch.Tensor, bias: None, labels: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(F.linear(states, weight, bias).float(), labels, ignore_index=IGNORED, reduction="sum")


def _inputs(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, None, torch.Tensor]:
    """States, weight, no bias, labels: as before a first step, so that each token is about as likely."""
    generator = torch.Generator(device_name()).manual_seed(0)
    width, device = SUBJECT.model.dimensions().hidden_size, device_name()
    states = torch.randn(SUBJECT.micro_tokens, width, device=device, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(SUBJECT.vocab_size, width, device=device, generator=generator).mul_(width**-0.5)
    weight = weight.to(dtype).requires_grad_()
    labels = torch.randint(SUBJECT.vocab_size, (SUBJECT.micro_tokens,), device=device, generator=generator)
    return states, weight, None, labels


def _loss_and_gradients(loss: Loss, dtype: torch.dtype) -> list[torch.Tensor]:
    states, weight, bias, labels = _inputs(dtype)
    value = loss(states, weight, bias, labels)
    gradients = torch.autograd.grad(value, [states, weight])
    return [value.detach().cpu(), *(each.cpu() for each in gradients)]


def _of_loss(loss: Loss, exact: list[torch.Tensor]) -> tuple[str, Numbers]:
    dtype = torch.bfloat16 if BF16 else torch.float32
    found = _loss_and_gradients(loss, dtype)
    off = [float((one.float() - other).norm() / other.norm()) for one, other in zip(found, exact, strict=True)]
    states, weight, bias, labels = _inputs(dtype)
    release_memory()
    seconds = _timed(lambda: torch.autograd.grad(loss(states, weight, bias, labels), [states, weight]))
    gib = peak_gib()
    words = ", ".join(f"{each:.1e}" for each in off)
    return f"{seconds * 1e3:.1f} ms, {in_words(gib)}; loss, gradients off by {words}", {}


def _attention(backend: SDPBackend) -> tuple[str, Numbers]:
    of = SUBJECT.model.dimensions()
    shape = (SUBJECT.micro_sequences(LENGTH), of.num_heads, LENGTH, of.hidden_size // of.num_heads)
    q, k, v = (torch.randn(shape, device="cuda", dtype=torch.bfloat16, requires_grad=True) for _ in range(3))

    def run() -> None:
        with sdpa_kernel(backend):
            F.scaled_dot_product_attention(q, k, v, is_causal=True).sum().backward()

    seconds = _timed(run)
    flops = 12 * of.hidden_size * LENGTH * SUBJECT.micro_tokens / 2
    return f"{seconds * 1e3:.2f} ms, {flops / seconds / 1e12:.0f} TFLOP/s of what is not masked", {}


def _waits() -> tuple[str, Numbers]:
    """Torch warns of each call that waits for the device; the loop's own look at ten losses is one or a few."""
    subject, length = SUBJECTS["124M"], LENGTHS[-1]
    ids = subject.ids(length)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")

        def batch_at(step: int) -> dict[str, object]:
            if step == 10:
                torch.cuda.set_sync_debug_mode("warn")
            if step == 19:
                torch.cuda.set_sync_debug_mode("default")
            return {"input_ids": ids, "labels": ids}

        train(
            subject.build(), batch_at, objective=CausalLM(), optimizer=AdamW(lr=1e-4),
            schedule=Constant(name="constant", warmup=0.0), num_steps=20, seed=0, bf16=BF16,
            worker=worker(subject, length),
        )  # fmt: skip
    waits = [f"{Path(each.filename).name}:{each.lineno}" for each in caught if "synchron" in str(each.message)]
    where = ", ".join(f"{place} ({num})" for place, num in Counter(waits).items()) or "none"
    return f"{len(waits)} in nine steps of {subject.num_micro} micro-batches: {where}", {"waits": len(waits)}
