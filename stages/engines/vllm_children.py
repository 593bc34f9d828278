"""A vLLM plugin, loaded in each of vLLM's processes: the engine's core and its workers end with their parent.

Without it, a SIGKILL of the stage leaves them on the GPU with all of its memory.
"""

import multiprocessing
import os

from stages.contract.stop import die_with_parent

NAME = "lorry"
"""The plugin's name in pyproject.toml."""


def end_with_parent() -> None:
    """End this process with its parent. vLLM calls it in its own processes and in this one, where it does nothing."""
    if multiprocessing.parent_process() is not None:
        die_with_parent(os.getppid())


def is_installed() -> bool:
    """Whether vLLM finds the plugin. It does not if Lorry runs from a folder and is not installed."""
    from importlib.metadata import entry_points

    return any(point.name == NAME for point in entry_points(group="vllm.general_plugins"))
