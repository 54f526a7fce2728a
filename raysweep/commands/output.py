"""What several commands print."""

from __future__ import annotations

import contextlib
import json
import shlex
import sys
from collections.abc import Iterator
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, TextIO

from raysweep.printable import printable

if TYPE_CHECKING:
    from raysweep.results import Results


_documents: ContextVar[TextIO | None] = ContextVar("documents", default=None)
"""Where documents go while stdout is kept for them."""


@contextlib.contextmanager
def stdout_for_documents() -> Iterator[None]:
    """While in it, only `print_json` reaches stdout: what libraries print, as DeepSpeed its log, goes to stderr."""
    token = _documents.set(sys.stdout)
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        _documents.reset(token)


def print_json(document: Any) -> None:
    """What a command with --json prints: one document on stdout, where what has no JSON form is its text."""
    print(json.dumps(document, indent=1, sort_keys=False, default=str), file=_documents.get())


def print_ranking(results: Results) -> None:
    """A ranking, and how to take its best checkpoint along."""
    from raysweep.analysis.fixed_rates import fixed_rate_table
    from raysweep.analysis.terminal import format_table, format_terminal
    from raysweep.analysis.worth import worth_table

    print(format_terminal(results.ranking))
    if (worth := worth_table(results.ranking, results.stages, best_alone=True)).rows:
        print(format_table(worth, "What each kind of stage costs, by its best indicator"))
    if (rates := fixed_rate_table(results.ranking, results.stages)).rows:
        print(format_table(rates, "What one fine-tuning rate for all would have chosen"))
    if results.ranking.best is not None:
        store = shlex.quote(results.run.store.url)
        print(printable(f"to take it along: raysweep export {results.run.name} --store {store} --to DIR"))


def exit_code_of(results: Results) -> int:
    """1 if stages of a run failed, which stderr then tells with their causes; else 0."""
    for failure in results.failures:
        print(printable(f"FAILED {failure['stage']}: {failure['cause']}"), file=sys.stderr)
    return 1 if results.failures else 0
