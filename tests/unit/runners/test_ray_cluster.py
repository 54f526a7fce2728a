import os

import pytest
from tiny import free_port

from raysweep.errors import ClusterError
from raysweep.resources import Resources
from raysweep.runners import ray_cluster
from raysweep.runners.jobs import stop
from raysweep.runners.ray_cluster import Cluster, LostRoom, connect
from raysweep.runners.room import Gangs, Shape, View


def test_a_cluster_that_auto_stands_for_and_that_is_gone_is_refused_at_once(monkeypatch):
    port = free_port()
    monkeypatch.setattr("ray._private.services.find_gcs_addresses", lambda: {f"127.0.0.1:{port}"})
    monkeypatch.setattr("ray._private.services.find_bootstrap_address", lambda temp_dir: None)
    monkeypatch.setenv("RAY_ADDRESS", "auto")
    with pytest.raises(ClusterError, match=rf"Ray at '\S+:{port}' cannot be reached .*Connection refused"):
        connect()
    monkeypatch.setattr("ray._private.services.find_gcs_addresses", set)
    with pytest.raises(ClusterError, match="Ray at 'auto' cannot be joined: Could not find any running Ray instance"):
        connect()


@pytest.mark.parametrize("address", ["localhost", "head:many", "10.0.0.1:"])
def test_what_is_no_address_is_refused_at_once(address, monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", address)
    with pytest.raises(ClusterError, match=f"Ray at '{address}': an address is IP:PORT, .* or auto"):
        connect()
    with pytest.raises(
        ClusterError, match=f"job server at '{address}': its address is a URL, such as http://HEAD:8265"
    ):
        stop("job", address)


@pytest.mark.parametrize(("mode", "warned"), [("disabled", True), ("token", False), ("", False)])
def test_a_ray_of_this_machine_without_a_token_is_warned_of(mode, warned, monkeypatch, caplog):
    for name in [name for name in os.environ if name.startswith(("RAY_", "TUNE_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setattr(os, "environ", os.environ | {"RAY_AUTH_MODE": mode})
    monkeypatch.setattr(ray_cluster, "_init", lambda **how: None)
    ray_cluster.start_ray()
    assert ("whoever is on this machine may run code as you" in caplog.text) == warned


def test_a_run_whose_nodes_are_all_lost_says_so_and_ends(caplog):
    one, two = Resources(), Resources(workers=2)
    cluster = Cluster({each: Shape.of(each) for each in (one, two)}, may_grow=True)
    placed, nodes = {}, [{"CPU": 2.0}]
    gangs = Gangs(lambda: View({"a": {"CPU": 0.0}}, placed), max_concurrent=None, may_grow=True)
    now = [0.0]
    lost = LostRoom(lambda: View({}, placed), gangs, cluster, 0.0, nodes=lambda: nodes, clock=lambda: now[0])

    def look_later(seconds: float) -> None:
        now[0] += seconds
        lost.look()

    look_later(0.0)
    gangs.start("x", cluster.shapes[two])
    look_later(9000.0)  # A node could hold it: others are in its way, or it starts.
    nodes[:] = [{"CPU": 1.0}, {"CPU": 1.0}]
    placed[cluster.shapes[one]] = [{"b": 1}]
    look_later(9000.0)  # Another gang is at work.
    assert caplog.text == ""
    placed.clear()
    look_later(1.0)
    assert "none can start; waiting for 600 s: a gang of resources.workers = 2 needs 2" in caplog.text
    look_later(599.0)
    nodes.append({"CPU": 2.0})
    look_later(2.0)  # One came.
    nodes.pop()
    look_later(0.0)
    assert caplog.text.count("waiting for 600 s") == 2
    with pytest.raises(ClusterError, match=r"for 600 s: .* 2 node\(s\), with room for 1 .* inside one .*; what is"):
        look_later(601.0)
