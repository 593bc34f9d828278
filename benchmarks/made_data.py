"""The scripts that make data (recipes/data/make_*.py), for benchmarks that want more of them, or other ones."""

import importlib.util
import sys
from pathlib import Path
from typing import Any


def maker(name: str) -> Any:
    """The script `make_<name>.py` as a module."""
    script = Path(__file__).parents[1] / "recipes" / "data" / f"make_{name}.py"
    spec = importlib.util.spec_from_file_location(script.stem, script)
    assert spec is not None and spec.loader is not None
    module = sys.modules[script.stem] = importlib.util.module_from_spec(spec)  # dataclasses look it up
    spec.loader.exec_module(module)
    return module
