"""Each file of cluster/ through a parser of its own kind; mistakes that are planted are found."""

import copy
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from clusters import CAN_UNSHARE
from metadata_service import MetadataService, metadata_service

CLUSTER = Path(__file__).parents[2] / "cluster"
KUBERAY = json.loads((Path(__file__).parents[1] / "data" / "kuberay.json").read_text())
SCRIPTS = ["slurm/raysweep.sbatch", "ssh/up.sh", "ray-up/spot.sh"]
KUBERNETES = "1.34"


def documents(name: str) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((CLUSTER / "kuberay" / name).read_text()))


def check_kubernetes(document: Mapping[str, Any]) -> None:
    """Raises ValidationError of jsonschema."""
    kubernetes_validate = pytest.importorskip("kubernetes_validate")
    if document["kind"] not in KUBERAY:
        kubernetes_validate.validate(document, KUBERNETES, strict=True)
        return
    jsonschema.Draft202012Validator(KUBERAY[document["kind"]]).validate(document)
    for template in templates(document["spec"]):
        pod = {"apiVersion": "v1", "kind": "PodTemplate", "template": template}
        kubernetes_validate.validate(pod, KUBERNETES, strict=True)


def templates(value: Any) -> Iterator[Mapping[str, Any]]:
    if isinstance(value, list):
        for item in value:
            yield from templates(item)
    elif isinstance(value, dict):
        for name, item in value.items():
            yield from [item] if name in ("template", "submitterPodTemplate") else templates(item)


@pytest.mark.parametrize("name", ["raycluster.yaml", "rayjob.yaml"])
def test_manifests_are_what_their_kinds_take(name):
    found = documents(name)
    assert {"NetworkPolicy"} <= {document["kind"] for document in found}
    for document in found:
        check_kubernetes(document)
    # What the claims are made of, in both.
    (ray,) = [document for document in found if document["kind"] in KUBERAY]
    spec = ray["spec"].get("rayClusterSpec", ray["spec"])
    assert spec["authOptions"] == {"mode": "token", "secretName": "ray-token"}
    assert spec["enableInTreeAutoscaling"]
    (policy,) = [document for document in found if document["kind"] == "NetworkPolicy"]
    selected = policy["spec"]["podSelector"]["matchLabels"]
    for template in templates(spec):
        assert selected.items() <= template["metadata"]["labels"].items()
        assert {"store", "shm"} <= {volume["name"] for volume in template["spec"]["volumes"]}


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("spec.enableInTreeAutoscaler", True),
        ("spec.authOptions.secret", "x"),
        ("spec.authOptions.mode", "tokens"),
        ("spec.headGroupSpec.rayStartParams.num-cpus", 0),
        ("spec.workerGroupSpecs.0.maxReplica", 3),
        ("spec.workerGroupSpecs.0.minReplicas", "0"),
        ("spec.workerGroupSpecs.0.template.spec.containers.0.resource", {}),
        ("spec.workerGroupSpecs.0.template.spec.volumes.1.emptyDir.mediun", "Memory"),
        ("spec.workerGroupSpecs.0.template.spec.terminationGracePeriodSeconds", "60"),
    ],
)
def test_a_misspelt_field_or_another_type_is_found(path, value):
    document = copy.deepcopy(documents("raycluster.yaml")[0])
    place: Any = document
    *parents, last = path.split(".")
    for name in parents:
        place = place[int(name)] if name.isdigit() else place[name]
    place[last] = value
    with pytest.raises(jsonschema.ValidationError):
        check_kubernetes(document)


@pytest.mark.parametrize("name", ["aws", "gcp", "local"])
def test_ray_up_takes_its_files(name):
    from ray.autoscaler._private.util import prepare_config, validate_config

    config = yaml.safe_load((CLUSTER / "ray-up" / f"{name}.yaml").read_text())
    validate_config(prepare_config(copy.deepcopy(config)))
    commands = [*config["head_start_ray_commands"], *config["worker_start_ray_commands"]]
    started = [line for line in commands if "ray start" in line]
    assert len(started) == 2
    # A job's `python` is then the one that raysweep is installed for.
    assert all(line.startswith("RAY_AUTH_MODE=token PATH=~/venv/bin:$PATH ") for line in started)
    for wrong in ({"idle_timeout_minute": 5}, {"idle_timeout_minutes": "5"}):
        with pytest.raises(jsonschema.ValidationError, match=next(iter(wrong))):
            validate_config(prepare_config(copy.deepcopy(config) | wrong))


@pytest.mark.parametrize("name", SCRIPTS)
def test_scripts_parse_and_have_no_finding(name):
    subprocess.run(["bash", "-n", CLUSTER / name], check=True)
    if (shellcheck := shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")) is None:
        pytest.skip("no shellcheck here")
    subprocess.run([shellcheck, CLUSTER / name], check=True)
    broken = (CLUSTER / name).read_text()
    for quoted in ('"$store"', '"$token"', '"$@"'):
        broken = broken.replace(quoted, quoted.strip('"'))
    assert subprocess.run([shellcheck, "-"], input=broken, text=True, capture_output=True).returncode == 1


class Stubs:
    """Programs of a cluster, as shell scripts that note what they are called with."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.log = folder, folder / "log"
        self.log.touch()
        (folder / "bin").mkdir()
        self.env = os.environ | {
            "PATH": f"{folder / 'bin'}:{os.environ['PATH']}", "HOME": str(folder / "home"), "LOG": str(self.log)
        }  # fmt: skip
        (folder / "home" / ".ray").mkdir(parents=True)

    def add(self, name: str, body: str) -> None:
        path = self.folder / "bin" / name
        path.write_text(f'#!/usr/bin/env bash\necho "{name} $*" >>"$LOG"\n{body}\n')
        path.chmod(0o755)

    def calls(self, name: str) -> list[str]:
        return [line for line in self.log.read_text().splitlines() if line.startswith(name + " ")]


def wait_for(condition: Any, seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.fixture
def spot(tmp_path) -> Iterator[tuple[Stubs, MetadataService]]:
    """A machine as `ray up` has set it up, whose `ray start --block` ends at SIGTERM only, with code 7; its service."""
    stubs = Stubs(tmp_path)
    (tmp_path / "home" / "venv").mkdir()
    (tmp_path / "home" / "venv" / "bin").symlink_to(tmp_path / "bin")
    (tmp_path / "home" / "raysweep").symlink_to(CLUSTER.parent)
    stubs.add(
        "ray",
        """[ "$1" = start ] || exit 0
trap 'echo "drains for $RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S s" >>"$LOG"; kill $!; exit 7' TERM
echo "Ray runtime started"
sleep 60 &
wait""",
    )
    with metadata_service() as service:
        stubs.env |= {"RAYSWEEP_METADATA_URL": service.url, "RAY_HEAD_IP": "10.0.0.1"}
        yield stubs, service


@pytest.mark.parametrize(("cloud", "seconds"), [("aws", 110), ("gcp", 25)])
def test_ray_drains_when_its_spot_machine_is_about_to_be_taken_back(cloud, seconds, spot):
    stubs, service = spot
    config = yaml.safe_load((CLUSTER / "ray-up" / f"{cloud}.yaml").read_text())

    def start() -> int:
        """As Ray's launcher does, but for SSH; it waits for each command to end."""
        for command in config["worker_start_ray_commands"]:
            ended = subprocess.run(["bash", "--login", "-c", f"({command})"], env=stubs.env, timeout=30)
            if ended.returncode:
                return ended.returncode
        return 0

    def ray() -> list[str]:
        return [line for line in stubs.log.read_text().splitlines() if not line.startswith("ray stop")]

    assert start() == 0
    wait_for(lambda: len(service.asked) > 2)
    assert ray() == ["ray start --address=10.0.0.1:6379 --block"]
    service.ends = True
    wait_for(lambda: len(ray()) == 2)
    assert ray()[1] == f"drains for {seconds} s"
    said = stubs.folder / "home" / "ray.log"
    assert "spot.sh: this machine is about to be taken back: Ray drains" in said.read_text()
    # Until it is gone, the autoscaler tries again.
    assert subprocess.run(["bash", CLUSTER / "ray-up" / "spot.sh", cloud, "ray"], env=stubs.env).returncode == 1
    assert len(ray()) == 2


def test_a_machine_without_metadata_keeps_its_ray_and_its_exit_code(spot):
    stubs, service = spot
    stubs.env["RAYSWEEP_METADATA_URL"] = service.url + "/elsewhere"
    watched = ["bash", CLUSTER / "ray-up" / "spot.sh"]
    node = subprocess.Popen([*watched, "aws", "ray", "start"], env=stubs.env)
    wait_for(lambda: len(service.asked) > 1)
    assert node.poll() is None
    node.terminate()  # As by its service manager.
    assert node.wait(timeout=10) == 7
    unknown = subprocess.run([*watched, "amazon", "ray"], env=stubs.env, capture_output=True, text=True)
    assert (unknown.returncode, unknown.stderr) == (2, "spot.sh: unknown cloud 'amazon'; known: aws, gcp\n")


@pytest.fixture
def slurm(tmp_path) -> Stubs:
    """Of two nodes. `raysweep run` works for $WORK seconds and ends with $CODE; cancelled, it saves and gives 143. The
    other node's part of a step goes on for $LINGER seconds after it, as its raylet waits for the head; without $UP Ray
    does not come up, and steps end with 0. Ray takes $STOPS seconds to stop, and $STARTS to start."""
    stubs = Stubs(tmp_path)
    stubs.env |= {"SLURM_JOB_ID": "42", "SLURM_JOB_NODELIST": "node-[a-b]", "SLURM_CPUS_ON_NODE": "8", "WORK": "0"}
    stubs.env |= {"SLURM_GPUS_ON_NODE": "4", "CODE": "0", "OVERSUBSCRIBE": "NO", "LINGER": "0", "UP": "yes"}
    stubs.env |= {"STOPS": "0", "STARTS": "0"}
    stubs.add("scontrol", 'case "$*" in *hostnames*) printf "node-a\\nnode-b\\n" ;; "show job"*) '
              'echo "   OverSubscribe=$OVERSUBSCRIBE Contiguous=0" ;; esac')  # fmt: skip
    # The first node's part of a step runs here: of symmetric-run, what stands after its `--`.
    stubs.add(
        "srun",
        """while [[ $1 == -* ]]; do shift; done
while [[ " $* " == *" -- "* ]]; do shift; done
[ -n "$UP" ] || exit 0
if [[ "$*" == *raysweep* ]]; then sleep "$STARTS"; fi
"$@"
code=$?
if [[ "$*" == *raysweep* ]]; then sleep "$LINGER"; fi
exit $code """,
    )
    stubs.add("ray", 'case "$1" in start) exec sleep 30 ;; stop) sleep "$STOPS" ;; esac')
    stubs.add(
        "raysweep",
        """if [ "$1" = cancel ]; then
  [ -e "$HOME/pid" ] || exit 2
  kill -TERM "$(cat "$HOME/pid")"
  while [ ! -e "$HOME/saved" ]; do sleep 0.1; done
  exit
fi
trap 'echo saved >>"$LOG"; touch "$HOME/saved"; exit 143' TERM
echo $$ >"$HOME/pid"
sleep "$WORK" &
wait $!
exit "$CODE" """,
    )
    return stubs


def sbatch(stubs: Stubs, **env: str) -> subprocess.Popen[str]:
    command = ["bash", str(CLUSTER / "slurm" / "raysweep.sbatch"), "s.yaml", "/shared", "r"]
    return subprocess.Popen(command, env=stubs.env | env, stderr=subprocess.PIPE, text=True)


def test_slurm_on_nodes_of_its_own_is_one_command(slurm):
    job = sbatch(slurm, CODE="1")
    assert job.wait(timeout=30) == 1, job.stderr and job.stderr.read()
    stop, call = slurm.calls("srun")
    assert "ray stop --force" in stop
    assert "--nodes=2 --ntasks-per-node=1" in call
    assert "ray symmetric-run --address node-a:20042 --min-nodes 2 --num-cpus 8 --num-gpus 4 -- " in call
    assert slurm.calls("raysweep") == ["raysweep run s.yaml --store /shared --run r --address auto"]
    assert slurm.calls("ray") == ["ray get-auth-token --generate", "ray stop --force"]
    assert not [call for call in slurm.calls("scontrol") if "requeue" in call]


def test_slurm_says_where_ray_has_not_come_up(slurm):
    job = sbatch(slurm, UP="")
    assert job.wait(timeout=30) == 1
    assert "Ray has not come up on node-a: the sweep was not begun" in job.stderr.read()
    assert not slurm.calls("raysweep")


@pytest.mark.parametrize("seconds", [{"STOPS": "3"}, {"STARTS": "60"}])
def test_slurm_goes_back_into_the_queue_where_nothing_has_begun(slurm, seconds):
    job = sbatch(slurm, **seconds)
    wait_for(lambda: slurm.log.exists() and bool(slurm.calls("srun")))
    time.sleep(1)
    job.send_signal(signal.SIGTERM)
    assert job.wait(timeout=30) == 143
    assert slurm.log.read_text().splitlines()[-1] == "scontrol requeue 42"
    assert not [call for call in slurm.calls("raysweep") if "run" in call.split()[1]]


@pytest.mark.parametrize("shared", [False, True])
def test_slurm_saves_on_the_signal_and_goes_back_into_the_queue(slurm, shared):
    job = sbatch(slurm, WORK="30", LINGER="90", OVERSUBSCRIBE="OK" if shared else "NO")
    wait_for((slurm.folder / "home" / "pid").exists)
    time.sleep(0.2)
    job.send_signal(signal.SIGTERM)
    assert job.wait(timeout=30) == 143
    lines = slurm.log.read_text().splitlines()
    assert lines[-1] == "scontrol requeue 42"
    assert lines.index("raysweep cancel r --store /shared") < lines.index("saved")
    if shared:
        other, head = sorted(call for call in slurm.calls("ray") if "start" in call)
        assert head == "ray start --head --port 20042 --temp-dir /tmp/ray-42 --block --num-cpus 8 --num-gpus 4"
        assert other.startswith("ray start --address node-a:20042 --block")
        assert "--address node-a:20042" in slurm.calls("raysweep")[0]
        assert not slurm.calls("ray stop")


# Of eight nodes that the controller may start when it likes, so that none has to answer.
SLURM_CONF = """
ClusterName=check
SlurmctldHost=localhost
SlurmUser=root
AuthType=auth/none
CredType=cred/none
StateSaveLocation={folder}
SlurmctldPidFile={folder}/pid
SelectType=select/cons_tres
SchedulerType=sched/builtin
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SuspendProgram=/bin/true
ResumeProgram=/bin/true
SuspendTime=300
NodeName=node[1-8] CPUs=96 RealMemory=1000000 State=CLOUD
PartitionName=all Nodes=ALL Default=YES State=UP
"""
# In a network of its own: a controller listens on all addresses. Names are looked up only where there is one that is
# not loopback's.
ASK_SLURM = """
hostname localhost && ip link set lo up && ip addr add 10.0.0.1/32 dev lo
slurmctld -D >"$SLURM_CONF.log" 2>&1 &
for _ in {1..600}; do scontrol ping | grep -q UP && break; sleep 0.1; done
for script in "$@"; do sbatch --test-only --nodes=4 --time=24:00:00 "$script" s.yaml /shared; done
kill %1; wait
"""


@pytest.mark.slow
@pytest.mark.skipif(not (CAN_UNSHARE and shutil.which("slurmctld")), reason="no Slurm, or no root, here")
def test_slurm_takes_the_script(tmp_path):
    (tmp_path / "slurm.conf").write_text(SLURM_CONF.format(folder=tmp_path))
    script = CLUSTER / "slurm" / "raysweep.sbatch"
    wrong = [tmp_path / "signal.sbatch", tmp_path / "option.sbatch"]
    for path, option, other in zip(wrong, ("TERM@120", "--requeue\n"), ("TREM@120", "--requeues\n"), strict=True):
        path.write_text(script.read_text().replace(option, other))
    done = subprocess.run(
        ["unshare", "--uts", "--net", "--fork", "--kill-child", "bash", "-c", ASK_SLURM, "-", script, *wrong],
        env=os.environ | {"SLURM_CONF": str(tmp_path / "slurm.conf")},
        capture_output=True,
        text=True,
        timeout=120,
    )
    found = [line for line in done.stderr.splitlines() if line.startswith("sbatch: ")]
    assert len(found) == 3 or found[3:] == ['sbatch: Try "sbatch --help" for more information'], done.stderr
    assert "using 384 processors on nodes node[1-4]" in found[0]  # All of four nodes: they are the job's alone.
    assert "Invalid --signal specification" in found[1]
    assert "unrecognized option '--requeues'" in found[2]


def test_slurm_says_what_it_needs(slurm):
    done = subprocess.run(
        ["bash", CLUSTER / "slurm" / "raysweep.sbatch"], env=slurm.env, capture_output=True, text=True
    )
    assert done.returncode != 0
    assert "usage: sbatch" in done.stderr


def test_ssh_starts_the_head_first_with_the_token_and_ends_what_it_started(tmp_path):
    stubs = Stubs(tmp_path)
    env = tmp_path / "venv"
    (env / "bin").mkdir(parents=True)
    stubs.env |= {"RAYSWEEP_ENV": str(env), "HOSTS": str(tmp_path / "hosts")}
    stubs.add("ssh", 'host=${@: -2:1}; mkdir -p "$HOSTS/$host"; HOME="$HOSTS/$host" bash -c "${@: -1}"')
    stubs.add("hostname", 'echo "10.0.0.1 172.17.0.1"')
    calls = 'echo "ray $* $RAY_AUTH_MODE ${PATH%%:*}" >>"$LOG"'
    starts = 'if [ "$1" = start ]; then echo "Ray runtime started"; sleep 60; fi'
    (env / "bin" / "ray").write_text(f"#!/usr/bin/env bash\n{calls}\n{starts}\n")
    (env / "bin" / "ray").chmod(0o755)
    up = [str(CLUSTER / "ssh" / "up.sh"), "up", "a", "b"]
    done = subprocess.run(up, env=stubs.env, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "--address 10.0.0.1:6379" in done.stdout
    wait_for(lambda: len(stubs.calls("ray start")) == 2)
    head, other = stubs.calls("ray start")
    with_it = f"--block token {env}/bin"  # Where a job finds its `python`.
    assert head == f"ray start --head --node-ip-address=10.0.0.1 --port=6379 --dashboard-host=127.0.0.1 {with_it}"
    assert other == f"ray start --address=10.0.0.1:6379 {with_it}"
    token = (tmp_path / "home" / ".ray" / "auth_token").read_text()
    sent = [tmp_path / "hosts" / host / ".ray" / "auth_token" for host in "ab"]
    assert [path.read_text() for path in sent] == [token, token]
    assert len(token) == 64
    assert {path.stat().st_mode & 0o077 for path in sent} == {0}
    assert token not in stubs.log.read_text()  # Arguments are seen by all users of a machine.
    pids = [int((tmp_path / "hosts" / host / ".ray" / "raysweep.pid").read_text()) for host in "ab"]
    down = [str(CLUSTER / "ssh" / "up.sh"), "down", "a", "b"]
    subprocess.run(down, env=stubs.env, check=True, timeout=60)
    wait_for(lambda: not [pid for pid in pids if Path(f"/proc/{pid}").exists()])
    assert subprocess.run([CLUSTER / "ssh" / "up.sh", "up"], env=stubs.env, capture_output=True).returncode == 2
