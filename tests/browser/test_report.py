"""The report in a real browser: drawn, readable on a phone, without a console message or a request."""

import functools
import http.server
import json
import re
import threading
from pathlib import Path

import pytest
from chromium import needs_chromium, open_page

from raysweep.results import Results
from raysweep.runners import run_sweep

# A page of ours beside the report, which opens it as wide as a phone and says what it sees. Chromium's own windows
# are 500 pixels wide at least.
PROBE = """<!doctype html><body><iframe id="phone" src="report.html" width="400" height="900"></iframe><script>
const until = async (is) => { while (!is()) await new Promise((done) => setTimeout(done, 50)); };
document.getElementById("phone").addEventListener("load", async ({ target }) => {
  const page = target.contentDocument, seen = {};
  const points = () => [...page.querySelectorAll("#scatter-chart .point")];
  await until(() => points().length);
  seen.width = page.documentElement.scrollWidth;
  seen.charts = [...page.querySelectorAll(".chart .main-svg")].map((each) => each.getBoundingClientRect().right);
  const row = page.querySelector("#ranking-table tbody tr");
  row.click();
  await until(() => points().some((each) => each.style.opacity !== "1"));
  seen.lit = page.querySelectorAll("#ranking-table tr.lit").length;
  seen.opacities = points().map((each) => each.style.opacity);
  seen.indicator = page.querySelector("#indicator option").textContent;
  const result = document.createElement("pre");
  result.id = "seen";
  result.textContent = JSON.stringify(seen);
  document.body.append(result);
});
</script></body>"""


@pytest.fixture(scope="module")
def page(tmp_path_factory) -> Path:
    """The report of the tiny sweep."""
    from tiny import TINY

    from raysweep.space import load
    from raysweep.store import Store

    folder = tmp_path_factory.mktemp("browser")
    (folder / "tiny.yaml").write_text(TINY)
    run = run_sweep(load(folder / "tiny.yaml"), Store(folder / "store"), runner="inline")
    return Results(run).write_report()


@needs_chromium
def test_the_page_shows_the_ranking_and_draws_its_charts(page, tmp_path):
    document, console = open_page(page.as_uri(), tmp_path / "profile")
    assert console == []
    table = re.search(r'<table id="ranking-table".*?</table>', document, re.S).group()
    rows = re.findall(r"<tr[^>]*>(.*?)</tr>", table.split("<tbody>")[1].split("</tbody>")[0], re.S)
    places = [re.sub(r"<[^>]+>", " ", re.search(r"<td.*?</td>", row, re.S).group()).strip() for row in rows]
    assert [int(place) for place in places] == sorted(int(place) for place in places)
    assert len(rows) == 4
    assert "linear" in table
    assert document.count("main-svg") >= 3  # Plotly drew its charts.
    drawn = set(re.findall(r'class="chart js-plotly-plot" id="([a-z]+)-chart"', document))
    assert drawn == {"scatter", "agreement", "worth", "steps", "loss"}
    assert 'id="failures"' not in document  # Nothing failed: no empty section.


@needs_chromium
def test_a_phone_reads_it_and_a_row_lights_its_dots(page, tmp_path):
    (page.parent / "probe.html").write_text(PROBE)
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=page.parent)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        document, console = open_page(f"http://127.0.0.1:{server.server_port}/probe.html", tmp_path / "profile")
        server.shutdown()
    assert console == []
    seen = json.loads(re.search(r'<pre id="seen">(.*?)</pre>', document, re.S).group(1))
    assert seen["width"] <= 400  # Tables scroll in boxes of their own.
    assert max(seen["charts"]) <= 400
    assert seen["lit"] == 1
    assert sorted(seen["opacities"]) == ["0.15", "0.15", "0.15", "1"]


@needs_chromium
def test_a_console_error_would_be_seen(tmp_path):
    page = tmp_path / "bad.html"
    page.write_text("<script>console.error('seen'); nosuchfunction()</script>")
    _, console = open_page(page.as_uri(), tmp_path / "profile")
    assert len(console) == 2
