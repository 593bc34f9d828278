"""Writes MGM as its authors publish it, with a few thousand random weights."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import CLIPVisionConfig, CLIPVisionModel, GemmaConfig, GemmaForCausalLM

GEMMA = {
    **{"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "head_dim": 8},
    **{"num_key_value_heads": 1, "vocab_size": 300, "hidden_act": "gelu_pytorch_tanh", "rope_theta": 10000.0},
    **{"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2, "max_position_embeddings": 512},
}
CLIP = {
    **{"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 3, "num_attention_heads": 2},
    **{"image_size": 56, "patch_size": 14, "hidden_act": "quick_gelu", "projection_dim": 16},
}
DEPTHS, SIZES = (1, 2, 3, 1), (4, 6, 8, 10)
PUBLISHED = {
    **{**GEMMA, "model_type": "mgm_gemma", "architectures": ["MGMGemmaForCausalLM"], "torch_dtype": "float32"},
    **{"mm_projector_type": "mlp2x_gelu", "mm_vision_select_layer": -2, "mm_vision_select_feature": "patch"},
    **{"mm_hidden_size": 24, "mm_hidden_size_aux": sum(SIZES), "image_size_aux": 128, "image_aspect_ratio": "pad"},
    **{"mm_use_im_start_end": False, "mm_use_im_patch_token": False, "image_grid": 1},
}
SIDE, ACROSS, TOKENS = 128, 4, 16
IMAGE = 7

Weights = dict[str, torch.Tensor]


def convnext_weights() -> Weights:
    """Random weights of a ConvNeXt, by timm's names."""
    shapes: dict[str, tuple[int, ...]] = {
        "stem.0.weight": (SIZES[0], 3, 4, 4),
        **dict.fromkeys(("stem.0.bias", "stem.1.weight", "stem.1.bias"), (SIZES[0],)),
    }
    for stage, (depth, size) in enumerate(zip(DEPTHS, SIZES, strict=True)):
        if stage:
            before = SIZES[stage - 1]
            shapes |= dict.fromkeys((f"stages.{stage}.downsample.0.{kind}" for kind in ("weight", "bias")), (before,))
            shapes[f"stages.{stage}.downsample.1.weight"] = (size, before, 2, 2)
            shapes[f"stages.{stage}.downsample.1.bias"] = (size,)
        for block in range(depth):
            here = f"stages.{stage}.blocks.{block}"
            shapes |= {f"{here}.conv_dw.weight": (size, 1, 7, 7), f"{here}.mlp.fc1.weight": (4 * size, size)}
            shapes |= {f"{here}.mlp.fc1.bias": (4 * size,), f"{here}.mlp.fc2.weight": (size, 4 * size)}
            names = ("gamma", "conv_dw.bias", "norm.weight", "norm.bias", "mlp.fc2.bias")
            shapes |= dict.fromkeys((f"{here}.{name}" for name in names), (size,))
    return {name: 0.5 * torch.randn(shape) for name, shape in shapes.items()}


def clip_weights() -> Weights:
    """Random weights of CLIP's vision tower, by the names in published folders, which transformers may change."""
    names = CLIPVisionModel(CLIPVisionConfig(**CLIP)).state_dict()
    return {f"vision_model.{name.removeprefix('vision_model.')}": torch.randn(t.shape) / 4 for name, t in names.items()}


def connector_weights() -> Weights:
    """Random weights of MGM's connector, by their published names."""
    low, high, hidden = 24, sum(SIZES), 32
    shapes = {"mm_projector.0": (hidden, low), "mm_projector.2": (hidden, hidden)}
    for name, size in (("query", low), ("aux", high), ("val", high)):
        shapes |= {f"vlm_uni_{name}_projector.0": (size,), f"vlm_uni_{name}_projector.1": (low, size)}
    weights = {f"model.{name}.weight": torch.randn(shape) / 4 for name, shape in shapes.items()}
    return weights | {f"model.{name}.bias": torch.randn(shape[0]) / 4 for name, shape in shapes.items()}


def published_weights() -> Weights:
    """Random weights of a published checkpoint that includes its vision towers."""
    torch.manual_seed(0)
    gemma = GemmaForCausalLM(GemmaConfig(**GEMMA)).state_dict()
    weights = {name: torch.randn(t.shape) / 3 for name, t in gemma.items() if name != "lm_head.weight"}
    weights |= {f"model.vision_tower.vision_tower.{name}": t for name, t in clip_weights().items()}
    weights |= {f"model.vision_tower_aux.vision_{name}": t for name, t in convnext_weights().items()}
    return weights | connector_weights()


def write_tokenizer(folder: Path) -> None:
    """Write Gemma's tokenizer without merges: only bytes and special tokens."""
    special = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "<2mass>", "[@BOS@]", "<unused0>"]
    special += ["<start_of_turn>", "<end_of_turn>"]
    words = [*special, *(f"<0x{i:02X}>" for i in range(256)), "▁"]
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    added = [{"id": i, "content": word, **flags, "special": word != "<unused0>"} for i, word in enumerate(special)]
    model = {
        **{"type": "BPE", "unk_token": "<unk>", "fuse_unk": True, "byte_fallback": True},
        **{"vocab": {word: i for i, word in enumerate(words)}, "merges": []},
    }
    split = {"type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious", "invert": False}
    tokenizer = {
        **{"version": "1.0", "added_tokens": added, "model": model, "pre_tokenizer": split, "post_processor": None},
        "normalizer": {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
                *({"type": kind} for kind in ("ByteFallback", "Fuse")),
            ],
        },
    }
    settings = {
        **{"tokenizer_class": "GemmaTokenizer", "bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>"},
        **{"unk_token": "<unk>", "add_bos_token": True, "add_eos_token": False},
        "added_tokens_decoder": {str(one["id"]): {k: v for k, v in one.items() if k != "id"} for one in added},
    }
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def write_published(folder: Path, weights: Weights, **settings: Any) -> Path:
    """Write a published folder with its weights in two files. `settings` replace values of config.json."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({**PUBLISHED, **settings}))
    write_tokenizer(folder)
    names = sorted(weights)
    for number, part in enumerate((names[::2], names[1::2]), start=1):
        save_file({name: weights[name].clone() for name in part}, folder / f"model-0000{number}-of-00002.safetensors")
    return folder


def write_clip(folder: Path, weights: Weights) -> Path:
    """Write a CLIP folder. Returns the folder."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": "clip", "vision_config": CLIP}))
    torch.save(weights, folder / "pytorch_model.bin")
    return folder
