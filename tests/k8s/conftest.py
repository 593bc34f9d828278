"""Models of patent-qa without their weights, for plans."""

import json
from pathlib import Path

import pytest

from tests.hardware.shapes import CONFIGS, PICTURE_CONFIGS, make_shape


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The models of patent-qa, as configs; the small embedder also has weights, of a true size."""
    folder = tmp_path_factory.mktemp("models")
    configs = {**PICTURE_CONFIGS, "Qwen2.5-7B-Instruct": CONFIGS["Qwen2.5-7B"], "SmolLM2-135M-Instruct": None}
    for name, config in configs.items():
        (folder / name).mkdir()
        (folder / name / "config.json").write_text(json.dumps(config or CONFIGS["Qwen2.5-0.5B"]))
    make_shape(folder / "all-MiniLM-L6-v2", "Qwen2.5-0.5B")
    return folder
