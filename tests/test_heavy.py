"""A test is heavy by what it uses, directly, through a fixture or through a helper."""

import subprocess
import sys
from pathlib import Path

import pytest

from stages.host.runner import run_stage
from tests.conftest import Lorry, need_model
from tests.heavy import imports_heavy_module


def start() -> None:
    subprocess.run([sys.executable, "-V"], check=True)


class Starter:
    def start(self) -> None:
        start()


def test_light(request: pytest.FixtureRequest, tmp_path: Path) -> None:
    assert request.node.get_closest_marker("heavy") is None


def test_heavy_by_a_fixture(request: pytest.FixtureRequest, embedder: Path) -> None:
    assert request.node.get_closest_marker("heavy")


def test_heavy_by_a_fixture_that_starts_commands(request: pytest.FixtureRequest, lorry: Lorry) -> None:
    assert request.node.get_closest_marker("heavy")


def test_heavy_by_a_helper(request: pytest.FixtureRequest) -> None:
    assert request.node.get_closest_marker("heavy")
    if request.node is None:
        need_model("tiny-llava")


def test_heavy_by_a_process(request: pytest.FixtureRequest) -> None:
    assert request.node.get_closest_marker("heavy")
    if request.node is None:
        Starter().start()


def test_heavy_by_a_stage(request: pytest.FixtureRequest) -> None:
    assert request.node.get_closest_marker("heavy")
    if request.node is None:
        run_stage("a run", "eval", start)  # type: ignore[arg-type]


def test_heavy_by_an_import_inside(request: pytest.FixtureRequest) -> None:
    assert request.node.get_closest_marker("heavy")
    if request.node is None:
        from stages.engines import transformers_engine  # noqa: F401


@pytest.mark.parametrize(
    ("source", "heavy"),
    [
        ("import json\nimport torch.nn\n", True),
        ("from transformers import AutoModel\n", True),
        ("try:\n    import vllm\nexcept ImportError:\n    pass\n", True),
        ("from stages.engines.transformers_engine import TransformersEngine\n", True),
        ("from stages.engines import transformers_engine\n", True),
        ("from tests import small_inputs\nfrom stages.contract import recipe\n", False),
        ("def load():\n    import torch\n", False),
        ("from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import torch\n", False),
    ],
)
def test_imports_of_a_file_are_followed(source: str, heavy: bool, tmp_path: Path) -> None:
    path = tmp_path / "module.py"
    path.write_text(source)
    assert imports_heavy_module(path) is heavy
