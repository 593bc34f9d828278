"""LoRA settings in the form in which PEFT keeps them, `adapter_config.json`, taken into a recipe."""

import difflib
import json
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from stages.contract.errors import UsageError
from stages.contract.recipe import Train

NAMES = {"r": "rank", "lora_alpha": "alpha", "lora_dropout": "dropout", "target_modules": "target_modules"}
"""PEFT's names of what a recipe has, with the recipe's."""

MUST_BE: dict[str, tuple[Any, ...]] = {
    "bias": ("none",),
    "peft_type": ("LORA",),
    "task_type": ("CAUSAL_LM", None),
    **dict.fromkeys(("use_rslora", "use_dora", "fan_in_fan_out", "use_qalora", "lora_bias"), (False,)),
    "init_lora_weights": (True,),
}
"""Other keys of PEFT's that we accept, with the values that say what is done anyway."""

SAYS_NOTHING = {
    *("inference_mode", "base_model_name_or_path", "revision", "auto_mapping", "peft_version"),
    *("megatron_core", "qalora_group_size"),
}
"""Keys that PEFT writes whatever was asked for: how and by what the file was written, and settings of what is off."""


def with_lora_config(settings: Train, path: Path) -> Train:
    """The settings with those of a JSON file in PEFT's form. What the file leaves out stays as the recipe has it.

    Raises UsageError for a missing file, a key that is no setting of PEFT's LoRA, and one that would not be obeyed.
    """
    values = _read(path)
    found: dict[str, Any] = {}
    for key, value in values.items():
        if key in NAMES:
            found[NAMES[key]] = sorted(value, key=str) if key == "target_modules" and isinstance(value, list) else value
        elif key in MUST_BE:
            if value not in MUST_BE[key]:
                raise UsageError(
                    f"{path}: {key} is {value!r}; adapters are trained with {MUST_BE[key][0]!r}: change it"
                )
        elif key not in SAYS_NOTHING and not _asks_for_nothing(value):
            near = difflib.get_close_matches(key, [*NAMES, *MUST_BE], 1)
            hint = f"did you mean {near[0]!r}?" if near else f"what is read: {', '.join(NAMES)}"
            raise UsageError(f"{path}: {key!r} would not be obeyed; {hint}")
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
        raise UsageError(f"{path}: {key}: {detail['msg']} (found {detail['input']!r})") from error


def _asks_for_nothing(value: Any) -> bool:
    """Whether this value of a key that we do not know switches nothing on. A number may: 0 is one."""
    return value is None or value is False or value in ([], {})


def _read(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise UsageError(f"{path}: no such file (train.lora_config, relative to the data mount)") from None
    except (OSError, ValueError) as error:
        raise UsageError(f"{path}: cannot be read as JSON ({error}); it must hold LoRA settings as PEFT's") from error
    if not isinstance(values, dict):
        raise UsageError(f"{path}: found {type(values).__name__}; LoRA settings are a mapping such as {{'r': 8}}")
    return values
