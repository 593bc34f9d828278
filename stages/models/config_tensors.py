"""Makes the names and shapes of a model's tensors from its config.json, for a plan before its weights are there.

The host command plans without torch and transformers, so the tensors are made here, for the decoders in BIASED, PLAIN,
FUSED and MIXTURES, with the vision towers of Qwen-VL and those that are plain transformers. Names of the decoder's
tensors are those of published files. Small tensors of rare parts are left out: the sum is right within 1 %.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from stages.models.config_sizes import Sizes, UnknownShapeError, decoder_config

Tensor = tuple[str, tuple[int, ...], str]
"""Name, shape and type, by safetensors' names."""

BIASED = {"qwen2", "qwen2_vl", "qwen2_vl_text", "qwen2_5_vl", "qwen2_5_vl_text"}
"""Decoders whose queries, keys and values have a bias."""
FUSED = {"phi3", "glm", "glm4"}
"""Decoders with one module for gate and up; phi3 also has one for queries, keys and values."""
PLAIN = {
    *("llama", "mistral", "ministral", "granite", "olmo2", "qwen3", "qwen3_vl_text", "smollm3", "cohere", "cohere2"),
    *("gemma", "gemma2", "gemma3_text"),
}
MIXTURES = {"mixtral", "qwen2_moe", "qwen3_moe", "qwen3_vl_moe_text", "gpt_oss", "llama4_text"}

TYPES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}
"""safetensors' names of the types in a config.json."""

VISION: dict[str, dict[str, int]] = {
    "clip_vision_model": {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12},
    "siglip_vision_model": {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12},
    "idefics3_vision": {"hidden_size": 1152, "intermediate_size": 3072, "num_hidden_layers": 12},
    "smolvlm_vision": {"hidden_size": 1152, "intermediate_size": 3072, "num_hidden_layers": 12},
    "pixtral": {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24},
    "qwen2_vl": {"depth": 32, "embed_dim": 1280, "hidden_size": 3584, "mlp_ratio": 4},
    "qwen2_5_vl": {"depth": 32, "hidden_size": 3584, "intermediate_size": 3420, "out_hidden_size": 3584},
}
"""Sizes that published configs of vision towers leave out: the defaults of transformers' classes, by model type."""


def make_tensors(config: dict[str, Any], sizes: Sizes, path: Path) -> Iterator[Tensor]:
    """Yield all tensors of the model that a config.json describes. `sizes` are those of its decoder.

    Raises UnknownShapeError if Lorry does not know the architecture; the message names `path`.
    """
    text = decoder_config(config)
    if sizes.kind not in BIASED | FUSED | PLAIN | MIXTURES or "kv_lora_rank" in text:
        raise UnknownShapeError(
            f"{path}: the weights are missing, and Lorry cannot make the tensors of a {sizes.kind or 'nameless'} model"
            " from its config; copy the weights there"
        )
    quantisation = config.get("quantization_config") or {}
    dtype = TYPES.get(str(text.get("dtype") or text.get("torch_dtype") or "bfloat16"), "BF16")
    plain = [
        *_ends(sizes),
        *(tensor for layer in range(sizes.layers) for tensor in _layer(f"model.layers.{layer}", sizes, text, layer)),
    ]
    method = quantisation.get("quant_method")
    for name, shape in plain:
        if method in ("gptq", "awq", "mxfp4", "fp8") and _is_packed(name, shape, method):
            yield from _packed(name, shape, method, quantisation, dtype)
        elif method in (None, "gptq", "awq", "mxfp4", "fp8"):
            yield name, shape, dtype
        else:
            raise UnknownShapeError(
                f"{path}: the weights are missing, and Lorry cannot make tensors quantised by {method} from a config;"
                " copy the weights there"
            )
    if vision := config.get("vision_config"):
        tower = {**VISION.get(str(vision.get("model_type") or config.get("model_type")), {}), **vision}
        try:
            for name, shape in _vision(tower, sizes.hidden, int(config.get("scale_factor") or 1)):
                yield name, shape, dtype
        except KeyError as error:
            raise UnknownShapeError(
                f"{path}: the weights are missing, and vision_config has no {error}; copy the weights there"
            ) from error


Named = tuple[str, tuple[int, ...]]
"""Name and shape of a tensor."""


def _ends(sizes: Sizes) -> Iterator[Named]:
    """Yield the tensors before and after the layers."""
    yield "model.embed_tokens.weight", (sizes.vocabulary, sizes.hidden)
    yield "model.norm.weight", (sizes.hidden,)
    if not sizes.tied:
        yield "lm_head.weight", (sizes.vocabulary, sizes.hidden)


def _layer(here: str, sizes: Sizes, text: dict[str, Any], number: int) -> Iterator[Named]:
    """Yield the tensors of one decoder layer. `number` counts from 0."""
    hidden, queries, keys = sizes.hidden, sizes.heads * sizes.head_size, sizes.kv_heads * sizes.head_size
    if sizes.kind == "phi3":
        yield f"{here}.self_attn.qkv_proj.weight", (queries + 2 * keys, hidden)
    else:
        biased = sizes.kind in BIASED or sizes.kind in ("qwen2_moe", "gpt_oss") or bool(text.get("attention_bias"))
        for name, outputs in (("q_proj", queries), ("k_proj", keys), ("v_proj", keys)):
            yield f"{here}.self_attn.{name}.weight", (outputs, hidden)
            if biased:
                yield f"{here}.self_attn.{name}.bias", (outputs,)
    yield f"{here}.self_attn.o_proj.weight", (hidden, queries)
    norms = ["input_layernorm", "post_attention_layernorm"]
    if sizes.kind in ("gemma2", "gemma3_text"):
        norms += ["pre_feedforward_layernorm", "post_feedforward_layernorm"]
    for name in norms:
        yield f"{here}.{name}.weight", (hidden,)
    if sizes.kind in ("qwen3", "qwen3_moe", "gemma3_text"):
        for name in ("q_norm", "k_norm"):
            yield f"{here}.self_attn.{name}.weight", (sizes.head_size,)
    if _is_mixture_layer(sizes, text, number):
        yield from _experts(here, sizes)
    elif sizes.kind in FUSED:
        yield f"{here}.mlp.gate_up_proj.weight", (2 * sizes.intermediate, hidden)
        yield f"{here}.mlp.down_proj.weight", (hidden, sizes.intermediate)
    else:
        dense = int(text.get("intermediate_size_mlp") or sizes.intermediate)
        yield from _mlp(f"{here}.mlp", hidden, dense)


GATED = ("gate_proj", "up_proj", "down_proj")
"""Names of a gated MLP's gate, up and down."""


def _mlp(here: str, hidden: int, inner: int, names: tuple[str, str, str] = GATED) -> Iterator[Named]:
    """Yield the tensors of a gated MLP; `names` are those of its gate, up and down."""
    gate, up, down = names
    yield f"{here}.{gate}.weight", (inner, hidden)
    yield f"{here}.{up}.weight", (inner, hidden)
    yield f"{here}.{down}.weight", (hidden, inner)


def _is_mixture_layer(sizes: Sizes, text: dict[str, Any], number: int) -> bool:
    """Whether the layer `number`, from 0, is a mixture of experts."""
    if not sizes.experts:
        return False
    step = int(text.get("decoder_sparse_step") or text.get("interleave_moe_layer_step") or 1)
    return number not in (text.get("mlp_only_layers") or ()) and (number + 1) % step == 0


def _experts(here: str, sizes: Sizes) -> Iterator[Named]:
    """Yield the tensors of a layer's router and experts, as published files have them."""
    hidden, count, width = sizes.hidden, sizes.experts, sizes.expert_intermediate
    if sizes.kind in ("gpt_oss", "llama4_text"):  # all experts of a layer in one tensor
        block = f"{here}.mlp" if sizes.kind == "gpt_oss" else f"{here}.feed_forward"
        yield f"{block}.router.weight", (count, hidden)
        yield f"{block}.experts.gate_up_proj", (count, hidden, 2 * width)
        yield f"{block}.experts.down_proj", (count, width, hidden)
        if sizes.shared_intermediate:
            yield from _mlp(f"{block}.shared_expert", hidden, sizes.shared_intermediate)
        return
    block = f"{here}.block_sparse_moe" if sizes.kind == "mixtral" else f"{here}.mlp"
    yield f"{block}.gate.weight", (count, hidden)
    names = ("w1", "w3", "w2") if sizes.kind == "mixtral" else GATED
    for number in range(count):
        yield from _mlp(f"{block}.experts.{number}", hidden, width, names)
    if sizes.shared_intermediate:
        yield from _mlp(f"{block}.shared_expert", hidden, sizes.shared_intermediate)
        yield f"{block}.shared_expert_gate.weight", (1, hidden)


def _is_packed(name: str, shape: tuple[int, ...], method: str) -> bool:
    """Whether a quantisation method packs a tensor: linear modules of the layers, or MXFP4's experts."""
    if method == "mxfp4":
        return ".experts." in name
    return ".layers." in name and len(shape) > 1 and not name.endswith(("gate.weight", "router.weight"))


def _packed(
    name: str, shape: tuple[int, ...], method: str, quantisation: dict[str, Any], dtype: str
) -> Iterator[Tensor]:
    """Yield the tensors in which a quantisation method stores one tensor."""
    if method == "fp8":
        yield name, shape, "F8_E4M3"
        return
    if method == "mxfp4":  # blocks of 32 values of 4 bits, and a byte of scale for each
        count, inputs, outputs = shape
        yield f"{name}_blocks", (count, outputs, inputs // 32, 16), "U8"
        yield f"{name}_scales", (count, outputs, inputs // 32), "U8"
        return
    outputs, inputs = shape
    bits, module = int(quantisation.get("bits") or 4), name.rpartition(".")[0]
    group = int(quantisation.get("group_size") or 128)
    groups = inputs // group if group > 0 else 1
    packed = (inputs * bits // 32, outputs) if method == "gptq" else (inputs, outputs * bits // 32)
    yield f"{module}.qweight", packed, "I32"
    yield f"{module}.qzeros", (groups, outputs * bits // 32), "I32"
    yield f"{module}.scales", (groups, outputs), "F16"
    if method == "gptq":
        yield f"{module}.g_idx", (inputs,), "I32"


def _vision(tower: dict[str, Any], text: int, scale: int) -> Iterator[Named]:
    """Yield the tensors of a vision tower and its connector. `text` is the language model's hidden size. If `scale` is
    above 1, the connector is one module that reads `scale` x `scale` patches together (Idefics3).

    Raises KeyError for a size that is missing.
    """
    if "depth" in tower:
        yield from _qwen_vision(tower)
        return
    hidden, inner, patch = int(tower["hidden_size"]), int(tower["intermediate_size"]), int(tower.get("patch_size", 14))
    yield "vision_tower.patch_embedding.weight", (hidden, 3, patch, patch)
    for number in range(int(tower["num_hidden_layers"])):
        here = f"vision_tower.layers.{number}"
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            yield f"{here}.self_attn.{name}.weight", (hidden, hidden)
        if tower.get("model_type") == "pixtral":
            yield from _mlp(f"{here}.feed_forward", hidden, inner)
        else:
            yield f"{here}.mlp.fc1.weight", (inner, hidden)
            yield f"{here}.mlp.fc2.weight", (hidden, inner)
    yield "multi_modal_projector.linear_1.weight", (text, hidden * scale**2)
    if scale == 1:
        yield "multi_modal_projector.linear_2.weight", (text, text)


def _qwen_vision(tower: dict[str, Any]) -> Iterator[Named]:
    """Yield the tensors of the vision tower of a Qwen2-VL, Qwen2.5-VL or Qwen3-VL. Raises KeyError as `_vision`."""
    hidden = int(tower.get("embed_dim") or tower["hidden_size"])
    output = int(tower["hidden_size"] if "embed_dim" in tower else tower["out_hidden_size"])
    inner = int(tower.get("intermediate_size") or tower["mlp_ratio"] * hidden)
    patch, merged = int(tower.get("patch_size", 14)), int(tower.get("spatial_merge_size", 2)) ** 2 * hidden
    yield "visual.patch_embed.proj.weight", (hidden, 3, 2, patch, patch)
    for number in range(int(tower["depth"])):
        here = f"visual.blocks.{number}"
        yield f"{here}.attn.qkv.weight", (3 * hidden, hidden)
        yield f"{here}.attn.proj.weight", (hidden, hidden)
        if "embed_dim" in tower or "deepstack_visual_indexes" in tower:
            yield f"{here}.mlp.fc1.weight", (inner, hidden)
            yield f"{here}.mlp.fc2.weight", (hidden, inner)
        else:
            yield from _mlp(f"{here}.mlp", hidden, inner)
    for number in range(1 + len(tower.get("deepstack_visual_indexes") or ())):
        here = "visual.merger" if number == 0 else f"visual.deepstack_merger_list.{number - 1}"
        yield f"{here}.mlp.0.weight", (merged, merged)
        yield f"{here}.mlp.2.weight", (output, merged)
