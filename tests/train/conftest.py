"""A run that is ready to train: made-up samples, a random Llama, and the train command in processes of its own."""

import importlib.metadata
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from stages.contract.files import FileHashes, read_json, write_json, write_jsonl
from stages.contract.recipe import load_recipe
from stages.contract.roots import Roots
from stages.contract.run import CONTRACT_VERSION, Run, describe_output
from stages.tasks import settle_recipe
from tests.conftest import REPOSITORY, Lorry
from tests.small_inputs import RANDOM_LLAMA, small_models

__all__ = ["small_models"]


class Training:
    """Runs `lorry-train` on one run folder."""

    def __init__(self, lorry: Lorry, overrides: tuple[str, ...], profile: str = "tiny") -> None:
        self.lorry, self.overrides, self.profile = lorry, overrides, profile

    @property
    def run(self) -> Run:
        recipe = load_recipe(REPOSITORY / "recipes" / "patent-qa.yaml", self.profile, self.overrides)
        roots = Roots(self.lorry.data, self.lorry.models, self.lorry.runs)
        return Run("r", settle_recipe(recipe, "patent-qa", roots.data), roots)

    @property
    def options(self) -> tuple[str, ...]:
        sets = (word for override in self.overrides for word in ("--set", override))
        return ("patent-qa", "--profile", self.profile, "--run", "r", *sets)

    def start(self, *arguments: str, **environment: str) -> "subprocess.Popen[str]":
        lorry = replace(self.lorry, extra={"LORRY_TARGET": "cpu", **environment})
        module = "tests.train.hungry_train" if "HUNGER" in environment else "entrypoints.train"
        return lorry.start(module, *self.options, *arguments)

    def __call__(self, *arguments: str, **environment: str) -> tuple[int, str]:
        """Exit code and output."""
        process = self.start(*arguments, **environment)
        output, _ = process.communicate(timeout=300)
        return process.returncode, output

    def manifest(self) -> dict[str, Any]:
        manifest: dict[str, Any] = read_json(self.run.path("train", "manifest.json"))
        return manifest

    def with_samples(self, number: int = 24, images: tuple[str, ...] = (), validation: int = 2) -> "Training":
        """Put the outputs of preprocess into the run; every sample has the same images."""
        splits = {"train": number, "validation": validation}
        return self.with_splits(
            {split: [sample(f"{split}{i}", images) for i in range(count)] for split, count in splits.items()}
        )

    def with_splits(self, splits: dict[str, list[dict[str, Any]]]) -> "Training":
        """Put these samples into the run, by split, as the outputs of preprocess."""
        run = self.run
        outputs = {}
        for split, samples in splits.items():
            name = f"samples/{split}.jsonl"
            write_jsonl(run.path("preprocess", name), samples)
            outputs[name] = describe_output(run.stage_folder("preprocess"), name, None, FileHashes(run.folder / "none"))
        manifest = {"contract": CONTRACT_VERSION, "version": importlib.metadata.version("lorry")}
        manifest |= {"key": run.key("preprocess", {}), "inputs": {}, "outputs": outputs}
        write_json(run.path("preprocess", "manifest.json"), manifest)
        return self


def sample(
    name: str, images: tuple[str, ...] = (), source: str = "questions", answer: str | None = None
) -> dict[str, Any]:
    """A question about `name` and its answer."""
    question = f"{'<image>' * len(images)}What is {name}?"
    said = {"system": "Answer.", "user": question, "assistant": answer or f"It is {name}."}
    messages = [{"role": role, "content": content} for role, content in said.items()]
    return {
        "id": name,
        "messages": messages,
        "images": list(images),
        "references": ["x"],
        "meta": {"source": source},
    }


@pytest.fixture
def training(lorry: Lorry, small_models: Path) -> Training:
    """A small training: 24 samples, batches of 4."""
    overrides = (*RANDOM_LLAMA, "train.effective_batch=4", "train.checkpoint_every=1000")
    return Training(replace(lorry, models=small_models), overrides).with_samples()
