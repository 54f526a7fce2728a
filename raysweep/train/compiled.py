"""Blocks of a model compiled by torch: one compilation serves all blocks, and all later models of that shape."""

from __future__ import annotations

from typing import Any

import torch

# Shapes of a block that a process keeps compiled; torch keeps eight, and leaves any further one as it is.
MAX_SHAPES = 64


def compile_blocks(model: Any, *, backend: str = "inductor") -> None:
    """Have torch compile the repeated blocks of a model when they first run; names of weights stay.

    What stands around them is left alone: an embedding, a norm and an output layer, each an operation or two by itself.
    What the first block takes (seconds on a GPU) the others do not, nor those of a later model of this shape in the
    same process; in another process, the kernels come from torch's cache on disk.

    Args:
        model: a Hugging Face model; no module of its blocks may have a `forward` of its own, as `fuse_norms` makes:
            torch would compile each block anew.
        backend: what makes code of what torch has traced.
    """
    from accelerate.utils.other import is_repeated_blocks

    torch._dynamo.config.recompile_limit = max(MAX_SHAPES, torch._dynamo.config.recompile_limit)
    for module in model.modules():
        if is_repeated_blocks(module):
            for block in module:
                # A second shape would be taken as a sign that all sizes may change, and compiled into slower code.
                block.compile(backend=backend, dynamic=False)
