"""Python files in a model's folder: they run if the recipe says so, and never else."""

import json
import shutil
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from stages.contract.errors import Exit, UsageError
from stages.contract.files import read_json, write_json
from stages.models.remote_code import refuse_embedder_code, settle_remote_code
from tests.conftest import REPOSITORY
from tests.small_inputs import add_python_files, small_models
from tests.train.conftest import Training, training

__all__ = ["small_models", "training"]


PROGRAM = """
import json, sys
from pathlib import Path
from stages.models.remote_code import settle_remote_code
for name, (folder, trusted) in json.loads(sys.argv[1]).items():
    settle_remote_code(Path(folder), trusted)
    from transformers import AutoModelForCausalLM
    print(name, type(AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)).__module__)
"""
"""Loads folders as ms-swift does, which always trusts them, and prints the module of each model's class."""


@dataclass(frozen=True)
class Loaded:
    """A folder that PROGRAM has loaded."""

    module: str
    ran: bool
    """Whether its Python files ran."""


@pytest.fixture
def llama(small_models: Path, tmp_path: Path) -> Path:
    return copy_llama(small_models, tmp_path / "models" / "random-llama")


def copy_llama(models: Path, folder: Path) -> Path:
    """Copy the random Llama without its Python files. Returns the folder."""
    return Path(shutil.copytree(models / "random-llama", folder, ignore=shutil.ignore_patterns("*.py", "custom_*")))


@pytest.fixture(scope="module")
def loaded(small_models: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Loaded]:
    """Three folders with Python files: of a model that transformers has, of the same without a word in its JSON files,
    and of one that transformers does not have and the recipe trusts."""
    folder = tmp_path_factory.mktemp("models")
    kinds = {"known": ("llama", False), "unnamed": ("llama", False), "trusted": ("surprising", True)}
    ran = {name: add_python_files(copy_llama(small_models, folder / name), kind) for name, (kind, _) in kinds.items()}
    config = read_json(folder / "unnamed" / "config.json")
    del config["auto_map"]
    write_json(folder / "unnamed" / "config.json", config)
    asks = {name: (str(folder / name), trusted) for name, (_, trusted) in kinds.items()}
    command = [sys.executable, "-c", PROGRAM, json.dumps(asks)]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=True)
    modules = dict(line.split(" ", 1) for line in done.stdout.splitlines() if line.split(" ")[0] in kinds)
    return {name: Loaded(module, ran[name].exists()) for name, module in modules.items()}


@pytest.mark.parametrize("name", ["known", "unnamed"])
def test_a_model_of_transformers_own_is_loaded_without_its_python_files(loaded: dict[str, Loaded], name: str) -> None:
    """Neither those that `auto_map` names, nor a way to generate of its own, which no JSON file has to name."""
    assert loaded[name] == Loaded("transformers.models.llama.modeling_llama", ran=False)


def test_files_that_the_recipe_trusts_run(loaded: dict[str, Loaded]) -> None:
    assert loaded["trusted"].module.endswith(".surprise") and loaded["trusted"].ran


def test_a_model_that_needs_its_files_is_refused_before_anything_loads(llama: Path) -> None:
    mark = add_python_files(llama, "surprising")
    with pytest.raises(UsageError) as caught:
        settle_remote_code(llama, trusted=False)
    assert str(caught.value) == (
        f"{llama}: transformers has no surprising model, so its Python files (surprise.py) would have to run; set"
        " model.trust_remote_code to true if you trust them"
    )
    assert not mark.exists()


def test_training_refuses_it_in_one_line(training: Training, llama: Path) -> None:
    mark = add_python_files(llama, "surprising")
    training.lorry = replace(training.lorry, models=llama.parent)
    code, output = training()
    assert code == Exit.USAGE, output
    assert "would have to run; set model.trust_remote_code to true if you trust them" in output.splitlines()[-1]
    assert "Traceback" not in output
    assert not mark.exists()


@pytest.mark.parametrize(
    ("modules", "config", "says"),
    [
        (
            [{"type": "custom.Pooling"}],
            {},
            r"modules\.json: custom\.Pooling is Python of this folder, which never runs",
        ),
        pytest.param(
            [],
            {"model_type": "own", "auto_map": {"AutoModel": "own--code.Model"}},
            r"no own model.*\(code\.py\)",
            marks=pytest.mark.heavy,  # transformers is asked whether it knows the model
        ),
    ],
)
def test_an_embedder_that_needs_its_files_is_refused(
    tmp_path: Path, modules: object, config: object, says: str
) -> None:
    write_json(tmp_path / "modules.json", modules)
    write_json(tmp_path / "config.json", config)
    with pytest.raises(UsageError, match=f"{says}.*; use an embedder that needs none"):
        refuse_embedder_code(tmp_path)


def test_an_embedder_of_a_known_architecture_is_none_of_them(tmp_path: Path) -> None:
    """As GME is published."""
    auto_map = {"AutoModel": "modeling_gme_qwen2vl.GmeQwen2VLForVision"}
    write_json(tmp_path / "config.json", {"model_type": "qwen2_vl", "auto_map": auto_map})
    write_json(tmp_path / "modules.json", [{"type": "sentence_transformers.models.Transformer"}])
    refuse_embedder_code(tmp_path)
    assert read_json(tmp_path / "config.json")["auto_map"] == auto_map
