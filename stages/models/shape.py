"""A model's shape: the sizes in its config.json and in the headers of its safetensors files. No weights are read.

`read_shape` needs all files of the weights. `planned_shape` does without them: one plans before a download.
"""

import json
import struct
from dataclasses import dataclass
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any

from stages.contract.errors import UsageError
from stages.contract.machine_errors import machine_error
from stages.models.config_sizes import Sizes, decoder_sizes
from stages.models.config_sizes import UnknownShapeError as UnknownShapeError  # noqa: PLC0414 - raised here too
from stages.models.config_tensors import make_tensors

BYTES = {"F64": 8, "I64": 8, "F32": 4, "I32": 4, "U32": 4, "F16": 2, "BF16": 2, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}
"""Bytes per element, by safetensors' names of types. Types that are missing here, such as F8_E4M3, have one byte."""


INDEX = "model.safetensors.index.json"

TOLERANCE = 0.03
"""Share by which the bytes of tensors made from a config.json may differ from those that the index states."""

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
    def unpacked_count(self) -> int:
        """Number of parameters in it. MXFP4 packs two into a byte of `*_blocks`, and `*_scales` has none."""
        if self.dtype == "U8" and self.name.endswith("_blocks"):
            return 2 * self.count
        return 0 if self.dtype == "U8" and self.name.endswith("_scales") else self.count

    @property
    def stored_bytes(self) -> int:
        """Bytes in the file."""
        return self.count * BYTES.get(self.dtype, 1)


@dataclass(frozen=True, eq=False)  # compared by identity, so that what is computed from a shape can be cached
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
    """Width of the MLP that one token passes; of a mixture, that of all experts that it passes together."""
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
    expert_intermediate: int = 0
    """Width of one expert of a mixture; 0 for other models."""
    active_experts: float = 1.0
    """Share (0..1) of a mixture's experts that one token passes."""
    activation: str = "silu"
    """Activation function of the MLPs, by transformers' names."""

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
        kinds = ("weight", "qweight", "qzeros", "scales", "g_idx")
        counted = {f"{module}.{kind}" for module in self.linears for kind in kinds}
        others = sum(weight.unpacked_count for weight in self.weights if weight.name not in counted)
        return sum(inputs * outputs for inputs, outputs in self.linears.values()) + others

    @property
    def disk_bytes(self) -> int:
        """Bytes of all weights in their files."""
        return sum(weight.stored_bytes for weight in self.weights)

    @property
    def served_bytes(self) -> int:
        """Bytes of all weights in 16 bits; of a quantised model, as they are stored."""
        return self.disk_bytes if self.quantisation else self.parameters * 2


def _is_embedding(module: str) -> bool:
    """Whether a module is an embedding, by its name."""
    return module.rpartition(".")[2] in ("embed_tokens", "wte", "word_embeddings", "embedding", "position_embedding")


def read_shape(folder: Path) -> ModelShape:
    """Return the shape of the model in a Hugging Face folder.

    Raises UsageError if the folder holds no model or is damaged, and UnknownShapeError if its config.json lacks the
    sizes of a decoder, or they are not numbers.
    """
    config = _read_object(folder / "config.json")
    weights = tuple(weight for path in weight_files(folder) for weight in read_header(path))
    return _shape(config, decoder_sizes(config, folder / "config.json"), weights)


def planned_shape(folder: Path) -> tuple[ModelShape, str | None]:
    """Return the shape of a model whose weights may be missing, and where its tensors come from: None for its files, or
    the reason why they were made from its config.json.

    Raises UsageError for a folder without a config.json and for damaged files. Raises UnknownShapeError as `read_shape`
    does, and if the weights are missing and Lorry cannot make the tensors of the model's architecture, or their size
    is not the one that the index states.
    """
    index = folder / INDEX
    files = {folder / name for name in _indexed_names(index)} if index.is_file() else set(folder.glob("*.safetensors"))
    missing = sum(not path.is_file() for path in files)
    if files and not missing:
        return read_shape(folder), None
    path = folder / "config.json"
    config = _read_object(path)
    sizes = decoder_sizes(config, path)
    made = tuple(Weight(*tensor) for tensor in make_tensors(config, sizes, path))
    shape = _shape(config, sizes, made)
    stated = (_read_object(index).get("metadata") or {}).get("total_size") if index.is_file() else None
    if stated and abs(shape.disk_bytes / stated - 1) > TOLERANCE:
        raise UnknownShapeError(
            f"{path}: tensors of these sizes have {shape.disk_bytes / 1e9:.1f} GB, but {INDEX} states"
            f" {stated / 1e9:.1f} GB, so memory cannot be estimated without the weights; copy them there"
        )
    return shape, f"{missing} of {len(files)} weight files are missing" if files else "its weights are missing"


def _shape(config: dict[str, Any], sizes: Sizes, weights: tuple[Weight, ...]) -> ModelShape:
    """Return the shape of a model with this config.json, these sizes and these weights."""
    quantisation = config.get("quantization_config") or {}
    text = {**config, **(config.get("text_config") or {})}
    return ModelShape(
        weights=weights,
        hidden=sizes.hidden,
        layers=sizes.layers,
        heads=sizes.heads,
        kv_heads=sizes.kv_heads,
        head_size=sizes.head_size,
        intermediate=sizes.token_intermediate,
        vocabulary=sizes.vocabulary,
        tied=sizes.tied,
        quantisation=quantisation.get("quant_method"),
        vision=config.get("vision_config"),
        bits=int(quantisation.get("bits") or 4),
        vision_aux=config.get("vision_config_aux"),
        expert_intermediate=sizes.expert_intermediate if sizes.experts else 0,
        active_experts=sizes.experts_per_token / sizes.experts if sizes.experts else 1.0,
        activation=str(text.get("hidden_activation") or text.get("hidden_act") or "silu"),
    )


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
    return [weight.name for weight in read_header(path)]


def weight_files(folder: Path) -> list[Path]:
    """Return the safetensors files from which libraries load a model: those that its index names, else
    model.safetensors. Other copies of the weights (consolidated.safetensors, adapters) are left out.

    Raises UsageError if the folder has none, or not all that its index names.
    """
    index = folder / INDEX
    if index.is_file():
        names = _indexed_names(index)
        missing = [name for name in names if not (folder / name).is_file()]
        if missing:
            raise UsageError(
                f"{folder}: {missing[0]} is missing, one of {len(names)} files that {index.name} names; copy it again"
            )
        return [folder / name for name in names]
    if (folder / "model.safetensors").is_file():
        return [folder / "model.safetensors"]
    # older GPTQ models name their file after the quantisation
    others = ("consolidated", "adapter_", "optimizer")
    found = sorted(path for path in folder.glob("*.safetensors") if not path.name.startswith(others))
    if not found:
        raise UsageError(f"{folder}: no *.safetensors; copy a whole Hugging Face model folder there")
    return found


def _indexed_names(index: Path) -> list[str]:
    """Return the names of the files that an index names, sorted. Raises UsageError if it cannot be read."""
    return sorted(set(_read_object(index).get("weight_map", {}).values()))


def read_header(path: Path) -> list[Weight]:
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
