import os

import pytest
from tiny import free_port

from raysweep.errors import ClusterError
from raysweep.runners import ray_cluster
from raysweep.runners.ray_cluster import connect


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


@pytest.mark.parametrize(("mode", "warned"), [("disabled", True), ("token", False), ("", False)])
def test_a_ray_of_this_machine_without_a_token_is_warned_of(mode, warned, monkeypatch, caplog):
    for name in [name for name in os.environ if name.startswith(("RAY_", "TUNE_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setattr(os, "environ", os.environ | {"RAY_AUTH_MODE": mode})
    monkeypatch.setattr(ray_cluster, "_init", lambda **how: None)
    ray_cluster.start_ray()
    assert ("whoever is on this machine may run code as you" in caplog.text) == warned
