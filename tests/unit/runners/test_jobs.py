"""What is sent as a job, and what is refused before anything is."""

import importlib.util
import shlex
from dataclasses import replace
from pathlib import Path

import pytest

from raysweep.cli import main
from raysweep.errors import ClusterError, StoreError
from raysweep.runners import jobs
from raysweep.runners.jobs import Submission, _send, _sent_folder, submit


@pytest.fixture
def submission(tmp_path: Path) -> Submission:
    (tmp_path / "my sweep.yaml").write_text("name: x\n")
    return Submission("http://127.0.0.1:9", tmp_path / "my sweep.yaml", store="/shared/a b")


def test_the_id_is_that_of_what_is_sent(submission, tmp_path):
    assert submission.job_id.startswith("raysweep-my-sweep-")
    assert replace(submission, address="http://elsewhere:8265").job_id == submission.job_id
    for change in ({"store": "/shared/c"}, {"run": "r"}, {"overrides": ("seeds=[1]",)}):
        assert replace(submission, **change).job_id != submission.job_id
    before = submission.job_id
    submission.sweep.write_text("name: y\n")
    assert submission.job_id != before


def test_the_command_is_one_for_a_shell(submission):
    words = shlex.split(replace(submission, run="r", overrides=("a.b=[1, 2]",)).command("my sweep.yaml"))
    assert words[:5] == ["exec", "python", "-m", "raysweep", "run"]
    assert words[5:] == ["my sweep.yaml", "a.b=[1, 2]", "--store", "/shared/a b", "--run", "r"]


def test_the_sweep_file_goes_alone_or_in_its_folder(submission, tmp_path):
    (tmp_path / "data").touch()
    with _sent_folder(submission) as (folder, sweep):
        assert [path.name for path in folder.iterdir()] == [sweep] == ["my sweep.yaml"]
    with _sent_folder(replace(submission, working_dir=tmp_path)) as (folder, sweep):
        assert (folder, sweep) == (tmp_path, "my sweep.yaml")
    (tmp_path / "other").mkdir()
    with pytest.raises(ClusterError, match="is not in it"), _sent_folder(
        replace(submission, working_dir=tmp_path / "other")
    ):  # fmt: skip
        pass


def test_a_store_that_is_another_on_each_machine_is_refused(submission, capsys):
    with pytest.raises(StoreError, match="a URL, or an absolute folder that all nodes share"):
        submit(replace(submission, store="raysweep-store"))
    assert main(["submit", str(submission.sweep), "--address", submission.address]) == 2
    assert "a job needs --store" in capsys.readouterr().err


def test_what_is_missing_here_is_said(submission, monkeypatch):
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "aiohttp" else real(name))
    with pytest.raises(ClusterError, match=r"pip install 'raysweep\[submit\]'"):
        submit(submission)


class ComingUp:
    """A job server whose agent comes up after some tries."""

    def __init__(self, tries: int, says: str = "No available agent to submit job, please try again later.") -> None:
        self.tries, self.says = tries, says

    def submit_job(self, **job: object) -> None:
        self.tries -= 1
        if self.tries >= 0:
            raise RuntimeError(f"Request failed with status code 500: {self.says}")


def test_a_head_that_comes_up_is_waited_for_and_no_other_refusal(monkeypatch):
    monkeypatch.setattr(jobs, "POLL_SECONDS", 0.0)
    _send(server := ComingUp(2), submission_id="x")
    assert server.tries == -1
    with pytest.raises(RuntimeError, match="no such runtime"):
        _send(ComingUp(2, "no such runtime"), submission_id="x")
    monkeypatch.setattr(jobs, "AGENT_SECONDS", 0.0)
    with pytest.raises(RuntimeError, match="No available agent"):
        _send(ComingUp(10**9), submission_id="x")
