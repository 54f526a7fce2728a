"""A trial as a chain of stages with content ids. Pure: no disk, no torch, no Ray."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import groupby
from typing import Any

from raysweep.data.corpora import Corpus
from raysweep.finetuning import Finetuning
from raysweep.objectives.causal_lm import CausalLM
from raysweep.objectives.families import Objective
from raysweep.scores import (
    Column,
    Result,
    by_tuning,
    checkpoint_metrics,
    finetuning_runs,
    means_of,
    method_of,
    open_sides,
    pooled_examples,
    tuning_name,
)
from raysweep.spec import Metric, fingerprint
from raysweep.stages.base import StageSpec, Subject
from raysweep.stages.enlarge import Enlarge
from raysweep.stages.fetch import Existing, Fetch
from raysweep.stages.held_text import HeldText
from raysweep.stages.heldout import Heldout, HeldoutSection
from raysweep.stages.optimizer_state import OptimizerState
from raysweep.stages.phases import Reading, segments
from raysweep.stages.pretrain import Pretrain, Recipe
from raysweep.stages.probe import Probe
from raysweep.stages.sft import NUM_VALID, Sft
from raysweep.stages.tokenize import SAMPLER, Tokenize
from raysweep.tasks.families import Task
from raysweep.tasks.mixture import Mixture
from raysweep.train.models import Model

LADDER = (1e-6, 3e-6, 1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
"""The fine-tuning rates that `sft.lrs: auto` may come to."""


NUM_SENTENCES = 2000
"""Held-out rows of a corpus of sentences, which are short: for an entropy gap that is known to 0.0002 nats."""


@dataclass(frozen=True)
class Stage:
    """One unit of work. `inputs` maps a role to the id of the stage that plays it.

    `checkpoint` is the id of the stage whose checkpoint this one leaves or measures, `step` that checkpoint's step
    (None before there is one), `task` the name of its downstream task; of fine-tuning a `scores.tuning_name`, or on a
    mixture of tasks a `scores.mixture_name`.
    """

    spec: StageSpec
    inputs: Mapping[str, str]
    step: int | None = None
    checkpoint: str | None = None
    task: str | None = None

    @cached_property
    def id(self) -> str:
        """`kind-` and twelve hex digits of everything that can change the result."""
        return f"{self.kind}-{fingerprint({'spec': self.spec, 'inputs': self.inputs})}"

    @property
    def kind(self) -> str:
        """What kind of stage it is."""
        return self.spec.kind

    @property
    def state_key(self) -> str | None:
        """Names the resumable state that it shares with other stages: that of one recipe from one start."""
        key, begins = self.spec.state_key, [self.inputs.get(role) for role in ("start", "optimizer", "tokens")]
        return f"{key}-{fingerprint(begins)}" if key and begins[0] else key


@dataclass(frozen=True)
class Trial:
    """One variant under one seed: a pretraining trajectory, and all that hangs from its checkpoints, in order."""

    point: Mapping[str, Any]
    seed: int
    stages: tuple[Stage, ...]
    auto_lrs: frozenset[str] = frozenset()
    """The methods, and mixtures behind them, of which further fine-tuning stages come as results ask for them: see
    `widened`."""
    added: frozenset[str] = frozenset()
    """Ids of the stages that came so."""
    settings: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Zip -> path -> the value that the point's name of it stands for, as a table has it."""

    @cached_property
    def variant_id(self) -> str:
        """The same for all seeds of a point."""
        return f"variant-{fingerprint(self.point)}"

    @cached_property
    def id(self) -> str:
        """Stands for the stages it set out with: equal chains are one trial, however far they are widened."""
        return f"trial-{fingerprint([stage.id for stage in self.stages if stage.id not in self.added])}"

    @property
    def last_step(self) -> int:
        """The step of the last checkpoint."""
        return max(stage.step for stage in self.stages if stage.step is not None)

    @cached_property
    def columns(self) -> tuple[Column, ...]:
        """What is known of its checkpoints where all stages finish, each column once."""
        steps = dict.fromkeys(stage.step for stage in self.stages if stage.step is not None)
        return tuple(dict.fromkeys(column for step in steps for column in self.columns_at(step)))

    def columns_at(self, step: int) -> tuple[Column, ...]:
        """Those of the checkpoint at `step`, in the order of `checkpoint_metrics`."""
        declared: dict[str, Column] = {}
        results = []
        for stage in self.stages:
            if stage.step != step:
                continue
            metrics = stage.spec.metrics(self.corpus_of(stage))
            by_name = {metric.name: metric for metric in metrics}
            columns = [
                Column(stage.kind, replace(metric, name=name), task)
                for task, name, metric in by_tuning(by_name, stage.task)
            ]
            declared |= {column.name: column for column in columns}
            results.append(_assumed(stage, metrics))
        declared |= {column.name: column for column, _ in means_of(results)}
        return tuple(declared[name] for name in checkpoint_metrics(results))

    def corpus_of(self, stage: Stage) -> Corpus:
        """The text that a stage reads; of one that reads none the last phase's."""
        *_, last = self._corpora.values()
        return self._corpora.get(stage.inputs.get("tokens", ""), last)

    @cached_property
    def _corpora(self) -> Mapping[str, Corpus]:
        """By the id of the stage that makes tokens of it."""
        return {stage.id: stage.spec.corpus for stage in self.stages if isinstance(stage.spec, Tokenize)}

    def widened(self, results: Mapping[str, Result]) -> Trial:
        """With the fine-tuning stages that `sft.lrs: auto` adds, now that `results` (by stage id) are known.

        For each checkpoint and task whose stages all are finished, the grid gets the next rate of `LADDER` at the ends
        that are open: see `open_sides`. It depends on results alone, so that a resumed trial comes by the same stages.
        Itself where nothing is to be added.
        """
        groups: dict[tuple[str, str], list[Stage]] = {}
        for stage in self.stages if self.auto_lrs else ():
            if stage.kind == "sft" and method_of(str(stage.task)) in self.auto_lrs:
                groups.setdefault((str(stage.checkpoint), str(stage.task)), []).append(stage)
        # By the task, too: two tasks of the same data have stages of the same ids.
        more = {(stages[-1].id, stages[-1].task): _further(stages, results) for stages in groups.values()}
        if not any(more.values()):
            return self
        stages = tuple(each for stage in self.stages for each in (stage, *more.get((stage.id, stage.task), ())))
        added = {stage.id for group in more.values() for stage in group}
        return replace(self, stages=stages, added=self.added | added)

    def legs(self) -> Iterator[tuple[int | None, list[list[Stage]]]]:
        """By checkpoint step: batches of stages that may run side by side, a wide stage being a batch of its own."""
        for step, stages in groupby(self.stages, key=lambda stage: stage.step):
            yield step, list(_batches(stages))


def _batches(stages: Iterable[Stage]) -> Iterator[list[Stage]]:
    """Each stage after those it needs, and wide ones before all others that they can do without: ranks share split ones
    among them, and each end of a batch is a wait for the last one."""
    left = list(stages)
    while left:
        unmade = {stage.id for stage in left}
        ready = [stage for stage in left if unmade.isdisjoint(stage.inputs.values())]
        needed = {stage_id for stage in left for stage_id in stage.inputs.values()}
        wide = [stage for stage in ready if stage.spec.wide]
        batch = wide[:1] or [stage for stage in ready if stage.id in needed] or ready
        yield batch
        left = [stage for stage in left if not any(stage is each for each in batch)]


def _assumed(stage: Stage, metrics: Sequence[Metric]) -> Result:
    """A stage as if it had finished."""
    return Result(
        id=stage.id,
        kind=stage.kind,
        task=stage.task,
        status="done",
        metrics={metric.name: 0.0 for metric in metrics},
        lr=getattr(stage.spec, "lr", None),
        seed=getattr(stage.spec, "seed", None),
    )


def _further(stages: Sequence[Stage], results: Mapping[str, Result]) -> list[Stage]:
    """Of the fine-tuning stages of one checkpoint and task: those of the next rates, none while one is unfinished."""
    finished = [replace(results[stage.id], task=stage.task) for stage in stages if stage.id in results]
    runs = finetuning_runs(finished, str(stages[0].task))
    if len(runs) < len(stages):
        return []
    tried = sorted({run.lr for run in runs})
    lower, higher = [lr for lr in LADDER if lr < tried[0]], [lr for lr in LADDER if lr > tried[-1]]
    beyond = {"lowest": lower[-1:], "highest": higher[:1]}
    specs = [stage.spec for stage in stages if isinstance(stage.spec, Sft)]
    lrs = [lr for side in open_sides(runs, num_valid=_num_valid(specs[0], finished)) for lr in beyond[side]]
    # Each seed once: the stages of any one rate.
    seeds = [stage for stage, spec in zip(stages, specs, strict=True) if spec.lr == tried[0]]
    return [replace(stage, spec=stage.spec.with_(lr=lr)) for lr in lrs for stage in seeds]


def _num_valid(spec: Sft, finished: Iterable[Result]) -> float | None:
    """Examples of the score that picks a rate; as planned where no record tells. None: a likelihood picks it."""
    if spec.likelihood:
        return None
    known = ([num for name, num in each.metrics.items() if name.rpartition("/")[2] == NUM_VALID] for each in finished)
    return pooled_examples(next(filter(None, known), spec.num_valid))


def chain(
    pretrain: Recipe | Existing,
    *,
    measurements: Iterable[StageSpec],
    sft: Finetuning | None,
    seed: int,
    heldout: HeldoutSection | None = None,
) -> tuple[Stage, ...]:
    """The stages of a trial, each after those it needs; checkpoint by checkpoint, so that a trial can be pruned.

    Args:
        pretrain: where the checkpoints come from.
        measurements: what is measured on each, beside its held-out loss; yet to be bound.
        sft: what each is fine-tuned on.
        seed: of pretraining.
        heldout: how much of the held-out text the held-out loss is of; by default what suits the corpus.

    Raises:
        RaysweepError: if a task and the corpus, or a measurement and the objective, do not go together.
    """
    stages: list[Stage] = []
    for part in _existing(pretrain) if isinstance(pretrain, Existing) else _trained(pretrain, seed):
        tasks = sft.bind(part.corpus, part.objective.head) if sft else {}
        given: dict[str, Any] = {"mix": part.corpus.mix, "sequence_length": part.sequence_length}
        if heldout:
            given["max_sequences"] = heldout.max_sequences
        elif part.corpus.row_length:
            given["max_sequences"] = NUM_SENTENCES
        loss = Heldout(objective=part.objective, **given)
        subject = Subject(
            part.corpus,
            part.objective,
            part.sequence_length,
            tasks,
            model=model_of(pretrain),
            shown_tokens=part.shown_tokens,
            trained_by=part.trained_by,
            steps_before=part.steps_before,
        )
        measured = [loss, *(each.bind(subject) for each in measurements)]
        split = list(_finetunings(sft, tasks, HeldText.of(subject))) if sft else []
        stages += [stage for stage in part.opening if stage not in stages]
        for step, (checkpoint, *beside) in part.checkpoints:
            stages += [stage for stage in (checkpoint, *beside) if stage not in stages]
            where: dict[str, Any] = {"step": step, "checkpoint": checkpoint.id}
            alone = {"checkpoint": checkpoint.id}
            stages += _measured(measured, alone, part.tokens, where)
            for name, spec in split:
                text = {"tokens": part.tokens.id} if isinstance(spec, Sft) and spec.forgetting else {}
                stages.append(Stage(spec, {**alone, **text}, task=name, **where))
        stages += part.closing
    return tuple(stages)


def _measured(
    specs: Iterable[StageSpec], alone: Mapping[str, str], tokens: Stage, where: Mapping[str, Any]
) -> Iterator[Stage]:
    """What is measured of a checkpoint; of the enlarged one, if there is one, what changes with its weights."""
    weights = alone
    for task, spec in (item for each in specs for item in each.by_task().items()):
        inputs = dict(weights if spec.of_weights else alone)
        stage = Stage(spec, inputs | ({"tokens": tokens.id} if spec.reads_text else {}), task=task, **where)
        if isinstance(spec, Enlarge):
            weights = {"checkpoint": stage.id}
        yield stage


@dataclass(frozen=True)
class _Part:
    """Checkpoints that are measured on the same text, and the stages around them."""

    corpus: Corpus
    objective: Objective
    sequence_length: int
    tokens: Stage
    opening: Sequence[Stage]
    checkpoints: Sequence[tuple[int, Sequence[Stage]]]
    """The step of each (of one that exists already 0), the stage that leaves it, and what is made right after."""
    shown_tokens: frozenset[str] | None = None
    """See `Subject.shown_tokens`."""
    trained_by: Objective | None = None
    """See `Subject.trained_by`."""
    steps_before: int = 0
    """See `Subject.steps_before`."""
    closing: Sequence[Stage] = ()
    """What the next part goes on from, where it is not measured: without a step, as all that only prepares."""


def objective_of(pretrain: Recipe | Existing) -> Objective:
    """Whose loss is measured, of the last phase or of a checkpoint that exists.

    Until that is pinned, causal_lm where the file says none.
    """
    return (pretrain.objective or CausalLM()).measured


def model_of(pretrain: Recipe | Existing) -> Model | None:
    """That is trained; None of checkpoints that exist, or of training that goes on from one."""
    return pretrain.model if isinstance(pretrain, Recipe) else None


def _existing(given: Existing) -> Iterator[_Part]:
    objective = objective_of(given)
    spec = Fetch(source=given.from_, fingerprint=given.fingerprint, digests=given.digests, head=objective.head)
    fetch = Stage(spec, {})
    tokens = Stage(Tokenize(corpus=given.data.source()), {"checkpoint": fetch.id})
    yield _Part(
        corpus=given.data,
        objective=objective,
        sequence_length=given.sequence_length,
        tokens=tokens,
        opening=[fetch, tokens],
        checkpoints=[(0, [fetch])],
    )


def _trained(whole: Recipe, seed: int) -> Iterator[_Part]:
    """A part for each segment of a recipe, whose input "start" is the end of the one before."""
    start = whole.start
    fetch = Stage(Fetch(**start.model_dump() | {"head": whole.objective.head}), {}) if start else None
    goes_on = {"start": fetch.id} if fetch else {}
    first: Stage | None = None
    reading, parts = Reading(seed), segments(whole)
    for part, following in zip(parts, [*parts[1:], None], strict=True):
        recipe = part.recipe
        tokens = _tokens(recipe.data, fetch, first)
        before = reading.begin(tokens.id, recipe.data.mix, recipe.sequence_length)
        inputs = {"tokens": tokens.id, **goes_on}
        pretrain = Pretrain(recipe=recipe, seed=seed, step=recipe.num_steps, before=before if first else None)
        first = first or tokens
        reading.take(recipe.num_steps, recipe.batch_sequences)
        end = Stage(pretrain, inputs)
        left = [end]
        goes_on = {"start": end.id}
        if following.keeps_optimizer if following else whole.leave_optimizer_state:
            left.append(Stage(OptimizerState(pretrain=pretrain), {**inputs, "checkpoint": end.id}))
            goes_on["optimizer"] = left[1].id
        checkpoints = []
        for step in part.measured:
            made = left if step == pretrain.step else [Stage(pretrain.with_(step=step), inputs)]
            checkpoints.append((before.steps + step, [replace(each, step=before.steps + step) for each in made]))
        is_measured = pretrain.step in part.measured
        yield _Part(
            corpus=recipe.data,
            objective=objective_of(recipe),
            sequence_length=recipe.sequence_length,
            tokens=tokens,
            opening=[stage for stage in (fetch, _sampler(recipe.data), tokens) if stage],
            checkpoints=checkpoints,
            shown_tokens=part.shown_tokens,
            trained_by=recipe.objective,
            steps_before=before.steps,
            closing=() if is_measured or not (following or whole.leave_optimizer_state) else left,
        )


def _tokens(corpus: Corpus, fetch: Stage | None, first: Stage | None) -> Stage:
    """The tokens of a corpus, by the tokenizer of the checkpoint that training starts from, or of the first phase."""
    sampler = _sampler(corpus)
    inputs = {"checkpoint": fetch.id} if fetch else {SAMPLER: sampler.id} if sampler else {}
    tokens = Stage(Tokenize(corpus=corpus.source()), inputs)
    if first and tokens != first and corpus.takes_tokenizer and not fetch:
        return replace(tokens, inputs={"tokens": first.id})
    return tokens


def _sampler(corpus: Corpus) -> Stage | None:
    """The stage that fetches the model that text is drawn from, if there is one."""
    source = corpus.sampler
    return Stage(Fetch(**source.model_dump() | {"head": "causal"}), {}) if source else None


def _finetunings(sft: Finetuning, tasks: Mapping[str, Task], text: HeldText) -> Iterator[tuple[str, StageSpec]]:
    given: dict[str, Any] = {
        "hyperparameters": sft.hyperparameters,
        "forgetting": text if sft.forgetting else None,
        "likelihood": sft.likelihood,
    }
    for name, task in {**tasks, **sft.mixed(tasks)}.items():
        if not isinstance(task, Mixture) and task.num_classes is not None and sft.linear_probe:
            yield from ((name, Probe(task=task, seed=seed)) for seed in sft.seeds)
        for by, method in sft.methods.items():
            for lr in sft.first_lrs(by):
                for seed in sft.seeds:
                    yield tuning_name(name, by), Sft(task=task, lr=lr, seed=seed, method=method, **given)
