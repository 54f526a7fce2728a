"""`make gpu` without a GPU: a part alone, its rows kept, and not measured again."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def table(folder: Path, parts: str) -> subprocess.CompletedProcess:
    command = [sys.executable, str(ROOT / "tests/benchmarks/gpu"), "--to", str(folder), "--parts", parts]
    given = os.environ | {"DEVICE": "cpu", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, capture_output=True, text=True, env=given)


@pytest.mark.slow
def test_a_part_of_the_gpu_table_leaves_its_rows(tmp_path):
    first = table(tmp_path, "finetuning")
    assert first.returncode == 0, first.stderr
    rows = (tmp_path / "rows.jsonl").read_text()
    assert len(rows.splitlines()) == 2
    assert "failed" not in (tmp_path / "table.md").read_text()
    assert table(tmp_path, "fine").returncode == 0
    assert (tmp_path / "rows.jsonl").read_text() == rows
    unknown = table(tmp_path, "finetuning,decoding")
    assert unknown.returncode == 2
    assert "no part 'decoding'; there are throughput-1B" in unknown.stderr
