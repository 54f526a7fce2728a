"""What a GPU can do at most, by the name that its driver gives it. To add one: a line of the table, with its source.

Figures are the makers' for dense matrix products (no sparsity) of bfloat16 numbers summed in float32.
"""

from __future__ import annotations

# What has to be in a device's name, the particular before the general -> TFLOP/s.
_PEAKS = (
    ("B200", 2250.0),  # NVIDIA DGX B200 datasheet: 36 PFLOP/s of eight, with sparsity.
    ("H100 PCIe", 756.0),  # NVIDIA H100 datasheet (2023): 1,513 with sparsity.
    ("H100 NVL", 835.5),  # NVIDIA H100 datasheet (2024): 1,671 with sparsity.
    ("H100", 989.4),  # NVIDIA H100 datasheet, SXM: 1,979 with sparsity.
    ("H200", 989.4),  # NVIDIA H200 datasheet, SXM: the H100's processor with other memory.
    ("GH200", 989.4),  # NVIDIA GH200 datasheet: likewise.
    ("H800", 989.4),  # The H100 with slower links.
    ("A100", 312.0),  # NVIDIA A100 datasheet: all forms.
    ("A800", 312.0),  # The A100 with slower links.
    ("A40", 149.7),  # NVIDIA A40 datasheet.
    ("A30", 165.0),  # NVIDIA A30 datasheet.
    ("A10", 125.0),  # NVIDIA A10 datasheet.
    ("L40S", 362.05),  # NVIDIA L40S datasheet: 733 with sparsity.
    ("L40", 181.05),  # NVIDIA L40 datasheet.
    ("L4", 121.0),  # NVIDIA L4 datasheet: 242 with sparsity.
    ("RTX 4090", 165.2),  # NVIDIA Ada architecture whitepaper, appendix A: half as fast where sums are in float32.
    ("RTX 3090", 71.0),  # NVIDIA Ampere GA102 whitepaper, appendix A: likewise.
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
    words = f" {device_name.replace('-', ' ')} "
    return next((1e12 * peak for name, peak in _PEAKS if f" {name} " in words), None)
