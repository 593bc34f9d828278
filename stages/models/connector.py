"""A vision-language model with a trained connector: a folder of links to the base's files plus one small file.

`train.connector` trains the layers between vision tower and language model (LLaVA's `multi_modal_projector`) before the
adapters. Training, inference and merging use the same folder. Its index names the connector's own file for the
connector's tensors. transformers and vLLM read the files of an index in the order of their names; if two files have a
tensor of the same name, the later one counts.
"""

from pathlib import Path
from typing import Any

from stages.contract.errors import UsageError
from stages.contract.files import read_json, remove, sha256_file, visible_files, write_json
from stages.contract.recipe import CONNECTOR
from stages.contract.run import Run
from stages.models.shape import tensor_names

FILE = "connector.safetensors"
"""Name of the file with the connector's weights. The tensors have the same names as in the base's files."""

INDEX = "model.safetensors.index.json"

LAST = f"zz-{FILE}"
"""Name of that file in a folder of links: it sorts after all files of the base."""


def trained_connector(run: Run) -> tuple[Path, str] | None:
    """Return the file of a run's trained connector and its sha256; None if the recipe has no train.connector.

    Raises UsageError if the recipe has it but no connector is trained yet.
    """
    if run.recipe.train.connector is None:
        return None
    folder = run.path("train", CONNECTOR)
    made = read_json(folder / "made.json")
    if made is None:
        raise UsageError(f"{folder}: has no trained connector, but the recipe has train.connector; run train first")
    return folder / FILE, str(made["files"][FILE])


def refuse_quantised_connector(model: Path) -> None:
    """Raise UsageError if the base is quantised, so that no connector can be trained on it."""
    if (read_json(model / "config.json") or {}).get("quantization_config"):
        raise UsageError(
            f"{model}: train.connector needs a base in 16 bits or more, but this one is quantised; use another base, or"
            " leave out train.connector"
        )


def check_connector(connector: Path, sha256: str) -> None:
    """Raise UsageError if the connector's file is missing, or has another sha256 than after its training."""
    found = sha256_file(connector) if connector.is_file() else None
    if found != sha256:
        state = f"has sha256 {found[:16]}" if found else "is missing"
        raise UsageError(
            f"{connector}: {state}, but train wrote it with sha256 {sha256[:16]}; restore it, or delete"
            f" {connector.parent} to train it again"
        )


def link_connector(model: Path, connector: Path, sha256: str, folder: Path) -> Path:
    """Write a model folder of links to the base's files and to this connector. Replaces `folder` and returns it.

    Raises UsageError if the connector is missing, does not have this sha256, or belongs to another model.
    """
    check_connector(connector, sha256)
    remove(folder)
    folder.mkdir(parents=True)
    places = tensor_files(model)
    names = set(tensor_names(connector))
    if not names or not names <= places.keys():
        strange = next(iter(sorted(names - places.keys())), None)
        found = f"contains {strange}, which {model} does not have" if strange else "contains no tensors"
        raise UsageError(f"{connector}: {found}; use a model and a connector from the same training")
    links = {path.name: path for path in set(places.values())}
    if len(links) == 1:  # a file named model.safetensors would be read without the index
        links = {"model-00001-of-00001.safetensors": next(iter(links.values()))}
    called = {path: name for name, path in links.items()}
    assert max(links) < LAST, "the connector's file must be the last one"
    for name, path in {**links, LAST: connector}.items():
        (folder / name).symlink_to(path.resolve())
    for path in visible_files(model):
        relative = path.relative_to(model)
        if path.suffix not in (".safetensors", ".bin") and not path.name.endswith(".index.json"):
            (folder / relative).parent.mkdir(parents=True, exist_ok=True)
            (folder / relative).symlink_to(path.resolve())
    weight_map = {name: LAST if name in names else called[path] for name, path in places.items()}
    size = sum(path.stat().st_size for path in called)
    write_json(folder / INDEX, {"metadata": {"total_size": size}, "weight_map": weight_map})
    return folder


def tensor_files(model: Path) -> dict[str, Path]:
    """Return the file of each tensor in a model folder, by tensor name. Raises UsageError if it has neither an
    index nor a model.safetensors."""
    index: Any = read_json(model / INDEX)
    if index is not None:
        return {name: model / file for name, file in index["weight_map"].items()}
    only = model / "model.safetensors"
    if not only.is_file():
        raise UsageError(
            f"{model}: neither {INDEX} nor model.safetensors; copy a whole Hugging Face model folder there"
        )
    return dict.fromkeys(tensor_names(only), only)


def names_in_files(model: Path, parameters: list[str]) -> dict[str, str]:
    """Return the name of each parameter in the model's files, by its name in memory.

    In memory, a LLaVA's connector is `model.multi_modal_projector`; in published files it has no `model.` prefix.
    Raises UsageError for a parameter that no file has.
    """
    stored = tensor_files(model)
    found = {}
    for parameter in parameters:
        parts = parameter.split(".")
        endings = [".".join(parts[start:]) for start in range(len(parts))]
        name = next((ending for ending in endings if ending in stored), None)
        if name is None:
            raise UsageError(f"{model}: no file has the connector's parameter {parameter}; copy the model again")
        found[parameter] = name
    return found
