"""Models of the exact published shapes for `benchmarks.jobs`, with random weights, by the names that recipes give them.

The tokenizer is SmolLM2's; where its 49,152 tokens exceed the published vocabulary (CodeLlama, LLaVA), the vocabulary
is that large: 0.14 billion parameters more. The base of patent-qa has 67 GB of weights, more than fits the disk of the
machine with one H200, so its files have no contents (`job_hooks`).
"""

import json
from pathlib import Path
from typing import Any

from benchmarks.job_hooks.sitecustomize import NO_WEIGHTS
from benchmarks.random_models import CONFIGS, REAL_TOKENS, make_model, silence_unused_tokens
from benchmarks.training import QWEN_32B, config_of
from recipes.demo_models import LLAVA_TOKEN, llava_processor
from stages.contract.roots import Roots

LLAMA = {
    **{"model_type": "llama", "architectures": ["LlamaForCausalLM"], "dtype": "bfloat16", "hidden_act": "silu"},
    **{"attention_bias": False, "attention_dropout": 0.0, "mlp_bias": False, "bos_token_id": 1, "eos_token_id": 2},
}
SHAPES: dict[str, dict[str, Any]] = {
    "Qwen2.5-VL-32B-Instruct": {
        **CONFIGS["Qwen2.5-VL-7B"],
        **{key: QWEN_32B[key] for key in ("hidden_size", "intermediate_size", "num_hidden_layers")},
        **{key: QWEN_32B[key] for key in ("num_attention_heads", "num_key_value_heads")},
        "vision_config": {
            **CONFIGS["Qwen2.5-VL-7B"]["vision_config"],
            **{"intermediate_size": 3456, "out_hidden_size": 5120},
        },
    },
    "gme-Qwen2-VL-7B-Instruct": CONFIGS["GME-Qwen2-VL-7B"],
    # as the 1M variant, whose sparse attention begins beyond 256K tokens
    "Qwen2.5-7B-Instruct": {**CONFIGS["Qwen2.5-7B"], "rope_theta": 1e7, "max_position_embeddings": 1010000},
    "Qwen2.5-32B-Instruct-GPTQ-Int4": {
        **QWEN_32B,
        **{key: CONFIGS["Qwen2.5-7B-GPTQ-Int4"][key] for key in ("dtype", "quantization_config")},
    },
    "llava-1.5-7b-hf": CONFIGS["LLaVA-1.5-7B"],
    "CodeLlama-7b-Instruct-hf": {
        **LLAMA,
        **{"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32},
        **{"num_key_value_heads": 32, "vocab_size": REAL_TOKENS, "max_position_embeddings": 16384},
        **{"rms_norm_eps": 1e-5, "rope_theta": 1e6, "tie_word_embeddings": False},
    },
}
WITHOUT_CONTENTS = ("Qwen2.5-VL-32B-Instruct",)
MGM = "MGM-2B"
TINY_SIZES = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4}
TINY_CLIP = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 2}
TINY_MGM = {
    "text_config": {**TINY_SIZES, "num_key_value_heads": 1, "head_dim": 32, "vocab_size": REAL_TOKENS + 64},
    "vision_config": {**TINY_CLIP, "image_size": 56, "patch_size": 14, "projection_dim": 32},
    "vision_config_aux": {"hidden_sizes": [4, 6, 8, 10], "depths": [1, 2, 3, 1], "patch_size": 4, "num_stages": 4}
    | {"image_size": 128, "drop_path_rate": 0.0},
}


def model_name(name: str, tiny: bool) -> str:
    """The folder of a model below LORRY_MODELS."""
    return f"tiny-{name}" if tiny else name


def make(name: str, tiny: bool, has_contents: bool = True) -> Path:
    """Write the folder of a model unless it is there. Returns it. Without `has_contents`, no weights are written."""
    folder = Roots.from_environment().models / model_name(name, tiny)
    if any(folder.glob("*.safetensors")):
        return folder
    if name == MGM:
        _make_mgm(folder, tiny, has_contents)
        return folder
    config = _tiny(name) if tiny else SHAPES[name]
    has_contents = has_contents and name not in WITHOUT_CONTENTS
    make_model(folder, config, has_contents)
    if not has_contents:
        (folder / NO_WEIGHTS).write_text("Random weights are made where these are read.\n", encoding="utf-8")
    elif config.get("vocab_size", 0) > REAL_TOKENS and "vision_config" not in config:  # those have names for the rest
        silence_unused_tokens(folder)
    ends = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2, "do_sample": False}
    (folder / "generation_config.json").write_text(json.dumps(ends), encoding="utf-8")
    return folder


def _tiny(name: str) -> dict[str, Any]:
    """The config of a small model of the same architecture."""
    config = SHAPES[name]
    if config["model_type"] == "llava":
        text = {**config["text_config"], **TINY_SIZES, "num_key_value_heads": 2}
        vision = {**config["vision_config"], **TINY_CLIP, "image_size": 56, "projection_dim": 32}
        return {**config, "text_config": text, "vision_config": vision, "image_seq_length": 16}
    if config["model_type"] == "llama":
        return {**config, **TINY_SIZES, "num_key_value_heads": 2}
    if name.startswith("gme"):
        vision = {**config["vision_config"], "depth": 2, "embed_dim": 32, "num_heads": 2, "hidden_size": 128}
        return {**config_of("GME-Qwen2-VL-7B", True), "vision_config": vision}
    like = "Qwen2.5-VL-7B" if "vision_config" in config else "Qwen2.5-7B"
    small = config_of(like, True)
    return {
        **config,
        **{key: small[key] for key in small if key in config and key != "dtype"},
        "dtype": config["dtype"],
    }


def _make_mgm(folder: Path, tiny: bool, has_contents: bool) -> None:
    """Write MGM-2B as its conversion writes it, with SmolLM2's tokenizer; without `has_contents`, no weights."""
    import torch
    from transformers import AutoTokenizer

    from stages.models.mgm import MgmConfig, MgmForConditionalGeneration
    from stages.models.mgm.processing import make_processor

    source = Roots.from_environment().models / "SmolLM2-135M-Instruct"
    folder.mkdir(parents=True, exist_ok=True)
    llava_processor(source, folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    config = MgmConfig(**(TINY_MGM if tiny else {}), image_token_id=LLAVA_TOKEN)
    config.save_pretrained(folder)
    if has_contents:
        torch.manual_seed(0)
        with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
            model: Any = MgmForConditionalGeneration(config).to(torch.bfloat16)
        with torch.no_grad():  # a logit of 0, below others: no token without a text is generated
            model.get_input_embeddings().weight[REAL_TOKENS:] = 0
        model.save_pretrained(folder, max_shard_size="4GB")
    processor = make_processor(config, tokenizer)
    processor.save_pretrained(folder)
    processor.image_processor.save_pretrained(folder)
