"""Gangs over hosts of their own, one of which is lost."""

from pathlib import Path

import pytest
from nodes import CAN_HAVE_NODES, events_in, finish, nodes, results_in, wait_for
from tiny import TRUNK

SWEEP = f"""\
{TRUNK}  steps: 600
  checkpoints: [300, 600]
resources: {{workers: 2, zero_stage: 2}}
"""


@pytest.mark.slow
@pytest.mark.skipif(not CAN_HAVE_NODES, reason="only root may make hosts of its own")
def test_a_gang_over_two_hosts_goes_on_elsewhere_when_one_is_lost(s3, tmp_path, monkeypatch):
    """Their store is all that they share; on a folder, inside one host, the results are the same to the bit."""
    from s3_server import Server

    sweep, folder = tmp_path / "sweep.yaml", str(tmp_path / "store")
    sweep.write_text(SWEEP)
    with nodes(tmp_path) as cluster:
        server = Server(cluster.network.ip)
        cluster.env = dict(server.env)
        url = server.store("lost")
        _, lost = [cluster.add(num_cpus=1)[1] for _ in range(2)]
        events = tmp_path / "events"
        driver = cluster.start(sweep, url, events)
        wait_for(events, driver, "finished", kind="pretrain", step=300)
        wait_for(events, driver, "progress", step=320)
        cluster.cluster.lose(lost)
        before = len(events_in(events))
        cluster.add(num_cpus=2)
        finish(driver)
        steps = [event["step"] for event in events_in(events)[before:] if "num_steps" in event]
        # What the other rank had told before it noticed, and what was trained again: nothing before the state.
        assert min(steps) > 300
        assert 310 in steps
        finish(cluster.start(sweep, folder, tmp_path / "events of the folder"))
        for name, value in {**server.env, "XDG_CACHE_HOME": str(tmp_path / "here")}.items():
            monkeypatch.setenv(name, value)
        assert results_in(url) == results_in(folder)
        server.stop()
    assert not list(Path(folder).glob("partial/*.state"))
