"""ms-swift's names, read from its files."""

import importlib.util
import sys
from pathlib import Path

import pytest

from stages.contract.errors import UsageError
from stages.contract.files import write_json
from stages.contract.recipe import Model, load_recipe, profile_names
from stages.train.swift_names import architectures_by_type, names_in_file, refuse_wrong_names
from tests.conftest import REPOSITORY


def model(kind: str | None, template: str | None = "chatml") -> Model:
    return Model(path="m", swift_type=kind, swift_template=template)


@pytest.fixture
def swift() -> Path:
    spec = importlib.util.find_spec("swift")
    assert spec is not None and spec.submodule_search_locations
    return Path(spec.submodule_search_locations[0])


def test_the_names_are_those_that_ms_swift_has(swift: Path) -> None:
    assert {"llama", "qwen3", "gemma3_vision"} <= names_in_file(swift / "model" / "constant.py")
    assert {"chatml", "qwen2_5_vl", "llama3_2"} <= names_in_file(swift / "template" / "constant.py")


def test_the_architectures_are_those_that_ms_swift_has(swift: Path) -> None:
    known = architectures_by_type(swift)
    assert len(known) > 100
    assert known.keys() <= names_in_file(swift / "model" / "constant.py")
    assert (known["llama"], known["qwen2_5_vl"]) == (["LlamaForCausalLM"], ["Qwen2_5_VLForConditionalGeneration"])


def test_every_recipe_has_known_names() -> None:
    for path in (REPOSITORY / "recipes").glob("*.yaml"):
        for profile in (None, *profile_names(path)):
            refuse_wrong_names(load_recipe(path, profile).model, None)


def test_both_wrong_names_are_said_with_what_is_near() -> None:
    with pytest.raises(UsageError) as caught:
        refuse_wrong_names(model("qwen_2_5", "zzz"), None)
    first, second = str(caught.value).splitlines()
    assert first.startswith("model.swift_type: ms-swift has no 'qwen_2_5'; did you mean '") and "'qwen2_5_vl'" in first
    assert second == "model.swift_template: ms-swift has no 'zzz'; see ms-swift's list of models"


@pytest.mark.parametrize(
    ("kind", "config", "said"),
    [
        ("llama", {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}, None),
        (
            "qwen2",
            {"architectures": ["LlamaForCausalLM"], "model_type": "llama"},
            "is a LlamaForCausalLM; set it to llama",
        ),
        ("qwen2", {"architectures": ["Qwen2_5_VLForConditionalGeneration"], "model_type": "qwen2_5_vl"}, "qwen2_5_vl"),
        ("mgm", {"architectures": ["LlamaForCausalLM"]}, None),
        ("llama", {"architectures": ["OwnForCausalLM"]}, None),
        ("llama", {}, None),
    ],
)
def test_a_type_for_another_architecture_is_refused(
    tmp_path: Path, kind: str, config: dict[str, object], said: str | None
) -> None:
    write_json(tmp_path / "config.json", config)
    if said is None:
        refuse_wrong_names(model(kind), tmp_path)
        return
    with pytest.raises(UsageError) as caught:
        refuse_wrong_names(model(kind), tmp_path)
    assert str(caught.value).startswith(f"model.swift_type: '{kind}' is for Qwen2ForCausalLM")
    assert said in str(caught.value)


@pytest.mark.parametrize(("kind", "template"), [(None, None), ("mgm", "mgm"), ("llama", "llava_vicuna")])
def test_names_may_be_missing_or_those_of_earlier_recipes(
    tmp_path: Path, kind: str | None, template: str | None
) -> None:
    write_json(tmp_path / "config.json", {"architectures": ["LlamaForCausalLM"]})
    refuse_wrong_names(model(kind, template), tmp_path)


def test_another_version_that_keeps_them_elsewhere_is_not_guessed_at(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "swift").mkdir()
    (tmp_path / "swift" / "__init__.py").write_text("raise ImportError")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "swift", raising=False)
    refuse_wrong_names(model("x", "y"), None)
