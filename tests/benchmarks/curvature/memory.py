"""Peak of memory held by tensors, from the allocator's own events."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from pathlib import Path

from torch.profiler import ProfilerActivity, profile


def peak_of_tensors(function: Callable[[], object]) -> int:
    """Bytes at the peak, above those held before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        function()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    held = peak = 0
    for event in sorted((each for each in events if each.get("name") == "[memory]"), key=lambda each: each["ts"]):
        held += event["args"]["Bytes"]
        peak = max(peak, held)
    return peak
