"""A vision-language model with a connector of its own: the base's files, and one small file instead of a copy of them.

What stands between vision tower and language model (LLaVA's `multi_modal_projector`) can be trained before the adapters
(`train.connector`). Base, connector and adapter are then put together in one way for training, inference and merging: a
folder of links to the base's files, with an index by which the connector's tensors come from its own file. transformers
and vLLM read an index's files in the order of their names, and of two tensors of one name the later one stands.
"""

from pathlib import Path
from typing import Any

from stages.contract.errors import UsageError
from stages.contract.files import read_json, remove, sha256_file, visible_files, write_json
from stages.contract.recipe import CONNECTOR
from stages.contract.run import Run
from stages.models.shape import tensors_of

FILE = "connector.safetensors"
"""The connector's weights, by the names that they have in the base's own files."""

INDEX = "model.safetensors.index.json"

LAST = f"zz-{FILE}"
"""What it is called beside the base's files: after all of them."""


def trained_connector(run: Run) -> tuple[Path, str] | None:
    """The connector that a run has trained, and its sha256; None where its recipe trains none.

    Raises UsageError where the recipe has one and none is there.
    """
    if run.recipe.train.connector is None:
        return None
    folder = run.path("train", CONNECTOR)
    made = read_json(folder / "made.json")
    if made is None:
        raise UsageError(f"{folder}: no connector is there, and the recipe has train.connector; run train first")
    return folder / FILE, str(made["files"][FILE])


def check_connector(connector: Path, sha256: str) -> None:
    """Raise UsageError where the file is not the one that was trained: adapters would meet what they do not know."""
    found = sha256_file(connector) if connector.is_file() else "nothing"
    if found != sha256:
        raise UsageError(
            f"{connector}: changed since it was trained (sha256 {found[:16]}, not {sha256[:16]}); put it back, or"
            f" delete {connector.parent} to train it again"
        )


def with_connector(model: Path, connector: Path, sha256: str, folder: Path) -> Path:
    """Make `folder` a model folder of the base with this connector, out of links. Returns it.

    Raises UsageError for a connector that has changed, or that is none of this model's.
    """
    check_connector(connector, sha256)
    remove(folder)
    folder.mkdir(parents=True)
    places = tensor_files(model)
    names = set(tensors_of(connector))
    if not names or not names <= places.keys():
        strange = next(iter(sorted(names - places.keys())), "nothing")
        raise UsageError(f"{connector}: holds {strange}, which {model} has not; it is another model's connector")
    links = {path.name: path for path in set(places.values())}
    if len(links) == 1:  # transformers would take a model.safetensors for all that there is
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
    """The file of each tensor of a model folder."""
    index: Any = read_json(model / INDEX)
    if index is not None:
        return {name: model / file for name, file in index["weight_map"].items()}
    only = model / "model.safetensors"
    if not only.is_file():
        raise UsageError(f"{model}: holds neither {INDEX} nor model.safetensors")
    return dict.fromkeys(tensors_of(only), only)


def names_in_files(model: Path, parameters: list[str]) -> dict[str, str]:
    """What parameters of a model, by their names in memory, are called in the model's files.

    In memory a LLaVA's connector is `model.multi_modal_projector`, in published files it has no `model.` in front.
    Raises UsageError for a parameter that no file has.
    """
    there = tensor_files(model)
    found = {}
    for parameter in parameters:
        parts = parameter.split(".")
        endings = [".".join(parts[start:]) for start in range(len(parts))]
        name = next((ending for ending in endings if ending in there), None)
        if name is None:
            raise UsageError(f"{model}: no file holds {parameter}, which the connector has")
        found[parameter] = name
    return found
