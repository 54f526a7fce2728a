"""Ids of the shipped sweeps. A change here re-runs everybody's finished work: it must be meant.

To take a meant change over: python tests/golden/test_ids.py > tests/golden/ids.json
"""

import json
from pathlib import Path

from raysweep.space import Declared, load

ROOT = Path(__file__).parents[2]


def ids_of(name: str) -> list[str]:
    space = load(ROOT / "search_spaces" / name)
    trials = [space.trial(point, seed) for point in space.points() for seed in space.declared.seeds]
    return sorted({stage.id for trial in trials for stage in trial.stages})


def test_quickstart_ids():
    want = json.loads(Path(__file__).with_name("ids.json").read_text())
    assert ids_of("quickstart.yaml") == want["quickstart.yaml"]


def test_shipped_schema_is_the_programs():
    """To renew it: raysweep schema > search_spaces/schema.json."""
    shipped = json.loads((ROOT / "search_spaces/schema.json").read_text())
    assert shipped == Declared.model_json_schema(by_alias=True)


def test_shipped_sweeps_name_the_schema_for_editors():
    for path in (ROOT / "search_spaces").glob("*.yaml"):
        assert path.read_text().startswith("# yaml-language-server: $schema=./schema.json"), path


if __name__ == "__main__":
    print(json.dumps({"quickstart.yaml": ids_of("quickstart.yaml")}, indent=1))
