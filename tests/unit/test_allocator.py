"""Memory that is kept between passes."""

import platform
import subprocess
import sys

import pytest

PASSES = """
import resource
import torch
from raysweep.allocator import keep_freed_memory

def faults_of_a_pass():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    blocks = [torch.ones(2**22) for _ in range(16)]  # Of 16 MiB: by default most go back to the kernel.
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

faults_of_a_pass()
print(faults_of_a_pass())
keep_freed_memory()
for _ in range(3):  # Aligned blocks do not fit at once where others were.
    faults_of_a_pass()
print(faults_of_a_pass())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries do not say what they keep")
def test_a_pass_after_another_faults_no_pages_in():
    by_default, kept = map(int, subprocess.check_output([sys.executable, "-c", PASSES], text=True).split())
    assert kept <= by_default / 100
