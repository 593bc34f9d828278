"""A model's shape: the sizes in its config.json and in the headers of its safetensors files. No weights are read."""

import json
import struct
from dataclasses import dataclass
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any

from stages.contract.errors import UsageError
from stages.contract.machine_errors import machine_error

BYTES = {"F64": 8, "I64": 8, "F32": 4, "I32": 4, "U32": 4, "F16": 2, "BF16": 2, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}
"""Bytes per element, by safetensors' names of types. Types that are missing here, such as F8_E4M3, have one byte."""


class UnknownShapeError(UsageError):
    """The model is intact, but Lorry cannot estimate its memory."""


MAX_HEADER = 100_000_000
"""Largest number of bytes in a header, by the safetensors format (https://huggingface.co/docs/safetensors)."""


@dataclass(frozen=True)
class Weight:
    """One tensor of the model."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    """Type in the file, by safetensors' names: BF16, F16, F32, I32."""

    @property
    def count(self) -> int:
        """Number of elements."""
        return prod(self.shape)

    @property
    def stored_bytes(self) -> int:
        """Bytes in the file."""
        return self.count * BYTES.get(self.dtype, 1)


@dataclass(frozen=True)
class ModelShape:
    """The sizes on which a model's memory depends. They are those of the language model; `vision` has the vision
    tower's."""

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
    """Quantisation method of the weights, such as `gptq` or `awq`; None if they are not quantised."""
    vision: dict[str, Any] | None
    """Config of the vision tower; None if the model has none."""
    bits: int = 4
    """Bits per quantised weight."""
    vision_aux: dict[str, Any] | None = None
    """Config of MGM's second tower, a ConvNeXt; None for other models."""

    @cached_property
    def linears(self) -> dict[str, tuple[int, int]]:
        """(number of inputs, number of outputs) of every linear module by name, packed modules of GPTQ and AWQ too."""
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
    def packed_modules(self) -> frozenset[str]:
        """The names of the linear modules that are stored as packed integers with scales, as with GPTQ and AWQ."""
        return frozenset(weight.name.rpartition(".")[0] for weight in self.weights if weight.name.endswith(".qweight"))

    @property
    def parameters(self) -> int:
        """Number of parameters, as on model cards: quantised modules count as if they were not packed."""
        packing = {f"{module}.{kind}" for module in self.linears for kind in ("qweight", "qzeros", "scales", "g_idx")}
        plain = {f"{module}.weight" for module in self.linears}
        others = sum(weight.count for weight in self.weights if weight.name not in packing | plain)
        return sum(inputs * outputs for inputs, outputs in self.linears.values()) + others

    @property
    def disk_bytes(self) -> int:
        """Bytes of all weights in their files."""
        return sum(weight.stored_bytes for weight in self.weights)


def _is_embedding(module: str) -> bool:
    """Whether a module is an embedding, by its name."""
    return module.rpartition(".")[2] in ("embed_tokens", "wte", "word_embeddings", "embedding", "position_embedding")


LLAMA = {
    **{"hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32, "intermediate_size": 11008},
    "vocab_size": 32000,
}
"""Defaults of a Llama config, those of a 7B: the `text_config` of published LLaVAs leaves them out."""


def read_shape(folder: Path) -> ModelShape:
    """Return the shape of the model in a Hugging Face folder.

    Raises UsageError if the folder holds no model or is damaged, and UnknownShapeError if its config.json lacks the
    sizes of a decoder, or they are not numbers.
    """
    config = _read_object(folder / "config.json")
    text = {**config, **(config.get("text_config") or {})}
    if text.get("model_type") == "llama" and "text_config" in config:
        text = {**LLAMA, **text}
    quantisation = config.get("quantization_config") or {}
    try:
        heads = int(text["num_attention_heads"])
        return ModelShape(
            weights=tuple(weight for path in _weight_files(folder) for weight in _read_header(path)),
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
        found = f"no {error}" if isinstance(error, KeyError) else f"a size is not a number ({error})"
        raise UnknownShapeError(
            f"{folder / 'config.json'}: {found}, so memory cannot be estimated; use a decoder such as Llama or Qwen"
        ) from error


def _read_object(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file. Raises UsageError if the file cannot be read or holds no object."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise machine_error(error) or UsageError(
            f"{path}: cannot be read ({error}); copy a whole Hugging Face model folder there"
        ) from error
    if not isinstance(value, dict):
        raise UsageError(f"{path}: not a JSON object; copy a whole Hugging Face model folder there")
    return value


def tensor_names(path: Path) -> list[str]:
    """Return the names of all tensors in a safetensors file. Raises UsageError if the file is damaged."""
    return [weight.name for weight in _read_header(path)]


def _weight_files(folder: Path) -> list[Path]:
    """Return a model folder's safetensors files. Raises UsageError if it has none, or not all that its index names."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        names = sorted(set(_read_object(index).get("weight_map", {}).values()))
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


def _read_header(path: Path) -> list[Weight]:
    """Return the tensors that the header of a safetensors file lists. Raises UsageError if the file is damaged: the
    header cannot be read, or does not match the size of the file."""
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
        raise machine_error(error) or UsageError(f"{path}: damaged ({error}); copy it again") from error
    size = path.stat().st_size
    if size != 8 + length + end:
        raise UsageError(f"{path}: damaged ({size} bytes, but its header says {8 + length + end}); copy it again")
    return found
