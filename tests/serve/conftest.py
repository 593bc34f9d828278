"""A run that is trained: a small random Llama with two adapters that answer differently."""

from pathlib import Path
from typing import Any

import pytest

from stages.contract.files import write_jsonl
from stages.contract.recipe import load_recipe
from stages.contract.roots import Roots
from stages.contract.run import Run
from stages.host.runner import write_recipe
from stages.serve.loading import Loaded, load_models
from stages.serve.served import Served, served_run
from tests.conftest import REPOSITORY
from tests.infer.conftest import describe
from tests.small_inputs import small_models

__all__ = ["small_models"]

SYSTEM = "Answer in one word. 用一个词回答。"
NAMES = ["base", "formal", "terse"]

OVERRIDES = (
    "infer.max_length=512",
    "infer.max_new_tokens=12",
    "train.adapters=[{name: formal}, {name: terse}]",
)


def conversation(name: str, text: str) -> dict[str, Any]:
    return {
        "id": name,
        "messages": [{"role": "system", "content": SYSTEM}, {"role": "user", "content": text}],
        "images": [],
        "references": ["x"],
        "meta": {"source": "few"},
    }


def add_adapter(model: Path, folder: Path, seed: int) -> None:
    """Write an adapter with random weights, so large that it changes the answers."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    base = AutoModelForCausalLM.from_pretrained(model, local_files_only=True)
    config = LoraConfig(r=4, lora_alpha=32, init_lora_weights=False, target_modules=["q_proj", "v_proj", "down_proj"])
    get_peft_model(base, config).save_pretrained(folder)


def tuned_run(folder: Path, models: Path, model: str) -> Run:
    """A run `job` of a model, with the adapters `formal` and `terse`, and four test samples."""
    recipe = load_recipe(REPOSITORY / "recipes" / "patent-qa.yaml", "tiny", (*OVERRIDES, f"model.path={model}"))
    (folder / "data").mkdir()
    run = Run("job", recipe, Roots(folder / "data", models, folder / "runs"))
    samples = [
        conversation(f"s{i}", f"{text} {i}?") for i, text in enumerate(("What is a valve", "什么是阀", "Why", "二"))
    ]
    learnt = [{**one, "messages": [*one["messages"], {"role": "assistant", "content": "x"}]} for one in samples]
    write_jsonl(run.path("preprocess", "samples", "test.jsonl"), samples)
    write_jsonl(run.path("preprocess", "samples", "train.jsonl"), learnt)
    describe(run, "preprocess", "samples/test.jsonl", "samples/train.jsonl")
    for seed, name in enumerate(NAMES[1:]):
        add_adapter(models / model, run.path("train", "adapters", name), seed)
    describe(run, "train", "adapters/")
    write_recipe(run)
    return run


@pytest.fixture(scope="session")
def tuned(tmp_path_factory: pytest.TempPathFactory, small_models: Path) -> Run:
    """That run of the random Llama."""
    return tuned_run(tmp_path_factory.mktemp("tuned"), small_models, "random-llama")


@pytest.fixture(scope="session")
def served(tuned: Run) -> Served:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LORRY_TARGET", "cpu")
        return served_run(tuned, "transformers", None, None, print)


@pytest.fixture(scope="session")
def models(served: Served) -> dict[str, Loaded]:
    return load_models(served, print)


@pytest.fixture
def environment(tuned: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Set the mounts of that run in this process, and the target cpu."""
    mounts = {"LORRY_DATA": tuned.roots.data, "LORRY_MODELS": tuned.roots.models, "LORRY_RUNS": tuned.roots.runs}
    for name, value in {**mounts, "LORRY_TARGET": "cpu"}.items():
        monkeypatch.setenv(name, str(value))
