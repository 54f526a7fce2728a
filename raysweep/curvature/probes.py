"""Random probe vectors, each a function of (seed, probe, parameter name) alone.

So any worker can make any probe, whatever it made before, and a sharded model can make its part of one.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Literal

import numpy as np
import torch

Tensors = dict[str, torch.Tensor]
Distribution = Literal["rademacher", "gaussian"]


def key(*parts: object) -> int:
    """A 63-bit seed from any parts."""
    digest = hashlib.sha256("\0".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def probe_vector(
    like: Mapping[str, torch.Tensor], *, seed: int, probe: int, distribution: Distribution = "rademacher"
) -> Tensors:
    """A vector of independent entries of mean 0 and variance 1, from Philox, a counter-based generator.

    Args:
        like: name -> tensor whose shape, dtype and device each part takes.
        seed: of the whole estimate.
        probe: index of the vector.
        distribution: Rademacher entries (+1 or -1) have zero variance on a diagonal Hessian, unlike Gaussian ones.

    Returns:
        name -> tensor like that of `like`.
    """
    vector = {}
    for name, tensor in like.items():
        # Drawn on the CPU, so that a GPU gets the same vector. Signs take one bit each: drawing them must not cost
        # as much as the forward pass they are for.
        draw = np.random.Generator(np.random.Philox(key=key(seed, probe, name)))
        if distribution == "rademacher":
            bits = np.unpackbits(np.frombuffer(draw.bytes(-(-tensor.numel() // 8)), np.uint8), count=tensor.numel())
            drawn = torch.from_numpy(bits).to(tensor.device).to(tensor.dtype).mul_(2).sub_(1)
        else:
            drawn = torch.from_numpy(draw.standard_normal(tensor.numel())).to(tensor.device, tensor.dtype)
        vector[name] = drawn.view(tensor.shape)
    return vector
