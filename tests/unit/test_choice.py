"""What `auto` in resources comes to: what costs least of what fits, told with its reason, and kept."""

import dataclasses
import json
import re

import pytest
from tiny import TINY

from raysweep.choice import GIB, Device, choose
from raysweep.cli import main
from raysweep.devices import host_memory_bytes, memory_bytes
from raysweep.errors import ClusterError, SpaceError
from raysweep.estimates import size_of
from raysweep.resources import Resources
from raysweep.runners.hardware import NodeMemory, smallest_device
from raysweep.space import load

LARGE = "{name: llama, hidden_size: 2048, num_layers: 18, num_heads: 16}"
HUGE = "{name: llama, hidden_size: 4096, num_layers: 32, num_heads: 32}"
SIZES = TINY.replace(
    "  pretrain.optimizer.lr: {grid: [1e-2, 3e-3]}",
    "  pretrain.optimizer.lr: {grid: [1e-2, 3e-3]}\n"
    f"  pretrain.model: {{grid: {{small: {{name: llama, num_heads: 2}}, large: {LARGE}, huge: {HUGE}}}}}",
).replace("batch_sequences: 8\n", "batch_sequences: 65536\n")
AUTO = "{gpus_per_worker: 1, workers: auto, zero_stage: auto, micro_batch_sequences: auto, gradient_checkpointing: auto"
BY = "resources: {by: pretrain.model, default: {gpus_per_worker: 1}, large: auto, huge: auto}\n"


def choice(sweep_file, text, gpu="H100", room=8, host=None, **more):
    space = load(sweep_file(text))
    device = Device(gpu, memory_bytes(gpu), room, num_sharing=8, host_bytes=host)
    return choose(space, space.declared.resources.by_variant, lambda resources: device, **more)


def test_each_part_gets_what_its_largest_training_needs(sweep_file):
    chosen = choice(sweep_file, SIZES + BY)
    parts = chosen.resources.parts
    assert parts[None] == Resources(gpus_per_worker=1)
    # A billion weights, of 16 bytes with their gradients and AdamW's state, fit beside some activations.
    assert parts["large"] == Resources(gpus_per_worker=1, micro_batch_sequences=parts["large"].micro_batch_sequences)
    # Seven billion do not: they are sharded over as few workers as hold them, in fine-tuning, too.
    huge = parts["huge"]
    assert (huge.workers, huge.fine_tuning) == (2, "wide")
    assert huge.zero_stage in (2, 3)
    large, told = chosen.lines
    assert large.startswith("resources.large: workers 1, zero_stage 0, gradient_checkpointing false, micro_batch")
    assert " of 74.5 GiB (H100); micro_batch_sequences " in large
    assert " would take " in large
    assert told.startswith("resources.huge: workers 2, ")
    space = load(sweep_file(SIZES + BY))
    for point in space.points():
        trial = space.trial(point, 0)
        if chosen.resources.part_of(point):
            trained = [stage.spec for stage in trial.stages if stage.spec.training]
            sizes = [spec.memory_bytes(size_of(trial), chosen.resources.of(point)) for spec in trained]
            assert max(sizes) <= memory_bytes("H100")


def test_one_gang_for_all_holds_the_largest(sweep_file):
    together = choice(sweep_file, SIZES + f"resources: {AUTO}, fine_tuning: auto}}\n")
    alone = choice(sweep_file, SIZES + BY)
    assert together.resources.default == alone.resources.parts["huge"]
    # Rates take no memory; were they crossed with the sizes, nothing else would come of it.
    without = SIZES.replace("  pretrain.optimizer.lr: {grid: [1e-2, 3e-3]}\n", "")
    assert choice(sweep_file, without + BY).resources == alone.resources


def test_gangs_that_share_a_gpu_are_of_one(sweep_file):
    """NCCL takes no two ranks of a gang on one GPU, so that more workers are no remedy."""
    text = SIZES + f"resources: {AUTO.replace('gpus_per_worker: 1', 'gpus_per_worker: 0.75')}}}\n"
    assert choice(sweep_file, text, "B200").resources.default.workers == 1
    with pytest.raises(ClusterError, match=r"workers 1, .*: .*raise gpus_per_worker to 1, or"):
        choice(sweep_file, text, "H100")


def test_what_is_said_is_not_chosen(sweep_file):
    text = SIZES + "resources: {gpus_per_worker: 1, workers: 8, zero_stage: 2, micro_batch_sequences: auto}\n"
    chosen = choice(sweep_file, text, "B200").resources.default
    assert (chosen.workers, chosen.zero_stage, chosen.gradient_checkpointing, chosen.fine_tuning) == (
        8,
        2,
        False,
        "split",
    )
    assert chosen.micro_batch_sequences < 65536 / 8


def test_where_nothing_fits_the_nearest_is_named(sweep_file):
    def said(resources):
        with pytest.raises(ClusterError) as error:
            choice(sweep_file, SIZES + f"resources: {resources}\n", "L4", room=2)
        return str(error.value)

    whole = said(f"{AUTO}, fine_tuning: auto}}")
    assert whole.startswith("resources: no choice of workers, zero_stage, gradient_checkpointing, micro_batch")
    assert "fits: the nearest, workers 2, zero_stage 3, " in whole
    assert "a worker has 22.4 (L4): take more workers, give them more memory, or lower the model's size" in whole
    assert "GiB for sft, and a worker has 22.4 (L4): leave fine_tuning to auto, too, take" in said(f"{AUTO}}}")


def test_what_plans_may_be_low_by_is_left_where_it_can_be(sweep_file):
    space = load(sweep_file(SIZES + BY))
    takes = {}
    for micro in (8192, 16384):
        setting = Resources(gpus_per_worker=1, micro_batch_sequences=micro, gradient_checkpointing=True)
        trial = next(space.trial(point, 0) for point in space.points() if point["pretrain.model"] == "large")
        trained = [stage.spec for stage in trial.stages if stage.spec.training]
        takes[micro] = max(spec.memory_bytes(size_of(trial), setting) for spec in trained)
    text = SIZES + BY.replace("huge: auto", "huge: {}").replace(
        "large: auto", "large: {gpus_per_worker: 1, micro_batch_sequences: auto, gradient_checkpointing: true}"
    )

    def chosen(num_bytes, text=text):
        space = load(sweep_file(text))
        device = Device("GPU", int(num_bytes), 1)
        made = choose(space, space.declared.resources.by_variant, lambda resources: device)
        return made.resources.parts["large"].micro_batch_sequences, made.lines[0]

    roomy, tight = chosen(takes[16384] / 0.89), chosen(takes[16384] / 0.91)
    assert (roomy[0], tight[0]) == (16384, 8192)
    assert roomy[1].endswith("; 10 % of it is left, as plans may be low by that")
    assert f"; micro_batch_sequences 16384 would take {takes[16384] / GIB:.1f}; 10 % of it is left" in tight[1]
    only = text.replace("micro_batch_sequences: auto", "micro_batch_sequences: 8192, zero_stage: auto")
    assert chosen(takes[8192] / 0.99, only)[1].endswith("; nothing leaves the 10 % by which plans may be low")


def test_what_fits_a_gpu_but_not_its_node_is_not_chosen(sweep_file):
    text = SIZES + BY.replace(", huge: auto", "")
    space = load(sweep_file(text))
    trial = next(space.trial(point, 0) for point in space.points() if point["pretrain.model"] == "large")
    copy = size_of(trial).weights_bytes
    (roomy,) = choice(sweep_file, text, host=2**40).lines
    assert roomy.startswith("resources.large: workers 1, ")
    twice = f"{2 * copy / GIB:.1f}"
    assert f" of 74.5 GiB (H100), {twice} of 119.6 of its node; " in roomy
    # Alone, a worker has the model twice as it saves; of two, each has it once.
    node = int(8 * (1.5 * copy + 2 * GIB) / 0.95)
    chosen = choice(sweep_file, text, host=node)
    assert chosen.resources.parts["large"].workers == 2
    (told,) = chosen.lines
    reason = (
        f"; workers 1 would take {twice} of its node, which has {1.5 * copy / GIB:.1f} for a worker; 10 % of it is left"
    )
    assert reason in told
    with pytest.raises(ClusterError) as error:
        choice(sweep_file, text, host=20 * GIB)
    assert re.search(
        rf"takes {copy / GIB:.1f} GiB of its node for pretrain, and a worker has \S+ \(H100\): let fewer workers "
        r"share a node \(max_concurrent, or more cpus_per_worker\), give it more memory, or lower the model's size$",
        str(error.value),
    )
    # Two gangs of one at once, in place of eight.
    few = text.replace("default: {gpus_per_worker: 1}", "default: {gpus_per_worker: 1, max_concurrent: 2}")
    assert choice(sweep_file, few, host=20 * GIB + int(2 * copy)).resources.parts["large"].workers == 1
    # Kept where it still fits, as on another machine of that kind; chosen anew for nodes with less.
    kept = json.loads(json.dumps(chosen.to_dict()))
    for host in (2**40, node - 2**20):
        assert choice(sweep_file, text, host=host, kept=kept).lines == chosen.lines
    kept = json.loads(json.dumps(choice(sweep_file, text, host=2**40).to_dict()))
    assert choice(sweep_file, text, host=node, kept=kept).lines == chosen.lines


def test_a_run_that_goes_on_keeps_its_choice(sweep_file):
    text = SIZES + BY
    first = choice(sweep_file, text)
    kept = json.loads(json.dumps(first.to_dict()))
    decisions = [dict(each, reason="as before") for each in kept["decisions"]]
    decisions[0]["chosen"]["micro_batch_sequences"] = 3
    again = choice(sweep_file, text, kept={"decisions": decisions})
    assert again.resources.parts["large"].micro_batch_sequences == 3
    assert again.lines == ("resources.large: as before", "resources.huge: as before")
    # On other devices, in too small a cluster, for other resources, or where the note is damaged: chosen anew.
    assert choice(sweep_file, text, "H200", kept=kept).lines == choice(sweep_file, text, "H200").lines
    assert choice(sweep_file, text, "B200", room=1, kept=kept).lines == choice(sweep_file, text, "B200", room=1).lines
    other = text.replace("gpus_per_worker: 1", "gpus_per_worker: 1, max_retries: 7")
    assert choice(sweep_file, other, kept={"decisions": decisions}).resources.parts["large"].micro_batch_sequences != 3
    decisions[0]["chosen"]["workers"] = "many"
    assert choice(sweep_file, text, kept={"decisions": [{"x": 1}, *decisions]}).resources == first.resources


def test_no_id_changes(sweep_file, tiny_space):
    for resources in ("auto", "{workers: auto}", "{by: pretrain.optimizer.lr, default: auto, 3e-3: {workers: 2}}"):
        space = load(sweep_file(TINY + f"resources: {resources}\n"))
        assert space.run_name() == tiny_space.run_name()
        assert [space.trial(point, 0) for point in space.points()] == [
            tiny_space.trial(point, 0) for point in tiny_space.points()
        ]


def test_nothing_runs_by_what_is_still_to_be_chosen(sweep_file):
    with pytest.raises(SpaceError, match=r"resources: zero_stage auto: raysweep plan and run choose it"):
        load(sweep_file(TINY + "resources: {zero_stage: auto}\n")).resources.of({})


def test_what_is_neither_a_value_nor_auto_is_refused(sweep_file):
    with pytest.raises(SpaceError, match=r"resources.workers: must be a whole number or auto, not the text"):
        load(sweep_file(TINY + "resources: {workers: automatic}\n"))
    with pytest.raises(SpaceError, match=r"resources.gpus_per_worker: must be a number, not the text"):
        load(sweep_file(TINY + "resources: {gpus_per_worker: auto}\n"))


def test_memory_that_a_worker_has():
    node = NodeMemory({"CPU": 16.0, "GPU": 2.0}, 128 * GIB, [("NVIDIA H100 80GB HBM3", 81559 * 2**20)] * 2)
    other = NodeMemory({"CPU": 16.0, "GPU": 1.0}, 64 * GIB, [("NVIDIA A100-SXM4-40GB", 40960 * 2**20)])
    head = NodeMemory({"CPU": 0.0}, 2 * GIB, [])
    one = Resources(gpus_per_worker=1)
    assert smallest_device([node, head], one) == Device("NVIDIA H100 80GB HBM3", 80 * 10**9, 2, 2, 128 * GIB)
    # The smallest GPU is on one node, the smallest share of a node's memory on the other.
    less = dataclasses.replace(node, host=100 * GIB + 2**20)
    assert smallest_device([less, other], one) == Device("NVIDIA A100-SXM4-40GB", 40 * 10**9, 3, 2, less.host)
    strange = dataclasses.replace(other, gpus=[("Graphics 9", 100 * 10**9)])
    assert smallest_device([strange], one).num_bytes == 93 * 10**9
    half = Resources(gpus_per_worker=0.5)
    assert smallest_device([node], half).room == 4
    assert smallest_device([node], half).worker_memory(half).device == 40 * 10**9
    assert smallest_device([node], half).worker_memory(half).host == pytest.approx((0.95 * 32 - 2) * GIB)
    plain = Resources(cpus_per_worker=4)
    device = smallest_device([node, other, head], plain)
    assert (device.num_bytes, device.room, device.num_sharing) == (64 * GIB, 8, 4)
    # One gang of two, where there is room for four workers.
    at_once = device.worker_memory(plain.with_(max_concurrent=1, workers=2)).device
    assert at_once / device.worker_memory(plain).device == pytest.approx(2, rel=0.1)
    with pytest.raises(ClusterError, match="no node with room for a worker tells the memory of its GPUs"):
        smallest_device([dataclasses.replace(node, gpus=[])], one)
    with pytest.raises(ClusterError, match="no node has room for a worker of 32 CPU and 0 GPU"):
        smallest_device([node], Resources(cpus_per_worker=32))


def test_a_container_has_what_it_is_given(tmp_path):
    whole = host_memory_bytes(tmp_path)
    (tmp_path / "memory.max").write_text("max\n")
    assert host_memory_bytes(tmp_path) == whole
    (tmp_path / "memory.max").write_text("1048576\n")
    assert host_memory_bytes(tmp_path) == 2**20


def test_a_plan_says_what_was_chosen(sweep_file, tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    plan = ["plan", str(sweep_file(SIZES + BY)), "--store", str(tmp_path / "store")]
    assert main([*plan, "--gpu", "H100", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert [line.split(":")[0] for line in document["choices"]] == ["resources.large", "resources.huge"]
    assert document["memory_bytes_per_worker"] <= memory_bytes("H100")
    assert not [warning for warning in document["warnings"] if warning.startswith("memory")]
    assert main([*plan, "--gpu", "H100"]) == 0
    assert document["choices"][0] in capsys.readouterr().out
    monkeypatch.setenv("PATH", str(tmp_path))  # Without nvidia-smi.
    assert main(plan) == 2
    assert "auto is chosen by the memory of a GPU, and there is none here: name it" in capsys.readouterr().err
    assert main(["plan", str(sweep_file(TINY + "resources: auto\n")), "--store", str(tmp_path / "store")]) == 0
    assert "resources: workers 1, zero_stage 0, gradient_checkpointing false, micro" in capsys.readouterr().out
