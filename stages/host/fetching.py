"""Does the work of `lorry fetch`: downloads a model from a hub into the models folder.

A file is written below `.fetch` in the model's folder, checked there, and then moved into place; config.json comes
last. So a folder with a config.json has the whole model, and the same command goes on with one that has none.
"""

import fcntl
import importlib.util
import json
import os
import queue
import re
import shutil
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from stages.contract.errors import DoesNotFitError, InterruptedRunError, UsageError
from stages.contract.files import remove
from stages.contract.roots import Roots
from stages.host.hubs import HUBS, Hub, HubFile, is_hub_name
from stages.host.outcome import Lines, Note
from stages.models.shape import INDEX

WORKERS = 4
"""Files that are downloaded at the same time: one connection does not fill a fast line."""

SHOW_EVERY = 5.0
"""Seconds between two lines on how far a download is."""

SPARE = 256 * 1024**2
"""Bytes of the disk that a download leaves free."""

PARTS = ".fetch"
"""The hidden folder of unfinished files in a model's folder."""

LIBRARIES = {"huggingface": "huggingface_hub", "modelscope": "modelscope_hub"}
"""The library of each hub."""

KEPT = (".json", ".jinja", ".txt", ".model", ".tiktoken", ".md")
"""Endings of the files besides weights that are downloaded: config, tokenizer, chat template, model card."""

LICENSES = ("LICENSE", "NOTICE", "USE_POLICY")
"""Beginnings of the names of other files that are downloaded."""

OTHER_INDEXES = re.compile(r".*(pytorch_model|tf_model|flax_model|consolidated).*\.json")
"""Names of JSON files that belong to weights in other formats."""

PARTS_OF_EMBEDDERS = re.compile(r"(\d+_\w+|additional_chat_templates)/[^/]+")
"""Files in folders that are downloaded: modules of sentence-transformers, and further chat templates."""


def fetch(model: str, hub_name: str, revision: str | None, code: bool) -> Lines:
    """Download a model, by its name on a hub, into the folder of this name in the models mount. Yields lines.

    `revision` None: the newest. `code`: also its Python files. Files that are there and intact stay. Raises UsageError
    for a name of another form, for a model without safetensors and if the hub's library is missing, DoesNotFitError if
    the disk is too full, and the errors of `Hub`.
    """
    if not is_hub_name(model):
        raise UsageError(f"{model}: not a model's name on a hub; write OWNER/NAME, such as Qwen/Qwen2.5-7B-Instruct")
    if importlib.util.find_spec(LIBRARIES[hub_name]) is None:
        raise UsageError(f"--from {hub_name}: needs {LIBRARIES[hub_name]}, not installed here; run `make setup`")
    hub: Hub = HUBS[hub_name]()
    folder = Roots.from_environment().models / model
    revision, listed = hub.files(model, revision)
    files = {file.name: file for file in listed if _stays_inside(file.name)}
    wanted = needed_files(model, files, _indexed_weights(hub, model, revision, files, folder), code)
    missing = [file for file in wanted if not file.is_intact(folder / file.name)]
    total = sum(file.size for file in wanted)
    text = f"{model} ({revision[:12]}) from {hub_name}: {len(wanted)} files, {_size(total)}"
    if not missing:
        remove(folder / PARTS)
        yield Note(f"fetch: {text}, all here and intact")
        yield str(folder)
        return None
    _refuse_full_disk(folder, missing)
    yield Note(f"fetch: {text}, {_size(sum(file.size for file in missing))} to download into {folder}")
    for replaced in (file.name for file in missing if (folder / file.name).exists()):
        yield Note(f"fetch: {folder / replaced} differs from the hub's and is replaced")
    with _alone(folder):
        yield from _download_all(hub, model, revision, missing, folder)
    remove(folder / PARTS)
    yield str(folder)
    return None


def needed_files(model: str, files: dict[str, HubFile], indexed: Sequence[str] | None, code: bool) -> list[HubFile]:
    """The files that libraries load a model from, config.json last; `indexed` are the weights that its index names.

    Left out are weights in other formats, further copies of the weights, pictures, and Python files without `code`.
    Raises UsageError if the model has no config.json or no safetensors.
    """
    weights = list(indexed or [])
    if indexed is None:
        found = [name for name in files if name.endswith(".safetensors") and "/" not in name]
        copies = ("consolidated", "adapter_", "optimizer")
        weights = (
            ["model.safetensors"]
            if "model.safetensors" in found
            else [name for name in found if not name.startswith(copies)]
        )
    lost = [name for name in weights if name not in files]
    if lost or not weights or "config.json" not in files:
        what = lost[0] if lost else "*.safetensors" if not weights else "config.json"
        others = [name for name in files if name.endswith((".bin", ".pth", ".pt", ".gguf"))]
        has = f" (it has {', '.join(others[:3])})" if others else ""
        raise UsageError(
            f"{model}: no {what} on the hub{has}; name a model in transformers' format with safetensors weights, or a"
            " --revision that has them"
        )
    names = {name for name in files if name in weights or _is_kept(name, code)}
    return [files[name] for name in sorted(names, key=lambda name: (name == "config.json", name))]


def _is_kept(name: str, code: bool) -> bool:
    """Whether a file other than weights is downloaded."""
    if "/" in name and not PARTS_OF_EMBEDDERS.fullmatch(name):
        return code and name.endswith(".py")
    if "/" in name and name.endswith(".safetensors"):
        return True
    if name.startswith("."):
        return False
    return (
        name.startswith(LICENSES)
        or (name.endswith(KEPT) and not OTHER_INDEXES.fullmatch(name))
        or (code and name.endswith(".py"))
    )


def _stays_inside(name: str) -> bool:
    """Whether a file's path leads into the model's folder and nowhere else."""
    return not Path(name).is_absolute() and ".." not in Path(name).parts


def _indexed_weights(hub: Hub, model: str, revision: str, files: dict[str, HubFile], folder: Path) -> list[str] | None:
    """The names of the weight files in the model's index, which is downloaded first; None if it has no index."""
    index = files.get(INDEX)
    if index is None:
        return None
    with _alone(folder):
        _download(hub, model, revision, index, folder)
    return sorted(set(json.loads((folder / INDEX).read_text(encoding="utf-8")).get("weight_map", {}).values()))


def _refuse_full_disk(folder: Path, missing: Sequence[HubFile]) -> None:
    """Raise DoesNotFitError if the disk has no room for the missing files. What is there of them counts."""
    place = folder
    while not place.exists():
        place = place.parent
    needed = sum(file.size for file in missing) - _written(folder / PARTS) + SPARE
    free = shutil.disk_usage(place).free
    if needed > free:
        raise DoesNotFitError(
            f"{folder}: the download needs {_size(needed)}, but the disk has {_size(free)} free; free some, or set"
            " LORRY_MODELS to a folder on another disk"
        )


def _download_all(hub: Hub, model: str, revision: str, files: Sequence[HubFile], folder: Path) -> Iterator[str]:
    """Download files, several at a time and the last one alone. Yields lines on how far it is.

    Raises the first error of a download. The threads are daemons: an interrupted command ends at once.
    """
    *others, last = files
    before = _written(folder / PARTS)
    total = sum(file.size for file in files)
    todo: queue.SimpleQueue[HubFile] = queue.SimpleQueue()
    for file in sorted(others, key=lambda one: -one.size):
        todo.put(file)
    ends: queue.SimpleQueue[BaseException | None] = queue.SimpleQueue()

    def work() -> None:
        """Download files until none is left, and report how this ended."""
        try:
            while True:
                _download(hub, model, revision, todo.get_nowait(), folder)
        except queue.Empty:
            ends.put(None)
        except BaseException as error:  # noqa: BLE001 - raised again by the thread that waits
            ends.put(error)

    workers = min(WORKERS, len(others))
    threads = [threading.Thread(target=work, daemon=True) for _ in range(workers)]
    for thread in threads:
        thread.start()
    began = shown = time.monotonic()
    while workers:
        try:
            error = ends.get(timeout=0.2)
        except queue.Empty:
            if time.monotonic() - shown >= SHOW_EVERY:
                shown = time.monotonic()
                done = _written(folder / PARTS) + sum(file.size for file in files if (folder / file.name).is_file())
                speed = (done - before) / (shown - began)
                left = f", {(total - done) / speed / 60:.0f} min left" if speed > 0 and done < total else ""
                yield Note(f"fetch: {_size(min(done, total))} of {_size(total)}{left}")
            continue
        if error is not None:
            while not todo.empty():
                with suppress(queue.Empty):
                    todo.get_nowait()
            for thread in threads:  # what they have on the way is worth a moment
                thread.join(timeout=2)
            raise error
        workers -= 1
    _download(hub, model, revision, last, folder)


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Keep other processes from downloading into a model's folder. Raises InterruptedRunError if one does."""
    place = folder / PARTS
    place.mkdir(parents=True, exist_ok=True)
    lock = os.open(place / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError as error:
        raise InterruptedRunError(
            f"{folder}: another process is downloading this model; wait until it ends, then run again"
        ) from error
    finally:
        os.close(lock)


def _download(hub: Hub, model: str, revision: str, file: HubFile, folder: Path) -> None:
    """Download a file into a model's folder, if it is not there and intact.

    Raises InterruptedRunError if the hub sends other content than it states, and the errors of `Hub`.
    """
    if file.is_intact(folder / file.name):
        return
    parts = folder / PARTS / file.digest
    path = hub.download(model, revision, file, parts)
    if not file.is_intact(path):
        remove(parts)
        raise InterruptedRunError(f"{model}: {file.name} arrived damaged; run the same command again")
    (folder / file.name).parent.mkdir(parents=True, exist_ok=True)
    path.replace(folder / file.name)
    remove(parts)


def _written(folder: Path) -> int:
    """Bytes of a folder's files on the disk. A file that is written in several places at once has gaps, which do not
    count."""
    found = 0
    for path in folder.rglob("*"):
        try:
            stat = path.stat()
        except FileNotFoundError:  # another thread has just moved it
            continue
        found += min(stat.st_blocks * 512, stat.st_size) if path.is_file() else 0
    return found


def _size(count: int) -> str:
    """A number of bytes in words."""
    return f"{count / 1e9:.2f} GB" if count >= 1e8 else f"{count / 1e6:.1f} MB"
