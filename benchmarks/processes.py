"""Processes below a process, for benchmarks that watch what a command starts."""

from pathlib import Path


def descendants(root: int) -> set[int]:
    """Return the ids of the process `root` and of its children, their children and so on."""
    children: dict[int, list[int]] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(path.read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue
        children.setdefault(parent, []).append(int(path.parent.name))
    found, left = set(), [root]
    while left:
        found.add(one := left.pop())
        left += children.get(one, [])
    return found
