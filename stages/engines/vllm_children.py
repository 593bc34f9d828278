"""What vLLM loads in each of its processes, as a plugin: the engine's core and its workers end with their parent.

Without it a SIGKILL of the stage would leave them on the card, with all of its memory.
"""

import multiprocessing
import os

from stages.contract.stop import die_with_parent

NAME = "lorry"
"""As pyproject.toml names it among vLLM's plugins."""


def end_with_parent() -> None:
    """Called by vLLM in every process of its own, and in ours."""
    if multiprocessing.parent_process() is not None:
        die_with_parent(os.getppid())


def is_installed() -> bool:
    """Whether vLLM will find it: not where Lorry runs from a folder without having been installed."""
    from importlib.metadata import entry_points

    return any(point.name == NAME for point in entry_points(group="vllm.general_plugins"))
