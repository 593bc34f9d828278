"""Merge an adapter into a copy of its base, and refuse adapters that an engine can serve only after merging.

The copy is written tensor by tensor: memory holds one tensor of the base and the adapter, whatever the model's size.
PEFT merges each module's weight itself, on a model without weights of its own.
"""

import json
import shutil
import struct
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from warnings import catch_warnings, simplefilter

from stages.contract.errors import DoesNotFitError, UsageError
from stages.contract.files import flush, read_json, remove, visible_files, write_json
from stages.models.connector import tensor_files
from stages.models.gptq import patch_gptq_kernels
from stages.models.shape import INDEX, Weight, read_header, tensor_names

if TYPE_CHECKING:
    import torch

VISION = ("visual", "vision_tower", "vision_tower_aux", "vision_model", "multi_modal_projector", "mm_projector")
"""Parts of module names that mark vision towers and connectors."""

BESIDE_WEIGHTS = (".json", ".txt", ".model", ".jinja", ".tiktoken", ".py")
"""Endings of the files that a model needs beside its weights: configs, tokenizer, chat template, processor, code."""

TEMPLATES = "additional_chat_templates"
"""transformers' name of the folder with a tokenizer's further chat templates."""


def refuse_adapted_vision(adapters: dict[str, Path], engine: str, others: list[str]) -> None:
    """Raise UsageError if an adapter in `adapters` (folder by name) has LoRA weights of a vision tower or connector.

    `engine` would ignore these weights (vLLM only warns). The engines in `others` use them, and the message says so.
    """
    for name, folder in adapters.items():
        path = folder / "adapter_model.safetensors"
        tensors = tensor_names(path) if path.is_file() else []
        found = next((tensor for tensor in tensors if set(VISION) & set(tensor.split("."))), None)
        if found:
            raise UsageError(
                f"adapter {name}: adapts a vision tower or connector ({found}), which {engine} would ignore; set"
                f" infer.merged to true to merge the adapter, or infer.engine to {' or '.join(others)}"
            )


def refuse_unserved_vision(model: Path, engine: str) -> None:
    """Raise UsageError if the model reads pictures: its vision tower is to be adapted, which `engine` would ignore."""
    config = read_json(model / "config.json") or {}
    if "vision_config" in config or "mm_vision_tower" in config:
        raise UsageError(
            f"train.freeze_vision: false adapts the vision tower of {model}, which {engine} would ignore; set"
            " infer.merged to true to merge the adapters, or train.freeze_vision to true"
        )


def refuse_merging_quantised(model: Path, cure: str = "set infer.merged to false") -> None:
    """Raise UsageError if the model is quantised. `cure` ends the message."""
    quantisation = (read_json(model / "config.json") or {}).get("quantization_config")
    if quantisation:
        method = quantisation.get("quant_method", "an unknown method")
        raise UsageError(f"{model}: is quantised ({method}), so no adapter can be merged into it; {cure}")


def write_merged_copy(model: Path, adapter: Path, folder: Path, dtype: str) -> Path:
    """Write a copy of the base with the adapter merged into it, as a Hugging Face model folder. Returns `folder`.

    The folder appears only when it is complete. An existing one is not written again. `dtype` is torch's name of the
    merged weights' type. Raises the errors of `Merge`, and DoesNotFitError if the disk has too little space.
    """
    refuse_merging_quantised(model)
    if folder.is_dir():
        return folder
    partial = folder.with_name(f".{folder.name}")
    remove(partial)
    merge = Merge(model, adapter, dtype)
    folder.parent.mkdir(parents=True, exist_ok=True)
    refuse_full_disk(folder, merge.bytes, "a merged copy", "free some space, or set infer.merged to false")
    merge.write(partial)
    partial.rename(folder)
    return folder


def refuse_full_disk(folder: Path, needed: int, what: str, cure: str) -> None:
    """Raise DoesNotFitError if the disk on which `folder` will be has fewer than `needed` bytes free for `what`."""
    free = shutil.disk_usage(folder.parent).free
    if free < needed:
        raise DoesNotFitError(
            f"{folder}: {what} needs {needed / 1e9:.1f} GB, but only {free / 1e9:.1f} GB are free; {cure}"
        )


Change = Callable[["torch.Tensor"], "torch.Tensor"]
"""Makes the merged tensor from the base's."""

TYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
"""safetensors' names of torch's types that a merged weight may have."""


@dataclass(frozen=True)
class _Written:
    """A tensor of the copy."""

    weight: Weight
    """Its name, shape and type in the copy."""
    source: str
    """The base's tensor that it is made from."""
    change: Change | None
    """None: the base's bytes."""


class Merge:
    """An adapter and its base, ready to be written as one model."""

    def __init__(self, model: Path, adapter: Path, dtype: str | None = None) -> None:
        """Load the adapter, and find the base's tensor of each module that it changes.

        `dtype` is torch's name of the merged weights' type; None: that of the base's own tensor. Other tensors stay as
        they are. If base and head share their weights and the adapter changes one of them, the copy has both. Raises
        UsageError for an adapter that does not belong to the base, or with weights other than modules can merge.
        """
        self._model = model
        self._places = tensor_files(model)
        self._weights = {
            weight.name: weight
            for file in sorted(set(self._places.values()))
            for weight in read_header(file)
            if self._places.get(weight.name) == file
        }
        changes, self._unties = self._changes(adapter)
        self._files: list[tuple[Path, list[_Written]]] = []
        for file in sorted(set(self._places.values())):
            written = [
                _Written(self._typed(weight, name, dtype if change else None), weight.name, change)
                for weight in self._weights.values()
                if self._places[weight.name] == file
                for name, change in changes.get(weight.name, {weight.name: None}).items()
            ]
            self._files.append((file, written))

    @property
    def bytes(self) -> int:
        """Size of the copy."""
        beside = sum(path.stat().st_size for path in _files_beside_weights(self._model))
        return beside + sum(one.weight.stored_bytes for _, written in self._files for one in written)

    def write(self, folder: Path) -> None:
        """Write the copy into a folder: weights in the base's files and order, with an index if there are several, and
        the files beside the base's weights."""
        folder.mkdir(parents=True, exist_ok=True)
        names = ["model.safetensors"]
        if len(self._files) > 1:
            names = [f"model-{n:05}-of-{len(self._files):05}.safetensors" for n in range(1, len(self._files) + 1)]
        for name, (file, written) in zip(names, self._files, strict=True):
            _write_tensors(folder / name, file, written)
        if len(names) > 1:
            places = {
                one.weight.name: name for name, (_, written) in zip(names, self._files, strict=True) for one in written
            }
            size = sum(one.weight.stored_bytes for _, written in self._files for one in written)
            write_json(folder / INDEX, {"metadata": {"total_size": size}, "weight_map": places})
        for path in _files_beside_weights(self._model):
            target = folder / path.relative_to(self._model)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target)
        if self._unties:
            config = read_json(folder / "config.json")
            for part in (config, config.get("text_config") or {}):
                part["tie_word_embeddings"] = False
            write_json(folder / "config.json", config)
        flush(folder)

    def _typed(self, weight: Weight, name: str, dtype: str | None) -> Weight:
        """A tensor of the base under another name and with another type; None: its own."""
        return Weight(name, weight.shape, weight.dtype if dtype is None else TYPES[dtype])

    def _changes(self, adapter: Path) -> tuple[dict[str, dict[str, Change | None]], bool]:
        """By the base's tensor: the tensors of the copy that are made from it, each with its change, where these are
        not just the same tensor. Also returns whether base and head no longer share their weights."""
        from peft.tuners.tuners_utils import BaseTunerLayer
        from peft.utils import ModulesToSaveWrapper

        base = _without_weights(self._model)
        ends = {"head": base.get_output_embeddings(), "embedding": base.get_input_embeddings()}
        names = {what: name for name, module in base.named_modules() for what, end in ends.items() if module is end}
        tied = len(names) == 2 and ends["head"].weight is ends["embedding"].weight
        modules: list[tuple[str, Any]] = []
        with patch_gptq_kernels(self._model, on_card=False, training=False):  # else PEFT imports gptqmodel
            tuned = _with_adapter(base, adapter)
        for name, module in tuned.get_base_model().named_modules():
            if isinstance(module, BaseTunerLayer):
                modules.append((f"{name}.weight", _merging(module)))
            elif isinstance(module, ModulesToSaveWrapper):
                saved = module.modules_to_save[module.active_adapters[0]]
                modules += [(f"{name}.{part}", _replacing(value)) for part, value in saved.named_parameters()]
        changes: dict[str, dict[str, Change | None]] = {}
        ours = {what: f"{name}.weight" for what, name in names.items()}
        unties = tied and any(parameter in ours.values() for parameter, _ in modules)
        embedding = self._stored_name(ours["embedding"]) if unties else ""
        if unties:
            changes[embedding] = {embedding: None, ours["head"]: None}
            self._weights.pop(ours["head"], None)  # a second copy of the embedding, which tied models ignore
        for parameter, change in modules:
            if unties and parameter in ours.values():
                changes[embedding][ours["head"] if parameter == ours["head"] else embedding] = change
                continue
            stored = self._stored_name(parameter)
            if stored in changes:
                raise UsageError(
                    f"{self._model}: {stored} is the tensor of two modules that {adapter} changes; export the adapter"
                    " without merging it"
                )
            changes[stored] = {stored: change}
        return changes, unties

    def _stored_name(self, parameter: str) -> str:
        """The name in the base's files of a parameter, by its name in memory: in memory, the language model of a LLaVA
        has another path than in published files. It is the tensor with the longest end in common.

        Raises UsageError if there is none, or several equally good ones.
        """
        if parameter in self._weights:
            return parameter
        parts = parameter.split(".")
        sees = bool(set(VISION) & set(parts))
        scores: dict[tuple[int, int], list[str]] = {}
        for name in self._weights:
            others = name.split(".")
            if bool(set(VISION) & set(others)) == sees:
                scores.setdefault(_likeness(parts, others), []).append(name)
        best = max(scores, default=(0, 0))
        if best[0] < 2 or len(scores[best]) > 1:
            raise UsageError(
                f"{self._model}: no file has the parameter {parameter}, which the adapter changes; use the base that it"
                " was trained on"
            )
        return scores[best][0]


def _likeness(parts: list[str], others: list[str]) -> tuple[int, int]:
    """How many parts at the end of two names are equal, and how many of the others both have."""
    end = 0
    while end < min(len(parts), len(others)) and parts[-1 - end] == others[-1 - end]:
        end += 1
    return end, len(set(parts[: len(parts) - end]) & set(others[: len(others) - end]))


def _without_weights(model: Path) -> Any:
    """The base as transformers builds it, with weights that have shapes only."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

    import stages.models.mgm  # noqa: F401 - registers MGM with transformers

    config = AutoConfig.from_pretrained(model, local_files_only=True)
    kind: Any = AutoModelForImageTextToText if hasattr(config, "vision_config") else AutoModelForCausalLM
    with torch.device("meta"):
        return kind.from_config(config)


def _with_adapter(base: Any, adapter: Path) -> Any:
    """The base with the adapter, whose weights are loaded. Raises UsageError if the adapter has weights that no module
    takes."""
    import torch
    from peft import LoraConfig, get_peft_model, set_peft_model_state_dict
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils import get_peft_model_state_dict
    from safetensors.torch import load_file

    with catch_warnings():
        simplefilter("ignore")  # a base and head that share their weights get their own
        tuned: Any = get_peft_model(base, LoraConfig.from_pretrained(str(adapter)), low_cpu_mem_usage=True)
    for module in tuned.modules():
        if isinstance(module, BaseTunerLayer):  # PEFT moves an adapter's weights to where its base has one
            module.get_base_layer().weight = torch.nn.Parameter(torch.empty(0), requires_grad=False)
    weights = load_file(adapter / "adapter_model.safetensors")
    # PEFT saves base and head beside their LoRA
    weights = {name: weights[name] for name in weights if ".base_layer." not in name}
    set_peft_model_state_dict(tuned, dict(weights), low_cpu_mem_usage=True)
    missing = [name for name, value in tuned.named_parameters() if "lora_" in name and value.is_meta]
    unknown = sorted({*weights} - {*get_peft_model_state_dict(tuned, save_embedding_layers=False)})
    if missing or unknown:
        raise UsageError(
            f"{adapter}: {(missing or unknown)[0]} {'is missing' if missing else 'belongs to no module of the base'};"
            " use the base that it was trained on"
        )
    return tuned


def _merging(layer: Any) -> Change:
    """The change that PEFT's layer makes in its base's weight: computed in float32, for one rounding only."""
    import torch

    def merged(weight: "torch.Tensor") -> "torch.Tensor":
        base = layer.get_base_layer()
        own = base.weight
        base.weight = torch.nn.Parameter(weight.to(torch.float32, copy=True), requires_grad=False)
        layer.merge()
        result: torch.Tensor = base.weight.data
        base.weight = own
        layer.merged_adapters.clear()
        return result

    return merged


def _replacing(value: "torch.Tensor") -> Change:
    """The change to a tensor that the adapter has whole."""
    return lambda _: value.detach()


def _write_tensors(path: Path, source: Path, written: Iterable[_Written]) -> None:
    """Write a safetensors file (https://huggingface.co/docs/safetensors), one tensor after the other, from the file
    `source`."""
    import torch
    from safetensors import safe_open

    written = list(written)
    types = {name: getattr(torch, dtype) for dtype, name in TYPES.items()}
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for one in written:
        begin, end = end, end + one.weight.stored_bytes
        shape = list(one.weight.shape)
        header[one.weight.name] = {"dtype": one.weight.dtype, "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header, ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)  # tensors begin at multiples of 8 bytes, as in the libraries' own files
    with safe_open(source, framework="pt") as tensors, path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for one in written:
            tensor = tensors.get_tensor(one.source)
            if one.change is not None:
                if tensor.shape != one.weight.shape:
                    raise AssertionError(f"{one.source} was read with another shape")
                tensor = one.change(tensor).to(types[one.weight.dtype])
            if tensor.numel():
                file.write(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)


LICENCES = ("license", "licence", "notice", "use_policy")
"""How the names of files begin that a copy has to keep beside the weights."""


def _files_beside_weights(model: Path) -> list[Path]:
    """Return a model folder's files without its weights in any format: tokenizer, chat templates, picture processor,
    licence.

    Folders with other copies of the weights (original/, onnx/) are left out, and so is an adapter that lies there:
    transformers would load it.
    """
    return [
        path
        for path in visible_files(model)
        if path.parent in (model, model / TEMPLATES)
        and (path.name.endswith(BESIDE_WEIGHTS) or path.name.lower().startswith(LICENCES))
        and not path.name.endswith(".index.json")
        and not path.name.startswith("adapter_")
    ]
