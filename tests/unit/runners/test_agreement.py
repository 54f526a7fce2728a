"""A process of a gang on a node that does not go together with the driver's works on nothing."""

from dataclasses import replace

import pytest

from raysweep.errors import ClusterError
from raysweep.runners.agreement import Agreement
from raysweep.runners.gang import RankActor
from raysweep.runners.trainable import GangTrainable
from raysweep.runs import Run
from raysweep.store import Store


@pytest.fixture
def agreement(store: Store) -> Agreement:
    return Agreement.of_driver(Run.create(store, "r", sweep_text="x", identity="{}"))


def test_the_driver_agrees_with_itself(agreement, store, tmp_path):
    agreement.check(store, node="n")
    RankActor(store, agreement)
    # What lies at a URL is one to whoever reaches it.
    agreement.check(Store(f"local://{tmp_path}/elsewhere"), node="n")


def test_other_versions_other_code_and_another_store_are_named(agreement, store, tmp_path):
    other = replace(agreement, versions=agreement.versions | {"torch": "1.0"})
    with pytest.raises(ClusterError, match=r"node n has torch .*, not 1\.0: install the same"):
        other.check(store, node="n")
    with pytest.raises(ClusterError, match="node n has other files of raysweep"):
        replace(agreement, code="0").check(store, node="n")
    with pytest.raises(ClusterError, match=r"node n does not see run 'r' in .*elsewhere"):
        agreement.check(Store(tmp_path / "elsewhere"), node="n")


def test_no_rank_comes_to_work_there(agreement, tmp_path, tiny_space):
    elsewhere = Store(tmp_path / "elsewhere")
    with pytest.raises(ClusterError, match="does not see run"):
        RankActor(elsewhere, agreement)
    gang = object.__new__(GangTrainable)
    with pytest.raises(ClusterError, match="does not see run"):
        gang.setup({}, tiny_space, elsewhere.url, pruned={}, events=None, agreement=agreement)
