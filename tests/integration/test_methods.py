"""Full fine-tuning and LoRA in one sweep: rates, scores, forgetting and errors of each, side by side."""

import pytest
from tiny import TINY, results_of

from raysweep.analysis.tables import columns_of
from raysweep.analysis.worth import own_stages, seconds_by_kind
from raysweep.costs import Size
from raysweep.errors import SpaceError
from raysweep.progress import Progress
from raysweep.resources import Resources
from raysweep.results import Results
from raysweep.runners import run_sweep
from raysweep.scores import FULL, method_of
from raysweep.space import load
from raysweep.train.optimizers import SGD

pytest.importorskip("peft", reason="PEFT, of the extra 'lora', is not installed")

FEW = (
    TINY.replace("checkpoints: [6, 12]", "checkpoints: [12]")
    .replace("flatness: {num_sequences: 16, batch_sequences: 2, min_units: 4, max_units: 8}\n", "")
    .replace("indicators: {kshot: 2, max_examples: 20}\n", "")
)
BOTH = FEW.replace(
    "  lrs: [1e-3, 1e-2]\n",
    """\
  forgetting: true
  methods:
    full: {name: full}
    lora: {name: lora, r: 2, lora_alpha: 4, lora_dropout: 0.1}
  lrs: {full: [1e-3, 1e-2], lora: [1e-2, 3e-2, 1e-1]}
""",
)
ONE = BOTH.replace("    lora: {name: lora, r: 2, lora_alpha: 4, lora_dropout: 0.1}\n", "").replace(
    ", lora: [1e-2, 3e-2, 1e-1]", ""
)


def finetunings(space, method):
    trial = space.trial({}, 0)
    return [stage for stage in trial.stages if stage.kind == "sft" and method_of(stage.task) == method]


def test_both_methods_of_a_sweep_stand_side_by_side(sweep_file, store):
    space = load(sweep_file(BOTH))
    run = run_sweep(space, store, runner="inline")
    assert run.failures() == []
    results = Results(run)
    table = results.checkpoints
    for name in ("", "lora/"):
        for column in ("score", "score_stderr", "lr", "lr_edge", "forgetting_nats_per_token", "num_seeds"):
            assert table[f"sft/{name}span/{column}"].notna().all(), column
        # The mean over one task.
        assert list(table[f"sft/{name}mean_score"]) == list(table[f"sft/{name}span/score"])
        assert table[f"sft/{name}mean_score_low"].notna().all()
        assert table[f"sft/{name}mean_forgetting_stderr"].notna().all()
    assert set(table["sft_optimizer"]) == {"adamw"}
    assert set(table["sft/span/lr"]) <= {1e-3, 1e-2}
    assert set(table["sft/lora/span/lr"]) <= {1e-2, 3e-2, 1e-1}
    assert (table["sft/lora/mean_forgetting"] != table["sft/mean_forgetting"]).all()
    declared = {column.name for column in columns_of(run)}
    assert {name for name in table if name.startswith("sft/")} <= declared
    assert {"sft/mean_score", "sft/lora/mean_score"} <= set(space.metric_names())

    ranking = results.ranking
    assert (ranking.target, ranking.tasks) == ("sft/mean_score", ("span", "lora/span"))
    assert {edge.task for edge in ranking.edges} == {
        name for name in ranking.tasks if table[f"sft/{name}/lr_edge"].ne(0).any()
    }
    assert not [item.indicator for item in ranking.associations if item.indicator.startswith("sft/")]
    spent, whole = seconds_by_kind(own_stages(ranking, results.stages)), seconds_by_kind(results.stages)
    assert 0 < spent.pop("sft") < whole.pop("sft")
    assert spent == whole
    page = results.write_report().read_text()
    for heading in ("by lora", "lora/span"):
        assert f"{heading},\N{NO-BREAK SPACE}%</button>" in page

    # Nothing is measured again, and full fine-tuning is the same stages with and without another method beside it.
    before = results_of(run)
    alone = run_sweep(load(sweep_file(ONE)), store, runner="inline")
    assert results_of(alone).items() <= before.items()


def test_a_sweep_of_lora_alone_ranks_by_it(sweep_file, store):
    space = load(sweep_file(FEW), ["sft.methods={lora: {name: lora, r: 2}}", "sft.lrs=auto"])
    events = []
    results = Results(run_sweep(space, store, runner="inline", show=events.append))
    assert results.failures == []
    # The rates of LoRA, and on until the best is inside.
    assert {1e-3, 3e-3, 1e-2} <= set(results.stages.query("kind == 'sft'")["lr"])
    assert (results.checkpoints["sft/lora/span/lr_edge"] == 0).all()
    assert results.ranking.target == "sft/lora/mean_score"
    assert results.ranking.gap is not None
    assert results.ranking.errors == "paired, one seed"
    # What the board shows as the run goes on.
    progress = Progress(space)
    for event in events:
        progress.take(event)
    assert progress.best(1)[0].score == results.ranking.best["sft/lora/mean_score"]


def test_a_plan_knows_what_adapters_save(sweep_file):
    space = load(sweep_file(BOTH))
    full, lora = (finetunings(space, method) for method in (FULL, "lora"))
    assert len(full) == 2
    assert len(lora) == 3
    assert {stage.id for stage in full} == {stage.id for stage in finetunings(load(sweep_file(ONE)), FULL)}
    size = Size(10**8, 12, 768, 12, inner_numbers=8192, vocab_size=32_000, num_bytes=0)
    by_full, by_lora = full[0].spec, lora[0].spec
    assert 0.6 < by_lora.training_flops(size) / by_full.training_flops(size) < 0.8
    assert by_lora.memory_bytes(size, Resources()) < 0.5 * by_full.memory_bytes(size, Resources())


@pytest.mark.parametrize(
    ("change", "found"),
    [
        ("{full: {name: lora}}", "full: {name: lora}: the name full is that of full fine-tuning, and of no other"),
        ("{span: {name: lora}}", "'span' is a task and a method: columns could not tell them apart; rename one"),
        ("{lora: {name: lora, target_modules: [query]}}", "has no linear layer 'query' inside; it has q_proj"),
        ("{lora: {name: lora, target_modules: query}}", "write a list of modules' names, such as"),
        ("{lora: {name: lora, rank: 4}}", "no field 'rank'"),
    ],
)
def test_what_cannot_be_is_said_before_anything_runs(sweep_file, change, found):
    with pytest.raises(SpaceError) as error:
        load(sweep_file(FEW), [f"sft.methods={change}"])
    assert found in str(error.value)


def test_one_rate_for_both_is_hardly_meant(sweep_file):
    assert not load(sweep_file(BOTH)).warnings
    [warning] = load(sweep_file(BOTH), ["sft.lrs=[3e-4]"]).warnings
    assert "sft.lrs: 0.0003 is the one rate of full, lora, and LoRA's best is often ten times" in warning


def test_the_optimizer_of_fine_tuning_is_declared(sweep_file):
    adamw, same, sgd = (
        finetunings(load(sweep_file(FEW), [f"sft.hyperparameters.optimizer={name}"] if name else []), FULL)[0]
        for name in ("", "adamw", "sgd")
    )
    assert adamw.id == same.id != sgd.id
    assert sgd.spec.hyperparameters.optimizer_at(0.5) == SGD(name="sgd", lr=0.5, weight_decay=0.01)
    assert adamw.spec.hyperparameters.optimizer_at(0.5).betas == (0.9, 0.999)


def test_rates_by_method_are_those_of_the_methods(sweep_file):
    with pytest.raises(SpaceError, match=r"lrs are by method, of full, lora; methods are full: give each its rates"):
        load(sweep_file(FEW), ["sft.lrs={full: [1e-3], lora: auto}"])
