"""What the indicators of a checkpoint cost beside its pretraining and its fine-tuning, by the stages' own FLOPs.

`RAYSWEEP_DATA=FOLDER python tests/benchmarks/indicator_costs.py search_spaces/indicators_50.yaml [KEY=VALUE ...]`
prints a table; nothing is run.
"""

from __future__ import annotations

import sys
from collections import defaultdict
from dataclasses import dataclass, field

from raysweep.estimates import flops_of, size_of
from raysweep.plan import Trial
from raysweep.space import load
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

    @property
    def all_indicators(self) -> float:
        """Of all kinds together."""
        return sum(self.indicators.values())

    @property
    def of_last_phase(self) -> float:
        """All indicators over the last phase of pretraining, which is its smallest part and the variant's own."""
        return self.all_indicators / self.phases[-1]

    @property
    def of_cheapest_family(self) -> float:
        """All indicators over fine-tuning on the family that takes least."""
        return self.all_indicators / min(self.families.values())


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
            tuned[family[stage.task or ""]] += flops
        elif stage.kind == BASELINE:
            found.baseline += flops
        elif stage.checkpoint is not None:
            measured[stage.kind] += flops
    found.families, found.indicators = dict(tuned), dict(measured)
    return found


def main() -> None:
    """The variant whose indicators take most of its fine-tuning."""
    space = load(sys.argv[1], sys.argv[2:])
    every = [costs(space, trial) for trial in space.trials()]
    found = max(every, key=lambda each: each.of_cheapest_family)
    cheapest = min(found.families, key=lambda name: found.families[name])
    print(f"| stage | FLOPs | of the last phase | of fine-tuning on {cheapest} |\n| --- | --- | --- | --- |")
    rows = sorted(found.indicators.items(), key=lambda item: -item[1])
    rows += [("all of these", found.all_indicators), (BASELINE, found.baseline)]
    rows += [(f"fine-tuning on {name}", flops) for name, flops in found.families.items()]
    rows += [(f"pretraining, phase {place}", flops) for place, flops in enumerate(found.phases, start=1)]
    for name, flops in rows:
        shares = (flops / whole for whole in (found.phases[-1], found.families[cheapest]))
        print("|", " | ".join([name, f"{flops:.2e}", *(f"{share:.2%}" for share in shares)]), "|")


if __name__ == "__main__":
    main()
