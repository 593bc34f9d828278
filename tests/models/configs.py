"""config.json of published models, with the sizes that they state, and the parameters on their cards."""

from typing import Any

QWEN2_5_VL = {
    **{"architectures": ["Qwen2_5_VLForConditionalGeneration"], "model_type": "qwen2_5_vl"},
    **{"hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "num_attention_heads": 28},
    **{"num_key_value_heads": 4, "vocab_size": 152064, "tie_word_embeddings": False, "torch_dtype": "bfloat16"},
    "vision_config": {
        **{"depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16, "out_hidden_size": 3584},
        **{"patch_size": 14, "spatial_merge_size": 2, "temporal_patch_size": 2, "in_chans": 3},
    },
}
"""Qwen2.5-VL-7B-Instruct as it was published: the language model's sizes stand at the top."""

_SIZES = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
QWEN2_5_VL_NESTED = {
    **{key: value for key, value in QWEN2_5_VL.items() if key not in (*_SIZES, "vocab_size")},
    "text_config": {
        "model_type": "qwen2_5_vl_text",
        **{key: QWEN2_5_VL[key] for key in (*_SIZES, "vocab_size")},
    },
}
"""The same, saved by a later transformers."""

CONFIGS: dict[str, tuple[dict[str, Any], float]] = {
    "Qwen2.5-VL-7B": (QWEN2_5_VL, 8.29e9),
    "Qwen2.5-VL-7B nested": (QWEN2_5_VL_NESTED, 8.29e9),
    "Qwen2.5-VL-3B": (
        {
            **QWEN2_5_VL,
            **{"hidden_size": 2048, "intermediate_size": 11008, "num_hidden_layers": 36, "num_attention_heads": 16},
            **{"num_key_value_heads": 2, "vocab_size": 151936, "tie_word_embeddings": True},
            "vision_config": {**QWEN2_5_VL["vision_config"], "out_hidden_size": 2048},  # type: ignore[dict-item]
        },
        3.75e9,
    ),
    "Qwen2-VL-2B": (
        {
            **{"model_type": "qwen2_vl", "hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28},
            **{"num_attention_heads": 12, "num_key_value_heads": 2, "vocab_size": 151936},
            **{"tie_word_embeddings": True, "torch_dtype": "bfloat16"},
            "vision_config": {
                **{"depth": 32, "embed_dim": 1280, "mlp_ratio": 4, "num_heads": 16, "in_chans": 3},
                **{"hidden_size": 1536, "patch_size": 14, "spatial_merge_size": 2, "temporal_patch_size": 2},
            },
        },
        2.21e9,
    ),
    "gemma-3-4b": (
        {
            **{"architectures": ["Gemma3ForConditionalGeneration"], "model_type": "gemma3", "torch_dtype": "bfloat16"},
            "text_config": {
                **{"hidden_size": 2560, "intermediate_size": 10240, "model_type": "gemma3_text"},
                **{"num_hidden_layers": 34, "rope_scaling": {"factor": 8.0}, "sliding_window": 1024},
            },
            "vision_config": {
                **{"hidden_size": 1152, "image_size": 896, "intermediate_size": 4304, "num_attention_heads": 16},
                **{"model_type": "siglip_vision_model", "num_hidden_layers": 27, "patch_size": 14},
            },
        },
        4.30e9,
    ),
    "llava-1.5-7b": (
        {
            **{"architectures": ["LlavaForConditionalGeneration"], "model_type": "llava", "torch_dtype": "float16"},
            "text_config": {"model_type": "llama", "max_position_embeddings": 4096, "vocab_size": 32064},
            "vision_config": {
                **{"hidden_size": 1024, "image_size": 336, "intermediate_size": 4096, "patch_size": 14},
                **{"model_type": "clip_vision_model", "num_attention_heads": 16, "num_hidden_layers": 24},
            },
        },
        7.06e9,
    ),
    "llava-v1.6-mistral-7b": (
        {
            **{"architectures": ["LlavaNextForConditionalGeneration"], "model_type": "llava_next"},
            "text_config": {
                **{"intermediate_size": 14336, "max_position_embeddings": 32768, "model_type": "mistral"},
                **{"num_key_value_heads": 8, "vocab_size": 32064},
            },
            "vision_config": {
                **{"hidden_size": 1024, "image_size": 336, "intermediate_size": 4096, "patch_size": 14},
                **{"model_type": "clip_vision_model", "num_attention_heads": 16, "num_hidden_layers": 24},
            },
        },
        7.57e9,
    ),
    "Mistral-Small-3.1-24B": (
        {
            **{"architectures": ["Mistral3ForConditionalGeneration"], "model_type": "mistral3"},
            **{"spatial_merge_size": 2, "torch_dtype": "bfloat16"},
            "text_config": {
                **{"head_dim": 128, "hidden_size": 5120, "intermediate_size": 32768, "model_type": "mistral"},
                **{"num_attention_heads": 32, "num_hidden_layers": 40, "num_key_value_heads": 8},
                **{"vocab_size": 131072, "rope_theta": 1e9, "sliding_window": None},
            },
            "vision_config": {"head_dim": 64, "image_size": 1540, "model_type": "pixtral", "patch_size": 14},
        },
        24.0e9,
    ),
    "gpt-oss-20b": (
        {
            **{"architectures": ["GptOssForCausalLM"], "model_type": "gpt_oss", "attention_bias": True},
            **{"head_dim": 64, "hidden_size": 2880, "intermediate_size": 2880, "num_attention_heads": 64},
            **{"num_hidden_layers": 24, "num_key_value_heads": 8, "num_local_experts": 32, "vocab_size": 201088},
            **{"num_experts_per_tok": 4, "experts_per_token": 4, "tie_word_embeddings": False},
            "quantization_config": {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]},
        },
        20.9e9,
    ),
    "Qwen3-30B-A3B": (
        {
            **{"architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "decoder_sparse_step": 1},
            **{"head_dim": 128, "hidden_size": 2048, "intermediate_size": 6144, "moe_intermediate_size": 768},
            **{"mlp_only_layers": [], "num_attention_heads": 32, "num_experts": 128, "num_experts_per_tok": 8},
            **{"num_hidden_layers": 48, "num_key_value_heads": 4, "tie_word_embeddings": False},
            **{"torch_dtype": "bfloat16", "vocab_size": 151936},
        },
        30.5e9,
    ),
    "Mixtral-8x7B": (
        {
            **{"model_type": "mixtral", "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32},
            **{"num_attention_heads": 32, "num_key_value_heads": 8, "num_local_experts": 8, "vocab_size": 32000},
            **{"num_experts_per_tok": 2, "tie_word_embeddings": False, "torch_dtype": "bfloat16"},
        },
        46.7e9,
    ),
    "Phi-3-mini": (
        {
            **{"architectures": ["Phi3ForCausalLM"], "model_type": "phi3", "hidden_size": 3072},
            **{"intermediate_size": 8192, "num_attention_heads": 32, "num_hidden_layers": 32},
            **{"num_key_value_heads": 32, "tie_word_embeddings": False, "vocab_size": 32064},
            "auto_map": {"AutoConfig": "configuration_phi3.Phi3Config"},
        },
        3.82e9,
    ),
    "Llama-4-Scout": (
        {
            **{"architectures": ["Llama4ForConditionalGeneration"], "model_type": "llama4"},
            "text_config": {
                **{"head_dim": 128, "hidden_size": 5120, "interleave_moe_layer_step": 1, "intermediate_size": 8192},
                **{"intermediate_size_mlp": 16384, "model_type": "llama4_text", "num_attention_heads": 40},
                **{"num_experts_per_tok": 1, "num_hidden_layers": 48, "num_key_value_heads": 8},
                **{"num_local_experts": 16, "tie_word_embeddings": False, "vocab_size": 202048},
            },
            "vision_config": {
                **{"hidden_size": 1408, "image_size": 336, "intermediate_size": 5632, "patch_size": 14},
                **{"model_type": "llama4_vision_model", "num_attention_heads": 16, "num_hidden_layers": 34},
            },
        },
        108.6e9,
    ),
    "SmolVLM-500M": (
        {
            **{"architectures": ["Idefics3ForConditionalGeneration"], "model_type": "idefics3", "scale_factor": 4},
            **{"tie_word_embeddings": False, "torch_dtype": "bfloat16", "vocab_size": 49280},
            "text_config": {
                **{"hidden_size": 960, "intermediate_size": 2560, "model_type": "llama", "vocab_size": 49280},
                **{"num_attention_heads": 15, "num_hidden_layers": 32, "num_key_value_heads": 5},
            },
            "vision_config": {
                **{"hidden_size": 768, "image_size": 512, "model_type": "idefics3_vision", "patch_size": 16},
                **{"num_attention_heads": 12},
            },
        },
        0.507e9,
    ),
    "Qwen2.5-7B in GPTQ's 4 bits": (
        {
            **{"model_type": "qwen2", "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28},
            **{"num_attention_heads": 28, "num_key_value_heads": 4, "vocab_size": 152064},
            **{"tie_word_embeddings": False, "torch_dtype": "float16"},
            "quantization_config": {"quant_method": "gptq", "bits": 4, "group_size": 128},
        },
        7.62e9,
    ),
}
"""By name: the config and the number of parameters."""
