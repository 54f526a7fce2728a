"""The numbers that a model is multiplied in. A new precision is a word here, and what the engines make of it."""

from __future__ import annotations

from typing import Literal

Precision = Literal["auto", "fp32", "bf16"]
"""fp32, or bf16 with float32 weights in the optimizer; auto: whichever suits the device."""


def settled(precision: Precision, *, on_gpu: bool) -> Literal["fp32", "bf16"]:
    """What `precision` stands for: auto is bf16 on a GPU, which is several times as fast in it, and fp32 on a CPU."""
    if precision == "auto":
        return "bf16" if on_gpu else "fp32"
    return precision
