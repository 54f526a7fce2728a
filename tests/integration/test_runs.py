"""Whole sweeps: inline and on Ray, interrupted and gone on with, equal to the bit."""

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
from by_value import sent_by_value
from processes import OTHER_RANK, RANK_0, gang_workers
from tiny import LONGER, TINY, results_of

from raysweep.analysis.tables import stage_table
from raysweep.cli import main
from raysweep.errors import ClusterError, SpaceError, StoreError
from raysweep.estimates import ToWrite
from raysweep.resources import Resources
from raysweep.runners import run_sweep, tail
from raysweep.runners.cluster_checks import shared_store
from raysweep.runners.ray_cluster import cluster_for, start_ray
from raysweep.runners.room import Shape
from raysweep.runners.tune import _GangRequest
from raysweep.runs import Run
from raysweep.space import load
from raysweep.store import Store

DRIVER = """
import sys
from raysweep.cli import main
sys.exit(main(["run", sys.argv[1], "--store", sys.argv[2]]))
"""


def drive(sweep: Path, store: Path) -> subprocess.Popen[bytes]:
    log = (store.parent / "driver.log").open("ab")
    # A session of its own, as a shell gives a background job: killing the driver alone leaves the rest to Ray.
    command = [sys.executable, "-c", DRIVER, str(sweep), str(store)]
    return subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)


def wait_for(condition, *, seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "nothing came in time"
        time.sleep(0.05)


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Run:
    """The tiny sweep, run inline; to be left as it is."""
    folder = tmp_path_factory.mktemp("finished")
    (folder / "tiny.yaml").write_text(TINY)
    return run_sweep(load(folder / "tiny.yaml"), Store(folder / "store"), runner="inline")


@pytest.fixture
def copied(finished, store) -> Run:
    """That run in a store of this test's own."""
    shutil.copytree(finished.store.root, store.root, dirs_exist_ok=True)
    return Run.find(store, finished.name)


def test_inline_runs_every_stage(finished):
    assert finished.failures() == []
    found = results_of(finished)
    kinds = {stage_id.rsplit("-", 1)[0] for stage_id in found}
    assert kinds == {"tokenize", "pretrain", "heldout", "indicators", "flatness", "probe", "sft"}


def test_what_the_planner_chose_is_told_kept_and_recorded(sweep_file, store):
    text = TINY[: TINY.index("sweep:")] + "resources: auto\n"
    space = load(sweep_file(text))
    first, last = (stage.id for stage in space.trial({}, 0).stages if stage.kind == "pretrain")
    run = run_sweep(space, store, runner="inline")
    told = [event["message"] for event in run.events() if event["event"] == "note"]
    (line,) = [each for each in told if each.startswith("resources: zero_stage 0, gradient_checkpointing false, ")]
    assert line.endswith("nothing is cheaper; 12 % of it is left, as plans may be low by that")
    assert store.get(first).provenance["micro_batch_sequences"] is None
    # The same run goes on with what it chose, whatever would be chosen now.
    note = run.folder / "gangs.json"
    kept = json.loads(note.read_text())
    kept["decisions"][0]["chosen"]["micro_batch_sequences"] = 2
    note.write_text(json.dumps(kept))
    store.discard(last)
    again = run_sweep(load(sweep_file(text)), store, runner="inline")
    assert (again.name, again.gangs()) == (run.name, kept)
    assert store.get(last).provenance["micro_batch_sequences"] == 2


def test_what_fits_nowhere_is_refused_before_anything_runs(sweep_file, store, caplog, capsys, monkeypatch):
    huge = TINY.replace(
        "hidden_size: 16, num_layers: 1, num_heads: 2", "hidden_size: 16384, num_layers: 96, num_heads: 128"
    )
    lack = rf"GiB are free in {store.root}, and about [\d,]+\.\d are to be written: make room, or give another --store"
    with pytest.raises(StoreError, match=lack + r"; its disk has [\d,]+\.\d in all"):
        run_sweep(load(sweep_file(huge + "resources: auto\n")), store, runner="inline")
    # On a disk that could be freed, or may do as this is an estimate, that is told, and waited for once it is full.
    needed = ToWrite.of(load(sweep_file(huge)), store)
    monkeypatch.setattr(
        "raysweep.runners.disk_usage", lambda folder: SimpleNamespace(total=(needed.kept + needed.state) // 1.4)
    )
    no_gang = r"no choice of zero_stage, .* fits: the nearest, .* GiB for pretrain"
    with pytest.raises(ClusterError, match=no_gang):
        run_sweep(load(sweep_file(huge + "resources: auto\n")), store, runner="inline")
    assert re.search(lack, caplog.text)
    # Behind a URL, what is there is not known here.
    caplog.clear()
    monkeypatch.setattr("raysweep.runners.disk_usage", lambda folder: SimpleNamespace(total=0))
    with pytest.raises(ClusterError, match=no_gang):
        run_sweep(load(sweep_file(huge + "resources: auto\n")), Store("memory://elsewhere"), runner="inline")
    assert "are to be written" not in caplog.text
    assert main(["doctor", str(sweep_file(huge)), "--store", store.url]) == 2
    assert re.search(f"FAIL  store: .* {lack}", capsys.readouterr().out)
    assert store.finished_ids() == set()


def test_tensorboard_logs_hold_losses_and_scores(finished):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folders = sorted((finished.folder / "tensorboard").iterdir())
    assert [folder.name for folder in folders] == sorted(trial.trial for trial in finished.trials())
    log = EventAccumulator(str(folders[0])).Reload()
    assert {"pretrain/loss", "heldout/ppl", "flatness/hessian_trace", "sft/span/score"} <= set(log.Tags()["scalars"])


def test_a_store_on_a_url_runs_the_same(tiny_space, finished, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    remote = Store(f"memory://run-{tmp_path.name}")
    assert results_of(run_sweep(tiny_space, remote, runner="inline")) == results_of(finished)


@pytest.mark.parametrize(
    ("search", "asked"),
    [
        ("{scheduler: {name: asha, metric: heldout/ppl, mode: min}}", "search.scheduler asha"),
        ("{name: optuna, num_trials: 2, objectives: [{metric: heldout/ppl, mode: min}]}", "search.name optuna"),
    ],
)
def test_what_only_tune_runs_is_refused_inline(sweep_file, store, search, asked):
    space = load(sweep_file(f"search: {search}\n{TINY}"))
    with pytest.raises(SpaceError, match=f"^{asked} needs Ray Tune: leave --runner inline out"):
        run_sweep(space, store, runner="inline")


def test_inline_again_runs_nothing(tiny_space, finished, copied):
    events = []
    again = run_sweep(tiny_space, copied.store, runner="inline", show=events.append)
    assert results_of(again) == results_of(finished)
    assert not [event for event in events if event.event in ("started", "finished")]


def test_trials_of_an_earlier_version_are_not_counted_beside_those_of_now(sweep_file, store, monkeypatch):
    """The sweep file says the same, so the run is the same; what is filled in of a stage has another version."""
    untied = TINY.replace("num_heads: 2}", "num_heads: 2, tie_embeddings: false}")
    sweep = sweep_file(untied.replace("max_units: 8}", "max_units: 8, rescaled: true}"))
    monkeypatch.setattr("raysweep.stages.flatness.SYMMETRIES", 1)
    before = results_of(run_sweep(load(sweep), store, runner="inline"))
    monkeypatch.setattr("raysweep.stages.flatness.SYMMETRIES", 2)
    with monkeypatch.context() as patch:
        patch.setattr("raysweep.runners._tell_lack_of_room", refuse)
        with pytest.raises(StoreError, match="no room"):
            run_sweep(load(sweep), store, runner="inline")
    [run] = Run.all(store)
    assert results_of(run) == before  # What is refused takes nothing away.
    events = []
    again = run_sweep(load(sweep), store, runner="inline", show=events.append)
    assert again.name == run.name
    assert {event.kind for event in events if event.event == "started"} == {"flatness"}
    assert len(again.trials()) == 2  # Of two variants, each once.
    assert results_of(again).keys() != before.keys()


def refuse(space, store):
    raise StoreError("no room")


def test_only_what_an_edit_changed_runs(sweep_file, copied):
    edited = load(sweep_file(TINY.replace("lrs: [1e-3, 1e-2]", "lrs: [1e-3, 1e-2, 3e-2]")))
    events = []
    run = run_sweep(edited, copied.store, runner="inline", show=events.append)
    started = [event for event in events if event.event == "started"]
    assert {event.kind for event in started} == {"sft"}
    assert len(started) == 4  # two variants, two checkpoints
    assert run.name != copied.name


def test_altered_checkpoint_is_made_again_to_the_same_bits(tiny_space, store, copied):
    before = results_of(copied)
    stage_id = next(stage_id for stage_id in before if stage_id.startswith("pretrain"))
    weights = store.folder(stage_id) / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-8])
    events = []
    run = run_sweep(tiny_space, store, runner="inline", show=events.append)
    assert [event.stage for event in events if event.event == "started"] == [stage_id]
    assert results_of(run) == before


def test_divergence_is_an_outcome(sweep_file, store):
    # Without clipping, and with steps that leave the finite numbers.
    text = TINY.replace("lr: 1e-2}", "lr: 1e-2}\n  clip_norm: null").replace(
        "pretrain.optimizer.lr: {grid: [1e-2, 3e-3]}",
        "pretrain.optimizer: {grid: {tame: {name: adamw, lr: 1e-2}, wild: {name: sgd, lr: 1e30}}}",
    )
    run = run_sweep(load(sweep_file(text)), store, runner="inline")
    assert run.failures() == []
    statuses = [
        record.status
        for trial in run.trials()
        for stage in trial.stages
        if stage.kind == "pretrain" and (record := store.get(stage.id))
    ]
    assert sorted(statuses) == ["diverged", "done", "done"]
    events = []
    run_sweep(load(sweep_file(text)), store, runner="inline", show=events.append)
    assert not [event for event in events if event.event == "started"]


def test_a_stage_that_cannot_succeed_does_not_stop_the_sweep(sweep_file, store, tmp_path):
    # The data vanishes between loading and running: what the sweep file asked for was right.
    (tmp_path / "a.jsonl").write_text('{"text": "some words of text"}\n' * 200)
    (tmp_path / "b.jsonl").write_text('{"text": "other words of text"}\n' * 200)
    data = "{name: text, tokenizer: {name: bpe, vocab_size: 300}, domains: {a: {train: %s.jsonl, valid: %s.jsonl}}}"
    start, end = TINY.index("  data:"), TINY.index("  model:")
    text = TINY[:start] + f"  data: {data % ('a', 'a')}\n" + TINY[end : TINY.index("indicators:")]
    text = text.replace(
        "pretrain.optimizer.lr: {grid: [1e-2, 3e-3]}",
        f"pretrain.data: {{grid: {{a: {data % ('a', 'a')}, b: {data % ('b', 'b')}}}}}",
    )
    space = load(sweep_file(text))
    (tmp_path / "a.jsonl").unlink()
    run = run_sweep(space, store, runner="inline", fail_fast=True)
    assert [failure["kind"] for failure in run.failures()] == ["tokenize"]
    assert not list(store.records())
    run = run_sweep(space, store, runner="inline")
    failure = run.failures()[0]
    assert failure["kind"] == "tokenize"
    assert "a.jsonl" in failure["cause"]
    finished = {record.kind for record in store.records()}
    assert finished == {"tokenize", "pretrain", "heldout", "flatness"}


OF_A_RUN = {
    "driver.json", "events.jsonl", "identity.json", "planned.json", "columns.json", "sweep.yaml", "tensorboard",
    "trials.jsonl",
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.ray
def test_ray_after_kills_equals_ray_undisturbed(sweep_file, tmp_path, undisturbed):
    """Kill -9 of the driver, then of rank 1 in each kind of stage that both ranks work at, and of rank 0 in
    pretraining: the same tables to the bit, and nothing finished is repeated."""
    sweep, want = sweep_file(LONGER.replace("max_retries: 2", "max_retries: 4")), undisturbed
    broken = Store(tmp_path / "broken")
    driver = drive(sweep, broken.root)
    wait_for(lambda: len(broken.finished_ids()) >= 4)
    os.kill(driver.pid, signal.SIGKILL)
    driver.wait()
    # Nothing of Tune's, which quotes errors.
    assert {path.name for path in broken.root.glob("runs/*/[!.]*")} <= OF_A_RUN
    kept = {path: path.stat().st_mtime_ns for path in broken.root.glob("stages/*/record.json")}
    assert 4 <= len(kept) < len(want)

    [run] = Run.all(broken)
    to_hit = [("pretrain", OTHER_RANK), ("flatness", OTHER_RANK), ("sft", OTHER_RANK), ("pretrain", RANK_0)]
    killed = set()
    count = len(list(run.events()))
    driver = drive(sweep, broken.root)
    while to_hit and driver.poll() is None:
        # The newest: those of gangs that were replaced may take a moment to go.
        events = list(run.events())
        last = events[-1] if len(events) > count else {"event": ""}
        hits = [hit for hit in to_hit if last["event"] == "started" and last["kind"] == hit[0]]
        workers = gang_workers(driver.pid, hits[0][1])[-1:] if hits else []
        if not killed.issuperset(workers):
            os.kill(workers[0], signal.SIGKILL)
            to_hit.remove(hits[0])
            killed.update(workers)
            count = len(events)
        time.sleep(0.05)
    assert driver.wait(timeout=240) == 0
    assert to_hit == []
    assert (tmp_path / "driver.log").read_text().count("a trial goes on in another gang") == 4
    assert results_of(Run.all(broken)[0]) == want
    assert {path: path.stat().st_mtime_ns for path in kept} == kept


@pytest.mark.slow
@pytest.mark.ray
def test_optuna_and_asha_on_ray(sweep_file, store):
    plain = TINY[: TINY.index("indicators:")] + TINY[TINY.index("sft:") :].replace("lrs: [1e-3, 1e-2]", "lrs: [1e-2]")
    text = plain.replace("{grid: [1e-2, 3e-3]}", "{loguniform: [1e-4, 1e-1]}")
    search = """\
search:
  name: optuna
  num_trials: %d
  objectives: [{metric: sft/mean_score, mode: max}, {metric: flatness/hessian_trace, mode: min}]
  choose: {metric: flatness/hessian_trace, mode: min, within: {metric: heldout/ppl, mode: min}}
  scheduler:
    name: pareto_asha
    goals: [{metric: heldout/ppl, mode: min}, {metric: flatness/hessian_trace, mode: min}]
resources: {workers: auto, zero_stage: auto, max_concurrent: 1}
"""
    run = run_sweep(load(sweep_file(text + search % 3)), store, name="study")
    assert run.failures() == []
    assert any(str(event.get("message")).startswith("resources: workers 1, zero_stage 0: ") for event in run.events())
    assert len(run.trials()) == 3
    import optuna

    study = optuna.load_study(study_name="tiny", storage=f"sqlite:///{run.folder / 'study.db'}")
    assert len(study.trials) == 3
    states = {state: [trial for trial in study.trials if trial.state.name == state] for state in ("COMPLETE", "PRUNED")}
    assert len(states["PRUNED"]) == len(run.pruned()) == 3 - len(states["COMPLETE"])
    assert all(len(trial.values) == 2 for trial in states["COMPLETE"])
    # Both metrics were worse than another trial's at the first checkpoint.
    assert run.pruned()
    assert min(trial.system_attrs["constraints"][0] for trial in states["COMPLETE"]) < 0

    asha = plain.replace("{grid: [1e-2, 3e-3]}", "{grid: [1e-2, 3e-3, 1e-3, 1e-4]}")
    asha += """\
search: {scheduler: {name: asha, metric: heldout/ppl, mode: min, reduction_factor: 2}}
resources:
  by: pretrain.optimizer.lr
  default: {max_concurrent: 1}
  3e-3: {workers: 2, zero_stage: 2, fine_tuning: wide}
  1e-4: {workers: 2, zero_stage: 1}
"""
    run = run_sweep(load(sweep_file(asha)), store)
    pruned = run.pruned()
    assert pruned
    assert set(pruned.values()) == {6}
    # Each in a gang of its own size, and ranks of one gang in another way than those of the one before.
    table = stage_table(run)
    trained = table[(table["kind"] == "pretrain") & (table["step"] == 6)]
    ran = {
        lr: store.provenance(id) for lr, id in zip(trained["point.pretrain.optimizer.lr"], trained["id"], strict=True)
    }
    gangs = {lr: (each["world_size"], each["zero_stage"]) for lr, each in ran.items()}
    assert gangs == {1e-2: (1, 0), 3e-3: (2, 2), 1e-3: (1, 0), 1e-4: (2, 1)}
    tuned = table[(table["kind"] == "sft") & (table["step"] == 6)]
    workers = {
        (lr, (store.provenance(id) or {})["world_size"])
        for lr, id in zip(tuned["point.pretrain.optimizer.lr"], tuned["id"], strict=True)
    }
    assert workers == {(1e-2, 1), (3e-3, 2), (1e-3, 1), (1e-4, 1)}
    events = []
    run_sweep(load(sweep_file(asha)), store, show=events.append)
    assert not [event for event in events if event.event == "started"]
    assert run.pruned() == pruned


@pytest.mark.slow
@pytest.mark.ray
def test_a_gang_without_a_trial_takes_stages_of_a_busy_one(sweep_file, tmp_path, monkeypatch):
    """Of Optuna's, which a scheduler may stop: the same tables to the bit, by stages in another order."""
    text = (
        TINY.replace("epochs: 1", "epochs: 120").replace("checkpoints: [6, 12]", "").replace("1e-2, 3e-3]}", "1e-2]}")
    )
    text = text.replace("  lrs:", "  seeds: [0, 1, 2, 3, 4, 5, 6, 7, 8, 9]\n  lrs:")
    search = """\
search:
  name: optuna
  num_trials: 1
  objectives: [{metric: sft/mean_score, mode: max}]
  scheduler: {name: asha, metric: heldout/ppl, mode: min}
"""
    space, shared, nexts = load(sweep_file(text + search)), [], tail.Tail.next
    # Stages one by one, so that they outlast the start of a gang whatever the machine.
    monkeypatch.setattr(tail, "WORTH_SECONDS", 1.0)
    monkeypatch.setattr(tail, "SHARE_SECONDS", 0.1)
    monkeypatch.setattr(tail.Tail, "next", lambda *args: shared.append(nexts(*args)) or shared[-1])
    run = run_sweep(space, store := Store(tmp_path / "ray"))
    assert run.failures() == []
    assert results_of(run) == results_of(run_sweep(load(sweep_file(text)), Store(tmp_path / "inline"), runner="inline"))
    (trial,) = load(sweep_file(text)).trials()
    begun = [store.provenance(stage.id)["started"] for stage in trial.stages if stage.kind == "sft"]
    assert begun != sorted(begun)
    assert len([share for share in shared if share]) > 1
    import optuna

    (told,) = optuna.load_study(study_name="tiny", storage=f"sqlite:///{run.folder / 'study.db'}").trials
    assert told.state.name == "COMPLETE"


@pytest.mark.slow
@pytest.mark.ray
def test_workers_that_are_terminated_or_stopped_are_replaced(sweep_file, store, caplog, undisturbed):
    """SIGTERM to rank 1, which saves first; SIGSTOP of it in a wide and in a split stage, and of rank 0: same bits."""
    text = LONGER.replace("[1e-2, 3e-3]", "[1e-2]").replace("max_retries: 2", "max_retries: 4, max_silence_seconds: 10")
    to_hit = [
        ("progress", "pretrain", OTHER_RANK, signal.SIGTERM),
        ("progress", "pretrain", OTHER_RANK, signal.SIGSTOP),
        ("started", "sft", OTHER_RANK, signal.SIGSTOP),
        # Of whichever stage rank 1 had in work: rank 0 may have finished all others before rank 1 was missed.
        ("started", None, RANK_0, signal.SIGSTOP),
    ]
    hit: list[int] = []
    failed: list[str] = []
    saved: list[int] = []

    def show(event) -> None:
        if event.event == "failed":
            failed.append(event.cause)
        at = getattr(event, "at", None)
        if len(hit) == 1 and at and at.saved_step:
            saved.append(at.saved_step)
        # Not before the one before it has led to another gang, the first to one that goes on from what was saved.
        if len(hit) == 1:
            is_due = at is not None and at.step > max(saved, default=240)
        else:
            is_due = not hit or f"(process {hit[-1]}) gave no sign of life" in caplog.text
        if to_hit and is_due and event.event == to_hit[0][0] and to_hit[0][1] in (None, getattr(event, "kind", "")):
            _, _, name, number = to_hit.pop(0)
            # The newest process of that name: those of replaced gangs may take a moment to go.
            hit.append(max(gang_workers(os.getpid(), name)))
            os.kill(hit[-1], number)

    run = run_sweep(load(sweep_file(text)), store, show=show)
    assert to_hit == []
    assert len(set(hit)) == 4
    assert 0 < saved[0] < 120
    for process in hit[1:]:
        assert f"(process {process}) gave no sign of life for 10 s" in caplog.text
    assert [cause for cause in failed if "no sign of life" in cause]
    assert run.failures() == []
    assert results_of(run).items() <= undisturbed.items()


@pytest.mark.slow
@pytest.mark.ray
def test_the_cause_of_a_lost_gang_is_kept_and_no_secret(sweep_file, store, tmp_path, monkeypatch, capsys, caplog):
    """Neither the environment's nor an error's: not in the run, nor in `raysweep logs`, nor in what Ray keeps of it.
    And the first one ends a run that is to fail fast."""
    import ray

    from raysweep.runners import trainable

    planted = {"AWS_SECRET_ACCESS_KEY": "planted/aws+4f1c9a", "HF_TOKEN": "hf_planted5b2e", "X_API_KEY": "planted-77aa"}
    ray.shutdown()  # So that its processes have the environment, too.
    for name, value in planted.items():
        monkeypatch.setenv(name, value)
    run_chain = trainable.run_chain

    def fails(trial, gang, **how):
        if trial.point["pretrain.optimizer.lr"] == 3e-3:
            raise RuntimeError(f"401 of https://me:planted-password@host/?sig=planted-signature with {planted}")
        yield from run_chain(trial, gang, **how)

    def show(event) -> None:
        if event.event == "started" and event.kind == "pretrain":
            os.kill(max(gang_workers(os.getpid(), RANK_0)), signal.SIGKILL)

    monkeypatch.setattr(trainable, "run_chain", fails)
    resources = "resources: {max_retries: 0, max_concurrent: 1}\n"
    try:
        with sent_by_value(trainable):
            space = load(sweep_file(TINY[: TINY.index("flatness:")] + resources))
            run = run_sweep(space, store, show=show)
            fast = run_sweep(space, Store(tmp_path / "fast"), show=show, fail_fast=True)
        session = Path(ray._private.worker._global_node.get_session_dir_path())
    finally:
        ray.shutdown()
    assert len(fast.failures()) == 1
    assert "ended at the first failure, as asked" in caplog.text
    by_cause = {failure["cause"].split()[0]: failure for failure in run.failures()}
    assert by_cause.keys() == {"The", "401"}
    assert all(failure["stage"].startswith("gang-") for failure in by_cause.values())
    assert "its worker process has died" in by_cause["The"]["cause"]
    assert "class_name" in by_cause["The"]["log"]  # What Ray knows of it.
    assert "401 of https://me:***@host/?sig=***" in by_cause["401"]["cause"]
    for stage in ([], [by_cause["401"]["stage"]]):
        assert main(["logs", run.name, *stage, "--store", store.url]) == 0
    written = {path: path.read_bytes() for root in (store.root, session) for path in root.rglob("*") if path.is_file()}
    assert any("raylet" in path.name for path in written)
    written[Path("terminal")] = "".join(capsys.readouterr()).encode()
    for secret in (*planted.values(), "planted-password", "planted-signature"):
        assert [str(path) for path, content in written.items() if secret.encode() in content] == []


@pytest.mark.slow
@pytest.mark.ray
def test_a_trial_outlives_a_gang_whose_memory_did_not_come_back(sweep_file, store, monkeypatch, caplog):
    """Every gang counts as grown after its first trial, and no failure may be forgiven: still no trial is lost."""
    import ray

    from raysweep.runners import trainable

    ray.shutdown()
    monkeypatch.setattr(trainable, "MEMORY_SLACK", -(2**50))
    text = TINY[: TINY.index("flatness:")].replace("{grid: [1e-2, 3e-3]}", "{grid: [1e-2, 3e-3, 1e-3]}")
    try:
        with sent_by_value(trainable):
            run = run_sweep(load(sweep_file(text + "resources: {max_concurrent: 1, max_retries: 0}\n")), store)
    finally:
        ray.shutdown()
    assert run.failures() == []
    assert len(run.trials()) == 3
    results_of(run)
    assert caplog.text.count("a trial goes on in another gang") == 2
    assert caplog.text.count("a worker grew from") == 2


@pytest.mark.slow
@pytest.mark.ray
def test_more_than_the_cluster_has_is_refused(sweep_file, store):
    text = TINY + "resources: {workers: 64, gpus_per_worker: 1}\n"
    with pytest.raises(ClusterError, match=r"needs 64 CPU, 64 GPU; the cluster has .* 0 GPU"):
        run_sweep(load(sweep_file(text)), store)


JOIN = """
import sys
import ray

ray._raylet.GcsClient(address=sys.argv[1])
print("taken")
"""


@pytest.mark.slow
@pytest.mark.ray
def test_a_ray_of_this_machine_stays_on_it(store, monkeypatch, caplog):
    """It listens on loopback alone, behind its token; gangs are asked for on a node, and come to another if need be."""
    import ray
    from ray._private import ray_constants

    ray.shutdown()
    for name in ("RAY_ADDRESS", "RAY_worker_niceness", "RAY_AUTH_MODE"):
        monkeypatch.delenv(name, raising=False)
    try:
        assert start_ray() == "127.0.0.1"
        # A cluster that is connected to next has an address of its own.
        assert ray_constants.ENABLE_RAY_CLUSTER
        assert ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR not in os.environ
        assert caplog.text == ""
        # Of a Ray that somebody else started it is not known where gangs will be.
        assert start_ray() == ray.util.get_node_ip_address()
        # What it starts goes before other work as this process does.
        assert ray.get(ray.remote(lambda: os.nice(0)).remote()) == os.nice(0)
        processes = [psutil.Process(), *psutil.Process().children(recursive=True)]
        names, listening = set(), []
        for process in processes:
            with contextlib.suppress(psutil.NoSuchProcess):  # Some are short, and have ended since.
                names.add(process.name().strip())
                doors = [each.laddr.ip for each in process.net_connections("inet") if each.status == psutil.CONN_LISTEN]
                listening += [ip.removeprefix("::ffff:") for ip in doors]
        assert {"gcs_server", "raylet", "ray::RuntimeEnvAgent"} <= names
        assert len(listening) > 5
        assert set(listening) == {"127.0.0.1"}
        node = ray._private.worker._global_node
        join = [sys.executable, "-c", JOIN, node.gcs_address]
        stranger = subprocess.run(join, env=os.environ | {"RAY_AUTH_MODE": "disabled"}, capture_output=True, text=True)
        assert stranger.returncode == 1
        assert "AuthenticationError" in stranger.stderr
        assert " and has " in shared_store(store).message
        much = shared_store(store, to_write=ToWrite(kept=0, state=2**60))
        assert (much.ok, much.message.split(": ")[0]) == (False, "127.0.0.1")
        assert f"GiB are free in {store.root}, and about 1,073,741,824.0 are to be written: make room" in much.message
        for asked in (node.node_id, "0" * len(node.node_id)):
            request = _GangRequest(Shape(1, 1, 0))
            request.node = asked
            assert request == _GangRequest(Shape(1, 1, 0))  # So that a gang on any node takes its trial over.
            group = request.to_placement_group()
            ray.get(group.ready(), timeout=60)
            assert ray.util.placement_group_table(group)["bundles_to_node_id"] == {0: node.node_id}
            ray.util.remove_placement_group(group)
    finally:
        ray.shutdown()


@pytest.mark.slow
@pytest.mark.ray
def test_a_worker_that_no_node_can_hold_is_refused(monkeypatch):
    # Its processors are all there, but on two nodes: Ray would wait for ever.
    import ray
    from ray.cluster_utils import Cluster

    ray.shutdown()
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    try:
        cluster.add_node(num_cpus=1)
        cluster.wait_for_nodes()
        monkeypatch.setenv("RAY_ADDRESS", cluster.address)
        start_ray()
        cluster_for(Resources(workers=2, cpus_per_worker=1, max_node_wait_seconds=0))
        with pytest.raises(ClusterError, match=r"needs 2 CPU, 0 GPU; the cluster has 2 CPU.* on 2 node.*room for 0"):
            cluster_for(Resources(workers=1, cpus_per_worker=2, max_node_wait_seconds=0))
    finally:
        ray.shutdown()
        cluster.shutdown()


def test_a_gpu_and_a_half_is_refused():
    with pytest.raises(ValueError, match="whole number"):
        Resources(gpus_per_worker=1.5)
