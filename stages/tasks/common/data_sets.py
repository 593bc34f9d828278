"""The data sets of a data path, for tasks whose data path may hold several: which there are, the splits that they
state, and the names of their records.

Each entry directly below the data folder is a data set, named after the entry without its ending: a file, a folder of
files, or a folder saved by `datasets`. A data path that is one file is one data set. So is a folder that `datasets`
saved, and one whose data sets are all named after splits, such as train.jsonl and test.jsonl.
"""

from pathlib import Path

from stages.contract.errors import DataError
from stages.contract.files import data_files
from stages.tasks.common.tables import (
    ENDINGS,
    Row,
    Split,
    data_set_name,
    is_saved_data_set,
    names_a_split,
    names_in,
)
from stages.tasks.task import Given, Skip

PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff")
"""Endings of pictures, which may be beside the records that name them."""

WHOLE = "data"
"""Name of the data set that is the data folder itself. In a container that folder has another name than on the host."""


def data_sets_in(path: Path) -> dict[str, Path]:
    """The paths of the data sets in a data path by name. Raises DataError if there is none, or if two have the same
    name."""
    if path.is_dir() and is_saved_data_set(path):
        return {WHOLE: path}
    found: dict[str, Path] = {}
    for entry in _entries(path):
        name = data_set_name(entry)
        if name in found:
            raise DataError(
                f"{path}: {found[name].name} and {entry.name} are both named {name!r}; rename one, or put both into"
                f" one folder if they are parts of one data set"
            )
        if name is not None:
            found[name] = entry
    if len(found) > 1 and all(map(names_a_split, found)):
        return {WHOLE: path}
    if not found:
        holds = f"found {names_in(path)}; put files" if path.is_dir() else "as its ending is another; name a file"
        raise DataError(
            f"{path}: no data set, {holds} with an ending of {', '.join(ENDINGS)}"
            + (" there, or folders of such files" if path.is_dir() else "")
        )
    return found


def skip_other_entries(path: Path, data_sets: dict[str, Path], skip: Skip) -> None:
    """Skip the entries of a data path that are no data sets, except pictures, README, LICENSE and NOTICE."""
    if path in data_sets.values():
        return
    for entry in _entries(path):
        known = entry in data_sets.values() or entry.stem.upper() in ("README", "LICENSE", "NOTICE")
        if not known and not any(file.suffix.lower() in PICTURES for file in data_files(entry)):
            skip(entry.name, "not a data set", f"its ending is none of {', '.join(ENDINGS)}")


def _entries(path: Path) -> list[Path]:
    """The files and folders in the data folder, sorted, without hidden ones; of a file, only itself. Raises DataError
    if it does not exist."""
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise DataError(f"{path}: no such folder; put the data sets there")
    return sorted(one for one in path.iterdir() if not one.name.startswith("."))


def file_of(row: Row, data_set: Path) -> str:
    """The name of a row's file without its ending; for a data set that is a folder, relative to it."""
    file = str(Path(row.file).with_suffix(""))
    return file.partition("/")[2] if data_set.is_dir() else file


def uses_of_splits(stated: set[Split]) -> dict[Split, Given]:
    """How Lorry uses each split that a data set states. Lorry itself splits questions whose stated split is not a key
    of the result.

    The test split is the test set. With a test split, the validation split is trained on, because Lorry holds out its
    own part of the training data to choose checkpoints. With a training split but no test split, the validation split
    is the test set, as for SQuAD, whose test set is not public. If a data set states only a training split, or only a
    validation split, Lorry splits it itself.
    """
    splits: dict[Split, Given] = {"test": "test"}
    if stated & {"test", "validation"}:
        splits["train"] = "train"
    if "test" in stated:
        splits["validation"] = "train"
    elif "train" in stated:
        splits["validation"] = "test"
    return splits
