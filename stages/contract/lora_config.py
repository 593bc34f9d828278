"""Reads LoRA settings from a file in PEFT's format, `adapter_config.json`, into a recipe."""

import difflib
import json
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from stages.contract.errors import UsageError
from stages.contract.recipe import Train, problem_text

NAMES = {"r": "rank", "lora_alpha": "alpha", "lora_dropout": "dropout", "target_modules": "target_modules"}
"""PEFT's keys of the settings that a recipe has too, and the recipe's names for them."""

MUST_BE: dict[str, tuple[Any, ...]] = {
    "bias": ("none",),
    "peft_type": ("LORA",),
    "task_type": ("CAUSAL_LM", None),
    **dict.fromkeys(("use_rslora", "use_dora", "fan_in_fan_out", "use_qalora", "lora_bias"), (False,)),
    "init_lora_weights": (True,),
}
"""PEFT's other keys that Lorry accepts, each with the values that change nothing."""

IGNORED = {
    *("inference_mode", "base_model_name_or_path", "revision", "auto_mapping", "peft_version"),
    *("megatron_core", "qalora_group_size"),
}
"""Keys that PEFT always writes and that change nothing: how the file was written, and settings of unused features."""


def apply_lora_config(settings: Train, path: Path) -> Train:
    """Training settings with their LoRA settings replaced by those of a JSON file in PEFT's format.

    Settings that the file lacks stay the recipe's. Raises UsageError if the file is missing or not JSON, if a value is
    out of range, and for a setting that Lorry does not support.
    """
    values = _read_lora_config(path)
    found: dict[str, Any] = {}
    for key, value in values.items():
        if key in NAMES:
            found[NAMES[key]] = sorted(value, key=str) if key == "target_modules" and isinstance(value, list) else value
        elif key in MUST_BE:
            if value not in MUST_BE[key]:
                raise UsageError(
                    f"{path}: {key!r} is {value!r}, but Lorry trains adapters with {MUST_BE[key][0]!r} only; write that"
                )
        elif key not in IGNORED and not _is_off(value):
            near = difflib.get_close_matches(key, [*NAMES, *MUST_BE], 1)
            hint = f"did you mean {near[0]!r}?" if near else f"supported keys: {', '.join(NAMES)}"
            raise UsageError(f"{path}: {key!r} is not supported and would be ignored; {hint}")
    if found.get("target_modules") == "all-linear":
        found["target_modules"] = ["all-linear"]
    if isinstance(found.get("dropout"), int):
        found["dropout"] = float(found["dropout"])
    try:
        return Train.model_validate({**settings.model_dump(), **found})
    except ValidationError as error:
        detail = error.errors()[0]
        theirs = {ours: name for name, ours in NAMES.items()}
        key = theirs.get(str(detail["loc"][0]), str(detail["loc"][0]))
        raise UsageError(f"{path}: {problem_text(detail, key)}") from error


def _is_off(value: Any) -> bool:
    """Whether a value of an unknown key surely switches nothing on. A number may switch something on, even 0."""
    return value is None or value is False or value in ([], {})


def _read_lora_config(path: Path) -> dict[str, Any]:
    """The mapping in a JSON file. Raises UsageError if the file is missing, unreadable, not JSON or not a mapping."""
    try:
        values = json.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise UsageError(f"{path}: no such file; set train.lora_config to a file below the data mount") from None
    except (OSError, ValueError) as error:
        raise UsageError(
            f"{path}: cannot be read as JSON ({error}); put LoRA settings in PEFT's format there"
        ) from error
    if not isinstance(values, dict):
        raise UsageError(f'{path}: found a {type(values).__name__}; write a mapping such as {{"r": 8}}')
    return values
