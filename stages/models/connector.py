"""A vision-language model with a trained connector: links to the base's files plus one small file, without a copy.

`train.connector` trains the layers between vision tower and language model (LLaVA's `multi_modal_projector`) before the
adapters. Training, inference and merging all use the result in the same way: a folder of links to the base's files,
with an index that takes the connector's tensors from their own file. transformers and vLLM read the index's files in
the order of their names, and of two tensors with one name the later one wins.
"""

from pathlib import Path
from typing import Any

from stages.contract.errors import UsageError
from stages.contract.files import read_json, remove, sha256_file, visible_files, write_json
from stages.contract.recipe import CONNECTOR
from stages.contract.run import Run
from stages.models.shape import tensors_of

FILE = "connector.safetensors"
"""The file of the connector's weights, whose names are those in the base's files."""

INDEX = "model.safetensors.index.json"

LAST = f"zz-{FILE}"
"""Its name among the base's files, so that it sorts last."""


def trained_connector(run: Run) -> tuple[Path, str] | None:
    """Return a run's trained connector and its sha256; None if the recipe trains none.

    Raises UsageError if the recipe trains one and it does not exist yet.
    """
    if run.recipe.train.connector is None:
        return None
    folder = run.path("train", CONNECTOR)
    made = read_json(folder / "made.json")
    if made is None:
        raise UsageError(f"{folder}: no connector, but the recipe has train.connector; run train first")
    return folder / FILE, str(made["files"][FILE])


def check_connector(connector: Path, sha256: str) -> None:
    """Raise UsageError if the file is not the one that the adapters were trained on."""
    found = sha256_file(connector) if connector.is_file() else None
    if found != sha256:
        now = f"sha256 {found[:16]}" if found else "missing"
        raise UsageError(
            f"{connector}: changed since it was trained ({now}, not sha256 {sha256[:16]}); restore it, or delete"
            f" {connector.parent} to train it again"
        )


def link_connector(model: Path, connector: Path, sha256: str, folder: Path) -> Path:
    """Make `folder` a model folder of links to the base with this connector. Returns it.

    Raises UsageError for a connector that has changed, or that belongs to another model.
    """
    check_connector(connector, sha256)
    remove(folder)
    folder.mkdir(parents=True)
    places = tensor_files(model)
    names = set(tensors_of(connector))
    if not names or not names <= places.keys():
        strange = next(iter(sorted(names - places.keys())), "nothing")
        raise UsageError(
            f"{connector}: contains {strange}, which {model} does not have; use the model that it was trained for"
        )
    links = {path.name: path for path in set(places.values())}
    if len(links) == 1:  # transformers reads a model.safetensors and no other file
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
    """Return the file of each tensor of a model folder. Raises UsageError for a folder without safetensors files."""
    index: Any = read_json(model / INDEX)
    if index is not None:
        return {name: model / file for name, file in index["weight_map"].items()}
    only = model / "model.safetensors"
    if not only.is_file():
        raise UsageError(
            f"{model}: neither {INDEX} nor model.safetensors; copy a whole Hugging Face model folder there"
        )
    return dict.fromkeys(tensors_of(only), only)


def names_in_files(model: Path, parameters: list[str]) -> dict[str, str]:
    """Return the names in the model's files of parameters, by their names in memory.

    In memory a LLaVA's connector is `model.multi_modal_projector`; in published files it has no `model.` prefix. Raises
    UsageError for a parameter that no file has.
    """
    stored = tensor_files(model)
    found = {}
    for parameter in parameters:
        parts = parameter.split(".")
        endings = [".".join(parts[start:]) for start in range(len(parts))]
        name = next((ending for ending in endings if ending in stored), None)
        if name is None:
            raise UsageError(f"{model}: no file has {parameter}, a parameter of the connector; copy the model again")
        found[parameter] = name
    return found
