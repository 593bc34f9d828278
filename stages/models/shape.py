"""A model's shape, read from its config.json and the headers of its safetensors files: no weight is read."""

import json
import struct
from dataclasses import dataclass
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any

from stages.contract.errors import UsageError

BYTES = {"F64": 8, "I64": 8, "F32": 4, "I32": 4, "U32": 4, "F16": 2, "BF16": 2, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}
"""Bytes of an element, by the names of the safetensors format; 8-bit floats begin with F8."""


class UnknownShapeError(UsageError):
    """A model in good order, of a kind whose memory we cannot estimate."""


MAX_HEADER = 100_000_000
"""The safetensors format's own limit."""


@dataclass(frozen=True)
class Weight:
    """One tensor of the model."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    """As the file keeps it, in safetensors' names: BF16, F16, F32, I32."""

    @property
    def count(self) -> int:
        return prod(self.shape)

    @property
    def stored_bytes(self) -> int:
        return self.count * BYTES.get(self.dtype, 1)


@dataclass(frozen=True)
class ModelShape:
    """What memory depends on. Sizes are the language model's; `vision` has those of the vision tower."""

    weights: tuple[Weight, ...]
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_size: int
    intermediate: int
    vocabulary: int
    tied: bool
    """Whether the head that makes logits is the embedding."""
    quantisation: str | None
    """`gptq`, `awq` and the like where the weights are stored so."""
    vision: dict[str, Any] | None
    """The config of the vision tower."""
    bits: int = 4
    """Of a weight that is stored quantised."""
    vision_aux: dict[str, Any] | None = None
    """The config of MGM's second tower, a ConvNeXt."""

    @cached_property
    def linears(self) -> dict[str, tuple[int, int]]:
        """Every linear module, with the numbers of its inputs and outputs; quantised ones too."""
        found: dict[str, tuple[int, int]] = {}
        scales = {weight.name: weight.shape for weight in self.weights if weight.name.endswith(".scales")}
        for weight in self.weights:
            module, _, kind = weight.name.rpartition(".")
            if kind == "weight" and len(weight.shape) == 2 and not _is_embedding(module):
                found[module] = (weight.shape[1], weight.shape[0])
            elif kind == "qweight" and f"{module}.scales" in scales:
                # GPTQ packs several values of the input side in one integer of 32 bits, AWQ of the output side
                inputs = weight.shape[0] if self.quantisation == "awq" else weight.shape[0] * 32 // self.bits
                found[module] = (inputs, scales[f"{module}.scales"][1])
        return found

    @cached_property
    def packed(self) -> frozenset[str]:
        """Linear modules whose weights are stored as integers with scales: GPTQ, AWQ."""
        return frozenset(weight.name.rpartition(".")[0] for weight in self.weights if weight.name.endswith(".qweight"))

    @property
    def parameters(self) -> int:
        """Parameters as counted by people: those of quantised modules unpacked."""
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
"""What a config of a Llama means where it says nothing, as the `text_config` of published LLaVAs does: a 7B's."""


def read_shape(folder: Path) -> ModelShape:
    """The shape of the model in a Hugging Face folder. Raises UsageError for what is not one, or is cut short."""
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
            f"{folder / 'config.json'}: no usable {error}: memory is estimated for decoders such as Llama and Qwen"
        ) from error


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(f"{path}: cannot be read ({error}); it must be a Hugging Face model's") from error
    if not isinstance(value, dict):
        raise UsageError(f"{path}: not a mapping; it must be a Hugging Face model's")
    return value


def tensors_of(path: Path) -> list[str]:
    """Names of the tensors in a safetensors file."""
    return [weight.name for weight in _header(path)]


def _files(folder: Path) -> list[Path]:
    """The safetensors files; where an index names them, all that it names must be there."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        names = sorted(set(_read_json(index).get("weight_map", {}).values()))
        missing = [name for name in names if not (folder / name).is_file()]
        if missing:
            raise UsageError(f"{folder}: {missing[0]} is not there, one of {len(names)} files that {index.name} names")
        return [folder / name for name in names]
    found = sorted(folder.glob("*.safetensors"))
    if not found:
        raise UsageError(f"{folder}: holds no *.safetensors; it must be an ordinary Hugging Face model folder")
    return found


def _header(path: Path) -> list[Weight]:
    """The tensors of a safetensors file. Raises UsageError where its size is not what its header says."""
    problem = f"{path}: damaged: copy it again"
    try:
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            if length > MAX_HEADER:
                raise UsageError(f"{problem} (its header claims {length} bytes)")
            header = json.loads(file.read(length))
        tensors = {name: value for name, value in header.items() if name != "__metadata__"}
        end = max((value["data_offsets"][1] for value in tensors.values()), default=0)
        found = [Weight(name, tuple(value["shape"]), value["dtype"]) for name, value in tensors.items()]
    except (OSError, struct.error, ValueError, KeyError, TypeError) as error:
        raise UsageError(f"{problem} ({error})") from error
    if path.stat().st_size != 8 + length + end:
        raise UsageError(f"{problem} ({path.stat().st_size} bytes, and its header says {8 + length + end})")
    return found
