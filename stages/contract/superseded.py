"""Finished adapters and connectors: whether one is intact, and where it stays after a later training replaced it.

<stage folder>/adapters/<name>/                 the adapter of the run
<stage folder>/superseded/<name>@<key>/         one that was replaced, with the first 12 hex digits of its key
<stage folder>/superseded/checkpoints@<key>/    the checkpoints of a training that was left for one with other settings

No stage reads the folder `superseded`, except to put something back: train does so if the recipe wants it again.
"""

from pathlib import Path

from stages.contract.files import FileHashes, read_json, remove, sha256_file

SUPERSEDED = "superseded"
"""Name of the folder of replaced adapters and connectors, in the folder of train or of one of its shards."""


CHECKPOINTS = "checkpoints"
"""Name of the folder of a half-done training's checkpoints, in the folder of train or of one of its shards."""


def trained_key(folder: Path, hashes: FileHashes | None = None) -> str | None:
    """The key of a finished adapter or connector: a digest of all that it depends on.

    None if the folder has none, or if a file is missing or has changed since. `hashes` caches the sha256 of files.
    Raises UsageError if its made.json is not JSON.
    """
    file_digest = hashes.file_digest if hashes else sha256_file
    made = read_json(folder / "made.json") or {}
    for name, digest in made.get("files", {}).items():
        if not (folder / name).is_file() or file_digest(folder / name) != digest:
            return None
    key: str | None = made.get("key")
    return key


def publish(made: Path, folder: Path, stage_folder: Path) -> None:
    """Make `made`, which is complete, the adapter or connector `folder`. One that is there is set aside before."""
    set_aside(folder, stage_folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    made.rename(folder)


def set_aside(folder: Path, stage_folder: Path) -> None:
    """Move an adapter or connector to the folder `superseded`. Does nothing if there is none.

    If one with the same key is there already, the intact one stays.
    """
    if not folder.is_dir():
        return
    key = str((read_json(folder / "made.json") or {}).get("key", "unknown"))
    target = _place(folder, stage_folder, key)
    if trained_key(target) is not None:
        remove(folder)
        return
    remove(target)
    target.parent.mkdir(exist_ok=True)
    folder.rename(target)


def put_back(folder: Path, stage_folder: Path, key: str) -> None:
    """Move the replaced adapter or connector with this key back to `folder`, if it is there and intact."""
    found = _place(folder, stage_folder, key)
    if trained_key(found) == key:
        publish(found, folder, stage_folder)


def set_all_aside(stage_folder: Path) -> None:
    """Move all adapters and the connector in a stage's folder to the folder `superseded`."""
    for folder in (*stage_folder.glob("adapters/*/"), stage_folder / "connector"):
        if not folder.name.startswith("."):
            set_aside(folder, stage_folder)


def set_checkpoints_aside(stage_folder: Path, key: str) -> None:
    """Move the checkpoints of the half-done training with this key of the stage to the folder `superseded`."""
    checkpoints = stage_folder / CHECKPOINTS
    if checkpoints.is_dir():
        target = _place(checkpoints, stage_folder, key)
        remove(target)
        target.parent.mkdir(exist_ok=True)
        checkpoints.rename(target)


def put_checkpoints_back(stage_folder: Path, key: str) -> None:
    """Move the checkpoints of the training with this key of the stage back to their place, if there are any and the
    place is free."""
    found = _place(stage_folder / CHECKPOINTS, stage_folder, key)
    if found.is_dir() and not (stage_folder / CHECKPOINTS).exists():
        found.rename(stage_folder / CHECKPOINTS)


def remove_other_checkpoints(stage_folder: Path) -> None:
    """Delete the checkpoints in the folder `superseded`. Call it when a training is complete."""
    for folder in (stage_folder / SUPERSEDED).glob(f"{CHECKPOINTS}@*/"):
        remove(folder)


def _place(folder: Path, stage_folder: Path, key: str) -> Path:
    """The place of an adapter or connector with this key after it was replaced."""
    return stage_folder / SUPERSEDED / f"{folder.name}@{key[:12]}"  # no adapter's own name has an @
