"""A model's shape, from its config.json and the headers of its safetensors files, without reading weights."""

import json
import struct
from dataclasses import dataclass
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any

from stages.contract.errors import UsageError

BYTES = {"F64": 8, "I64": 8, "F32": 4, "I32": 4, "U32": 4, "F16": 2, "BF16": 2, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}
"""Bytes per element, by the safetensors format's names; names that are missing here, F8 and so on, have one."""


class UnknownShapeError(UsageError):
    """An intact model of a kind whose memory Lorry cannot estimate."""


MAX_HEADER = 100_000_000
"""The safetensors format's own limit."""


@dataclass(frozen=True)
class Weight:
    """One tensor of the model."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    """In the file, by safetensors' names: BF16, F16, F32, I32."""

    @property
    def count(self) -> int:
        return prod(self.shape)

    @property
    def stored_bytes(self) -> int:
        return self.count * BYTES.get(self.dtype, 1)


@dataclass(frozen=True)
class ModelShape:
    """The sizes that memory depends on. They are the language model's; `vision` has those of the vision tower."""

    weights: tuple[Weight, ...]
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_size: int
    intermediate: int
    vocabulary: int
    tied: bool
    """Whether the language-model head shares the embedding's weights."""
    quantisation: str | None
    """How the weights are quantised: `gptq`, `awq` and so on; None if they are not."""
    vision: dict[str, Any] | None
    """The config of the vision tower."""
    bits: int = 4
    """Bits per quantised weight."""
    vision_aux: dict[str, Any] | None = None
    """The config of MGM's second tower, a ConvNeXt."""

    @cached_property
    def linears(self) -> dict[str, tuple[int, int]]:
        """Every linear module with its numbers of inputs and outputs, including quantised ones."""
        found: dict[str, tuple[int, int]] = {}
        scales = {weight.name: weight.shape for weight in self.weights if weight.name.endswith(".scales")}
        for weight in self.weights:
            module, _, kind = weight.name.rpartition(".")
            if kind == "weight" and len(weight.shape) == 2 and not _is_embedding(module):
                found[module] = (weight.shape[1], weight.shape[0])
            elif kind == "qweight" and f"{module}.scales" in scales:
                # GPTQ packs several values along the inputs into one 32-bit integer, AWQ along the outputs
                inputs = weight.shape[0] if self.quantisation == "awq" else weight.shape[0] * 32 // self.bits
                found[module] = (inputs, scales[f"{module}.scales"][1])
        return found

    @cached_property
    def packed(self) -> frozenset[str]:
        """Linear modules stored as integers with scales: GPTQ, AWQ."""
        return frozenset(weight.name.rpartition(".")[0] for weight in self.weights if weight.name.endswith(".qweight"))

    @property
    def parameters(self) -> int:
        """The number of parameters, counting quantised modules unpacked, as model cards do."""
        packing = {f"{module}.{kind}" for module in self.linears for kind in ("qweight", "qzeros", "scales", "g_idx")}
        plain = {f"{module}.weight" for module in self.linears}
        others = sum(weight.count for weight in self.weights if weight.name not in packing | plain)
        return sum(inputs * outputs for inputs, outputs in self.linears.values()) + others

    @property
    def disk_bytes(self) -> int:
        return sum(weight.stored_bytes for weight in self.weights)


def _is_embedding(module: str) -> bool:
    return module.rpartition(".")[2] in ("embed_tokens", "wte", "word_embeddings", "embedding", "position_embedding")


LLAMA = {
    **{"hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32, "intermediate_size": 11008},
    "vocab_size": 32000,
}
"""Defaults of a Llama config, a 7B's: the `text_config` of published LLaVAs leaves these out."""


def read_shape(folder: Path) -> ModelShape:
    """Return the shape of the model in a Hugging Face folder. Raises UsageError for a folder that is not a model's, or
    damaged, and UnknownShapeError for a config without the sizes of a decoder."""
    config = _read_json(folder / "config.json")
    text = {**config, **(config.get("text_config") or {})}
    if text.get("model_type") == "llama" and "text_config" in config:
        text = {**LLAMA, **text}
    quantisation = config.get("quantization_config") or {}
    try:
        heads = int(text["num_attention_heads"])
        return ModelShape(
            weights=tuple(weight for path in _files(folder) for weight in _header(path)),
            hidden=int(text["hidden_size"]),
            layers=int(text["num_hidden_layers"]),
            heads=heads,
            kv_heads=int(text.get("num_key_value_heads") or heads),
            head_size=int(text.get("head_dim") or text["hidden_size"] // heads),
            intermediate=int(text["intermediate_size"]),
            vocabulary=int(text["vocab_size"]),
            tied=bool(text.get("tie_word_embeddings", False)),
            quantisation=quantisation.get("quant_method"),
            vision=config.get("vision_config"),
            bits=int(quantisation.get("bits") or 4),
            vision_aux=config.get("vision_config_aux"),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise UnknownShapeError(
            f"{folder / 'config.json'}: no usable {error}; Lorry estimates memory only for decoders such as Llama and"
            " Qwen"
        ) from error


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(f"{path}: cannot be read ({error}); copy a whole Hugging Face model folder there") from error
    if not isinstance(value, dict):
        raise UsageError(f"{path}: not a JSON object; copy a whole Hugging Face model folder there")
    return value


def tensors_of(path: Path) -> list[str]:
    """Return the names of the tensors in a safetensors file. Raises UsageError for a damaged file."""
    return [weight.name for weight in _header(path)]


def _files(folder: Path) -> list[Path]:
    """The safetensors files. Raises UsageError if there are none, or if the index names one that is missing."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        names = sorted(set(_read_json(index).get("weight_map", {}).values()))
        missing = [name for name in names if not (folder / name).is_file()]
        if missing:
            raise UsageError(
                f"{folder}: {missing[0]} is missing, one of {len(names)} files that {index.name} names; copy it again"
            )
        return [folder / name for name in names]
    found = sorted(folder.glob("*.safetensors"))
    if not found:
        raise UsageError(f"{folder}: no *.safetensors; copy a whole Hugging Face model folder there")
    return found


def _header(path: Path) -> list[Weight]:
    """The tensors of a safetensors file. Raises UsageError if the file's size does not match its header."""
    try:
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            if length > MAX_HEADER:
                raise UsageError(f"{path}: damaged (its header claims {length} bytes); copy it again")
            header = json.loads(file.read(length))
        tensors = {name: value for name, value in header.items() if name != "__metadata__"}
        end = max((value["data_offsets"][1] for value in tensors.values()), default=0)
        found = [Weight(name, tuple(value["shape"]), value["dtype"]) for name, value in tensors.items()]
    except (OSError, struct.error, ValueError, KeyError, TypeError) as error:
        raise UsageError(f"{path}: damaged ({error}); copy it again") from error
    size = path.stat().st_size
    if size != 8 + length + end:
        raise UsageError(f"{path}: damaged ({size} bytes, but its header says {8 + length + end}); copy it again")
    return found
