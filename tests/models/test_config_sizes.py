"""What a config.json tells of a model whose weights are not there yet."""

import json
from pathlib import Path
from typing import Any

import pytest

from stages.contract.errors import UsageError
from stages.contract.recipe import Train
from stages.hardware import memory
from stages.hardware.fit import plan_training, smallest_changes
from stages.models.config_sizes import DEFAULTS, EXPERTS, NAMES, UnknownShapeError, decoder_sizes
from stages.models.config_tensors import VISION, make_tensors
from stages.models.shape import planned_shape, read_shape
from tests.hardware.shapes import make_gptq_shape, make_llava_shape, make_shape, write_safetensors
from tests.models.configs import CONFIGS

WHERE = Path("config.json")


@pytest.mark.parametrize("name", CONFIGS)
def test_a_config_alone_has_as_many_parameters_as_the_models_card(tmp_path: Path, name: str) -> None:
    config, parameters = CONFIGS[name]
    (tmp_path / "config.json").write_text(json.dumps(config))
    shape, made = planned_shape(tmp_path)
    assert made == "its weights are missing"
    assert shape.parameters == pytest.approx(parameters, rel=0.01)
    assert shape.linears


def test_gemmas_heads_are_its_classs_defaults() -> None:
    sizes = decoder_sizes(CONFIGS["gemma-3-4b"][0], WHERE)
    assert (sizes.heads, sizes.kv_heads, sizes.head_size, sizes.vocabulary, sizes.tied) == (8, 4, 256, 262208, True)


def test_a_flat_and_a_nested_config_have_the_same_sizes() -> None:
    flat, nested = (decoder_sizes(CONFIGS[name][0], WHERE) for name in ("Qwen2.5-VL-7B", "Qwen2.5-VL-7B nested"))
    assert {**vars(flat), "kind": ""} == {**vars(nested), "kind": ""}


def test_a_plan_reads_the_modules_of_a_mixture_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A plan estimates hundreds of ways, and once read all 18,867 tensors for each."""
    (tmp_path / "config.json").write_text(json.dumps(CONFIGS["Qwen3-30B-A3B"][0]))
    shape, _ = planned_shape(tmp_path)
    assert (len(shape.weights), shape.intermediate, shape.active_experts) == (18867, 8 * 768, 8 / 128)
    read: list[str] = []
    is_connector = memory.is_connector
    monkeypatch.setattr(memory, "is_connector", lambda module: read.append(module) or is_connector(module))
    settings = Train.model_validate({"adapters": [{"name": "a"}]})
    plan_training(shape, settings, 2, "bfloat16", 24 * 1024**3)
    smallest_changes(shape, settings, 2, "bfloat16", 24 * 1024**3, memory.Lengths(2048, 64))
    assert len(read) < 8 * len(shape.weights)


@pytest.mark.parametrize("make", [make_shape, make_gptq_shape])
def test_made_tensors_are_those_of_the_files(tmp_path: Path, make: Any) -> None:
    real = read_shape(make(tmp_path, "Qwen2.5-7B"))
    config = json.loads((tmp_path / "config.json").read_text())
    made = set(make_tensors(config, decoder_sizes(config, WHERE), WHERE))
    found = {(weight.name, weight.shape, weight.dtype) for weight in real.weights}
    if make is make_gptq_shape:  # whose scales and norms are in float16
        made = {(name, shape, "F16" if dtype == "BF16" else dtype) for name, shape, dtype in made}
    assert made == found


def test_made_tensors_of_a_llava_have_the_files_size(tmp_path: Path) -> None:
    real = read_shape(make_llava_shape(tmp_path))
    (tmp_path / "model.safetensors").unlink()
    shape, _ = planned_shape(tmp_path)
    assert shape.parameters == pytest.approx(real.parameters, rel=0.002)


def test_the_files_count_where_they_are(tmp_path: Path) -> None:
    shape, made = planned_shape(make_shape(tmp_path, "Qwen2.5-0.5B"))
    assert made is None and shape.tied


def test_an_index_whose_files_are_missing_must_agree(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIGS["Qwen3-30B-A3B"][0]))
    index: dict[str, Any] = {"metadata": {"total_size": 61064245248}, "weight_map": {"a": "model-1.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert planned_shape(tmp_path)[1] == "1 of 1 weight files are missing"
    index["metadata"]["total_size"] *= 2
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UnknownShapeError, match=r"tensors of these sizes have 61\.1 GB, but .* states 122\.1 GB"):
        planned_shape(tmp_path)


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"model_type": "mamba", "hidden_size": 8}, "no 'num_attention_heads'"),
        ({**CONFIGS["Phi-3-mini"][0], "model_type": "deepseek_v3"}, "cannot make the tensors of a deepseek_v3 model"),
        ({**CONFIGS["Phi-3-mini"][0], "quantization_config": {"quant_method": "bitsandbytes"}}, "by bitsandbytes"),
        ({**CONFIGS["gemma-3-4b"][0], "vision_config": {"model_type": "own"}}, "vision_config has no 'hidden_size'"),
    ],
)
def test_what_a_config_cannot_tell_is_said(tmp_path: Path, config: dict[str, Any], says: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UnknownShapeError, match=says) as caught:
        planned_shape(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "name", ["consolidated.safetensors", "adapter_model.safetensors", "model.fp16.safetensors", "other.safetensors"]
)
@pytest.mark.parametrize("indexed", [False, True])
def test_another_copy_of_the_weights_is_not_counted(tmp_path: Path, name: str, indexed: bool) -> None:
    alone = read_shape(make_shape(tmp_path, "Qwen2.5-0.5B"))
    if indexed:
        weights = {weight.name: "model.safetensors" for weight in alone.weights}
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weights}))
    write_safetensors(tmp_path / name, {"tok_embeddings.weight": [151936, 896]})
    for other in ("pytorch_model.bin", "model.gguf", "onnx/model.onnx", "original/consolidated.00.pth"):
        (tmp_path / other).parent.mkdir(exist_ok=True)
        (tmp_path / other).write_bytes(b"weights")
    shape = read_shape(tmp_path)
    assert (shape.parameters, shape.disk_bytes) == (alone.parameters, alone.disk_bytes)


def test_a_folder_of_consolidated_weights_alone_is_refused(tmp_path: Path) -> None:
    make_shape(tmp_path, "Qwen2.5-0.5B")
    (tmp_path / "model.safetensors").rename(tmp_path / "consolidated.safetensors")
    with pytest.raises(UsageError, match=r"no \*\.safetensors"):
        read_shape(tmp_path)


def test_the_defaults_are_those_of_transformers_classes() -> None:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    experts = {"experts": ("num_experts", "num_local_experts"), "per_token": ("num_experts_per_tok",)}
    experts |= {"width": ("moe_intermediate_size",), "shared": ("shared_expert_intermediate_size",)}
    for kind, row in DEFAULTS.items():
        config = CONFIG_MAPPING[kind]().get_text_config()
        for name, value in zip(NAMES, row, strict=True):
            default = getattr(config, name, None)
            default = default[0] if isinstance(default, list) else default
            if value is None:  # as derived: as many as heads, or divided by them
                derived = {"num_key_value_heads": config.num_attention_heads}
                derived["head_dim"] = config.hidden_size // config.num_attention_heads
                assert default in (None, derived[name]), (kind, name)
            elif name != "tie_word_embeddings" or default is not None:
                assert default == value, (kind, name)
        for key, value in EXPERTS.get(kind, {}).items():
            names = [name for name in experts[key] if hasattr(config, name)]
            assert getattr(config, names[0]) == value, (kind, key)
    for kind, sizes in VISION.items():
        config = CONFIG_MAPPING[kind]()
        config = getattr(config, "vision_config", config)
        assert {key: getattr(config, key) for key in sizes} == sizes, kind
