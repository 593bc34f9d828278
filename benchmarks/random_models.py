"""Model folders of true shapes with random weights, for measurements where no real weights can be had.

    python -m benchmarks.random_models FOLDER NAME...

The tokenizer is SmolLM2's, from LORRY_MODELS; its few token ids are all known to the larger vocabularies. Weights are
one block of normal random numbers in bfloat16, written over and over: neither memory nor time depends on more.
"""

import json
import shutil
import struct
import sys
from math import prod
from pathlib import Path
from typing import Any

from recipes.demo_models import PICTURE_TOKENS, tokenizer_with_pictures
from stages.contract.roots import Roots

SHARD = 5_000_000_000
"""Bytes of a safetensors file, about as models are published."""

COMMON = {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "rms_norm_eps": 1e-6, "rope_theta": 1e6}
QWEN = {**COMMON, "hidden_act": "silu", "max_position_embeddings": 32768, "attention_dropout": 0.0, "dtype": "bfloat16"}
QWEN |= {"bos_token_id": 1, "eos_token_id": 2}

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
CONFIGS["Qwen2.5-VL-7B"] = {
    **CONFIGS["Qwen2.5-7B"],
    **{"model_type": "qwen2_5_vl", "architectures": ["Qwen2_5_VLForConditionalGeneration"]},
    "max_position_embeddings": 128000,
    "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
    "vision_config": {
        **{"model_type": "qwen2_5_vl", "depth": 32, "hidden_act": "silu", "hidden_size": 1280, "num_heads": 16},
        **{"intermediate_size": 3420, "in_channels": 3, "in_chans": 3, "out_hidden_size": 3584, "patch_size": 14},
        **{"spatial_merge_size": 2, "temporal_patch_size": 2, "window_size": 112, "tokens_per_second": 2},
        "fullatt_block_indexes": [7, 15, 23, 31],
    },
}
CONFIGS["GME-Qwen2-VL-7B"] = {
    **CONFIGS["Qwen2.5-7B"],
    **{"model_type": "qwen2_vl", "architectures": ["Qwen2VLForConditionalGeneration"]},
    "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
    "vision_config": {
        **{"model_type": "qwen2_vl", "depth": 32, "hidden_act": "quick_gelu", "embed_dim": 1280, "num_heads": 16},
        **{"hidden_size": 3584, "in_channels": 3, "in_chans": 3, "mlp_ratio": 4, "patch_size": 14},
        **{"spatial_merge_size": 2, "temporal_patch_size": 2},
    },
}


def make_model(folder: Path, config: dict[str, Any]) -> None:
    """Write a model folder: config, tokenizer, and random weights named as transformers names them."""
    folder.mkdir(parents=True, exist_ok=True)
    config = dict(config)
    if "vision_config" in config:
        source = Roots.from_environment().models / "SmolLM2-135M-Instruct"
        tokenizer_with_pictures(source, folder, config["architectures"][0])
        names = {"vision_start": "vision_start", "vision_end": "vision_end", "image_pad": "image", "video_pad": "video"}
        config |= {f"{name}_token_id": PICTURE_TOKENS[f"<|{token}|>"] for token, name in names.items()}
    else:
        for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
            shutil.copy(Roots.from_environment().models / "SmolLM2-135M-Instruct" / name, folder)
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    _write_weights(folder, _shapes(folder))


def _shapes(folder: Path) -> dict[str, list[int]]:
    """Names and shapes of a model's parameters, from transformers, without making one."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

    config = AutoConfig.from_pretrained(folder)
    kind: Any = AutoModelForImageTextToText if hasattr(config, "vision_config") else AutoModelForCausalLM
    with torch.device("meta"):
        model = kind.from_config(config)
    tied = {"lm_head.weight"} if getattr(config, "tie_word_embeddings", False) else set()
    return {name: list(value.shape) for name, value in model.state_dict().items() if name not in tied}


def _write_weights(folder: Path, shapes: dict[str, list[int]]) -> None:
    import torch

    block = (torch.randn(32 << 20, generator=torch.Generator().manual_seed(0)) * 0.02).to(torch.bfloat16)
    content = block.view(torch.uint8).numpy().tobytes()
    files: list[dict[str, Any]] = [{}]
    size = 0
    for name, shape in shapes.items():
        length = 2 * prod(shape)
        if size and size + length > SHARD:
            files.append({})
            size = 0
        files[-1][name] = {"dtype": "BF16", "shape": shape, "data_offsets": [size, size + length]}
        size += length
    names = [f"model-{number:05}-of-{len(files):05}.safetensors" for number in range(1, len(files) + 1)]
    for name, header in zip(names, files, strict=True):
        text = json.dumps(header).encode()
        left = max(value["data_offsets"][1] for value in header.values())
        with (folder / name).open("wb") as file:
            file.write(struct.pack("<Q", len(text)) + text)
            while left > 0:
                left -= file.write(content[: min(left, len(content))])
    weight_map = {weight: name for name, header in zip(names, files, strict=True) for weight in header}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


if __name__ == "__main__":
    for wanted in sys.argv[2:]:
        make_model(Path(sys.argv[1]) / wanted, CONFIGS[wanted])
