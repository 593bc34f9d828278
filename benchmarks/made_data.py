"""Load the scripts that make demo data (recipes/data/make_*.py), for benchmarks that need more data or other data."""

import importlib.util
import sys
from pathlib import Path
from typing import Any


def load_maker(name: str) -> Any:
    """Import recipes/data/make_<name>.py. Returns the module. Raises FileNotFoundError if there is no such script."""
    script = Path(__file__).parents[1] / "recipes" / "data" / f"make_{name}.py"
    spec = importlib.util.spec_from_file_location(script.stem, script)
    assert spec is not None and spec.loader is not None
    module = sys.modules[script.stem] = importlib.util.module_from_spec(spec)  # dataclasses look it up there
    spec.loader.exec_module(module)
    return module
