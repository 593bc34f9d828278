"""A vLLM plugin that ends vLLM's processes with their parent. vLLM loads it in the engine's core and in each worker.

Without it, these processes survive a SIGKILL of the stage and keep the GPU's memory.
"""

import multiprocessing
import os

from stages.contract.stop import die_with_parent

NAME = "lorry"
"""The plugin's name in pyproject.toml."""


def end_with_parent() -> None:
    """Make the kernel end this process when its parent ends. Does nothing in the stage's own process.

    vLLM calls this in the stage's process and in each process that it starts.
    """
    if multiprocessing.parent_process() is not None:
        die_with_parent(os.getppid())


def is_installed() -> bool:
    """Whether vLLM finds the plugin. It does not if Lorry runs from its folder without being installed."""
    from importlib.metadata import entry_points

    return any(point.name == NAME for point in entry_points(group="vllm.general_plugins"))
