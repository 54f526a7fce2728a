"""Tokens/s, MFU and peak memory of training beside a plain torch loop and HF Trainer, on one model of one step size."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from subjects import BF16, LENGTHS, LR, ON_GPU, TIMED, WARM_UP, Subject, device_name, mfu, train_on, worker
from table import Numbers, Table, in_words, peak_gib, release_memory, synchronize

# What a step may be cut finer by, where it does not fit otherwise.
CUTS = (1, 2, 4)


class Clock:
    """Reads the time after WARM_UP steps and at the end of TIMED more, and the peak of memory up to there."""

    def __init__(self) -> None:
        self._at: dict[int, float] = {}
        self.gib = float("nan")

    def tick(self, step: int) -> None:
        """After each step, or at least after these two."""
        if step in (WARM_UP, WARM_UP + TIMED):
            synchronize()
            self._at[step] = time.perf_counter()
            self.gib = peak_gib()

    @property
    def seconds(self) -> float:
        """Of the steps that are timed."""
        return self._at[WARM_UP + TIMED] - self._at[WARM_UP]


Contestant = Callable[[Subject, int], Clock]
"""Trains on sequences of so many tokens."""


def ours(subject: Subject, length: int, **changes: Any) -> Clock:
    """By the training loop of every pretraining stage."""
    clock, ids = Clock(), subject.ids(length)
    told = worker(subject, length, report=lambda reached: clock.tick(reached.step), **changes)
    train_on(subject.build(), ids, num_steps=WARM_UP + TIMED, worker=told)
    return clock


def plain_loop(subject: Subject, length: int) -> Clock:
    """As one writes it: autocast, accelerate's regional compilation, torch's fused AdamW, the model's own loss."""
    from accelerate.utils import compile_regions

    whole = subject.build().train()
    model = compile_regions(whole)
    optimizer = torch.optim.AdamW(whole.parameters(), lr=LR, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    clock = Clock()
    ids = torch.from_numpy(subject.ids(length)).to(device_name())
    for step in range(1, WARM_UP + TIMED + 1):
        for part in ids.split(subject.micro_sequences(length)):
            with torch.autocast(device_name().split(":")[0], torch.bfloat16, enabled=BF16):
                loss = model(input_ids=part, labels=part, use_cache=False).loss
            (loss / subject.num_micro).backward()
        torch.nn.utils.clip_grad_norm_(whole.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        clock.tick(step)
    return clock


def hf_trainer(subject: Subject, length: int, *, compiled: bool = False) -> Clock:
    """As it comes, with the same optimizer; compiled: with its own switch, which compiles the whole model."""
    from transformers import Trainer, TrainerCallback, TrainingArguments

    clock = Clock()

    class Ticks(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
            clock.tick(state.global_step)

    rows = [{"input_ids": row, "labels": row} for row in torch.from_numpy(subject.ids(length))]
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder, per_device_train_batch_size=subject.micro_sequences(length),
            gradient_accumulation_steps=subject.num_micro, max_steps=WARM_UP + TIMED, optim="adamw_torch_fused",
            learning_rate=LR, lr_scheduler_type="constant", weight_decay=0.1, adam_beta2=0.95, max_grad_norm=1.0,
            bf16=BF16, torch_compile=compiled, save_strategy="no", logging_strategy="no", report_to=[],
            disable_tqdm=True, use_cpu=not ON_GPU,
        )  # fmt: skip
        # Each step reads the same sequences, so there are as many rows as steps need.
        trainer = Trainer(
            model=subject.build(), args=arguments, train_dataset=rows * (WARM_UP + TIMED), callbacks=[Ticks()]
        )
        trainer.train()
    return clock


def measured(run: Contestant, subject: Subject, length: int) -> tuple[str, Numbers]:
    """A row: in micro-batches as large as fit, of those that were thought of."""
    for cut in CUTS:
        finer = Subject(subject.model, subject.vocab_size, subject.micro_tokens // cut, subject.num_micro * cut)
        release_memory()
        # What one contestant compiled must not tell torch that sizes change in the next one.
        torch._dynamo.reset()
        try:
            clock = run(finer, length)
            break
        except torch.OutOfMemoryError:
            if cut == CUTS[-1]:
                raise
    rate = TIMED * finer.step_tokens() / clock.seconds
    how = f"{finer.num_micro} micro-batches of {finer.micro_sequences(length)} sequences"
    use = mfu(rate, subject.flops_per_token(length))
    return f"{rate:,.0f} tokens/s, MFU {use}, {in_words(clock.gib)}; {how}", {
        "tokens_per_second": rate,
        "gib": clock.gib,
    }


def main(table: Table, name: str, subject: Subject) -> None:
    """Rows of one size: what bars are of comes first."""
    for length in LENGTHS:
        title = f"{name}, {length} tokens"
        contestants = {"ours": ours, "a plain loop, compiled too": plain_loop, "HF Trainer": hf_trainer}
        found = {
            who: table.measure(f"training {title}: {who}", partial(measured, run, subject, length))
            for who, run in contestants.items()
        }
        mine, plain, theirs = (each.get("tokens_per_second", float("nan")) for each in found.values())
        bars = f"{mine / plain:.2f}x of the plain loop (bar 1.0), {mine / theirs:.2f}x of HF Trainer (bar 1.15)"
        if name == "1B" and length == LENGTHS[0]:
            bars += f", MFU {mfu(mine, subject.flops_per_token(length))} (bar 45 %)"
        bars += "" if ON_GPU else "; bars are for GPUs"
        table.write(f"training {title}: ours beside them", bars)
    if ON_GPU and name == "1B":
        compiled = f"training {name}, {LENGTHS[0]} tokens: HF Trainer with torch_compile"
        table.measure(compiled, partial(measured, partial(hf_trainer, compiled=True), subject, LENGTHS[0]))
