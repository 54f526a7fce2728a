"""The shipped sweep files, and the presets that their comments name."""

import re
import shlex
from pathlib import Path

FOLDER = Path(__file__).parents[1] / "search_spaces"


def presets(name: str) -> dict[str, list[str]]:
    """The overrides of a shipped sweep's comment, by preset; none of "cpu", which is the file itself."""
    found: dict[str, list[str]] = {"cpu": []}
    preset = ""
    for line in re.findall(r"^#   (.*)$", (FOLDER / f"{name}.yaml").read_text(), re.M):
        word, *rest = shlex.split(line)
        preset = word.removesuffix(":") if word.endswith(":") else preset
        found.setdefault(preset, []).extend(rest if word.endswith(":") else [word, *rest])
    return found
