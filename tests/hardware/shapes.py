"""Makes model folders with tensors of true shapes and without weights, in sparse files."""

import json
import struct
from math import prod
from pathlib import Path
from typing import Any

QWEN = {"model_type": "qwen2", "rms_norm_eps": 1e-6, "dtype": "bfloat16"}
CONFIGS: dict[str, dict[str, Any]] = {
    "Qwen2.5-0.5B": {
        **QWEN,
        **{"hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24, "num_attention_heads": 14},
        **{"num_key_value_heads": 2, "vocab_size": 151936, "tie_word_embeddings": True},
    },
    "Qwen2.5-7B": {
        **QWEN,
        **{"hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "num_attention_heads": 28},
        **{"num_key_value_heads": 4, "vocab_size": 152064, "tie_word_embeddings": False},
    },
    "Qwen2.5-14B": {
        **QWEN,
        **{"hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 48, "num_attention_heads": 40},
        **{"num_key_value_heads": 8, "vocab_size": 152064, "tie_word_embeddings": False},
    },
}

CONFIGS["Qwen2.5-32B"] = {
    **QWEN,
    **{"hidden_size": 5120, "intermediate_size": 27648, "num_hidden_layers": 64, "num_attention_heads": 40},
    **{"num_key_value_heads": 8, "vocab_size": 152064, "tie_word_embeddings": False},
}


TOWER = {"depth": 32, "num_heads": 16, "patch_size": 14, "spatial_merge_size": 2, "temporal_patch_size": 2}
PICTURE_CONFIGS: dict[str, dict[str, Any]] = {
    "Qwen2.5-VL-32B-Instruct": {
        **CONFIGS["Qwen2.5-32B"],
        "model_type": "qwen2_5_vl",
        "architectures": ["Qwen2_5_VLForConditionalGeneration"],
        "vision_config": {**TOWER, "hidden_size": 1280, "intermediate_size": 3456, "out_hidden_size": 5120},
    },
    "gme-Qwen2-VL-7B-Instruct": {
        **CONFIGS["Qwen2.5-7B"],
        "model_type": "qwen2_vl",
        "architectures": ["Qwen2VLForConditionalGeneration"],
        "vision_config": {**TOWER, "embed_dim": 1280, "hidden_size": 3584, "mlp_ratio": 4},
    },
}
"""Models with a vision tower, from whose config the tensors can be made."""


def tensors(config: dict[str, Any]) -> dict[str, list[int]]:
    """Names and shapes of the weights of a Qwen2 model."""
    hidden, inner, layers = config["hidden_size"], config["intermediate_size"], config["num_hidden_layers"]
    keys = hidden // config["num_attention_heads"] * config["num_key_value_heads"]
    found = {"model.embed_tokens.weight": [config["vocab_size"], hidden], "model.norm.weight": [hidden]}
    if not config["tie_word_embeddings"]:
        found["lm_head.weight"] = [config["vocab_size"], hidden]
    for layer in range(layers):
        here = f"model.layers.{layer}"
        for name, outputs in (("q_proj", hidden), ("k_proj", keys), ("v_proj", keys)):
            found |= {f"{here}.self_attn.{name}.weight": [outputs, hidden], f"{here}.self_attn.{name}.bias": [outputs]}
        found[f"{here}.self_attn.o_proj.weight"] = [hidden, hidden]
        found |= {f"{here}.mlp.{name}.weight": [inner, hidden] for name in ("gate_proj", "up_proj")}
        found[f"{here}.mlp.down_proj.weight"] = [hidden, inner]
        found |= {f"{here}.{name}.weight": [hidden] for name in ("input_layernorm", "post_attention_layernorm")}
    return found


def write_safetensors(path: Path, shapes: dict[str, list[int]], dtype: str = "BF16", width: int = 2) -> None:
    """Write a sparse safetensors file with these tensors, all zeros, which takes no disk space."""
    header, size = {}, 0
    for name, shape in shapes.items():
        length = width * prod(shape)
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [size, size + length]}
        size += length
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + size)


def make_gptq_shape(folder: Path, name: str, group: int = 128) -> Path:
    """Make the folder of a model of CONFIGS with the linear modules of its layers in GPTQ's 4 bits."""
    folder.mkdir(parents=True, exist_ok=True)
    how = {"quant_method": "gptq", "bits": 4, "group_size": group, "desc_act": False, "sym": True}
    (folder / "config.json").write_text(json.dumps({**CONFIGS[name], "quantization_config": how}))
    halves, integers = {}, {}
    for tensor, shape in tensors(CONFIGS[name]).items():
        module, _, kind = tensor.rpartition(".")
        if kind != "weight" or not module.endswith("_proj"):
            halves[tensor] = shape
            continue
        outputs, inputs = shape
        halves[f"{module}.scales"] = [inputs // group, outputs]
        integers |= {f"{module}.qweight": [inputs // 8, outputs], f"{module}.qzeros": [inputs // group, outputs // 8]}
        integers[f"{module}.g_idx"] = [inputs]
    write_safetensors(folder / "halves.safetensors", halves, "F16")
    write_safetensors(folder / "integers.safetensors", integers, "I32", 4)
    return folder


def make_shape(folder: Path, name: str) -> Path:
    """Make the folder of a model of CONFIGS. Returns the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(CONFIGS[name]))
    write_safetensors(folder / "model.safetensors", tensors(CONFIGS[name]))
    return folder


LLAVA = {
    **{"model_type": "llava", "architectures": ["LlavaForConditionalGeneration"], "image_token_index": 32000},
    "text_config": {"model_type": "llama", "max_position_embeddings": 4096, "vocab_size": 32064},
    "vision_config": {
        **{"model_type": "clip_vision_model", "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24},
        **{"num_attention_heads": 16, "image_size": 336, "patch_size": 14, "projection_dim": 768, "vocab_size": 32000},
    },
}
"""LLaVA-1.5-7B's config as it is published: of the language model it says only what is not as in every Llama."""


def llava_tensors() -> dict[str, list[int]]:
    """Names and shapes of LLaVA-1.5-7B's weights, as published."""
    text, eyes = "language_model.model", "vision_tower.vision_model"
    found = {f"{text}.embed_tokens.weight": [32064, 4096], "language_model.lm_head.weight": [32064, 4096]}
    found[f"{text}.norm.weight"] = [4096]
    for number in range(32):
        layer = f"{text}.layers.{number}"
        found |= {f"{layer}.self_attn.{name}_proj.weight": [4096, 4096] for name in "qkvo"}
        found |= {f"{layer}.mlp.{name}_proj.weight": [11008, 4096] for name in ("gate", "up")}
        found[f"{layer}.mlp.down_proj.weight"] = [4096, 11008]
        found |= {f"{layer}.{name}_layernorm.weight": [4096] for name in ("input", "post_attention")}
    both = {"weight": [1024], "bias": [1024]}
    found |= {
        f"{eyes}.embeddings.class_embedding": [1024],
        f"{eyes}.embeddings.patch_embedding.weight": [1024, 3, 14, 14],
    }
    found[f"{eyes}.embeddings.position_embedding.weight"] = [577, 1024]
    for name in ("pre_layrnorm", "post_layernorm"):
        found |= {f"{eyes}.{name}.{kind}": shape for kind, shape in both.items()}
    for number in range(24):
        layer = f"{eyes}.encoder.layers.{number}"
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            found |= {f"{layer}.self_attn.{name}.weight": [1024, 1024], f"{layer}.self_attn.{name}.bias": [1024]}
        found |= {f"{layer}.mlp.fc1.weight": [4096, 1024], f"{layer}.mlp.fc1.bias": [4096]}
        found |= {f"{layer}.mlp.fc2.weight": [1024, 4096], f"{layer}.mlp.fc2.bias": [1024]}
        for name in ("layer_norm1", "layer_norm2"):
            found |= {f"{layer}.{name}.{kind}": shape for kind, shape in both.items()}
    for name, inputs in (("linear_1", 1024), ("linear_2", 4096)):
        found |= {f"multi_modal_projector.{name}.weight": [4096, inputs], f"multi_modal_projector.{name}.bias": [4096]}
    return found


def make_llava_shape(folder: Path) -> Path:
    """Make the folder of LLaVA-1.5-7B as published. Returns the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(LLAVA))
    write_safetensors(folder / "model.safetensors", llava_tensors(), "F16")
    return folder
