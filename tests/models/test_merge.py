"""Adapters merged into a copy of their base: the same logits, and no other copy of the weights."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from stages.models.merge import write_merged_copy


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
