"""Random probe vectors, each a function of (seed, probe, parameter name) alone.

So any worker can make any probe, whatever it made before, and a sharded model can make its part of one.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping

import numpy as np
import numpy.typing as npt
import torch

from raysweep.curvature.settings import Distribution

Tensors = dict[str, torch.Tensor]

# Entries of a piece of a vector: with the weights they move, ahead and behind, 1 MiB in float32, which stays in cache.
PIECE = 1 << 16

# Entries whose signs are drawn at once, bits of one number.
WORD = 64

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
    return dict(Probe(like, seed=seed, probe=probe, distribution=distribution))


class Packed:
    """Small tensors side by side in a flat one, so that what each costs beside its entries is paid once.

    Each begins at a multiple of `WORD` entries.

    Args:
        tensors: of one dtype, on one device.

    Attributes:
        sizes: name -> entries up to the next one.
        home: a copy of them, flat.

    >>> Packed({"a": torch.ones(3), "b": torch.ones(2, 40)}).sizes
    {'a': 64, 'b': 128}
    """

    def __init__(self, tensors: Mapping[str, torch.Tensor]) -> None:
        self._shapes = {name: tensor.shape for name, tensor in tensors.items()}
        self.sizes = {name: -(-tensor.numel() // WORD) * WORD for name, tensor in tensors.items()}
        first = next(iter(tensors.values()))
        self.home = torch.zeros(sum(self.sizes.values()), dtype=first.dtype, device=first.device)
        for name, part in self.views(self.home).items():
            part.copy_(tensors[name])

    def views(self, flat: torch.Tensor) -> Tensors:
        """By name, of a tensor as long as `home`."""
        parts = torch.split(flat, list(self.sizes.values()))
        return {
            name: part[: shape.numel()].view(shape)
            for (name, shape), part in zip(self._shapes.items(), parts, strict=True)
        }


class Probe(Mapping[str, torch.Tensor]):
    """A probe vector whose parts are drawn whenever they are asked for, and never held together.

    Args: as of `probe_vector`.

    >>> like = {"w": torch.zeros(2, 3)}
    >>> torch.equal(Probe(like, seed=0, probe=0)["w"], probe_vector(like, seed=0, probe=0)["w"])
    True
    """

    def __init__(
        self, like: Mapping[str, torch.Tensor], *, seed: int, probe: int, distribution: Distribution = "rademacher"
    ) -> None:
        self._like, self._seed, self._probe, self._distribution = like, seed, probe, distribution

    def __getitem__(self, name: str) -> torch.Tensor:
        like = self._like[name]
        return probe_part(self._stream(name), like.numel(), like=like.view(-1), distribution=self._distribution).view(
            like.shape
        )

    def __iter__(self) -> Iterator[str]:
        return iter(self._like)

    def __len__(self) -> int:
        return len(self._like)

    def pieces(self, name: str) -> Iterator[torch.Tensor]:
        """A part as flat pieces, one after another, each to be used before the next: they share memory.

        On a CPU, writing a vector out and reading it again costs more than drawing it.
        """
        like = self._like[name]
        if like.device.type != "cpu" or not self.has_signs:
            yield self[name].view(-1)
            return
        yield from _pieces(_packed_signs(np.random.Philox(key=self._stream(name)), like.numel()), like)

    def pieces_of(self, parts: Packed) -> Iterator[torch.Tensor]:
        """The same of parts side by side; between them are signs that are of none.

        Raises:
            ValueError: if its entries are no signs.
        """
        if not self.has_signs:
            raise ValueError("only signs are drawn side by side")
        draw = np.random.Philox(key=0)
        state, packed = draw.state, []
        for name, size in parts.sizes.items():
            # Putting back the state takes a fifth of the time of another generator.
            state["state"]["key"][0] = self._stream(name)
            draw.state = state
            packed.append(_packed_signs(draw, size))
        yield from _pieces(np.concatenate(packed), parts.home)

    @property
    def has_signs(self) -> bool:
        """Whether its entries are +1 or -1."""
        return self._distribution == "rademacher"

    def rows(self, name: str, numbers: torch.Tensor) -> torch.Tensor:
        """Some rows [n, width] of a part that is a matrix; of signs, no others are made."""
        like = self._like[name]
        if not self.has_signs or like.shape[1] % 8:
            return self[name][numbers]
        packed = _packed_signs(np.random.Philox(key=self._stream(name)), like.numel())
        chosen = packed[: like.numel() // 8].reshape(len(like), -1)[numbers.cpu().numpy()]
        return _signs(chosen.reshape(-1), like).view(len(numbers), -1)

    def _stream(self, name: str) -> int:
        return key(self._seed, self._probe, name)


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
        packed = _packed_signs(draw, num)[first : -(-stop // 8)]
        drawn = _signs(packed, like).view(-1)[start - 8 * first : max(0, stop - 8 * first)]
    else:
        drawn = torch.from_numpy(np.random.Generator(draw).standard_normal(num)[start:stop]).to(like)
    return drawn if len(drawn) == like.numel() else torch.nn.functional.pad(drawn, (0, like.numel() - len(drawn)))


def _packed_signs(draw: np.random.Philox, num: int) -> npt.NDArray[np.uint8]:
    """So many random bits and a few more, eight in a byte."""
    words: npt.NDArray[np.uint64] = draw.random_raw(-(-num // WORD))
    return words.astype("<u8", copy=False).view(np.uint8)


def _pieces(packed: npt.NDArray[np.uint8], like: torch.Tensor) -> Iterator[torch.Tensor]:
    """The signs of bytes, as many as `like` has entries, in pieces that share memory."""
    signs = np.empty((min(len(packed), PIECE // 8), 8), np.float32)
    for start in range(0, like.numel(), PIECE):
        num = min(PIECE, like.numel() - start)
        part = packed[start // 8 : -(-(start + num) // 8)]
        # No index is out of range; "clip" spares a copy that "raise" makes.
        _SIGNS_OF_BYTE.take(part, axis=0, out=signs[: len(part)], mode="clip")
        yield torch.from_numpy(signs).view(-1)[:num].to(like.dtype)


def _signs(packed: npt.NDArray[np.uint8], like: torch.Tensor) -> torch.Tensor:
    """The signs of bytes [n], [n, 8]; where a GPU makes them, a thirty-second part is sent."""
    if like.device.type == "cpu":
        return torch.from_numpy(_SIGNS_OF_BYTE.take(packed, axis=0)).to(like.dtype)
    bytes_there = torch.from_numpy(packed.astype(np.int32)).to(like.device)
    return torch.from_numpy(_SIGNS_OF_BYTE).to(like).index_select(0, bytes_there)
