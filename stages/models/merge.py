"""Merge an adapter into a copy of its base, and refuse adapters that an engine can serve only after merging."""

import json
import shutil
import struct
from pathlib import Path
from typing import Any

from stages.contract.errors import DoesNotFitError, UsageError
from stages.contract.files import read_json, remove, visible_files

VISION = ("visual", "vision_tower", "vision_tower_aux", "vision_model", "multi_modal_projector", "mm_projector")
"""Parts of module names that mark vision towers and connectors."""


def refuse_adapted_vision(adapters: dict[str, Path], engine: str, others: list[str]) -> None:
    """Raise UsageError if an adapter in `adapters` (folder by name) has LoRA weights of a vision tower or connector.

    `engine` would ignore these weights (vLLM only warns). The engines in `others` use them, and the message says so.
    """
    for name, folder in adapters.items():
        path = folder / "adapter_model.safetensors"
        if not path.is_file():
            continue
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            tensors = json.loads(file.read(length))
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


def refuse_merging_quantised(model: Path) -> None:
    """Raise UsageError if the model is quantised."""
    if (read_json(model / "config.json") or {}).get("quantization_config"):
        raise UsageError(f"{model}: is quantised, so no adapter can be merged into it; set infer.merged to false")


def write_merged_copy(model: Path, adapter: Path, folder: Path, dtype: str) -> Path:
    """Write a copy of the base with the adapter merged into it, as a Hugging Face model folder. Returns `folder`.

    The folder appears only when it is complete. An existing one is not written again. `dtype` is torch's name of the
    weights' type. Raises UsageError for a quantised base, and DoesNotFitError if the disk has too little space.
    """
    refuse_merging_quantised(model)
    if folder.is_dir():
        return folder
    needed = sum(path.stat().st_size for path in model.glob("*.safetensors"))
    folder.parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder.parent).free
    if free < needed:
        raise DoesNotFitError(
            f"{folder}: a merged copy needs {needed / 1e9:.1f} GB, but only {free / 1e9:.1f} GB are free; free some"
            " space, or set infer.merged to false"
        )
    import torch
    from peft import PeftModel
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

    import stages.models.mgm  # noqa: F401 - registers MGM with transformers

    partial = folder.with_name(f".{folder.name}")
    remove(partial)
    config = AutoConfig.from_pretrained(model, local_files_only=True)
    kind: Any = AutoModelForImageTextToText if hasattr(config, "vision_config") else AutoModelForCausalLM
    base = kind.from_pretrained(model, dtype=getattr(torch, dtype), local_files_only=True)
    PeftModel.from_pretrained(base, str(adapter)).merge_and_unload().save_pretrained(partial)
    weights = (".safetensors", ".bin", ".index.json")
    for path in visible_files(model):  # tokenizer, chat template, picture processor
        target = partial / path.relative_to(model)
        if not path.name.endswith(weights) and not target.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target)
    partial.rename(folder)
    return folder
