"""Other engines in the place of the recipe's."""

from collections.abc import Callable
from typing import Any

import pytest

from stages.engines.engine import EngineSettings
from stages.infer import serving


def use_engine(patch: pytest.MonkeyPatch, start: Callable[[EngineSettings], Any]) -> None:
    """Have infer start its engines by this function, whatever the recipe names."""
    patch.setattr(serving, "start_engine", lambda name, settings: start(settings))
