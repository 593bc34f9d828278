"""Whether the Python files in a model's folder run (`model.trust_remote_code`).

transformers imports the files that `auto_map` names in a folder's JSON files, and custom_generate/generate.py, if it is
asked to trust them. ms-swift always asks it to. Here the recipe alone decides, for every library that loads
through transformers.
"""

import importlib
import importlib.util
from functools import partial
from pathlib import Path
from typing import Any

from stages.contract.errors import UsageError
from stages.contract.files import read_json
from stages.contract.stage import Stage

CONFIGS = (
    *("config.json", "tokenizer_config.json", "processor_config.json", "preprocessor_config.json"),
    "video_preprocessor_config.json",
)
"""Files whose `auto_map` names Python files."""

LOADERS = (
    *("auto_factory", "configuration_auto", "tokenization_auto", "processing_auto", "image_processing_auto"),
    *("feature_extraction_auto", "video_processing_auto"),
)
"""Modules of transformers.models.auto that decide whether such a file runs."""

MODULES = "modules.json"
"""The file in which sentence-transformers names the classes of a model."""


def settle_remote_code(model: Path, trusted: bool) -> None:
    """From now on, run the Python files of model folders in this process if `trusted` is true, and never if it is not,
    whatever a library asks for. Does nothing if the folder `model` neither has nor names such a file.

    Raises UsageError as `refuse_remote_code`, before a library is loaded that would run them.
    """
    if not names_python_files(model) and next(model.rglob("*.py"), None) is None:
        return
    if not trusted:
        refuse_remote_code(model, "set model.trust_remote_code to true if you trust them")
    dynamic: Any = importlib.import_module("transformers.dynamic_module_utils")
    decide = dynamic.resolve_trust_remote_code
    for name in LOADERS:
        try:
            module: Any = importlib.import_module(f"transformers.models.auto.{name}")
        except ModuleNotFoundError:  # transformers 4 has no videos
            continue
        module.resolve_trust_remote_code = partial(_decision, decide, trusted)


def settle_base(stage: Stage) -> None:
    """Settle as the stage's recipe says whether the base's Python files run, and record it if they may.

    Raises UsageError as `settle_remote_code`, and if the base's folder is missing.
    """
    model = stage.run.recipe.model
    settle_remote_code(stage.run.model(model.path, "model.path"), model.trust_remote_code)
    if model.trust_remote_code:
        stage.decide("Python files of the model", "may run", "model.trust_remote_code")


def refuse_remote_code(model: Path, cure: str) -> None:
    """Raise UsageError if transformers has no code for a model's type, so that Python files in its folder would have to
    run. The message ends with `cure`.

    Without transformers, as on a host that only plans, nothing is known of model types, and nothing is refused.
    """
    config = read_json(model / "config.json") or {}
    files = _python_files(config)
    if not files or importlib.util.find_spec("transformers") is None:
        return
    known: Any = importlib.import_module("transformers.models.auto.configuration_auto")
    kind = config.get("model_type")
    if kind not in known.CONFIG_MAPPING_NAMES:
        raise UsageError(
            f"{model}: transformers has no {kind or 'such'} model, so its Python files ({', '.join(files)}) would have"
            f" to run; {cure}"
        )


def refuse_embedder_code(folder: Path) -> None:
    """Raise UsageError if an embedder cannot be loaded without Python files in its folder, which never run."""
    cure = "use an embedder that needs none"
    for module in read_json(folder / MODULES) or []:
        if not module["type"].startswith("sentence_transformers."):
            raise UsageError(f"{folder / MODULES}: {module['type']} is Python of this folder, which never runs; {cure}")
    refuse_remote_code(folder, cure)


def names_python_files(model: Path) -> bool:
    """Whether a model folder's JSON files name Python files to run."""
    return any(_python_files(read_json(model / name) or {}) for name in CONFIGS)


def _python_files(config: dict[str, Any]) -> list[str]:
    """The Python files that the `auto_map` of a JSON file names, sorted. An entry is `file.Class`, a list of these, or
    has the name of a repository and `--` in front."""
    entries = (config.get("auto_map") or {}).values()
    classes = [one for entry in entries for one in (entry if isinstance(entry, list) else [entry]) if one]
    return sorted({f"{one.rpartition('--')[2].partition('.')[0]}.py" for one in classes})


def _decision(decide: Any, trusted: bool, _asked: Any, *arguments: Any, **named: Any) -> Any:
    """What transformers' `resolve_trust_remote_code` decides if it is asked with `trusted`. Raises UsageError if it
    cannot load the model with that decision."""
    try:
        return decide(trusted, *arguments, **named)
    except ValueError as error:
        raise UsageError(
            f"{arguments[0]}: its Python files would have to run; set model.trust_remote_code to true if you trust them"
        ) from error
