"""Ids and run names of the shipped sweeps. A change re-runs everybody's finished work, or renames their runs: mean it.

To take a meant change over: python tests/golden/test_ids.py > tests/golden/ids.json
"""

import json
from dataclasses import replace
from pathlib import Path
from typing import Annotated

from raysweep.declared import Declared
from raysweep.docstrings import schema_of
from raysweep.space import load
from raysweep.spec import Neutral

ROOT = Path(__file__).parents[2]


def golden() -> dict[str, object]:
    space = load(ROOT / "search_spaces/quickstart.yaml")
    trials = [space.trial(point, seed) for point in space.points() for seed in space.declared.seeds]
    ids = sorted({stage.id for trial in trials for stage in trial.stages})
    return {"quickstart.yaml": ids, "runs": {"quickstart.yaml": space.run_name()}}


def test_quickstart_ids():
    assert golden() == json.loads(Path(__file__).with_name("ids.json").read_text())


def test_a_section_added_later_renames_no_run(tiny_space):
    class Later(Declared):
        notes: Annotated[str | None, Neutral(None)] = None

    fields = {name: getattr(tiny_space.declared, name) for name in Declared.model_fields}
    same, other = (replace(tiny_space, declared=Later(**fields, notes=notes)) for notes in (None, "x"))
    assert same.run_name() == tiny_space.run_name()
    assert other.run_name() != tiny_space.run_name()


def test_shipped_schema_is_the_programs():
    """To renew it: raysweep schema > search_spaces/schema.json."""
    shipped = json.loads((ROOT / "search_spaces/schema.json").read_text())
    assert shipped == schema_of(Declared)


def test_editors_can_explain_every_field():
    schema = schema_of(Declared)
    for name, spec in [("Declared", schema), *schema["$defs"].items()]:
        assert spec.get("description"), name
        for field, said in spec.get("properties", {}).items():
            assert said.get("description"), f"{name}.{field}: write a docstring under the field"


def test_shipped_sweeps_name_the_schema_for_editors():
    for path in (ROOT / "search_spaces").glob("*.yaml"):
        assert path.read_text().startswith("# yaml-language-server: $schema=./schema.json"), path


if __name__ == "__main__":
    print(json.dumps(golden(), indent=1))
