"""Fixtures of the inference tests."""

import importlib.metadata
from pathlib import Path
from typing import Any

import pytest

from stages.contract.files import FileHashes, write_json, write_jsonl
from stages.contract.recipe import load_recipe
from stages.contract.roots import Roots
from stages.contract.run import CONTRACT_VERSION, Run, describe_output
from tests.conftest import REPOSITORY
from tests.small_inputs import small_models

__all__ = ["small_models"]


@pytest.fixture
def run(tmp_path: Path, small_models: Path) -> Run:
    """A run with six test samples and an adapter folder."""
    overrides = ("model.path=random-llama", "infer.chunk_size=3", "infer.max_length=64", "infer.max_new_tokens=8")
    recipe = load_recipe(REPOSITORY / "recipes" / "patent-qa.yaml", "tiny", overrides)
    run = Run("r", recipe, Roots(tmp_path / "data", small_models, tmp_path / "runs"))
    samples = [sample(f"s{i}", "word " * i) for i in range(6)]
    ask(run, samples)
    write_json(run.path("train", "adapters", "tuned", "adapter_config.json"), {"r": 8})
    describe(run, "train", "adapters/tuned/adapter_config.json")
    return run


def ask(run: Run, samples: list[dict[str, Any]]) -> None:
    """Make these the test samples."""
    write_jsonl(run.path("preprocess", "samples", "test.jsonl"), samples)
    rows = [
        {"idx": str(i), "ids": [one["id"]], "document": "a.pdf", "question": one["messages"][0]["content"]}
        for i, one in enumerate(samples)
        if one["messages"]
    ]
    write_jsonl(run.path("preprocess", "asked.jsonl"), rows)
    describe(run, "preprocess", "samples/test.jsonl", "asked.jsonl")


def sample(name: str, text: str, **meta: Any) -> dict[str, Any]:
    return {
        "id": name,
        "messages": [{"role": "user", "content": text}],
        "images": [],
        "references": ["x"],
        "meta": meta,
    }


def describe(run: Run, stage: str, *names: str) -> None:
    hashes = FileHashes(run.folder / "none")
    outputs = {name: describe_output(run.stage_folder(stage), name, None, hashes) for name in names}
    version = importlib.metadata.version("lorry")
    manifest = {
        "contract": CONTRACT_VERSION,
        "version": version,
        "key": run.key(stage, {}),
        "inputs": {},
        "outputs": outputs,
    }
    write_json(run.path(stage, "manifest.json"), manifest)
