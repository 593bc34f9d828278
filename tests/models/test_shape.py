"""A model's shape, read without its weights."""

import json
from pathlib import Path

import pytest

from stages.contract.errors import UsageError
from stages.models.shape import read_shape
from tests.hardware.shapes import CONFIGS, make_shape, tensors, write_safetensors


@pytest.mark.parametrize(("name", "parameters"), [("Qwen2.5-0.5B", 494.0e6), ("Qwen2.5-7B", 7615.6e6)])
def test_parameters_are_as_many_as_published(tmp_path: Path, name: str, parameters: float) -> None:
    shape = read_shape(make_shape(tmp_path, name))
    assert shape.parameters == pytest.approx(parameters, rel=1e-4)
    assert shape.disk_bytes == 2 * shape.parameters


def test_linear_modules_do_not_include_embeddings(tmp_path: Path) -> None:
    shape = read_shape(make_shape(tmp_path, "Qwen2.5-7B"))
    assert len(shape.linears) == 28 * 7 + 1
    assert shape.linears["model.layers.0.mlp.down_proj"] == (18944, 3584)
    assert shape.linears["lm_head"] == (3584, 152064)


@pytest.mark.parametrize(
    ("method", "bits", "packed_shape"),
    [("gptq", 4, [4864 // 8, 896]), ("gptq", 8, [4864 // 4, 896]), ("awq", 4, [4864, 896 // 8])],
)
def test_a_quantised_model_is_counted_unpacked(tmp_path: Path, method: str, bits: int, packed_shape: list[int]) -> None:
    make_shape(tmp_path, "Qwen2.5-0.5B")
    packed = {"model.layers.0.mlp.down_proj.qweight": packed_shape}
    write_safetensors(tmp_path / "packed.safetensors", packed, "I32", 4)
    write_safetensors(tmp_path / "scales.safetensors", {"model.layers.0.mlp.down_proj.scales": [38, 896]}, "F16")
    names = {name: shape for name, shape in tensors(CONFIGS["Qwen2.5-0.5B"]).items() if "layers.0.mlp.down" not in name}
    write_safetensors(tmp_path / "model.safetensors", names)
    files = ("model.safetensors", "packed.safetensors", "scales.safetensors")
    index = {"weight_map": {str(number): name for number, name in enumerate(files)}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    (tmp_path / "config.json").write_text(
        json.dumps({**CONFIGS["Qwen2.5-0.5B"], "quantization_config": {"quant_method": method, "bits": bits}})
    )
    shape = read_shape(tmp_path)
    assert shape.quantisation == method
    assert shape.linears["model.layers.0.mlp.down_proj"] == (4864, 896)
    assert shape.parameters == pytest.approx(494.0e6, rel=1e-4)


def test_a_vision_language_config_has_the_text_models_sizes(tmp_path: Path) -> None:
    make_shape(tmp_path, "Qwen2.5-0.5B")
    config = {"text_config": CONFIGS["Qwen2.5-0.5B"], "vision_config": {"depth": 2}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    shape = read_shape(tmp_path)
    assert (shape.hidden, shape.layers, shape.tied, shape.vision) == (896, 24, True, {"depth": 2})


def _cut(folder: Path) -> None:
    with (folder / "model.safetensors").open("r+b") as file:
        file.truncate((folder / "model.safetensors").stat().st_size - 1)


def _no_header(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"\xff" * 100)


def _pointer(folder: Path) -> None:
    (folder / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")


def _empty(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"")


def _missing_part(folder: Path) -> None:
    index = {"weight_map": {"a": "model.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def _no_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def _no_config(folder: Path) -> None:
    (folder / "config.json").write_text("{")


def _no_decoder(folder: Path) -> None:
    (folder / "config.json").write_text('{"model_type": "resnet"}')


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (_cut, r"damaged \(.*\); copy it again"),
        (_no_header, r"damaged \(.*\); copy it again"),
        (_pointer, r"damaged \(.*\); copy it again"),
        (_empty, r"damaged \(.*\); copy it again"),
        (_missing_part, "model-00002-of-00002.safetensors is missing, one of 2 files that .* names; copy it again"),
        (_no_weights, "no \\*.safetensors; copy a whole Hugging Face model folder there"),
        (_no_config, "config.json: cannot be read .*; copy a whole Hugging Face model folder there"),
        (_no_decoder, "no 'num_attention_heads', so memory cannot be estimated; use a decoder such as Llama or Qwen"),
    ],
)
def test_a_damaged_folder_is_named_in_one_line(tmp_path: Path, damage: object, says: str) -> None:
    damage(make_shape(tmp_path, "Qwen2.5-0.5B"))  # type: ignore[operator]
    with pytest.raises(UsageError, match=says) as caught:
        read_shape(tmp_path)
    assert "\n" not in str(caught.value)
    assert str(tmp_path) in str(caught.value)
