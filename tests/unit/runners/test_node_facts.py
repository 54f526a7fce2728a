"""What nodes say of themselves, and what is said of nodes that do not go together."""

import json
import subprocess
import sys
import time
from dataclasses import replace

import pytest

from raysweep.runners.node_facts import GIB, NodeFacts, compare
from raysweep.runners.node_tasks import PACKAGES, code_digest, facts_here, interface_of

GOOD = NodeFacts(
    ip="10.0.0.1",
    interface="eth0",
    chosen_interfaces={},
    versions=dict.fromkeys(("python", *PACKAGES), "1.0"),
    code="a" * 64,
    gpus=("H100", "H100"),
    gpu_driver="570.1",
    is_token_asked=True,
    disk="/tmp/ray",
    free_disk=50 * GIB,
    total_disk=100 * GIB,
    free_shared_memory=8 * GIB,
    name="10.0.0.1",
    ray_gpus=2.0,
)
OTHER = replace(GOOD, ip="10.0.0.2", name="10.0.0.2")


def failed(*nodes: NodeFacts) -> dict[str, str]:
    return {check.name: check.message for check in compare(nodes) if not check.ok}


def test_nodes_that_agree_are_well():
    assert failed(GOOD, OTHER) == {}
    assert failed(replace(GOOD, ray_gpus=1.0), OTHER) == {}  # Others have their share of it.


@pytest.mark.parametrize(
    ("change", "name", "words"),
    [
        ({"versions": GOOD.versions | {"torch": "2.0"}}, "versions", "torch 1.0 on 10.0.0.1; 2.0 on 10.0.0.2"),
        ({"versions": GOOD.versions | {"raysweep": "missing"}}, "versions", "raysweep 1.0 on 10.0.0.1; missing on"),
        ({"code": "b" * 64}, "code", "raysweep's own files differ: aaaaaaaaaaaa on 10.0.0.1; bbbb"),
        ({"code": ""}, "code", "missing on 10.0.0.2"),
        ({"gpus": ("H100",)}, "gpus", "Ray counts 2 GPU.s., the driver 1"),
        ({"gpu_driver": "550.2"}, "gpus", "driver 570.1 on 10.0.0.1; 550.2 on 10.0.0.2"),
        ({"interface": ""}, "interfaces", "no interface has the node's IP"),
        ({"ip": "127.0.0.1"}, "interfaces", "by loopback"),
        ({"chosen_interfaces": {"NCCL_SOCKET_IFNAME": "docker0"}}, "interfaces", "NCCL_SOCKET_IFNAME is 'docker0'"),
        ({"clock_ahead_seconds": 20.0, "clock_error_seconds": 0.1}, "clocks", r"10.0.0.2 is \+20.0 s off"),
        ({"free_disk": GIB}, "disks", "/tmp/ray is 99% full"),
        ({"free_shared_memory": 2**26}, "shared memory", "0.06 GiB free in /dev/shm"),
        ({"is_token_asked": False}, "auth", "takes anybody who reaches it"),
    ],
)
def test_a_node_that_differs_is_named(change, name, words, monkeypatch):
    monkeypatch.delenv("RAY_AUTH_MODE", raising=False)
    found = failed(GOOD, replace(OTHER, **change))
    assert list(found) == [name]
    with pytest.raises(AssertionError, match=words):
        raise AssertionError(found[name])


def test_an_interface_among_several_or_left_out_is_right():
    for value in ("eth0,eth1", "=eth0", "eth", "^docker,lo"):
        assert failed(GOOD, replace(OTHER, chosen_interfaces={"NCCL_SOCKET_IFNAME": value})) == {}
    for value in ("=eth", "^eth", "ib"):
        assert list(failed(GOOD, replace(OTHER, chosen_interfaces={"NCCL_SOCKET_IFNAME": value}))) == ["interfaces"]


def test_a_clock_that_is_read_badly_is_no_finding():
    assert failed(GOOD, replace(OTHER, clock_ahead_seconds=20.0, clock_error_seconds=16.0)) == {}


def test_an_open_cluster_is_let_be_where_it_was_asked_for(monkeypatch):
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    assert failed(replace(GOOD, is_token_asked=False)) == {}


def test_the_facts_of_this_machine(tmp_path):
    started = time.monotonic()
    facts = NodeFacts(**facts_here("127.0.0.1", str(tmp_path)), name="here")
    assert facts.interface == interface_of("127.0.0.1") != ""
    assert facts.code == code_digest()
    assert len(facts.code) == 64
    assert "missing" not in facts.versions.values()
    assert 0 < facts.free_disk <= facts.total_disk
    assert interface_of("203.0.113.7") == ""
    assert time.monotonic() - started < 30


MEASURE = """
import json
import psutil
from raysweep.runners.node_tasks import Rank

rank = Rank("127.0.0.1", 0, 1, use_gpu=False)
port = rank.listen()
opened = [each.laddr for each in psutil.Process().net_connections("inet") if each.status == psutil.CONN_LISTEN]
seconds, interface = rank.reduce("127.0.0.1", port, 2**20)
print(json.dumps([port, opened, seconds, interface]))
"""


def test_links_are_measured_at_the_address_of_the_node_alone():
    done = subprocess.run([sys.executable, "-c", MEASURE], capture_output=True, text=True, check=True, timeout=120)
    port, opened, seconds, interface = json.loads(done.stdout)
    assert opened == [["127.0.0.1", port]]
    assert seconds > 0
    assert interface == interface_of("127.0.0.1")
