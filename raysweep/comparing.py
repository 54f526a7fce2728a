"""Learning to compare from a run or a table, and comparing two checkpoints by what was learnt."""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from raysweep.analysis.kept import of_mean, version_of, versions_of
from raysweep.data.tokenizers import load_tokenizer
from raysweep.document import Document, read_document
from raysweep.errors import DataError, RaysweepError, SpaceError, StageError
from raysweep.estimates import flops_of
from raysweep.events import Event, Report, StageFailed
from raysweep.flatter import Z95
from raysweep.overrides import COMMAND_LINE
from raysweep.plan import Trial
from raysweep.results import Results
from raysweep.runners.chain import run_chain
from raysweep.runners.gang import Gang
from raysweep.runners.journal import quiet_libraries
from raysweep.scores import Column, Result, by_tuning, checkpoint_metrics, column_name, with_families
from raysweep.space import check_fields
from raysweep.space import load as load_space
from raysweep.spec import canonical
from raysweep.stages.fetch import Fetch
from raysweep.store import Store
from raysweep.worker import ignore

if TYPE_CHECKING:
    import pandas as pd
    from transformers import PreTrainedTokenizerBase

    from raysweep.analysis.comparer import Reason
    from raysweep.analysis.comparer_files import IndicatorFile
    from raysweep.analysis.given_table import Roles
    from raysweep.analysis.learning import Learnt
    from raysweep.analysis.ranking import Ranking
    from raysweep.analysis.uncertainty import TaskNoise
    from raysweep.variants import SearchSpace


_MEASURED_BY = ("data", "sequence_length", "objective")
"""Of the pretrain section, what says how checkpoints that exist are measured."""


def learn_from_run(results: Results, folder: Path, *, without: Sequence[str] = ()) -> list[Learnt]:
    """A comparer of what checkpoints are ranked by and of the same of each family and task, saved in `folder`.

    Args:
        without: indicators to leave out, by name or beginning; see `indicators_named`.

    Raises:
        CompareError: if there is too little to learn from.
    """
    versions = versions_of(results.stages, results.columns)
    learnt = _learnt(results.ranking, results.checkpoints, results.columns, noise=results.noise, without=without)
    return _saved(learnt, folder, results.run.name, versions)


def learn_from_table(path: Path, roles: Roles, folder: Path, *, without: Sequence[str] = ()) -> list[Learnt]:
    """The same of a table's target; of a table that a run wrote, of what that run is ranked by.

    Args:
        without: indicators to leave out, by name or beginning; see `indicators_named`.

    Raises:
        CompareError: if there is too little to learn from.
        DataError: if the table is not what `roles` say.
    """
    from raysweep.analysis.given_table import take

    given = take(path, roles)
    learnt = _learnt(given.ranking(), given.rows, given.columns, noise=None, without=without)
    return _saved(learnt, folder, path.name, given.versions)


def _learnt(
    ranking: Ranking,
    table: pd.DataFrame,
    columns: Sequence[Column],
    *,
    noise: Mapping[str, TaskNoise] | None,
    without: Sequence[str],
) -> list[Learnt]:
    from raysweep.analysis.learning import indicators_named, learn_target, targets_of
    from raysweep.analysis.ranking import rank

    targets = targets_of(ranking, columns)
    more = [target for target in targets if target != ranking.target]
    rankings = [ranking, *(rank(table, columns=columns, target=target, noise=noise) for target in more)]
    unwanted = indicators_named(rankings, without)
    return [learn_target(each, others=targets[each.target], without=unwanted) for each in rankings]


def _saved(learnt: list[Learnt], folder: Path, learnt_from: str, versions: Mapping[str, IndicatorFile]) -> list[Learnt]:
    from raysweep.analysis.comparer_files import IndicatorFile, save

    needed = dict.fromkeys(indicator for each in learnt for indicator in each.comparer.indicators)
    save(
        folder,
        {each.tested.target: (each.comparer, each.tested.indicators.by_distance) for each in learnt},
        learnt_from=learnt_from,
        indicators={each: versions.get(each, versions.get(each.partition("/")[0], IndicatorFile())) for each in needed},
    )
    return learnt


@dataclass(frozen=True)
class Measured:
    """A checkpoint's indicators, of whatever origin it is."""

    name: str
    values: Mapping[str, float]
    """Column -> number."""
    versions: Mapping[str, str]
    """Column -> fingerprint of the stage that measured it."""
    seconds: Mapping[str, float]
    """Column -> worker time of that stage."""
    flops: Mapping[str, float | None]
    """Column -> FLOPs of that stage, by its own formula; None where the size of the model is not known."""

    def error(self, name: str) -> float:
        """Standard error of an indicator; NaN where none is recorded."""
        from raysweep.analysis.measure_errors import error_column, stderr

        errors = {each: self.values[column] for each in self.values if (column := error_column(each, self.values))}
        return float(stderr(name, self.values, errors))


def compare(
    names: tuple[str, str], *, comparers: Path, sweep: Path, store: Store, report: Report = ignore
) -> dict[str, Any]:
    """Which of two checkpoints fine-tunes better, by comparers that were learnt from others; a JSON document.

    Args:
        names: folders or hub ids of Hugging Face checkpoints, each measured with its own tokenizer.
        comparers: a folder that `learn_from_run` made.
        sweep: the sweep file that says how indicators are measured, and on what: that of the run learnt from.
        store: what was measured before is taken from it.

    Raises:
        CompareError: if a comparer cannot be loaded, its indicators are measured in another way here, or some of them
            are no one quantity for the two, whose vocabularies differ.
        RaysweepError: if the sweep file or a checkpoint cannot be used.
    """
    from raysweep.analysis.comparer import TOO_FAR
    from raysweep.analysis.comparer_files import check_versions, load, range_of

    contents, loaded = load(comparers)
    kinds = {name.partition("/")[0] for name in contents.indicators}
    space, trials = _planned(names, sweep)
    for trial in trials:
        check_versions(contents, _planned_versions(trial, contents.indicators, space.columns()))
    _check_vocabularies(names, trials, contents.indicators, space.columns())
    first, second = _measure(names, trials, space, store, kinds=kinds, report=report)
    for each in (first, second):
        check_versions(contents, each.versions)
    declared = _declared(space.columns())
    answers = []
    for comparer, file in zip(loaded, contents.comparers, strict=True):
        left, right = (np.array([each.values[name] for name in comparer.indicators]) for each in (first, second))
        distances = [comparer.distance(left), comparer.distance(right)]
        far = float(np.max(distances))  # NaN where no indicator of one has a value.
        tested = range_of(file, far)
        answers.append(
            {
                "target": comparer.target,
                "probability": comparer.probability(left, right) if far <= TOO_FAR else None,
                "distance": distances,
                "tested": asdict(tested) if tested else None,
                "reasons": [
                    asdict(reason) | {"against_direction": _is_against(reason, declared[reason.indicator])}
                    for reason in (() if math.isnan(far) else comparer.reasons(left, right))
                ],
            }
        )
    return {
        "first": names[0],
        "second": names[1],
        "learnt_from": contents.learnt_from,
        "unchecked": [name for name, each in contents.indicators.items() if not each.versions],
        "answers": answers,
        "cut_prompts": _cut_prompts(first, second),
        "seconds": {name: [first.seconds[name], second.seconds[name]] for name in contents.indicators},
        "flops": {name: [first.flops[name], second.flops[name]] for name in contents.indicators},
    }


def side_by_side(names: tuple[str, str], *, sweep: Path, store: Store, report: Report = ignore) -> dict[str, Any]:
    """What a sweep file's indicators say of two checkpoints, each by its declared direction; a JSON document.

    Without a comparer there is no probability, and nothing that weighs one indicator against another.

    Args:
        names: folders or hub ids of Hugging Face checkpoints, each measured with its own tokenizer.
        sweep: says what is measured, and on what; its fine-tuning is left out.
        store: what was measured before is taken from it.

    Raises:
        RaysweepError: if the sweep file or a checkpoint cannot be used.
    """
    from raysweep.analysis.objectives import is_of_tokens

    space, trials = _planned(names, sweep)
    # Fine-tuning is what they are to foretell.
    kinds = {stage.kind for trial in trials for stage in trial.stages} - {"sft"}
    first, second = _measure(names, trials, space, store, kinds=kinds, report=report)
    columns = {
        name: column
        for name, column in _declared(space.columns()).items()
        if column.metric.direction and name in first.seconds and name in second.seconds
    }
    one, other = (_tokenizer(trial).get_vocab() for trial in trials)
    left_out = [name for name, column in columns.items() if one != other and is_of_tokens(column)]
    said = []
    for name, column in columns.items():
        if name not in left_out:
            values, errors = ((first.values[name], second.values[name]), (first.error(name), second.error(name)))
            said.append(
                {
                    "indicator": name,
                    "first": values[0],
                    "second": values[1],
                    "first_stderr": errors[0],
                    "second_stderr": errors[1],
                    "lead": _lead(column, *values),
                    "for": _side(_lead(column, *values), math.hypot(*errors)),
                }
            )
    return {
        "first": names[0],
        "second": names[1],
        "learnt_from": None,
        "indicators": said,
        "of_other_vocabularies": left_out,
        "cut_prompts": _cut_prompts(first, second),
        "seconds": {name: [first.seconds[name], second.seconds[name]] for name in columns},
        "flops": {name: [first.flops[name], second.flops[name]] for name in columns},
    }


def _lead(column: Column, first: float, second: float) -> float:
    """By how much the first is better, as the column's direction is declared."""
    return (first - second) * (1 if column.metric.direction == "max" else -1)


def _side(lead: float, stderr: float) -> str:
    """`A`, `B` or `neither`: within 95 % of the error of a difference, if that is known, it may be either."""
    if math.isnan(lead) or lead == 0 or abs(lead) <= Z95 * stderr:
        return "neither"
    return "A" if lead > 0 else "B"


def _is_against(reason: Reason, column: Column) -> bool:
    """Whether what a comparer learnt of an indicator speaks for the one that is worse by its declared direction."""
    return column.metric.direction is not None and reason.logit * _lead(column, reason.first, reason.second) < 0


def _cut_prompts(first: Measured, second: Measured) -> list[dict[str, Any]]:
    """Few-shot scores of the two some of whose prompts did not fit."""
    import pandas as pd

    from raysweep.analysis.cut_prompts import cut_prompts

    return [asdict(each) for each in cut_prompts(pd.DataFrame([first.values, second.values]))]


def _planned(names: Sequence[str], sweep: Path) -> tuple[SearchSpace, list[Trial]]:
    """All that a sweep file says of each checkpoint. Raises RaysweepError if it, its data or one of them is no use."""
    quiet_libraries()
    document = read_document(sweep)
    given = document.data.get("pretrain", {})
    given = given if isinstance(given, dict) else {}
    wanted: Sequence[str] = _MEASURED_BY
    if more := given.keys() - {*_MEASURED_BY}:
        check_fields(sweep)
        # What a recipe trains by, each of its checkpoints says in its own objective.json.
        wanted = wanted if "from" in more else wanted[:2]
    if "objective" in wanted:
        _refuse_axes(document, wanted)
    taken = {name: given[name] for name in wanted if name in given}
    # Tokens of tags are for later phases; a checkpoint taken as it is has those that it has.
    if isinstance(data := taken.get("data"), dict):
        taken["data"] = {name: value for name, value in data.items() if name != "later_tags"}
    places = [str(Path(name).absolute()) if Path(name).is_dir() else name for name in names]
    if places[0] == places[1]:
        raise DataError(f"A and B are one checkpoint: {places[0]}")
    changes = {
        "pretrain": {"from": places[0], **taken},
        "sweep": {"pretrain.from": {"grid": places}},
        "search": {"name": "grid"},
        "seeds": [0],
        "replicates": None,
        "resources": {"workers": 1},
    }
    try:
        space = load_space(sweep, [f"{key}={json.dumps(value)}" for key, value in changes.items()])
    except RaysweepError as error:
        lines = dict.fromkeys(_where_given(line, sweep) for line in str(error).splitlines())
        raise type(error)("\n".join(lines)) from error
    return space, [space.trial({"pretrain.from": place}, 0) for place in places]


def _refuse_axes(document: Document, wanted: Collection[str]) -> None:
    """Raises SpaceError if an axis says how checkpoints are measured: no value of it is the one for A and B."""
    sweep = document.data.get("sweep")
    for name, axis in sweep.items() if isinstance(sweep, dict) else ():
        zipped = axis.get("zip") if isinstance(axis, dict) else None
        for path in zipped if isinstance(zipped, dict) else [name]:
            section, _, field = str(path).partition(".")
            if section == "pretrain" and field.partition(".")[0] in wanted:
                raise SpaceError(
                    f"{document.at(('sweep', name))}: compare measures A and B alike, and this axis has several "
                    f"values: leave it out, and give {path} the one that both are measured by"
                )


def _where_given(line: str, sweep: Path) -> str:
    """A finding on what was put into a sweep file, as one on A, on B, or on the file."""
    of = {"sweep.pretrain.from.grid.0": "A", "sweep.pretrain.from.grid.1": "B", "pretrain.from": "A"}
    for place, name in of.items():
        line = line.replace(f"{COMMAND_LINE}: {place}: ", f"{name}: ", 1)
    return line.replace(f"{COMMAND_LINE}: ", f"{sweep.name}: ", 1)


def _planned_versions(trial: Trial, indicators: Collection[str], columns: Sequence[Column]) -> dict[str, str]:
    """Indicator -> fingerprint of the stage that is to measure it; without those that none is to."""
    of = {stage.kind: version_of(canonical(stage.spec)) for stage in trial.stages}
    declared = _declared(columns)
    return {
        name: of_mean(of[kind], declared[name])
        for name in indicators
        if (kind := name.partition("/")[0]) in of and name in declared
    }


def _declared(columns: Sequence[Column]) -> dict[str, Column]:
    """By name, with what is derived from them."""
    from raysweep.analysis.derived import DERIVED

    return {column.name: column for column in (*columns, *(derived.column for derived in DERIVED))}


def _check_vocabularies(
    names: Sequence[str], trials: Sequence[Trial], indicators: Collection[str], columns: Sequence[Column]
) -> None:
    """Raises CompareError if two checkpoints with different vocabularies would be compared by losses of tokens."""
    from raysweep.analysis.comparer import CompareError
    from raysweep.analysis.objectives import is_of_tokens

    declared = _declared(columns)
    of_tokens = [name for name in indicators if name in declared and is_of_tokens(declared[name])]
    first, second = (_tokenizer(trial) for trial in trials)
    if of_tokens and first.get_vocab() != second.get_vocab():
        kinds = ",".join(dict.fromkeys(name.partition("/")[0] for name in of_tokens))
        raise CompareError(
            f"{names[0]} has a vocabulary of {len(first)} tokens and {names[1]} another, of {len(second)}: "
            f"{len(of_tokens)} of the comparer's {len(indicators)} indicators are of losses by token, which do not "
            f"compare over vocabularies, such as {of_tokens[0]}; learn one without them (--without {kinds})"
        )


def _tokenizer(trial: Trial) -> PreTrainedTokenizerBase:
    [source] = [stage.spec.source for stage in trial.stages if isinstance(stage.spec, Fetch)]
    return load_tokenizer(Path(source))


def _measure(
    names: Sequence[str],
    trials: Sequence[Trial],
    space: SearchSpace,
    store: Store,
    *,
    kinds: Collection[str],
    report: Report,
) -> list[Measured]:
    """Checkpoints, in this process, by the stages of some kinds alone. Raises StageError if a stage fails."""
    failures: list[str] = []

    def tell(event: Event) -> None:
        if isinstance(event, StageFailed):
            failures.append(f"{event.stage}: {event.cause}")
        report(event)

    measured = []
    gang = Gang(store, space.resources.of({}), report=tell)
    try:
        for name, trial in zip(names, trials, strict=True):
            for _leg in run_chain(_without_others(trial, kinds), gang, max_retries=0, report=tell):
                pass
            if failures:
                raise StageError(f"{name}: {failures[0]}")
            measured.append(_measured(name, trial, store, space.columns()))
    finally:
        gang.close()
    return measured


def _without_others(trial: Trial, kinds: Collection[str]) -> Trial:
    """The stages that make a checkpoint and its tokens, and of what is measured on it the wanted ones."""
    made = {stage.checkpoint for stage in trial.stages}
    return replace(
        trial,
        stages=tuple(
            stage for stage in trial.stages if stage.kind in kinds or stage.checkpoint is None or stage.id in made
        ),
        auto_lrs=frozenset(),
    )


def _measured(name: str, trial: Trial, store: Store, columns: Sequence[Column]) -> Measured:
    from raysweep.analysis.derived import with_derived

    records = {stage.id: record for stage in trial.stages if (record := store.get(stage.id))}
    results = [
        # What is left out counts as a task all the same: means are over tasks.
        Result(
            id=stage.id,
            kind=stage.kind,
            status="done" if stage.id in records else "missing",
            metrics=records[stage.id].metrics if stage.id in records else {},
            task=stage.task,
        )
        for stage in trial.stages
    ]
    values = with_derived(with_families(checkpoint_metrics(results), columns))
    by_kind = {record.kind: record for record in records.values()}
    by_column = {
        column_name(stage.kind, metric, task): records[stage.id]
        for stage in trial.stages
        if stage.id in records
        for task, metric, _ in by_tuning(records[stage.id].metrics, stage.task)
    }
    # What is derived is of the kind that its name begins with.
    of = {
        column: by_column.get(column, by_kind[kind])
        for column in values
        if (kind := column.partition("/")[0]) in by_kind
    }
    means = {column.name: column for column in columns if column.tasks}
    flops = flops_of(trial)
    return Measured(
        name,
        values,
        versions={
            column: of_mean(version_of(record.spec), means[column]) if column in means else version_of(record.spec)
            for column, record in of.items()
        },
        seconds={
            column: record.provenance["wall_seconds"] * record.provenance["world_size"] for column, record in of.items()
        },
        flops={column: flops.get(record.id) for column, record in of.items()},
    )
