"""Small real inputs: a random Llama with SmolLM2's tokenizer, the real embedder, a few of the demo's documents."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
RANDOM_LLAMA = ("model.path=random-llama", "train.target_modules=[all-linear]")
"""Overrides of the profile tiny for the random Llama, which has only two layers."""

DOCUMENTS = ("CN1000003A", "US1000001A", "US1000004A", "US1000006A")


@pytest.fixture(scope="session")
def small_models(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A models mount with `random-llama` (float32, 2 layers) and `all-MiniLM-L6-v2`.

    The Llama's folder has Python files that no library may run.
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("models")
    real = ROOT / "models"
    (folder / "all-MiniLM-L6-v2").symlink_to(real / "all-MiniLM-L6-v2")
    config = LlamaConfig.from_pretrained(
        real / "SmolLM2-135M-Instruct",
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config)
    model.save_pretrained(folder / "random-llama")
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(real / "SmolLM2-135M-Instruct" / name, folder / "random-llama" / name)
    ran = add_python_files(folder / "random-llama", "llama")
    yield folder
    assert not ran.exists(), "a library ran the Python files in a model's folder"


PYTHON = """
from pathlib import Path
from transformers import LlamaConfig, LlamaForCausalLM

Path({ran!r}).touch()


class Config(LlamaConfig):
    model_type = {kind!r}


class Model(LlamaForCausalLM):
    config_class = Config
"""


def add_python_files(folder: Path, kind: str) -> Path:
    """Give the folder of a Llama Python files of its own, for this model type. Returns the file that they write if they
    run."""
    ran = folder.parent / f"{folder.name}-ran"
    (folder / "surprise.py").write_text(PYTHON.format(ran=str(ran), kind=kind))
    (folder / "custom_generate").mkdir()
    own_way = f"{PYTHON.format(ran=str(ran), kind=kind)}\n\ndef generate(*_, **__):\n    pass\n"
    (folder / "custom_generate" / "generate.py").write_text(own_way)
    config = json.loads((folder / "config.json").read_text())
    named = {"AutoConfig": "surprise.Config", "AutoModelForCausalLM": "surprise.Model"}
    (folder / "config.json").write_text(json.dumps({**config, "model_type": kind, "auto_map": named}))
    return ran


@pytest.fixture(scope="session")
def demo_subset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data folder with four of the demo's documents and their questions."""
    folder = tmp_path_factory.mktemp("data") / "few"
    (folder / "documents").mkdir(parents=True)
    source = ROOT / "recipes" / "data" / "patent-qa"
    for name in DOCUMENTS:
        shutil.copy(source / "documents" / f"{name}.pdf", folder / "documents")
    lines = (source / "questions.jsonl").read_text(encoding="utf-8").splitlines()
    kept = [line for line in lines if json.loads(line)["document"].removesuffix(".pdf") in DOCUMENTS]
    (folder / "questions.jsonl").write_text("\n".join(kept) + "\n", encoding="utf-8")
    return folder
