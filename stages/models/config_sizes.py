"""The sizes of a decoder in a model's config.json, with the defaults of its class, which it leaves out.

A config that transformers saved has no value that equals the default of its class. Published vision-language models
therefore often state a few sizes of their language model only: Gemma-3-4b's config names no number of heads.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stages.contract.errors import UsageError


class UnknownShapeError(UsageError):
    """The model is intact, but Lorry cannot estimate its memory."""


NAMES = (
    *("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"),
    *("head_dim", "vocab_size", "tie_word_embeddings"),
)
"""Names of the values in a row of DEFAULTS."""

_LLAMA = (4096, 11008, 32, 32, None, None, 32000, False)
_MISTRAL = (4096, 14336, 32, 32, 8, None, 32000, False)
_QWEN2 = (4096, 22016, 32, 32, None, None, 151936, False)
_QWEN3 = (4096, 22016, 32, 32, None, 128, 151936, False)
_QWEN_VL = (8192, 29568, 80, 64, 8, None, 152064, False)
_GEMMA2 = (2304, 9216, 26, 8, 4, 256, 256000, True)
_GLM = (4096, 13696, 40, 32, 2, 128, 151552, False)

DEFAULTS: dict[str, tuple[int | bool | None, ...]] = {
    **{"llama": _LLAMA, "granite": _LLAMA, "olmo2": (*_LLAMA[:6], 50304, False)},
    **{"mistral": _MISTRAL, "ministral": _MISTRAL, "mixtral": _MISTRAL},
    **{"qwen2": _QWEN2, "qwen3": _QWEN3, "qwen3_vl_text": _QWEN3},
    **dict.fromkeys(("qwen2_vl", "qwen2_vl_text", "qwen2_5_vl", "qwen2_5_vl_text"), _QWEN_VL),
    "qwen2_moe": (2048, 5632, 24, 16, 16, None, 151936, False),
    "qwen3_moe": (2048, 6144, 24, 32, 4, None, 151936, False),
    "qwen3_vl_moe_text": (2048, 5632, 24, 16, 16, 128, 151936, True),
    "gemma": (3072, 24576, 28, 16, 16, 256, 256000, True),
    **{"gemma2": _GEMMA2, "gemma3_text": (*_GEMMA2[:6], 262208, True)},
    "phi3": (3072, 8192, 32, 32, None, None, 32064, False),
    "gpt_oss": (2880, 2880, 36, 64, 8, 64, 201088, False),
    "llama4_text": (5120, 8192, 48, 40, 8, 128, 202048, False),
    **{"glm": _GLM, "glm4": _GLM},
    "smollm3": (2048, 11008, 36, 16, 4, None, 128256, True),
    "cohere": (8192, 22528, 40, 64, None, None, 256000, True),
    "cohere2": (8192, 22528, 40, 64, None, None, 256000, True),
    "gemma3n_text": (2048, 16384, 35, 8, 2, 256, 262400, True),
    "glm4v_text": (*_GLM[:5], None, 151552, False),
    "mllama_text_model": (4096, 14336, 40, 32, 8, None, 128256, False),
    "qwen3_5_text": (4096, 12288, 32, 16, 4, 256, 248320, False),
}
"""Defaults of transformers' config classes (transformers 5.19, `transformers.models.*.configuration_*`), by model type.
The values are those of NAMES. None: as many num_key_value_heads as heads; a head_dim of hidden_size / heads."""

EXPERTS: dict[str, dict[str, int]] = {
    "mixtral": {"experts": 8, "per_token": 2},
    "qwen2_moe": {"experts": 60, "per_token": 4, "width": 1408, "shared": 5632},
    "qwen3_moe": {"experts": 128, "per_token": 8, "width": 768},
    "qwen3_vl_moe_text": {"experts": 60, "per_token": 4, "width": 1408},
    "gpt_oss": {"experts": 128, "per_token": 4},
    "llama4_text": {"experts": 16, "per_token": 1},
}
"""The same for mixtures of experts: number of experts, of those that a token passes, and the width of one and of the
shared one. A missing width is intermediate_size."""

NESTED = ("text_config", "llm_config", "language_config")
"""Keys of the language model's part in the config of a model with several parts."""


@dataclass(frozen=True)
class Sizes:
    """The sizes of a decoder."""

    kind: str
    """Model type of the language model, such as `qwen2`; empty if the config has none."""
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_size: int
    intermediate: int
    vocabulary: int
    tied: bool
    """Whether the language-model head shares the embedding's weights."""
    experts: int
    """Number of experts in a layer of a mixture; 0 for other models."""
    experts_per_token: int
    expert_intermediate: int
    shared_intermediate: int
    """Width of the expert that every token passes; 0 if there is none."""

    @property
    def token_intermediate(self) -> int:
        """Width of the MLP that one token passes, over all its experts."""
        if not self.experts:
            return self.intermediate
        return self.experts_per_token * self.expert_intermediate + self.shared_intermediate


def decoder_config(config: dict[str, Any]) -> dict[str, Any]:
    """Return the language model's values in a config.json, with those of the whole model around it, and the defaults
    that it leaves out."""
    text = {**config, **_nested_config(config)}
    defaults = dict(zip(NAMES, DEFAULTS.get(_kind(config), ()), strict=False))
    return {key: value for key, value in {**defaults, **text}.items() if value is not None}


def _nested_config(config: dict[str, Any]) -> dict[str, Any]:
    """Return the part of a config.json that is the language model's; empty if the whole is."""
    return next((config[key] for key in NESTED if isinstance(config.get(key), dict)), {})


def _kind(config: dict[str, Any]) -> str:
    """Return the model type of the language model in a config.json; empty if it has none."""
    return str(_nested_config(config).get("model_type") or config.get("model_type") or "")


def decoder_sizes(config: dict[str, Any], path: Path) -> Sizes:
    """Return the sizes of the decoder in a config.json.

    Raises UnknownShapeError if a size without a known default is missing, or is not a number. The message names `path`.
    """
    text, kind = decoder_config(config), _kind(config)
    known = EXPERTS.get(kind, {})

    def first(names: tuple[str, ...], default: int) -> int:
        """The first of these values that the config has; else the default."""
        return int(next((text[name] for name in names if text.get(name) is not None), default))

    try:
        heads, hidden = int(text["num_attention_heads"]), int(text["hidden_size"])
        wide = text["intermediate_size"]  # gemma3n has one for each layer
        intermediate = int(wide[0] if isinstance(wide, list) and wide else wide)
        experts = first(("num_local_experts", "num_experts", "n_routed_experts"), known.get("experts", 0))
        width = first(("moe_intermediate_size",), known.get("width", intermediate))
        shared = first(("shared_expert_intermediate_size",), known.get("shared", 0))
        if kind == "llama4_text":  # each layer has an expert for all tokens, of the width of the others
            shared = width
        return Sizes(
            kind=kind,
            hidden=hidden,
            layers=int(text["num_hidden_layers"]),
            heads=heads,
            kv_heads=int(text.get("num_key_value_heads") or heads),
            head_size=int(text.get("head_dim") or hidden // heads),
            intermediate=intermediate,
            vocabulary=int(text["vocab_size"]),
            tied=bool(text.get("tie_word_embeddings", False)),
            experts=experts if experts > 1 else 0,
            experts_per_token=first(("num_experts_per_tok",), known.get("per_token", 1)),
            expert_intermediate=width,
            shared_intermediate=shared + first(("n_shared_experts",), 0) * width,
        )
    except (KeyError, TypeError, ValueError) as error:
        found = f"no {error}" if isinstance(error, KeyError) else f"a size is not a number ({error})"
        raise UnknownShapeError(
            f"{path}: {found}, so memory cannot be estimated; use a decoder such as Llama or Qwen"
        ) from error
