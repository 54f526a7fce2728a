"""Where neither Ray nor Optuna is installed, a sweep runs in one process, with its ranking and report."""

import json
import os
import subprocess
import sys

import pytest
from tiny import TINY

MAIN = """
import sys

class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("ray", "optuna"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Missing())
from raysweep.cli import main

sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.slow
def test_the_inline_runner_needs_neither_ray_nor_optuna(sweep_file, tmp_path):
    path = sweep_file(TINY.replace("{grid: [1e-2, 3e-3]}", "{grid: [1e-2]}"))
    command = [sys.executable, "-c", MAIN, "run", str(path), "--runner", "inline", "--json"]
    # As a user has it: DeepSpeed then looks for a device itself, and says on stdout that it found none.
    env = {name: value for name, value in os.environ.items() if name != "DS_ACCELERATOR"}
    given = {"capture_output": True, "text": True, "env": env | {"PYTHONPATH": os.pathsep.join(sys.path)}}
    done = subprocess.run([*command, "--store", str(tmp_path / "store")], **given)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)
    assert list(tmp_path.glob("store/runs/*/report.html"))
    # What rounding depends on is no part of an id, and stands in the record.
    for path in tmp_path.glob("store/stages/*/record.json"):
        how = json.loads(path.read_text())["provenance"]
        assert (how["compile"], how["zero_stage"], how["gradient_checkpointing"]) == (False, 0, False)
