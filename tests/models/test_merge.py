"""Adapters merged into a copy of their base: the same logits, and no other copy of the weights."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    LlamaConfig,
    LlamaForCausalLM,
)

from stages.contract.errors import UsageError
from stages.contract.files import read_json, sha256_file
from stages.models.connector import link_connector
from stages.models.merge import Merge, write_merged_copy
from tests.conftest import need_model


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama whose head shares the embedding's weights, in a folder with other files than its own."""
    folder = tmp_path_factory.mktemp("models") / "base"
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=300, tie_word_embeddings=True)).save_pretrained(folder)
    for name in (
        *("tokenizer.json", "chat_template.jinja", "tekken.json", "additional_chat_templates/tools.jinja"),
        *("consolidated.safetensors", "pytorch_model.bin", "pytorch_model.bin.index.json", "model.gguf"),
        *("original/params.json", "original/consolidated.00.pth", "onnx/model.onnx", "adapter_model.bin"),
    ):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("{}")
    return folder


@pytest.mark.parametrize(
    "lora",
    [
        {"target_modules": "all-linear"},
        {"target_modules": ["q_proj", "lm_head"]},
        {"target_modules": ["q_proj", "embed_tokens"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
    ],
    ids=["layers", "head", "embedding", "saved head", "saved embedding"],
)
def test_a_merged_copy_has_the_adapters_logits(base: Path, tmp_path: Path, lora: dict[str, Any]) -> None:
    torch.manual_seed(1)
    load: Any = AutoModelForCausalLM.from_pretrained
    tuned: Any = get_peft_model(load(base), LoraConfig(r=8, init_lora_weights=False, **lora))
    for name, parameter in tuned.named_parameters():
        if "modules_to_save" in name:
            parameter.data += 0.02 * torch.randn_like(parameter)
    tuned.save_pretrained(tmp_path / "adapter")
    tokens = torch.arange(40).reshape(2, 20)
    with torch.inference_mode():
        plain = load(base)(tokens).logits
        served = PeftModel.from_pretrained(load(base), str(tmp_path / "adapter")).eval()(tokens).logits
        copy = write_merged_copy(base, tmp_path / "adapter", tmp_path / "merged", "float32")
        merged = load(copy)(tokens).logits
    assert (served - plain).abs().max() > 0.1
    assert (served - merged).abs().max() < 1e-5
    assert {str(path.relative_to(copy)) for path in copy.rglob("*") if path.is_file()} == {
        *("config.json", "generation_config.json", "model.safetensors"),
        *("tokenizer.json", "chat_template.jinja", "tekken.json", "additional_chat_templates/tools.jinja"),
    }


SMALL = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
SMALL["vocab_size"] = 300
HEAD_TOO = ["q_proj", "down_proj", "lm_head"]


def write_adapter(base: Any, folder: Path, **lora: Any) -> None:
    """Save random LoRA weights for a loaded base."""
    torch.manual_seed(1)
    get_peft_model(base, LoraConfig(r=8, init_lora_weights=False, **lora)).save_pretrained(folder)


@pytest.mark.parametrize(
    ("family", "tied", "target"),
    [
        *(("llama", tied, target) for tied in (False, True) for target in ("all-linear", HEAD_TOO)),
        *((family, True, HEAD_TOO) for family in ("qwen2", "qwen3", "gemma2")),
    ],
    ids=str,
)
def test_a_merge_in_bfloat16_differs_by_its_rounding_only(tmp_path: Path, family: str, tied: bool, target: Any) -> None:
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        family, **SMALL, num_key_value_heads=2, head_dim=16, tie_word_embeddings=tied, dtype="bfloat16"
    )
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(
        tmp_path / "base", max_shard_size="60KB"
    )
    load: Any = AutoModelForCausalLM.from_pretrained
    lora = {"lora_alpha": 8, "use_rslora": tied, "rank_pattern": {"q_proj": 4}}
    write_adapter(load(tmp_path / "base"), tmp_path / "adapter", target_modules=target, **lora)
    Merge(tmp_path / "base", tmp_path / "adapter").write(tmp_path / "merged")

    exact = PeftModel.from_pretrained(load(tmp_path / "base", dtype=torch.float32), str(tmp_path / "adapter")).eval()
    tokens = torch.arange(40).reshape(2, 20)
    with torch.inference_mode():
        wanted, merged = exact(tokens).logits, load(tmp_path / "merged", dtype=torch.float32)(tokens).logits
        plain = load(tmp_path / "base", dtype=torch.float32)(tokens).logits
    # bfloat16 has 8 bits: each weight is off by up to 1/512 of itself
    assert (wanted - merged).abs().max() < 0.02 * (wanted - plain).abs().max()

    files = sorted((tmp_path / "merged").glob("*.safetensors"))
    assert len(files) == len(list((tmp_path / "base").glob("*.safetensors"))) > 2
    kinds, places = set(), {}
    for file in files:
        with safe_open(file, framework="pt") as opened:
            places |= dict.fromkeys(opened.keys(), file.name)
            kinds |= {opened.get_tensor(name).dtype for name in opened.keys()}  # noqa: SIM118 - no mapping
    assert kinds == {torch.bfloat16}
    assert read_json(tmp_path / "merged" / "model.safetensors.index.json")["weight_map"] == places
    unties = tied and target != "all-linear"
    assert read_json(tmp_path / "merged" / "config.json")["tie_word_embeddings"] is (tied and not unties)
    assert ("lm_head.weight" in places) is (not tied or unties)


def test_a_merged_llava_has_the_trained_connector_and_the_lora_of_its_vision_tower(tmp_path: Path) -> None:
    model = need_model("tiny-llava")
    weights = load_file(model / "model.safetensors")
    torch.manual_seed(0)
    own = {name: torch.randn_like(weights[name]) for name in weights if "multi_modal_projector" in name}
    save_file(own, tmp_path / "connector.safetensors")
    linked = link_connector(
        model, tmp_path / "connector.safetensors", sha256_file(tmp_path / "connector.safetensors"), tmp_path / "linked"
    )
    load: Any = AutoModelForImageTextToText.from_pretrained
    write_adapter(load(linked), tmp_path / "adapter", target_modules=["q_proj", "fc1", "down_proj"])
    Merge(linked, tmp_path / "adapter").write(tmp_path / "merged")
    asked = {
        "input_ids": torch.tensor([[*[49152] * 16, *range(20)]]),
        "pixel_values": torch.randn(1, 3, 56, 56),
    }
    with torch.inference_mode():
        wanted = PeftModel.from_pretrained(load(linked), str(tmp_path / "adapter")).eval()(**asked).logits
        merged, plain = load(tmp_path / "merged")(**asked).logits, load(model)(**asked).logits
    assert (wanted - merged).abs().max() < 1e-4 < (wanted - plain).abs().max()
    files = [path for path in (tmp_path / "merged").iterdir() if path.suffix == ".safetensors"]
    assert not any(path.is_symlink() for path in files)
    names = [name for file in files for name in load_file(file)]
    assert sorted(names) == sorted(weights)  # each once


def test_an_adapter_of_another_base_is_refused(base: Path, tmp_path: Path) -> None:
    load: Any = AutoModelForCausalLM.from_pretrained
    write_adapter(load(base), tmp_path / "adapter", target_modules=["q_proj"])
    other = tmp_path / "other"
    LlamaForCausalLM(LlamaConfig(**{**SMALL, "num_hidden_layers": 1})).save_pretrained(other)
    with pytest.raises(UsageError, match=r"layers\.1\.self_attn\.q_proj.* belongs to no module of the base"):
        Merge(other, tmp_path / "adapter")
