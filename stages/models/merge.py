"""Merge an adapter into a copy of its base, and refuse adapters that an engine can serve only after merging."""

import shutil
from pathlib import Path
from typing import Any

from stages.contract.errors import DoesNotFitError, UsageError
from stages.contract.files import read_json, remove, visible_files
from stages.models.shape import tensor_names, weight_files

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


def refuse_merging_quantised(model: Path) -> None:
    """Raise UsageError if the model is quantised."""
    if (read_json(model / "config.json") or {}).get("quantization_config"):
        raise UsageError(f"{model}: is quantised, so no adapter can be merged into it; set infer.merged to false")


def write_merged_copy(model: Path, adapter: Path, folder: Path, dtype: str) -> Path:
    """Write a copy of the base with the adapter merged into it, as a Hugging Face model folder. Returns `folder`.

    The folder appears only when it is complete. An existing one is not written again. `dtype` is torch's name of the
    weights' type. If base and head share their weights and the adapter changes one of them, the copy has both. Raises
    UsageError for a quantised base, and DoesNotFitError if the disk has too little space.
    """
    refuse_merging_quantised(model)
    if folder.is_dir():
        return folder
    needed = sum(path.stat().st_size for path in weight_files(model))
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
    _untie_adapted_head(base, adapter)
    PeftModel.from_pretrained(base, str(adapter)).merge_and_unload().save_pretrained(partial)
    for path in _files_beside_weights(model):
        target = partial / path.relative_to(model)
        if not target.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target)
    partial.rename(folder)
    return folder


def _files_beside_weights(model: Path) -> list[Path]:
    """Return a model folder's files without its weights in any format: tokenizer, chat templates, picture processor.

    Folders with other copies of the weights (original/, onnx/) are left out, and so is an adapter that lies there:
    transformers would load it.
    """
    return [
        path
        for path in visible_files(model)
        if path.parent in (model, model / TEMPLATES)
        and path.name.endswith(BESIDE_WEIGHTS)
        and not path.name.endswith(".index.json")
        and not path.name.startswith("adapter_")
    ]


def _untie_adapted_head(base: Any, adapter: Path) -> None:
    """Give the head its own weights if it shares them with the embedding and the adapter changes one of the two.

    Merged into shared weights, an adapter of the head would change the embedding, too.
    """
    import torch

    head, embedding = base.get_output_embeddings(), base.get_input_embeddings()
    if head is None or embedding is None or head.weight is not embedding.weight:
        return
    shared = {name.rpartition(".")[2] for name, module in base.named_modules() if module in (head, embedding)}
    names = tensor_names(adapter / "adapter_model.safetensors")
    if not any(shared & set(name.split(".")) for name in names):
        return
    head.weight = torch.nn.Parameter(embedding.weight.detach().clone(), requires_grad=False)
    for config in (base.config, base.config.get_text_config()):
        config.tie_word_embeddings = False
    base.tie_weights()
