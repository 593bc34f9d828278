"""A stage in this process, for tests of parts that need one without `run_stage`."""

import io
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from stages.contract.events import Events
from stages.contract.recipe import load_recipe
from stages.contract.roots import Roots
from stages.contract.run import Run
from stages.contract.stage import Stage
from stages.contract.stop import StopRequest
from tests.conftest import MODELS


@pytest.fixture
def new_stage(tmp_path: Path, recipe_file: Path) -> Iterator[Callable[..., Stage]]:
    """Return a function that makes a preprocess stage of the minimal recipe with overrides; each call is a new start on
    one run folder."""
    opened: list[Events] = []

    def make(*overrides: str) -> Stage:
        recipe = load_recipe(recipe_file, None, overrides)
        run = Run("r", recipe, Roots(tmp_path / "data", MODELS, tmp_path / "runs"))
        events = Events(run.path("preprocess", "events.jsonl"), "preprocess", io.StringIO())
        opened.append(events)
        return Stage(run, "preprocess", events, StopRequest(), -1, -1)

    yield make
    for events in opened:
        events.close()
