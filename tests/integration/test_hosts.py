"""Ranks on hosts of their own: how they reach each other, and what they hand on where the store is all they share."""

import json
import logging
import os
from pathlib import Path

import pytest
from hosts import Host, can_have_hosts, hosts, shared_extensions
from ranks import run_ranks
from tiny import free_port, recipe_of

from raysweep.plan import Stage
from raysweep.resources import Resources
from raysweep.runners.attempts import attempt, fetch_inputs, make
from raysweep.runners.processes import join_process_group, leave_process_group, make_worker
from raysweep.stages.pretrain import Pretrain
from raysweep.stages.tokenize import Tokenize
from raysweep.store import Store
from raysweep.worker import Worker


def rank_main(rank: int, hosts: list[str], port: int, url: str, spec: str, inputs: dict[str, str]) -> dict[str, str]:
    """One rank of a gang tries a wide stage; gives what the group has put into its environment."""
    resources, store = Resources(workers=len(hosts), zero_stage=2), Store(url)
    worker = make_worker(resources, rank=rank, world_size=len(hosts))
    join_process_group(worker, resources, hosts[0], port, hosts=hosts)
    stage = Stage(Pretrain.model_validate_json(spec), inputs)
    if rank == 0:
        store.work_dir(stage.id)
    assert fetch_inputs(stage, store) is None
    record = attempt(stage, store, worker)
    assert not hasattr(record, "cause"), record.log
    told = {name: os.environ[name] for name in ("LOCAL_RANK", "LOCAL_WORLD_SIZE", "GLOO_SOCKET_IFNAME")}
    leave_process_group()
    return told


def rank_here(rank: int, folder: str, *given) -> None:
    (Path(folder) / f"rank-{rank}").write_text(json.dumps(rank_main(rank, ["127.0.0.1"] * 2, *given)))


def rank_there(rank: int, places: list[Host], folder: str, env: dict[str, str], *given) -> None:
    host, told = places[rank], Path(folder)
    host.enter()
    os.environ.update(env)
    logging.basicConfig(level=logging.INFO, filename=told / f"{host.name}.log")
    # A host's ports are all free.
    found = rank_main(rank, [place.ip for place in places], 29500, *given)
    (told / f"{host.name}.json").write_text(json.dumps(found))


def run_gang(
    places: list[Host], told: Path, env: dict[str, str], url: str, stage: Stage
) -> list[tuple[dict[str, str], str]]:
    """One wide stage on a rank at each place; of each rank its environment, and what it has logged."""
    spec, inputs = stage.spec.model_dump_json(by_alias=True), dict(stage.inputs)
    run_ranks(rank_there, (places, str(told), env, url, spec, inputs))
    files = [told / place.name for place in places]
    return [(json.loads(Path(f"{each}.json").read_text()), Path(f"{each}.log").read_text()) for each in files]


@pytest.mark.slow
@pytest.mark.skipif(not can_have_hosts(), reason="only root may make hosts")
def test_two_hosts_hand_on_what_they_have_saved_to_two_others(grammar, tmp_path, monkeypatch):
    cache = tmp_path / "cache"
    cache.mkdir()
    env = shared_extensions() | {"XDG_CACHE_HOME": str(cache)}
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    recipe = recipe_of(grammar).with_(checkpoints=(6, 12))
    url, folder = f"local://{tmp_path}/url", str(tmp_path / "folder")
    tokens = Stage(Tokenize(corpus=grammar), {})
    halves = [Stage(Pretrain(recipe=recipe, seed=0, step=step), {"tokens": tokens.id}) for step in (6, 12)]
    for store in (url, folder):
        make(tokens, Store(store), Worker())
    with hosts() as network:
        first, second, third, fourth = (network.add([cache]) for _ in range(4))
        ranks = run_gang([first, second], tmp_path, env, url, halves[0])
        alone = {"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1", "GLOO_SOCKET_IFNAME": "cable0"}
        assert [told for told, _ in ranks] == [alone, alone]
        for _, logged in run_gang([third, fourth], tmp_path, env, url, halves[1]):
            assert "going on from step 6 of 12" in logged
    given = folder, halves[1].spec.model_dump_json(by_alias=True), dict(halves[1].inputs)
    run_ranks(rank_here, (str(tmp_path), free_port(), *given))
    here = [json.loads((tmp_path / f"rank-{rank}").read_text()) for rank in range(2)]
    assert [each["LOCAL_RANK"] for each in here] == ["0", "1"]
    over_hosts, on_one = (Store(store).get(halves[1].id) for store in (url, folder))
    assert over_hosts.files == on_one.files
    assert over_hosts.metrics == on_one.metrics
    Store(url).drop_state(halves[1].state_key)
    assert not list((tmp_path / "url").rglob("step-*"))
