"""The report's picture "Which indicator is worth its cost?" of the study's committed tables, as a PNG.

    python tests/benchmarks/worth_picture.py .github/worth.png       # needs Chromium

Drawn by the report's own script of what it would be given; see `indicators.py` for the tables.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from importlib.resources import files
from pathlib import Path

import pandas as pd
from indicators import STAGES, TARGETS, read, read_noise
from plotly.offline import get_plotlyjs

from raysweep.analysis.ranking import rank
from raysweep.analysis.worth import worth_chart

sys.path.insert(0, str(Path(__file__).parents[1]))
from chromium import CHROMIUM, FLAGS

PAGE = """<!doctype html><meta charset="utf-8">
<style>{style} #worth-chart {{ height: 560px; padding: 12px; }} .modebar {{ display: none; }}</style>
<div id="worth-chart"></div><script id="charts" type="application/json">{charts}</script>
<script>{plotly}</script><script>{script}</script>"""


def main() -> None:
    """Write the picture."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("picture", type=Path)
    picture = parser.parse_args().picture.absolute()
    table, columns = read()
    chart = worth_chart(rank(table, columns=columns, target=TARGETS[0], noise=read_noise()), pd.read_parquet(STAGES))
    assert chart
    analysis = files("raysweep.analysis")
    style, script = (analysis.joinpath(f"report.{kind}").read_text() for kind in ("css", "js"))
    page = PAGE.format(style=style, script=script, plotly=get_plotlyjs(), charts=json.dumps({"worth": chart}))
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "page.html").write_text(page)
        flags = [*FLAGS, "--window-size=1080,600", f"--user-data-dir={folder}/profile", f"--screenshot={picture}"]
        subprocess.run([str(CHROMIUM), *flags, f"file://{folder}/page.html"], check=True, capture_output=True)


if __name__ == "__main__":
    main()
