"""Peaks and memory by drivers' names: the particular form before the family, and nothing for the unknown."""

import pytest

from raysweep.devices import memory_bytes, peak_flops


@pytest.mark.parametrize(
    ("name", "tflops"),
    [
        ("NVIDIA H100 80GB HBM3", 989.4),
        ("NVIDIA H100 PCIe", 756.0),
        ("NVIDIA H100 NVL", 835.5),
        ("NVIDIA H200", 989.4),
        ("NVIDIA GH200 480GB", 989.4),
        ("NVIDIA A100-SXM4-80GB", 312.0),
        ("NVIDIA A10", 125.0),
        ("NVIDIA L4", 121.0),
        ("NVIDIA L40S", 362.05),
        ("NVIDIA GeForce RTX 4090", 165.2),
        ("NVIDIA A1000", None),
        ("Tesla V100-SXM2-32GB", None),
    ],
)
def test_a_peak_is_looked_up_by_name(name, tflops):
    assert peak_flops(name) == (None if tflops is None else pytest.approx(1e12 * tflops))


@pytest.mark.parametrize(
    ("name", "gigabytes"),
    [
        ("NVIDIA H100 80GB HBM3", 80),
        ("NVIDIA H100 NVL", 94),
        ("NVIDIA H200", 141),
        ("NVIDIA GH200 480GB", 96),
        ("NVIDIA A100-SXM4-40GB", 40),
        ("NVIDIA A100 80GB PCIe", 80),
        ("NVIDIA A1000", None),
        ("Tesla V100-SXM2-32GB", None),
    ],
)
def test_memory_is_looked_up_by_name(name, gigabytes):
    assert memory_bytes(name) == (None if gigabytes is None else gigabytes * 10**9)
