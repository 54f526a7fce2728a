"""Random probe vectors, each a function of (seed, probe, parameter name) alone.

So any worker can make any probe, whatever it made before, and a sharded model can make its part of one.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
import torch

from raysweep.curvature.settings import Distribution

Tensors = dict[str, torch.Tensor]

# +1 or -1 for each bit of a byte, the first bit first.
_SIGNS_OF_BYTE = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1).astype(np.float32) * 2 - 1


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

    >>> vector = probe_vector({"w": torch.zeros(2, 3)}, seed=0, probe=0)["w"]
    >>> tuple(vector.shape), vector.abs().unique().tolist()
    ((2, 3), [1.0])
    """
    return {
        name: probe_part(key(seed, probe, name), tensor.numel(), like=tensor.view(-1), distribution=distribution).view(
            tensor.shape
        )
        for name, tensor in like.items()
    }


def probe_part(
    stream: int, num: int, *, like: torch.Tensor, distribution: Distribution = "rademacher", start: int = 0
) -> torch.Tensor:
    """Entries of a parameter's probe from `start` on, as many as `like` has; 0 past the last.

    Args:
        stream: key of the parameter's own random stream.
        num: entries of the whole parameter.
        like: a flat tensor: how many entries, of what dtype, where.
        distribution: see `probe_vector`.
        start: of the part, when the parameter is sharded.
    """
    stop = min(start + like.numel(), num)
    draw = np.random.Philox(key=stream)
    # Drawn on the CPU, so that a GPU gets the same vector. Signs take one bit each: drawing them must not cost as much
    # as the forward pass they are for.
    if distribution == "rademacher":
        first = start // 8
        packed = draw.random_raw(-(-num // 64)).astype("<u8", copy=False).view(np.uint8)[first : -(-stop // 8)]
        drawn = _signs(packed, like).view(-1)[start - 8 * first : max(0, stop - 8 * first)]
    else:
        drawn = torch.from_numpy(np.random.Generator(draw).standard_normal(num)[start:stop]).to(like)
    return drawn if len(drawn) == like.numel() else torch.nn.functional.pad(drawn, (0, like.numel() - len(drawn)))


def _signs(packed: npt.NDArray[np.uint8], like: torch.Tensor) -> torch.Tensor:
    """The signs of bytes [n], [n, 8]; where a GPU makes them, a thirty-second part is sent."""
    if like.device.type == "cpu":
        return torch.from_numpy(_SIGNS_OF_BYTE.take(packed, axis=0)).to(like.dtype)
    bytes_there = torch.from_numpy(packed.astype(np.int32)).to(like.device)
    return torch.from_numpy(_SIGNS_OF_BYTE).to(like).index_select(0, bytes_there)
