"""The report in a real browser: drawn, readable, without a console message or a request."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from raysweep.results import Results
from raysweep.runners import run_sweep

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")

FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
    "--enable-logging=stderr", "--virtual-time-budget=10000", "--window-size=1280,2000",
)  # fmt: skip


def open_page(page: Path, profile: Path) -> tuple[str, list[str]]:
    """(the document after its scripts ran, lines of the console)."""
    command = [str(CHROMIUM), *FLAGS, f"--user-data-dir={profile}", "--dump-dom", page.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    return done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line]


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
def test_the_page_shows_the_ranking_and_draws_its_charts(tiny_space, store, tmp_path):
    run = run_sweep(tiny_space, store, runner="inline")
    page = Results(run).write_report()
    document, console = open_page(page, tmp_path / "profile")
    assert console == []
    table = re.search(r'<table id="ranking-table".*?</table>', document, re.S).group()
    rows = re.findall(r"<tr[^>]*>(.*?)</tr>", table.split("<tbody>")[1], re.S)
    places = [re.sub(r"<[^>]+>", " ", re.search(r"<td.*?</td>", row, re.S).group()).strip() for row in rows]
    assert [int(place) for place in places] == sorted(int(place) for place in places)
    assert len(rows) == 4
    assert document.count("main-svg") >= 3  # Plotly drew its charts.


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
def test_a_console_error_would_be_seen(tmp_path):
    page = tmp_path / "bad.html"
    page.write_text("<script>console.error('seen'); nosuchfunction()</script>")
    _, console = open_page(page, tmp_path / "profile")
    assert len(console) == 2
