"""A finished study of the same loss, in Markdown: what was equal, what differed, its bars, and all measures tried.

    python tests/benchmarks/same_loss.py search_spaces/same_loss_hmm.yaml --store STORE [OVERRIDE ...]

Bar 1: a dose of an adversary, of strength 0.05 in the prototype, costs a probe of 64 labels a point or more against its
control, at no more than 0.002 nats. Bar 2: among doses, Spearman's correlation within a base of the Fisher trace with
that probe is at most -0.5, and its interval over bases is below 0; the loss gap's is printed beside it.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator
from pathlib import Path

from raysweep.analysis.formatting import with_interval
from raysweep.analysis.report import same_loss_of
from raysweep.analysis.same_loss import GAP, Association, Group, SameLoss
from raysweep.analysis.same_loss_page import same_loss_page
from raysweep.analysis.sections import Table
from raysweep.results import Results

FISHER, PROBE = "flatness/fisher_trace", "probe, 64 labels"


def markdown(table: Table) -> Iterator[str]:
    """Its rows, one a line."""
    yield "| " + " | ".join(each.name for each in table.columns) + " |"
    yield "| --- " * len(table.columns) + "|"
    for row in table.rows:
        yield "| " + " | ".join(each.text for each in row.cells) + " |"


def measures(group: Group) -> Iterator[str]:
    """A row for each measure: correlation with each target, corrected p, without one variant, given loss or recipe."""
    targets = list(group.associations)
    yield f"| {group.name} ({len(group.variants)} variants) | " + " | ".join(targets) + " |"
    yield "| --- " * (len(targets) + 1) + "|"
    by_target = [{each.measure: each for each in group.associations[target]} for target in targets]
    for name in dict.fromkeys(name for of_target in by_target for name in of_target):
        cells = [_association(of_target.get(name)) for of_target in by_target]
        yield f"| {name.removeprefix('flatness/')} | " + " | ".join(cells) + " |"


def _association(each: Association | None) -> str:
    if each is None:
        return "—"
    text = f"{with_interval(each.rho)} (p {each.p:.3f})"
    text += f"; without {each.pivot.variant} {each.pivot.rho:+.2f}" if each.pivot else ""
    given, p = each.given_loss.value, each.p_given_loss
    told = "—" if math.isnan(p) else f"{p:.3f}"
    text += "" if math.isnan(given) else f"; given loss {given:+.2f} (p {told})"
    recipe = each.same_recipe
    return (
        text
        if math.isnan(recipe.value)
        else f"{text}; same recipe {with_interval(recipe)} (p {each.p_same_recipe:.3f})"
    )


def bars(found: SameLoss) -> Iterator[str]:
    """Bars 1 and 2, where there are doses."""
    for contrast in found.contrasts:
        if contrast.variant.startswith("harm-") and PROBE in contrast.transfer:
            cost, gap = contrast.transfer[PROBE], contrast.gap
            met = cost.value <= -0.01 and gap.value <= 0.002
            yield (
                f"Bar 1, strength {contrast.variant.removeprefix('harm-')}: "
                f"{100 * cost.value:+.2f} [{100 * cost.low:+.2f}, {100 * cost.high:+.2f}] points "
                f"at {gap.value:+.4f} [{gap.low:+.4f}, {gap.high:+.4f}] nats: {'met' if met else 'not met'}"
            )
    for group in found.groups:
        known = {each.measure: each.rho for each in group.associations.get(PROBE, ())}
        if group.name.startswith("doses") and FISHER in known:
            rho = known[FISHER]
            met = rho.value <= -0.5 and rho.high < 0
            gap_rho = with_interval(known[GAP]) if GAP in known else "not known"
            yield f"Bar 2, doses: {with_interval(rho)}: {'met' if met else 'not met'}; the loss gap's: {gap_rho}"


def main(sweep: Path, store: Path, overrides: list[str]) -> None:
    """Prints all of it."""
    results = Results.open(sweep, store=store, overrides=overrides)
    found = same_loss_of(results.run, results.stages, results.ranking)
    if isinstance(found, str):
        raise SystemExit(f"nothing can be compared: {found}")
    page = same_loss_page(found)
    answers = [f"{group}. {line}" for group, lines in page.answers for line in lines]
    print(page.verdict, page.equal, page.edge_note, *page.models, *answers, *bars(found), sep="\n\n", end="\n\n")
    print(page.variants_note, end="\n\n")
    for title, table in (("", page.variants), ("", page.differed), *page.layers):
        print(*([title, ""] if title else []), *markdown(table), "", sep="\n")
    for group in found.groups:
        print(*measures(group), "", sep="\n")
    print(page.known_note, "", *markdown(page.known), sep="\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sweep", type=Path)
    parser.add_argument("--store", type=Path, required=True)
    parser.add_argument("overrides", nargs="*")
    given = parser.parse_intermixed_args()
    main(given.sweep, given.store, given.overrides)
