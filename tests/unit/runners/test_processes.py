"""What a process of a gang tells its libraries of its place."""

import os

import psutil
import pytest
from tiny import free_port

from raysweep.resources import Resources
from raysweep.runners.processes import (
    environment_of,
    interfaces_of,
    join_process_group,
    leave_process_group,
    stay_near,
)
from raysweep.worker import Worker

HOSTS = ["10.0.0.1", "10.0.0.1", "10.0.0.1", "10.0.0.2"]


@pytest.mark.parametrize(
    ("rank", "device", "local_rank", "on_host"),
    [(0, "cpu", "0", "3"), (2, "cpu", "2", "3"), (3, "cpu", "0", "1"), (2, "cuda:0", "0", "3")],
)
def test_a_rank_has_its_number_in_the_gang_and_on_its_host(rank, device, local_rank, on_host):
    told = environment_of(Worker(rank=rank, world_size=4, device=device), HOSTS)
    assert told == {"RANK": str(rank), "WORLD_SIZE": "4", "LOCAL_RANK": local_rank, "LOCAL_WORLD_SIZE": on_host}


def test_ranks_of_several_hosts_talk_on_the_interface_of_their_nodes_address():
    name, ip = next((name, each.address) for name, all_ in psutil.net_if_addrs().items() for each in all_)
    assert interfaces_of("10.0.0.1", own=ip) == {"GLOO_SOCKET_IFNAME": name, "NCCL_SOCKET_IFNAME": f"={name}"}
    # Behind a translated address: the libraries choose.
    assert interfaces_of("10.0.0.1", own="192.0.2.77") == {}


def test_ranks_of_one_host_stay_on_loopback():
    assert interfaces_of("127.0.0.1", own="127.0.0.1") == {"GLOO_SOCKET_IFNAME": "lo"}


def test_who_leaves_a_group_has_the_environment_of_before(monkeypatch):
    """Else gangs that its process then starts on other nodes would look for this one's rank 0 and interface."""
    monkeypatch.setenv("RANK", "7")
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    names = "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "GLOO_SOCKET_IFNAME"
    before = {name: os.environ.get(name) for name in names}
    join_process_group(Worker(zero_stage=1), Resources(zero_stage=1), "127.0.0.1", free_port())
    assert (os.environ["RANK"], os.environ["GLOO_SOCKET_IFNAME"]) == ("0", "lo")
    leave_process_group()
    assert {name: os.environ.get(name) for name in names} == before


@pytest.mark.parametrize(("told", "wanted"), [("1-3,900-901\n", {1, 2, 3}), ("900\n", None), ("", None), (None, None)])
def test_a_worker_runs_near_its_gpu_as_far_as_it_may(told, wanted, tmp_path):
    before = os.sched_getaffinity(0)
    (tmp_path / "0000:dc:00.0").mkdir()
    if told is not None:
        (tmp_path / "0000:dc:00.0" / "local_cpulist").write_text(told)
    try:
        stay_near("0000:dc:00.0", devices=tmp_path)
        assert os.sched_getaffinity(0) == (wanted & before if wanted and wanted & before else before)
    finally:
        for thread in os.listdir("/proc/self/task"):
            os.sched_setaffinity(int(thread), before)
