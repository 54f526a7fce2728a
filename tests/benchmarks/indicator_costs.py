"""What the indicators of a checkpoint cost beside its pretraining and its fine-tuning, by the stages' own FLOPs.

`RAYSWEEP_DATA=FOLDER python tests/benchmarks/indicator_costs.py search_spaces/indicators_50.yaml [KEY=VALUE ...]`
prints tables; nothing is run.
"""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from statistics import median
from typing import Any

from raysweep.estimates import flops_of, size_of
from raysweep.plan import Trial
from raysweep.space import load
from raysweep.tasks.files import FileTask
from raysweep.tasks.mixture import Mixture
from raysweep.variants import SearchSpace

BASELINE = "early_sft"
"""A short fine-tuning, that others have to beat at its price: counted apart."""


@dataclass
class Costs:
    """FLOPs of what is done for one checkpoint."""

    phases: list[float] = field(default_factory=list)
    """Of each phase of its pretraining, in order."""
    indicators: dict[str, float] = field(default_factory=dict)
    """By kind of stage, without `BASELINE`."""
    baseline: float = 0.0
    families: dict[str, float] = field(default_factory=dict)
    """Of fine-tuning on all tasks of a family, with all seeds and rates."""
    mixtures: float = 0.0
    """Of one fine-tuning on several tasks, likewise."""

    @property
    def all_indicators(self) -> float:
        """Of all kinds together."""
        return sum(self.indicators.values())

    @property
    def of_last_phase(self) -> float:
        """All indicators over the last phase of pretraining, which is its smallest part and the variant's own."""
        return self.all_indicators / self.phases[-1]

    @property
    def of_families(self) -> dict[str, float]:
        """All indicators over fine-tuning on each family."""
        return {name: self.all_indicators / flops for name, flops in self.families.items()}


def costs(space: SearchSpace, trial: Trial) -> Costs:
    """Of a trial of one checkpoint.

    Raises:
        ValueError: if the sweep has no fine-tuning, names no families, or the model's size is not known.
    """
    declared = space.declared
    if not (size_of(trial) and declared.sft and declared.sft.families):
        raise ValueError(f"{space.name}: needs a recipe and sft.families, by which fine-tuning is told apart")
    family = {task: name for name, tasks in declared.sft.families.items() for task in tasks}
    found, tuned, measured = Costs(), defaultdict[str, float](float), defaultdict[str, float](float)
    flops_by_stage = flops_of(trial)
    for stage in trial.stages:
        flops = flops_by_stage[stage.id]
        if stage.kind == "pretrain":
            found.phases.append(flops)
        elif stage.kind == "sft":
            if isinstance(stage.spec.task, Mixture):
                found.mixtures += flops
            else:
                tuned[family[stage.task or ""]] += flops
        elif stage.kind == BASELINE:
            found.baseline += flops
        elif stage.checkpoint is not None:
            measured[stage.kind] += flops
    found.families, found.indicators = dict(tuned), dict(measured)
    return found


def median_lengths(space: SearchSpace, trial: Trial, *, num: int = 1000) -> dict[str, int]:
    """Task -> tokens of a training example, its answer and the end, by the corpus's own tokenizer; not cut."""
    declared = space.declared
    corpus = next(stage.spec.corpus for stage in trial.stages if stage.kind == "tokenize")
    tokenizer = corpus.tokenizer.build(corpus._training_texts)
    found = {}
    for name, task in declared.sft.tasks.items() if declared.sft else ():
        texts = [task.prompt(each) + task.answer(each) for each in task.examples("train")[:num]]
        found[name] = 1 + round(median(len(ids) for ids in tokenizer(texts)["input_ids"]))
    return found


@contextmanager
def texts_of(lengths: Mapping[str, int], tasks: Mapping[str, Any]) -> Iterator[None]:
    """Plans that reckon a task's texts at these lengths in place of one for all; longer than fits they are cut."""
    of = {task.fingerprint: lengths[name] for name, task in tasks.items()}
    before = FileTask.typical_length
    FileTask.typical_length = property(lambda task: of[task.fingerprint])  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        FileTask.typical_length = before  # type: ignore[method-assign]


def rows(found: Costs) -> Iterator[str]:
    """A table in Markdown: FLOPs, and shares of the last phase and of each family."""
    heads = ["stage", "FLOPs", "of the last phase", *(f"of fine-tuning on {name}" for name in found.families)]
    yield f"| {' | '.join(heads)} |"
    yield "| --- " * len(heads) + "|"
    named = sorted(found.indicators.items(), key=lambda item: -item[1])
    named += [("all of these", found.all_indicators), (BASELINE, found.baseline)]
    named += [(f"fine-tuning on {name}", flops) for name, flops in found.families.items()]
    named += [("fine-tuning on mixtures", found.mixtures)] if found.mixtures else []
    named += [(f"pretraining, phase {place}", flops) for place, flops in enumerate(found.phases, start=1)]
    for name, flops in named:
        shares = (flops / whole for whole in (found.phases[-1], *found.families.values()))
        yield f"| {name} | {flops:.2e} | {' | '.join(f'{share:.2%}' for share in shares)} |"


def main() -> None:
    """The variant whose indicators take most of its fine-tuning, by one length for all texts and by their own."""
    space = load(sys.argv[1], sys.argv[2:])
    trials = list(space.trials())
    trial = max(trials, key=lambda each: max(costs(space, each).of_families.values()))
    print("texts of tasks reckoned at one length, as in plans:\n", *rows(costs(space, trial)), sep="\n")
    lengths = median_lengths(space, trial)
    assert space.declared.sft
    with texts_of(lengths, space.declared.sft.tasks):
        told = ", ".join(f"{name} {tokens}" for name, tokens in lengths.items())
        print(f"\ntexts of their median length in tokens ({told}):\n", *rows(costs(space, trial)), sep="\n")


if __name__ == "__main__":
    main()
