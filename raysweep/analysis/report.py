"""One self-contained HTML file about a run: which checkpoint is best, what predicts it, what it cost, what failed.

Every text that came from a user passes through Jinja's autoescape, `_for_script` or the charts' own. The page's policy
names its two scripts by hash and allows nothing else to run, and no request to anywhere.
"""

from __future__ import annotations

import base64
import hashlib
import json
import logging
import shlex
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from raysweep.analysis import charts, formatting
from raysweep.analysis.budget_page import regret_chart
from raysweep.analysis.choosing import Chosen, chosen_of, identity_of, search_of, values_of, written_of
from raysweep.analysis.colors import variant_colors
from raysweep.analysis.comparer import CompareError
from raysweep.analysis.findings import cautions, gap_text, headline, how_to_read, score_text, tie_text
from raysweep.analysis.fixed_rates import fixed_rate_table
from raysweep.analysis.labels import is_missing, row_key
from raysweep.analysis.learning import Tested, learn_target
from raysweep.analysis.learnt_page import importance_table, learnt_table, reliability_chart
from raysweep.analysis.paired_losses import Losses, read_losses
from raysweep.analysis.pairwise import Floats
from raysweep.analysis.pareto import Front, front_of
from raysweep.analysis.predictions import read_scores
from raysweep.analysis.ranking import Ranking, default_target
from raysweep.analysis.same_loss import SameLoss, compare_same_loss
from raysweep.analysis.same_loss_page import Page, same_loss_page
from raysweep.analysis.sections import (
    Heading,
    Row,
    Table,
    agreement_table,
    beyond_tables,
    cell,
    cost_table,
    failure_table,
    ranking_table,
)
from raysweep.analysis.tables import columns_of
from raysweep.analysis.trajectories import steps_chart
from raysweep.analysis.worth import worth_chart, worth_table
from raysweep.durable import write_text
from raysweep.errors import LostError, UnreachableError
from raysweep.printable import printable
from raysweep.runs import Run
from raysweep.scores import SAME_LOSS_NATS
from raysweep.stages.heldout import LOSSES

if TYPE_CHECKING:
    import pandas as pd
    from jinja2 import Environment

logger = logging.getLogger(__name__)

MAX_TIES = 5
"""That are listed one by one."""


def write_report(run: Run, stages: pd.DataFrame, ranking: Ranking) -> Path:
    """Writes report.html into the run's folder; its path."""
    path = run.folder / "report.html"
    write_text(path, render(run, stages, ranking))
    try:
        run.store.push(run.folder)
    except UnreachableError as error:  # Such as a store that can only be read: the page is here all the same.
        logger.warning("the report stays on this machine: %s", error)
    return path


def render(run: Run, stages: pd.DataFrame, ranking: Ranking) -> str:
    """The page as text: one HTML document with its style, scripts and data inside."""
    from markupsafe import Markup

    colors = variant_colors(ranking)
    search = search_of(run)
    front = front_of(ranking.checkpoints, search.objectives)
    chosen = chosen_of(ranking.checkpoints, search.choose)
    drawn = charts.all_charts(run, stages, ranking, colors=colors, front=front)
    if steps := steps_chart(ranking, colors):
        drawn["steps"] = steps
    if worth := worth_chart(ranking, stages):
        drawn["worth"] = worth
    regret = regret_chart(ranking, stages) if worth else ""
    if not isinstance(regret, str):
        drawn["regret"] = regret
    learnt = _learnt(ranking)
    if isinstance(learnt, Tested):
        drawn["reliability"] = reliability_chart(learnt)
    sections = {
        "ranking": ("Ranking", ranking_table(ranking, colors)),
        "front": ("Trade-off", _front_table(front, ranking) if front else None),
        "scatter": ("Indicator against score", drawn.get("scatter")),
        "agreement": ("What predicts it", agreement_table(ranking)),
        "learnt": ("Learnt together", learnt_table(learnt) if isinstance(learnt, Tested) else None),
        "worth": ("Worth its cost?", worth_table(ranking, stages)),
        "steps": ("Over steps", drawn.get("steps")),
        "same_loss": ("Is flat better here?", _same_loss_page(run, stages, ranking)),
        "loss": ("Loss curves", drawn.get("loss")),
        "failures": ("Failures", failure_table(run, stages)),
        "cost": ("Cost", cost_table(stages)),
    }
    shown = {name: content if _has_content(content) else None for name, (_, content) in sections.items()}
    script, plotly = _shipped("report.js"), _plotly() if drawn else ""
    policy = " ".join(f"'sha256-{_digest(text)}'" for text in (plotly, script) if text)
    template = _environment().get_template("report.html")
    return template.render(
        name=run.name,
        headline=headline(ranking),
        cautions=cautions(ranking),
        best=_best(run, ranking),
        facts=[*_facts(stages, ranking), *_search_facts(front, chosen, ranking)],
        nav=[(name, title) for name, (title, _) in sections.items() if shown[name]],
        shown=shown,
        colors=colors,
        reading=how_to_read(ranking),
        has_edges=bool(ranking.edges),
        has_ties=bool(ranking.ties),
        fixed_rates=fixed_rate_table(ranking, stages),
        beyond=beyond_tables(ranking, learnt if isinstance(learnt, Tested) else None),
        learnt=learnt if isinstance(learnt, Tested) else None,
        importances=importance_table(learnt) if isinstance(learnt, Tested) else None,
        why_not_learnt=learnt if isinstance(learnt, str) else "",
        regret=drawn.get("regret"),
        why_no_regret=regret if isinstance(regret, str) else "",
        skipped=sorted(ranking.skipped.items()),
        sweep_text=run.sweep_text,
        provenance=_provenance(run, stages),
        charts_json=Markup(_for_script(drawn)) if drawn else "",
        max_points=charts.MAX_POINTS,
        script_hashes=Markup(policy),
        style=Markup(_shipped("report.css")),
        plotly=Markup(plotly),
        script=Markup(script),
    )


def ranking_html(ranking: Ranking) -> str:
    """The headline and the checkpoints, best first, as a piece of HTML without scripts."""
    return (
        _environment()
        .get_template("ranking.html")
        .render(headline=headline(ranking), ranking=ranking_table(ranking, {}))
    )


def _has_content(content: Any) -> bool:
    return bool(content.rows) if isinstance(content, Table) else bool(content)


def _learnt(ranking: Ranking) -> Tested | str:
    """How well a comparer that is learnt from all indicators does on unseen variants; in words why there is none."""
    try:
        return learn_target(ranking).tested
    except CompareError as error:
        return str(error)


def _same_loss_page(run: Run, stages: pd.DataFrame, ranking: Ranking) -> Page | str:
    """In words why there is none, if the sweep asks for one: where it says what losses are the same, of several bases.

    Else empty.
    """
    found = same_loss_of(run, stages, ranking)
    if isinstance(found, SameLoss):
        return same_loss_page(found)
    written = written_of(run)
    return found if "same_loss_nats" in written and len(written.get("seeds", ())) > 1 else ""


def same_loss_of(run: Run, stages: pd.DataFrame, ranking: Ranking) -> SameLoss | str:
    """What a run says of checkpoints of the same loss; see `compare_same_loss`."""
    return compare_same_loss(
        ranking.checkpoints,
        stages,
        columns_of(run),
        _scores_reader(run),
        band=_band(run),
        values=values_of(run),
        read_losses=partial(_read_losses, run),
    )


def _read_losses(run: Run, stage_id: str) -> Losses | None:
    """Of a held-out measurement; None if they are lost, or it is of before they were kept."""
    try:
        return read_losses(run.store.file(stage_id, LOSSES))
    except LostError as error:
        logger.warning("%s", error)
        return None


def _scores_reader(run: Run) -> Callable[[str], Floats | None]:
    """Gives the scores of a fine-tuning stage's test examples; None if they are lost."""

    def read(stage_id: str) -> Floats | None:
        try:
            found = read_scores(run.store.file(stage_id, "predictions.jsonl"))
        except LostError as error:
            logger.warning("%s", error)
            return None
        return found.by_metric.get("score") if found else None

    return read


def _band(run: Run) -> float:
    """Within which losses are the same, by the run's identity, which holds it where it is not the usual one."""
    try:
        return float(identity_of(run).get("same_loss_nats", SAME_LOSS_NATS))
    except ValueError:
        return SAME_LOSS_NATS


def _best(run: Run, ranking: Ranking) -> dict[str, Any] | None:
    """What a reader takes along: the winner, how far ahead it is of whom, and where it lies."""
    best = ranking.best
    if best is None:
        return None
    location = best.get("location")
    second = ranking.second
    return {
        "label": ranking.labels[row_key(best)],
        "score": score_text(best.to_dict(), ranking.target) + formatting.unit(ranking.target),
        "gap": gap_text(ranking),
        "second": ranking.labels[row_key(second)] if second is not None else "",
        "ties": [tie_text(tie, ranking) for tie in ranking.ties[:MAX_TIES]],
        "num_more_ties": max(0, len(ranking.ties) - MAX_TIES),
        "location": None if is_missing(location) else location,
        "export": f"raysweep export {run.name} --store {shlex.quote(run.store.url)}{_target(run, ranking)} --to DIR",
    }


def _target(run: Run, ranking: Ranking) -> str:
    """The option for another target than `export` takes by itself."""
    usual = default_target(ranking.checkpoints, columns_of(run))
    return "" if ranking.target == usual else f" --target {shlex.quote(ranking.target)}"


def _front_table(front: Front, ranking: Ranking) -> Table:
    columns = [Heading("checkpoint"), *(Heading(f"{goal.metric} ({goal.mode})", numeric=True) for goal in front.goals)]
    rows = [
        Row(
            [
                cell(ranking.labels[row_key(row)]),
                *(cell(row[goal.metric], formatting.number) for goal in front.goals),
            ],
            checkpoint=row["checkpoint"],
        )
        for row, on_front in zip(front.rows, front.on_front, strict=True)
        if on_front
    ]
    return Table(columns, rows)


def _facts(stages: pd.DataFrame, ranking: Ranking) -> list[tuple[str, str]]:
    unique = stages.drop_duplicates("id")

    def num_of(status: str) -> int:
        return int((unique["status"] == status).sum())

    distances = ranking.checkpoints.get("flatness/samples_relative_distance")
    facts = [
        ("variants", str(stages["variant"].nunique())),
        ("checkpoints", str(len(ranking.checkpoints))),
        ("stages done", f"{num_of('done')} of {len(unique)}"),
        ("stage time", formatting.seconds(float(unique["wall_seconds"].sum()))),
        *((status, str(number)) for status in ("failed", "diverged", "pruned") if (number := num_of(status))),
    ]
    if distances is not None and distances.notna().any():
        low, middle, high = (f"{distances.quantile(part):+.1%}" for part in (0, 0.5, 1))
        facts.append(("Hessian trace on own samples, off that on the text", f"{middle} (median; {low} to {high})"))
    return facts


def _search_facts(front: Front | None, chosen: Chosen | None, ranking: Ranking) -> list[tuple[str, str]]:
    facts = []
    if chosen:
        facts.append((f"chosen: {chosen.said()}", ranking.labels[row_key(chosen.row)]))
    if front and not is_missing(front.hypervolume):
        facts.append(("hypervolume of the front, of the box from worst to best", f"{front.hypervolume:.1%}"))
    return facts


def _provenance(run: Run, stages: pd.DataFrame) -> list[tuple[str, str]]:
    def values(name: str) -> str:
        return ", ".join(sorted(set(stages[name].dropna()))) or "—"

    versions: dict[str, set[str]] = {}
    for text in stages["versions"].dropna().unique():
        for package, version in json.loads(text).items():
            versions.setdefault(package, set()).add(version)
    started = stages["started"].dropna()
    return [
        ("run", run.name),
        ("store", run.store.url),
        ("first stage started", str(started.min()) if len(started) else "—"),
        ("last stage started", str(started.max()) if len(started) else "—"),
        ("hosts", values("host")),
        ("devices", values("device")),
        ("raysweep commit", values("git_commit")),
        *((package, ", ".join(sorted(numbers))) for package, numbers in sorted(versions.items())),
    ]


def _for_script(value: Mapping[str, Any] | Sequence[Any]) -> str:
    """JSON that cannot close the script element it stands in."""
    text = json.dumps(value, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _environment() -> Environment:
    """Templates whose every value is escaped; so are characters that would turn or hide their neighbours."""
    from jinja2 import Environment, FunctionLoader, StrictUndefined

    def shown(value: Any) -> Any:
        return printable(value) if type(value) is str else value  # Not of Markup, which is ours.

    return Environment(autoescape=True, undefined=StrictUndefined, loader=FunctionLoader(_shipped), finalize=shown)


def _shipped(name: str) -> str:
    return files("raysweep.analysis").joinpath(name).read_text(encoding="utf-8")


def _plotly() -> str:
    from plotly.offline import get_plotlyjs

    # An inline script ends at the first closing tag, wherever it stands.
    return str(get_plotlyjs()).replace("</script", "<\\/script")


def _digest(text: str) -> str:
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
