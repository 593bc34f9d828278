"""A model is found as a user names it, and its folder says how it is prompted."""

import json
import struct
from pathlib import Path

import pytest

from stages.contract.errors import UsageError
from stages.contract.roots import Roots
from stages.host.tune.base import find_model, read_base
from stages.host.tune.data import token_counter
from tests.models.chat_models import BASE, CHATML, HYBRID, Kind, chat_model


@pytest.fixture
def roots(tmp_path: Path) -> Roots:
    """Mounts with the model Qwen3-8B and, as on a hub, Own/Model."""
    for name in ("Qwen3-8B", "Own/Model"):
        (tmp_path / "models" / name).mkdir(parents=True)
        (tmp_path / "models" / name / "config.json").write_text("{}")
    return Roots(tmp_path / "data", tmp_path / "models", tmp_path / "runs")


def test_a_model_is_found_below_the_mount_by_folder_or_elsewhere(
    roots: Roots, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x").mkdir()
    named = (
        "Qwen3-8B",
        "Qwen3-8B/",
        "models/Qwen3-8B",
        str(roots.models / "Qwen3-8B"),
        "x/../models/Qwen3-8B",
        "Own/Model",
        "elsewhere",
    )
    found = [find_model(name, roots) for name in named]
    assert found == ["Qwen3-8B"] * 5 + ["Own/Model", str(tmp_path / "elsewhere")]


def test_a_link_into_the_mount_is_found_by_its_name_there(
    roots: Roots, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "link").symlink_to(roots.models / "Qwen3-8B")
    assert find_model("link", roots) == "Qwen3-8B"


def test_only_a_hubs_name_is_for_download(roots: Roots, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert find_model("Qwen/Qwen2.5-7B-Instruct", roots) is None
    for wrong in ("Qwen3-9B", "models/Qwen3-9B", "./Qwen3-8C", "/nowhere/x"):
        with pytest.raises(UsageError, match=rf"^--model {wrong}: no such folder, .* which has Qwen3-8B; name one"):
            find_model(wrong, roots)


def with_weight(folder: Path) -> None:
    """Write weights of one number into a model's folder."""
    header = json.dumps({"x": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}).encode()
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(4))


@pytest.mark.parametrize(
    ("kind", "template", "may_think"),
    [
        (CHATML, None, False),
        (HYBRID, None, True),
        (BASE, "chatml", False),  # SmolLM2's tokenizer, which has <|im_end|>
    ],
)
def test_template_and_thinking_are_found(roots: Roots, kind: Kind, template: str | None, may_think: bool) -> None:
    with_weight(chat_model(roots.models / "made", kind))
    base = read_base("made", roots)
    assert (base.chat_template, base.may_think) == (template, may_think)


def test_a_base_model_without_chatmls_words_is_prompted_plainly(roots: Roots) -> None:
    folder = chat_model(roots.models / "made", BASE)
    with_weight(folder)
    text = (folder / "tokenizer.json").read_text(encoding="utf-8").replace("<|im_end|>", "<|other|>")
    (folder / "tokenizer.json").write_text(text, encoding="utf-8")
    (folder / "tokenizer_config.json").write_text('{"eos_token": "</s>"}')
    assert read_base("made", roots).chat_template == "plain"


def test_a_real_model_has_a_context_and_a_size(roots: Roots, language_model: Path) -> None:
    base = read_base(str(language_model), roots)
    assert (base.chat_template, base.may_think, base.context) == (None, False, 8192)
    assert base.shape is not None
    assert 1.3e8 < base.shape.parameters < 1.4e8


def test_tokens_are_counted_by_the_tokenizer_or_by_bytes(language_model: Path, tmp_path: Path) -> None:
    texts = ["Hello, world! " * 10, "", "这是中文。", "\ud800"]
    counted, estimated = token_counter(language_model)(texts), token_counter(tmp_path)(texts)
    assert counted[1] == 0 and 35 <= counted[0] <= 45
    assert all(one <= other for one, other in zip(counted[:2], estimated[:2], strict=True))


def test_a_folder_that_is_no_model_is_refused(roots: Roots, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match=r"has no config.json; name the folder of a Hugging Face model$"):
        read_base(str(tmp_path / "empty"), roots)
    with pytest.raises(UsageError, match=r"no \*.safetensors"):
        read_base("Qwen3-8B", roots)
