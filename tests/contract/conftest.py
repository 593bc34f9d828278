"""A run folder whose stages take no time."""

import signal
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from stages.contract.recipe import load_recipe
from stages.contract.roots import Roots
from stages.contract.run import Run
from stages.contract.stop import STOPS
from tests.conftest import Lorry, make_data


@pytest.fixture
def small_mounts(lorry: Lorry, tmp_path: Path) -> Lorry:
    """Mounts with data and two model folders of a few bytes, which stages only hash."""
    for name in ("all-MiniLM-L6-v2", "SmolLM2-135M-Instruct"):
        folder = tmp_path / "models" / name
        folder.mkdir(parents=True)
        (folder / "config.json").write_text("{}")
        (folder / "model.safetensors").write_bytes(name.encode())
    make_data(lorry.data / "few", documents=2, pages=1)
    return replace(lorry, models=tmp_path / "models")


@pytest.fixture
def run(small_mounts: Lorry, recipe_file: Path) -> Run:
    return Run("r", load_recipe(recipe_file), Roots(small_mounts.data, small_mounts.models, small_mounts.runs))


@pytest.fixture(autouse=True)
def _signals_as_before() -> Iterator[None]:
    """Restore the signal handlers, which `run_stage` replaces in the tests' process."""
    before = {number: signal.getsignal(number) for number in STOPS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)
