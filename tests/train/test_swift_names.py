"""ms-swift's names, read from its files."""

import importlib.util
from pathlib import Path

import pytest

from stages.contract.errors import UsageError
from stages.contract.recipe import Model, load_recipe, profile_names
from stages.train.swift_names import names_in_file, refuse_unknown_names
from tests.conftest import REPOSITORY


def model(kind: str, template: str) -> Model:
    return Model(path="m", swift_type=kind, swift_template=template)


def test_the_names_are_those_that_ms_swift_has() -> None:
    spec = importlib.util.find_spec("swift")
    assert spec is not None and spec.submodule_search_locations
    swift = Path(spec.submodule_search_locations[0])
    assert {"llama", "qwen3", "gemma3_vision"} <= names_in_file(swift / "model" / "constant.py")
    assert {"chatml", "qwen2_5_vl", "llama3_2"} <= names_in_file(swift / "template" / "constant.py")


def test_every_recipe_has_known_names() -> None:
    for path in (REPOSITORY / "recipes").glob("*.yaml"):
        for profile in (None, *profile_names(path)):
            refuse_unknown_names(load_recipe(path, profile).model)


def test_both_wrong_names_are_said_with_what_is_near() -> None:
    with pytest.raises(UsageError) as caught:
        refuse_unknown_names(model("qwen_2_5", "zzz"))
    first, second = str(caught.value).splitlines()
    assert first.startswith("model.swift_type: ms-swift has no 'qwen_2_5'; did you mean '") and "'qwen2_5_vl'" in first
    assert second == "model.swift_template: ms-swift has no 'zzz'; see ms-swift's list of models"


def test_another_version_that_keeps_them_elsewhere_is_not_guessed_at(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "swift").mkdir()
    (tmp_path / "swift" / "__init__.py").write_text("raise ImportError")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(__import__("sys").modules, "swift", raising=False)
    refuse_unknown_names(model("x", "y"))
