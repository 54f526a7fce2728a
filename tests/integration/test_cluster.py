"""A cluster of two and three real nodes: what `doctor` sees there, and what `run` refuses."""

import json
import shutil
import threading
import time
from pathlib import Path

import pytest
from clusters import CAN_UNSHARE, RealCluster, real_cluster
from tiny import TINY

import raysweep
from raysweep.devices import host_memory_bytes
from raysweep.doctor import cluster_checks

pytestmark = [pytest.mark.slow, pytest.mark.ray]

LOOK = """
import json, os, sys
from raysweep.runners.cluster_checks import _alive, bandwidth, node_memories, quick_checks, reached, shared_store
from raysweep.runners.ray_cluster import connect
from raysweep.store import Store

connect()  # RAY_AUTH_MODE is not set, and the head asks for a token.
shared, hidden, url = map(Store, sys.argv[1:])
found = {"quick": quick_checks(shared), "hidden": [shared_store(hidden)], "url": [shared_store(url)]}
found["bandwidth"] = [bandwidth(num_bytes=2**20)]
found["closed"] = [reached(_alive(), "127.0.0.1", 9)]
found = {name: [check.to_dict() for check in checks] for name, checks in found.items()}
memory = [[node.host, node.free["CPU"]] for node in node_memories(on_cluster=True)]
print(json.dumps({"checks": found, "memory": memory}))
"""

WAIT = """
from raysweep.runners.ray_cluster import cluster_for, start_ray
from raysweep.resources import Resources

start_ray()
cluster_for(Resources(cpus_per_worker=2, max_node_wait_seconds=120))
"""
LOOK_AT_THREE = """
import json, sys
from raysweep.doctor import cluster_checks
from raysweep.store import Store

print(json.dumps([check.to_dict() for check in cluster_checks(Store(sys.argv[1])) if check.name != "all-reduce"]))
"""


@pytest.fixture(scope="module")
def hidden(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("hidden")


@pytest.fixture(scope="module")
def cluster(tmp_path_factory, hidden):
    """Two nodes; `hidden` is a folder of its own to the second one."""
    with real_cluster(tmp_path_factory.mktemp("home")) as cluster:
        cluster.add(hidden=hidden if CAN_UNSHARE else None)
        yield cluster


def test_two_nodes_are_looked_at(cluster: RealCluster, hidden, tmp_path):
    done = cluster.run(
        LOOK, str(tmp_path), str(hidden), f"local://{tmp_path}/url", env={"RAY_ADDRESS": cluster.address}
    )
    assert done.returncode == 0, done.stderr[-3000:]
    told = json.loads(done.stdout)
    found = {name: {check["name"]: check for check in checks} for name, checks in told["checks"].items()}
    assert told["memory"] == [[host_memory_bytes(), 1.0]] * 2
    assert [name for name, check in found["quick"].items() if not check["ok"]] == []
    assert list(found["quick"]) == [
        "versions",
        "code",
        "gpus",
        "interfaces",
        "clocks",
        "disks",
        "shared memory",
        "auth",
        "driver",
        "store",
    ]
    assert "each of 2 node(s) reads what the others write" in found["quick"]["store"]["message"]
    assert "takes nobody without its token" in found["quick"]["auth"]["message"]
    assert not found["closed"]["driver"]["ok"]
    assert found["closed"]["driver"]["message"].count("cannot reach 127.0.0.1:9 (") == 2
    assert found["url"]["store"]["ok"]
    assert found["bandwidth"]["all-reduce"]["ok"]
    assert "by gloo over 2 nodes" in found["bandwidth"]["all-reduce"]["message"]
    # Nothing is left in the stores.
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []
    if not CAN_UNSHARE:
        pytest.skip("nodes cannot have folders of their own here: the store that is not shared was not tried")
    assert not found["hidden"]["store"]["ok"]
    assert found["hidden"]["store"]["message"].count("does not see what") == 2


def test_a_sweep_on_a_store_that_is_not_shared_is_refused_in_seconds(cluster, hidden, tmp_path):
    if not CAN_UNSHARE:
        pytest.skip("nodes cannot have folders of their own here")
    (tmp_path / "tiny.yaml").write_text(TINY)
    started = time.monotonic()
    arguments = ["run", str(tmp_path / "tiny.yaml"), "--store", str(hidden), "--address", cluster.address]
    done = cluster.run("import sys; from raysweep.cli import main; sys.exit(main(sys.argv[1:]))", *arguments)
    assert done.returncode == 2
    assert "ClusterError: store: " in done.stderr
    assert "is not one store to all nodes" in done.stderr
    assert "Traceback" not in done.stderr
    assert time.monotonic() - started < 60


def test_a_node_with_other_code_and_another_interface_is_named(cluster, tmp_path):
    shutil.copytree(Path(raysweep.__file__).parent, tmp_path / "other" / "raysweep")
    (tmp_path / "other" / "raysweep" / "errors.py").open("a").write("# changed\n")
    env = {"PYTHONPATH": str(tmp_path / "other"), "GLOO_SOCKET_IFNAME": "nosuch0"}
    joining = threading.Timer(5.0, lambda: cluster.add(env=env, num_cpus=2))
    joining.start()
    # A node that is still to come is waited for.
    done = cluster.run(WAIT, env={"RAY_ADDRESS": cluster.address})
    assert done.returncode == 0, done.stderr[-3000:]
    assert "waiting for nodes: a gang of resources.workers = 1 needs 2 CPU" in done.stderr
    joining.join()
    done = cluster.run(LOOK_AT_THREE, str(tmp_path), env={"RAY_ADDRESS": cluster.address})
    assert done.returncode == 0, done.stderr[-3000:]
    found = {check["name"]: check for check in json.loads(done.stdout)}
    assert [name for name, check in found.items() if not check["ok"]] == ["code", "interfaces", "store"]
    assert "GLOO_SOCKET_IFNAME is 'nosuch0'" in found["interfaces"]["message"]
    assert found["store"]["message"] == "not looked at: see code"


def test_another_token_is_said_to_be_one(cluster, tmp_path):
    env = {"RAY_ADDRESS": cluster.address, "RAY_AUTH_TOKEN": "another-token"}
    (found,) = json.loads(cluster.run(LOOK_AT_THREE, str(tmp_path), env=env).stdout)
    assert not found["ok"]
    assert "auth_token of its head" in found["message"]


def test_where_nobody_listens_is_said_in_seconds(monkeypatch, store):
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:9")
    (found,) = cluster_checks(store)
    assert not found.ok
    assert "cannot be reached" in found.message
    monkeypatch.setenv("RAY_ADDRESS", "http://127.0.0.1:8265")
    assert "raysweep submit" in cluster_checks(store)[0].message
