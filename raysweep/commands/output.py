"""What several commands print."""

from __future__ import annotations

import json
import shlex
import sys
from typing import TYPE_CHECKING, Any

from raysweep.printable import printable

if TYPE_CHECKING:
    from raysweep.results import Results


def print_json(document: Any) -> None:
    """What a command with --json prints: one document on stdout, where what has no JSON form is its text."""
    print(json.dumps(document, indent=1, sort_keys=False, default=str))


def print_ranking(results: Results) -> None:
    """A ranking, and how to take its best checkpoint along."""
    from raysweep.analysis.terminal import format_terminal

    print(format_terminal(results.ranking))
    if results.ranking.best is not None:
        store = shlex.quote(results.run.store.url)
        print(printable(f"to take it along: raysweep export {results.run.name} --store {store} --to DIR"))


def exit_code_of(results: Results) -> int:
    """1 if stages of a run failed, which stderr then tells with their causes; else 0."""
    for failure in results.failures:
        print(printable(f"FAILED {failure['stage']}: {failure['cause']}"), file=sys.stderr)
    return 1 if results.failures else 0
