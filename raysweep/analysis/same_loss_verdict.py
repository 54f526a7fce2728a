"""One verdict over all answers to "Is flat better here?": no more than stays when all that was tried is counted."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Literal

from raysweep.analysis.derived import HESSIAN_TRACE
from raysweep.analysis.same_loss import Association, Group, SameLoss
from raysweep.analysis.transfer import WITHOUT_DIRECTION

ALPHA = 0.05
"""Chance of any false finding among all measures of an answer."""

FLATNESS = ("flatness/", "noise/", "updates/", "gradient_noise/trace")
"""Measures that say what is flat; others, such as an early fine-tuning, are what these have to beat."""

Side = Literal["better", "worse", "open", "noise"]


def short_name(measure: str) -> str:
    """Of flatness without its kind."""
    return measure.removeprefix("flatness/")


def nothing_to_predict(group: Group, target: str) -> bool:
    """Whether models differ by no more than noise would make them."""
    spread = group.spreads.get(target)
    return spread is not None and spread.p > ALPHA


def alike(group: Group, target: str) -> bool:
    """Whether models of one recipe differ by no more than noise would make them."""
    spread = group.recipe_spreads.get(target)
    return spread is not None and spread.p > ALPHA


def is_apart(association: Association) -> bool:
    """Whether the interval over bases leaves 0 out."""
    return association.rho.low > 0 or association.rho.high < 0


def holds_within_recipes(association: Association) -> bool:
    """Whether it is beyond chance with the configuration partialled out, by permuted seeds and over bases."""
    rho = association.same_recipe
    return association.p_same_recipe < ALPHA and (rho.low > 0 or rho.high < 0)


def verdict(found: SameLoss) -> str:
    """A few sentences: what holds among all measures of all answers, and which side the Hessian's trace is on in each.

    Of steps of one knob nothing counts as found; see `same_loss_page`. Within recipes all do: seeds are no steps.
    """
    answers = [(group, target) for group in found.groups for target in group.associations]
    free = [(group, target) for group, target in answers if not group.ordered]
    told = [(group, target) for group, target in answers if not nothing_to_predict(group, target)]
    sure = [
        (target, each.measure, each.rho.value)
        for group, target in told
        if not group.ordered
        for each in _of_flatness(group, target)
        if len(answers) * each.p < ALPHA
    ]
    recipes = [
        (f"{target}, {group.name}" if group.ordered else target, each.measure, each.same_recipe.value)
        for group, target in told
        if not alike(group, target)
        for each in _of_flatness(group, target)
        if holds_within_recipes(each)
    ]
    num_alike = sum(alike(group, target) for group, target in answers)
    opening = _opening({rho < 0 for _, _, rho in sure}, {_side(group, target) for group, target in free})
    return (
        f"{opening} By the Hessian's trace, in so many ways to measure transfer, flatter is: "
        f"{'; '.join(map(_counts, found.groups))}. Flatness beyond chance of all that was tried for all {len(answers)} "
        f"answers: {_names(sure)}. With the configuration partialled out, of what was tried for one answer: "
        f"{_names(recipes)}; in {num_alike} of {len(answers)} models of one recipe differ by no more than noise."
    )


def _opening(is_better: set[bool], sides: set[Side]) -> str:
    both = {"better", "worse"} <= sides
    if not is_better:
        return "Not shown, and the sign depends on how transfer is measured." if both else "Not shown."
    if both or len(is_better) > 1:
        return "It depends on how transfer is measured."
    return f"Flatter is {'better' if is_better == {True} else 'worse'} here."


def _side(group: Group, target: str) -> Side:
    trace = next((each for each in group.associations[target] if each.measure == HESSIAN_TRACE), None)
    if nothing_to_predict(group, target):
        return "noise"
    if trace is None or not is_apart(trace):
        return "open"
    return "better" if trace.rho.value < 0 else "worse"


def _counts(group: Group) -> str:
    counts = Counter(_side(group, target) for target in group.associations)
    noise = f", with nothing to predict in {counts['noise']}" if counts["noise"] else ""
    told = f"better in {counts['better']}, worse in {counts['worse']}, not told in {counts['open']}"
    return f"{group.name}, {told}{noise}"


def _of_flatness(group: Group, target: str) -> Iterator[Association]:
    for each in group.associations[target]:
        if each.measure.startswith(FLATNESS) and each.measure not in WITHOUT_DIRECTION:
            yield each


def _names(found: Sequence[tuple[str, str, float]]) -> str:
    """Measures of each target, with their correlations; the first few."""
    by_target: dict[str, list[str]] = {}
    for target, measure, rho in found:
        by_target.setdefault(target, []).append(f"{short_name(measure)} {rho:+.2f}")
    return "; ".join(f"{target} ({', '.join(_first(names))})" for target, names in by_target.items()) or "nothing"


def _first(names: Sequence[str]) -> Iterator[str]:
    yield from names[:2]
    if len(names) > 2:
        yield f"{len(names) - 2} more"
