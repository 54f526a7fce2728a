"""A sweep as a job of a real Slurm on two nodes, ended by its signal on the way: does it save, and go on to its end?

    python tests/benchmarks/on_slurm.py [--shared] [FOLDER]

As root, with slurmctld and slurmd installed, `raysweep` and `ray` on the PATH, and control groups of version 1. Nodes
are namespaces of this machine with a slurmd each; their names stand in /etc/hosts meanwhile. `--shared`: nodes that are
not the job's alone, on which Ray is started by hand. Slurm begins a job again two minutes after it went back into the
queue.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from hosts import Host, hosts, shared_extensions
from tiny import TINY

SCRIPT = Path(__file__).parents[2] / "cluster/slurm/raysweep.sbatch"
SWEEP = TINY.replace("steps: 12", "steps: 2500").replace("[6, 12]", "[1250, 2500]")
CONF = """
ClusterName=check
SlurmctldHost=controller({ip})
SlurmUser=root
AuthType=auth/none
CredType=cred/none
StateSaveLocation={folder}/state
SlurmctldPidFile={folder}/controller.pid
SlurmdPidFile={folder}/%n.pid
SlurmdSpoolDir={folder}/%n
SelectType=select/cons_tres
SchedulerType=sched/builtin
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
MpiDefault=none
{nodes}
PartitionName=all Nodes=ALL Default=YES State=UP OverSubscribe={oversubscribe}
"""
# A host's /sys is its own, and slurmd does not start without control groups.
DAEMON = """
hostname {name}; mount -t tmpfs none /sys/fs/cgroup
for part in freezer memory cpuset cpu cpuacct devices; do
  mkdir "/sys/fs/cgroup/$part"; mount -t cgroup -o "$part" none "/sys/fs/cgroup/$part"
done
exec slurmd -D
"""
MAX_SECONDS = 900


def main() -> None:
    """Prints what the queue says of the job, and in the end its log."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path)
    parser.add_argument("--shared", action="store_true")
    given = parser.parse_args()
    home = given.folder or Path(tempfile.mkdtemp())
    own = [home / "cache", Path("/tmp/ray")]
    for folder in (*own, home / "state", home / "node1", home / "node2"):
        folder.mkdir(parents=True, exist_ok=True)
    (home / "sweep.yaml").write_text(SWEEP)
    # Nodes are the job's alone by its own --exclusive, which nothing on the command line takes back.
    (home / "job.sbatch").write_text(SCRIPT.read_text().replace("#SBATCH --exclusive\n" if given.shared else "\0", ""))
    with hosts() as network:
        nodes = {"node1": network.add(own), "node2": network.add(own)}
        with _slurm(home, network.ip, nodes, shared=given.shared) as env:
            _follow(home, env, ["--oversubscribe"] if given.shared else [])


@contextlib.contextmanager
def _slurm(home: Path, ip: str, nodes: dict[str, Host], *, shared: bool) -> Iterator[dict[str, str]]:
    """A controller and its nodes; gives the environment of commands."""
    lines = [f"NodeName={name} NodeAddr={host.ip} CPUs=2 RealMemory=8000" for name, host in nodes.items()]
    how = "YES" if shared else "EXCLUSIVE"
    (home / "slurm.conf").write_text(CONF.format(ip=ip, folder=home, nodes="\n".join(lines), oversubscribe=how))
    (home / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")
    env = {**os.environ, "SLURM_CONF": str(home / "slurm.conf"), "HOME": str(home), "OMP_NUM_THREADS": "1"}
    env |= {"XDG_CACHE_HOME": str(home / "cache"), **shared_extensions()}
    names = Path("/etc/hosts")
    before = names.read_text()
    named = {"controller": ip} | {name: host.ip for name, host in nodes.items()}
    names.write_text(before + "".join(f"\n{address} {name}" for name, address in named.items()) + "\n")
    uts = ["unshare", "--uts", "sh", "-c"]
    commands = [[*uts, "hostname controller; exec slurmctld -D"]]
    commands += [[*host.command, *uts, DAEMON.format(name=name)] for name, host in nodes.items()]
    with (home / "slurm.log").open("w") as log:
        daemons = [subprocess.Popen(command, env=env, stdout=log, stderr=log) for command in commands]
    try:
        yield env
    finally:
        for daemon in daemons:
            daemon.kill()
            daemon.wait()
        names.write_text(before)


def _follow(home: Path, env: dict[str, str], more: list[str]) -> None:
    def said(*command: str) -> str:
        return subprocess.run(command, env=env, cwd=home, capture_output=True, text=True).stdout.strip()

    began = time.monotonic()
    while "idle 2" not in said("sinfo", "--noheader", "--format=%t %D"):
        assert time.monotonic() < began + 60, (home / "slurm.log").read_text()[-3000:]
        time.sleep(1)
    print(said("sbatch", "--time=30:00", *more, "job.sbatch", str(home / "sweep.yaml"), str(home / "store")))
    began, before, log, is_signalled = time.monotonic(), "", "", False
    while state := said("squeue", "--noheader", "--format=%T"):
        assert time.monotonic() < began + MAX_SECONDS
        if state != before:
            print(f"{time.monotonic() - began:.0f} s: {state}", flush=True)
        log = "".join(path.read_text() for path in home.glob("raysweep-*.log"))
        if not is_signalled and "tokens/s" in log:
            print(f"{time.monotonic() - began:.0f} s: signalled", said("scancel", "--signal=TERM", "--batch", "1"))
            is_signalled = True
        before = state
        time.sleep(1)
    print(log)
    print([line for line in said("scontrol", "show", "job", "1").split() if line.startswith(("JobState", "Restarts"))])


if __name__ == "__main__":
    main()
