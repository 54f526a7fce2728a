"""Memory that is kept between passes."""

import os
import platform
import subprocess
import sys

import pytest

OF_TORCH = "import torch; block = lambda: torch.ones(2**22)"
PLAIN = "block = lambda: b'1' * 2**24"  # Without the seconds that torch takes to import.
PASSES = """
import resource
from raysweep.allocator import keep_freed_memory

def faults_of_a_pass():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    blocks = [block() for _ in range(16)]  # Of 16 MiB: by default most go back to the kernel.
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

faults_of_a_pass()
print(faults_of_a_pass())
keep_freed_memory()
for _ in range(3):  # Aligned blocks do not fit at once where others were.
    faults_of_a_pass()
print(faults_of_a_pass())
"""


pytestmark = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries do not say what they keep")


def faults(block: str, **variables: str) -> tuple[int, int]:
    """Of a pass by default, and of one after `keep_freed_memory`."""
    said = subprocess.check_output([sys.executable, "-c", block + PASSES], text=True, env=os.environ | variables)
    by_default, kept = map(int, said.split())
    return by_default, kept


def test_a_pass_after_another_faults_no_pages_in():
    by_default, kept = faults(OF_TORCH)
    assert kept <= by_default / 100


def test_what_the_environment_says_of_freed_memory_stands():
    by_default, kept = faults(PLAIN, MALLOC_MMAP_THRESHOLD_=str(2**16))
    assert kept >= by_default / 2
