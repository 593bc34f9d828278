"""Python files in a model's folder: they run if the recipe says so, and never else."""

import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from stages.contract.errors import Exit, UsageError
from stages.contract.files import read_json, write_json
from stages.models.remote_code import refuse_embedder_code, settle_remote_code
from tests.conftest import REPOSITORY
from tests.small_inputs import add_python_files, small_models
from tests.train.conftest import Training, training

__all__ = ["small_models", "training"]


def load(folder: Path, trusted: bool) -> str:
    """Load a folder in a process of its own, as ms-swift does: it always trusts. Returns the class, or the error."""
    program = f"""
from pathlib import Path
from stages.contract.errors import UsageError
from stages.models.remote_code import settle_remote_code
try:
    settle_remote_code(Path({str(folder)!r}), {trusted})
    from transformers import AutoModelForCausalLM
    print(type(AutoModelForCausalLM.from_pretrained({str(folder)!r}, trust_remote_code=True)).__module__)
except UsageError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    return done.stdout.splitlines()[-1]


@pytest.fixture
def llama(small_models: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(small_models / "random-llama", tmp_path / "models" / "random-llama"))


def test_a_model_of_transformers_own_is_loaded_without_its_python_files(llama: Path) -> None:
    mark = add_python_files(llama, "llama")
    assert load(llama, trusted=False) == "transformers.models.llama.modeling_llama"
    assert not mark.exists()


def test_files_that_the_recipe_trusts_run(llama: Path) -> None:
    mark = add_python_files(llama, "surprising")
    assert load(llama, trusted=True).endswith("surprise")
    assert mark.exists()


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
        ([], {"model_type": "own", "auto_map": {"AutoModel": "own--code.Model"}}, r"no own model.*\(code\.py\)"),
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
