"""What a record says of the machine."""

import os
import subprocess
import sys

import pytest

# In a process of its own: in another one the heap may keep what is freed, as our setting of the allocator has it.
PEAKS = """
import time
import numpy as np
from raysweep.provenance import count_peak_memory_anew, provenance
from raysweep.worker import Worker

def peak():
    return provenance(started=time.time(), finished=time.time(), worker=Worker())["peak_memory_bytes"]

large = np.ones(2**25)
before = peak()
assert before >= large.nbytes
del large
count_peak_memory_anew("cpu")
assert peak() < before - 2**27
held = np.ones(2**24)
assert peak() >= held.nbytes
"""


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="this system does not count anew")
def test_peak_memory_is_that_of_the_stage_and_not_of_those_before_it():
    subprocess.run([sys.executable, "-c", PEAKS], check=True, timeout=60)
