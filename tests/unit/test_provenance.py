"""What a record says of the machine."""

import sys
import time

import numpy as np
import pytest

from raysweep.provenance import count_peak_memory_anew, provenance
from raysweep.worker import Worker


def _peak() -> int:
    return provenance(started=time.time(), finished=time.time(), worker=Worker())["peak_memory_bytes"]


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux counts anew")
def test_peak_memory_is_that_of_the_stage_and_not_of_those_before_it():
    large = np.ones(2**25)
    before = _peak()
    assert before >= large.nbytes
    del large
    count_peak_memory_anew("cpu")
    assert _peak() < before - 2**27
    held = np.ones(2**24)
    assert _peak() >= held.nbytes
