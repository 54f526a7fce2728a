"""What a GPU can do at most, by the name that its driver gives it. To add one: a line of the table, with its source.

FLOP/s are the makers' for dense matrix products (no sparsity) of bfloat16 numbers summed in float32. Memory is what
they name it by, in 10^9 bytes; a driver reports up to 7 % more, about what its own context takes.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

# What a micro-batch costs beside its tokens, in tokens: kernel launches, and passes over the weights.
OVERHEAD_TOKENS_CPU, OVERHEAD_TOKENS_GPU = 48, 4096

# What has to be in a device's name, the particular before the general -> TFLOP/s, and GB of the smallest of its forms.
_GPUS = (
    ("B200", 2250.0, 180),  # NVIDIA DGX B200 datasheet: 36 PFLOP/s of eight, with sparsity.
    ("H100 PCIe", 756.0, 80),  # NVIDIA H100 datasheet (2023): 1,513 with sparsity.
    ("H100 NVL", 835.5, 94),  # NVIDIA H100 datasheet (2024): 1,671 with sparsity.
    ("H100", 989.4, 80),  # NVIDIA H100 datasheet, SXM: 1,979 with sparsity.
    ("H200", 989.4, 141),  # NVIDIA H200 datasheet, SXM: the H100's processor with other memory.
    ("GH200", 989.4, 96),  # NVIDIA GH200 datasheet: likewise; 96 or 144 GB.
    ("H800", 989.4, 80),  # The H100 with slower links.
    ("A100", 312.0, 40),  # NVIDIA A100 datasheet: all forms; 40 or 80 GB, as the name says.
    ("A800", 312.0, 40),  # The A100 with slower links.
    ("A40", 149.7, 48),  # NVIDIA A40 datasheet.
    ("A30", 165.0, 24),  # NVIDIA A30 datasheet.
    ("A10", 125.0, 24),  # NVIDIA A10 datasheet.
    ("L40S", 362.05, 48),  # NVIDIA L40S datasheet: 733 with sparsity.
    ("L40", 181.05, 48),  # NVIDIA L40 datasheet.
    ("L4", 121.0, 24),  # NVIDIA L4 datasheet: 242 with sparsity.
    ("RTX 4090", 165.2, 24),  # NVIDIA Ada architecture whitepaper, appendix A: half as fast where sums are in float32.
    ("RTX 3090", 71.0, 24),  # NVIDIA Ampere GA102 whitepaper, appendix A: likewise.
)


def peak_flops(device_name: str) -> float | None:
    """FLOP/s of a GPU at most, dense bfloat16; None if it is not in the table.

    Args:
        device_name: as by `torch.cuda.get_device_name`.

    >>> peak_flops("NVIDIA H100 80GB HBM3")
    989400000000000.0
    >>> peak_flops("NVIDIA H100 PCIe")
    756000000000000.0
    """
    row = _row(device_name)
    return 1e12 * row[0] if row else None


def memory_bytes(device_name: str) -> int | None:
    """Memory of a GPU: as its name says, else of the smallest that is called so; None if it is not in the table.

    Args:
        device_name: as by `torch.cuda.get_device_name`.

    >>> memory_bytes("NVIDIA A100-SXM4-80GB"), memory_bytes("A100"), memory_bytes("NVIDIA H200")
    (80000000000, 40000000000, 141000000000)
    """
    row, said = _row(device_name), re.search(r"\b(\d+) ?GB\b", device_name)
    # Of a GH200 480GB that is the host's.
    gigabytes = int(said[1]) if said and "GH200" not in device_name else row and row[1]
    return gigabytes * 10**9 if row and gigabytes else None


def _row(device_name: str) -> tuple[float, int] | None:
    words = f" {device_name.replace('-', ' ')} "
    return next(((peak, gigabytes) for name, peak, gigabytes in _GPUS if f" {name} " in words), None)


def known_gpus() -> tuple[str, ...]:
    """Names in the table."""
    return tuple(name for name, _, _ in _GPUS)


def host_memory_bytes(cgroups: Path = Path("/sys/fs/cgroup")) -> int:
    """Memory of this machine, or what the container that this process is in may have of it.

    Args:
        cgroups: where the system describes the container.
    """
    whole = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for name in ("memory.max", "memory/memory.limit_in_bytes"):  # Of versions 2 and 1.
        try:
            return min(whole, int((cgroups / name).read_text()))
        except (OSError, ValueError):  # There is none, or no limit: "max".
            continue
    return whole
