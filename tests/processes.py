"""Processes below this one, as /proc and Ray's names of them tell."""

from pathlib import Path

RANK_0, OTHER_RANK = "ResourceTrainable", "RankActor"
"""What Ray calls the processes of a gang: by their actor's class."""


def children(pid: int) -> list[int]:
    """All processes below one."""
    parents: dict[int, int] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                parents[int(entry.name)] = int((entry / "stat").read_text().rsplit(")", 1)[1].split()[1])
            except (OSError, IndexError):
                continue
    found = {pid}
    while more := {child for child, parent in parents.items() if parent in found} - found:
        found |= more
    return sorted(found - {pid})


def gang_workers(pid: int, name: str = OTHER_RANK) -> list[int]:
    """Processes below one that are of a gang, and of that class."""
    return [child for child in children(pid) if name in title(child)]


def named(pid: int, name: str) -> int:
    """The one process below `pid` whose program is called `name`, as Ray's own are: raylet, gcs_server."""
    [found] = [child for child in children(pid) if title(child).split("\0")[0].endswith(f"/{name}")]
    return found


def title(pid: int) -> str:
    """A process's command line; empty if it has ended."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace")
    except OSError:
        return ""
