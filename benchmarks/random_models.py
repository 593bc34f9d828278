"""Write model folders of real shapes with random weights, for benchmarks without access to the real weights.

    python -m benchmarks.random_models FOLDER NAME...

`make_model` can also leave the contents out: the files then have their sizes, and take no disk.

The tokenizer is SmolLM2's, from LORRY_MODELS; the larger vocabularies contain all its token ids. Weights are one block
of normal random numbers in bfloat16, repeated, since memory and time do not depend on the values. LLaVA's norms are
ones. In a 4-bit GPTQ model, linear modules have random integers with one scale, packed as auto-gptq and gptqmodel do,
norms are ones, and the rest is in float16.
"""

import json
import shutil
import struct
import sys
from collections import Counter
from dataclasses import dataclass
from itertools import accumulate, pairwise
from math import prod
from pathlib import Path
from typing import Any

from recipes.demo_models import LLAVA_TOKEN, PICTURE_TOKENS, llava_processor, tokenizer_with_pictures
from stages.contract.roots import Roots

SHARD = 5_000_000_000
"""Bytes per safetensors file, about as in published models."""

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
CONFIGS["LLaVA-1.5-7B"] = {
    **{"model_type": "llava", "architectures": ["LlavaForConditionalGeneration"], "dtype": "bfloat16"},
    **{"image_token_index": LLAVA_TOKEN, "projector_hidden_act": "gelu", "tie_word_embeddings": False},
    **{"vision_feature_layer": -2, "vision_feature_select_strategy": "default", "image_seq_length": 576},
    "text_config": {
        **{"model_type": "llama", "hidden_act": "silu", "hidden_size": 4096, "intermediate_size": 11008},
        **{"num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 32, "vocab_size": 49184},
        **{"max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "rope_theta": 1e4, "tie_word_embeddings": False},
        **{"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2},
    },
    "vision_config": {
        **{"model_type": "clip_vision_model", "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24},
        **{"num_attention_heads": 16, "image_size": 336, "patch_size": 14, "projection_dim": 768},
    },
}
"""As published, except that the vocabulary is SmolLM2's instead of 32,064 tokens: 0.14 billion more parameters."""
REAL_TOKENS = 49152
"""Size of SmolLM2's tokenizer; the rest of a vocabulary has no text and must not be generated."""
GROUP = 128
"""Inputs of a GPTQ module that share a scale, as in published models."""
CONFIGS |= {
    f"{name}-GPTQ-Int4": {
        **CONFIGS[name],
        "dtype": "float16",
        "quantization_config": {
            **{"quant_method": "gptq", "bits": 4, "group_size": GROUP, "desc_act": False, "sym": True},
            "checkpoint_format": "gptq",
        },
    }
    for name in ("Qwen2.5-0.5B", "Qwen2.5-7B", "Qwen2.5-14B")
}


def make_model(folder: Path, config: dict[str, Any], has_contents: bool = True) -> None:
    """Write a model folder: `config`, tokenizer or processor, and random weights under the names of transformers.

    With `quantization_config` in `config`, the linear modules are in 4-bit GPTQ. Without `has_contents`, the weights'
    files have headers and sizes only.
    """
    folder.mkdir(parents=True, exist_ok=True)
    config = dict(config)
    source = Roots.from_environment().models / "SmolLM2-135M-Instruct"
    if config["model_type"] == "llava":
        llava_processor(source, folder, config["vision_config"]["image_size"])
    elif "vision_config" in config:
        tokenizer_with_pictures(source, folder, config["architectures"][0])
        names = {"vision_start": "vision_start", "vision_end": "vision_end", "image_pad": "image", "video_pad": "video"}
        config |= {f"{name}_token_id": PICTURE_TOKENS[f"<|{token}|>"] for token, name in names.items()}
    else:
        for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
            shutil.copy(source / name, folder)
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    plain = {key: value for key, value in config.items() if key != "quantization_config"}
    shapes = _parameter_shapes(plain)
    if plain == config:
        tensors = {name: Tensor("BF16", shape, _tensor_kind(config, name)) for name, shape in shapes.items()}
    else:
        tensors = _gptq_tensors(shapes)
    _write_weights(folder, tensors, has_contents)


@dataclass(frozen=True)
class Tensor:
    """A tensor to write."""

    dtype: str
    """As safetensors names it: BF16, F16 or I32."""
    shape: list[int]
    kind: str = "weight"
    """`weight`: random numbers; `norm` (float16) or `norm of 16 bits` (bfloat16): ones, because with random norms the
    signal would be too small to learn from; any other: the GPTQ tensor of that name."""

    @property
    def bytes(self) -> int:
        """Size in bytes."""
        return prod(self.shape) * {"BF16": 2, "F16": 2, "I32": 4}[self.dtype]


def _parameter_shapes(config: dict[str, Any]) -> dict[str, list[int]]:
    """Return the shapes of a model's parameters by name, except a tied head, without allocating them."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

    read = AutoConfig.for_model(**config)
    kind: Any = AutoModelForImageTextToText if hasattr(read, "vision_config") else AutoModelForCausalLM
    with torch.device("meta"):
        model = kind.from_config(read)
    tied = {"lm_head.weight"} if getattr(read, "tie_word_embeddings", False) else set()
    return {name: list(value.shape) for name, value in model.state_dict().items() if name not in tied}


def _tensor_kind(config: dict[str, Any], name: str) -> str:
    """Return the kind of a tensor, as in `Tensor`: `norm of 16 bits` for norms of LLaVA, otherwise `weight`.

    With random norms, LLaVA's connector would have no effect.
    """
    is_norm = name.endswith(("norm.weight", "layrnorm.weight", "layer_norm1.weight", "layer_norm2.weight"))
    return "norm of 16 bits" if config["model_type"] == "llava" and is_norm else "weight"


def _gptq_tensors(shapes: dict[str, list[int]]) -> dict[str, Tensor]:
    """Return the tensors, by name, of a 4-bit GPTQ model whose parameters would have these shapes unquantized.

    The linear modules of the layers are quantized, and all other tensors are in float16.
    """
    found = {}
    for name, shape in shapes.items():
        module, _, kind = name.rpartition(".")
        if kind != "weight" or not module.endswith("_proj"):
            found[name] = Tensor("F16", shape, "norm" if module.endswith("norm") else "weight")
            continue
        outputs, inputs = shape
        found[f"{module}.qweight"] = Tensor("I32", [inputs // 8, outputs], "qweight")
        found[f"{module}.qzeros"] = Tensor("I32", [inputs // GROUP, outputs // 8], "qzeros")
        found[f"{module}.scales"] = Tensor("F16", [inputs // GROUP, outputs], "scales")
        found[f"{module}.g_idx"] = Tensor("I32", [inputs], "g_idx")
    return found


SCALE = 0.0043
"""A weight is this times an integer from -8 to 7, so that the weights' standard deviation is 0.02."""


def _repeated_blocks() -> dict[str, bytes]:
    """Return, by dtype or kind of tensor, the block of bytes that is repeated to fill such tensors."""
    import torch

    normal = torch.randn(32 << 20, generator=torch.Generator().manual_seed(0)) * 0.02
    integers = torch.randint(0, 256, (32 << 20,), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    return {
        "BF16": normal.to(torch.bfloat16).view(torch.uint8).numpy().tobytes(),
        "F16": normal.to(torch.float16).view(torch.uint8).numpy().tobytes(),
        "qweight": integers.numpy().tobytes(),
        "qzeros": b"\x77" * (1 << 20),  # zero point 8; the format stores it minus one
        "scales": torch.full((1 << 20,), SCALE, dtype=torch.float16).view(torch.uint8).numpy().tobytes(),
        "norm of 16 bits": torch.ones(1 << 16, dtype=torch.bfloat16).view(torch.uint8).numpy().tobytes(),
        "norm": torch.ones(1 << 16, dtype=torch.float16).view(torch.uint8).numpy().tobytes(),
        "g_idx": (torch.arange(1 << 20, dtype=torch.int32) // GROUP).numpy().tobytes(),
    }


def _write_weights(folder: Path, tensors: dict[str, Tensor], has_contents: bool = True) -> None:
    """Write safetensors files with at most SHARD bytes of tensors each, and their index.

    A tensor that is larger than SHARD gets a file of its own. Without `has_contents`, files end in a hole.
    """
    contents = _repeated_blocks() if has_contents else {}
    written = Counter[str]()  # bytes so far: tensors start at different places of their block, so that they differ
    files: list[dict[str, Tensor]] = [{}]
    size = 0
    for name, tensor in tensors.items():
        if size and size + tensor.bytes > SHARD:
            files.append({})
            size = 0
        files[-1][name] = tensor
        size += tensor.bytes
    names = [f"model-{number:05}-of-{len(files):05}.safetensors" for number in range(1, len(files) + 1)]
    for name, inside in zip(names, files, strict=True):
        ends = list(accumulate((tensor.bytes for tensor in inside.values()), initial=0))
        header = {
            key: {"dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": list(span)}
            for (key, tensor), span in zip(inside.items(), pairwise(ends), strict=True)
        }
        text = json.dumps({"__metadata__": {"format": "pt"}, **header}).encode()
        with (folder / name).open("wb") as file:
            file.write(struct.pack("<Q", len(text)) + text)
            file.truncate(file.tell() + ends[-1])
            for tensor in inside.values() if has_contents else ():
                kind = tensor.dtype if tensor.kind == "weight" else tensor.kind
                block, left = contents[kind], tensor.bytes
                place = 0 if kind == "g_idx" else written[kind] % len(block)
                while left > 0:
                    wrote = file.write(block[place : place + left])
                    left, place = left - wrote, 0
                written[kind] += tensor.bytes
    weight_map = {weight: name for name, inside in zip(names, files, strict=True) for weight in inside}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def silence_unused_tokens(folder: Path) -> None:
    """Set the output head's rows to 0 for all tokens without text, so that none of these is generated.

    Their logits are then 0, and some token with text has a higher one.
    """
    index = json.loads((folder / "model.safetensors.index.json").read_text(encoding="utf-8"))["weight_map"]
    path = folder / index["lm_head.weight"]
    with path.open("r+b") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        entry = json.loads(file.read(length))["lm_head.weight"]
        start, end = entry["data_offsets"]
        row = 2 * entry["shape"][1]
        file.seek(8 + length + start + REAL_TOKENS * row)
        file.write(bytes(end - start - REAL_TOKENS * row))


if __name__ == "__main__":
    for wanted in sys.argv[2:]:
        make_model(Path(sys.argv[1]) / wanted, CONFIGS[wanted])
