"""The run folder: where each stage writes, and where the next one reads.

<runs>/<run>/recipe.yaml                 the resolved recipe, as run
<runs>/<run>/date.json                   the date in its prompts, if the chat template writes one
<runs>/<run>/<stage>/manifest.json       written last: a stage is done if this file exists and matches
<runs>/<run>/<stage>/state.json          while the stage is half done: the key that the finished half belongs to
<runs>/<run>/<stage>/{events.jsonl,log.txt}
<runs>/<run>/serve/                      links to the base with its connector, and merged copies, that servers load
<runs>/<run>/train/superseded/           adapters that a later training replaced (superseded.py)
<runs>/<run>/train/{tensorboard,trackers}/  what trackers show of each training
<runs>/<run>/shards/<stage>/<i>-of-<n>/  the same four files for a shard of the stage, and its outputs
<runs>/<run>/nodes/train/<rank>/         what machines 1 and up write when several train together
"""

import fcntl
import importlib.metadata
import os
import re
import socket
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import date, datetime
from pathlib import Path
from typing import Any

from stages.contract.errors import InterruptedRunError, UsageError
from stages.contract.files import (
    FileHashes,
    data_files,
    digest_of,
    read_json,
    stored_name,
    visible_files,
    write_json,
)
from stages.contract.part import Node, Part, Shard
from stages.contract.recipe import ADDED, CHAT_TEMPLATES, Recipe, job_of_recipe
from stages.contract.roots import Roots, data_path, refuse_other_than_folder
from stages.contract.superseded import SUPERSEDED

STAGES = ("preprocess", "train", "infer", "eval")

CONTRACT_VERSION = 3
"""Increased when the meaning of what stages hand to each other changes; the stages of older runs then run again."""

SECTIONS = {
    "preprocess": ("task", "seed", "data", "preprocess"),
    "train": ("task", "seed", "model", "train"),
    "infer": ("task", "seed", "model", "infer", "preprocess.classifier", "preprocess.samples", "train.too_long"),
    "eval": ("task", "seed", "eval", "infer.ablate", "infer.vote"),
}
"""The recipe sections that a stage's result depends on."""

REUSABLE = {
    "preprocess": ("cache", "pages"),
    "train": ("adapters", "connector", SUPERSEDED, "tensorboard", "trackers"),
    "infer": ("partial",),
}
"""Folders that a stage may keep when its inputs change: it checks each piece in them against that piece's own input."""

_TRAINED = ("train/adapters/*", "train/connector", "train/superseded/*", "shards/train/*/adapters/*")
"""Where a run's folder holds finished adapters and connectors, as glob patterns."""

UPSTREAM: dict[str, dict[str, tuple[str, ...]]] = {
    "preprocess": {},
    "train": {"preprocess": ("samples/train.jsonl", "samples/validation.jsonl", "pages/", "pictures/")},
    "infer": {
        "preprocess": ("samples/test.jsonl", "samples/validation_asked.jsonl", "asked.jsonl", "pages/", "pictures/"),
        "train": ("adapters/", "connector/"),
    },
    "eval": {
        "preprocess": ("samples/test.jsonl", "pages/", "pictures/"),
        "train": ("metrics.jsonl",),
        "infer": ("predictions/", "losses/", "ablations/", "votes.jsonl"),
    },
}
"""The outputs of earlier stages that a stage reads, by the beginning of their names."""


@dataclass(frozen=True)
class Run:
    """One run folder with its recipe and mounts."""

    name: str
    recipe: Recipe
    roots: Roots

    @property
    def folder(self) -> Path:
        """The run folder, which need not exist yet."""
        return self.roots.runs / self.name

    def stage_folder(self, stage: str, part: Part = None) -> Path:
        """The folder that a stage, or a part of it, writes to."""
        if isinstance(part, Shard):
            return self.folder / "shards" / stage / part.folder
        if isinstance(part, Node) and part.rank > 0:
            return self.folder / "nodes" / stage / str(part.rank)
        return self.folder / stage

    def path(self, stage: str, *parts: str) -> Path:
        """A path in a stage's folder."""
        return self.stage_folder(stage).joinpath(*parts)

    def manifest(self, stage: str, shard: Shard | None = None) -> dict[str, Any] | None:
        """The manifest of a stage or of one of its shards; None if it is not done in this contract version."""
        manifest: dict[str, Any] | None = read_json(self.stage_folder(stage, shard) / "manifest.json")
        if manifest is not None and manifest.get("contract") != CONTRACT_VERSION:
            return None
        return manifest

    @property
    def data(self) -> Path:
        """The folder or file with the task's input. Raises UsageError if it does not exist."""
        path = data_path(self.roots.data, self.recipe.data.path)
        if not path.is_dir() and not path.is_file():
            raise UsageError(
                f"{path}: no such data folder; set data.path to a folder below LORRY_DATA ({self.roots.data})"
            )
        return path

    def model(self, path: str, key: str, needs_weights: bool = True) -> Path:
        """The folder of a model; `path` is relative to the model mount, or absolute.

        Raises UsageError if it is not the folder of a Hugging Face model; without `needs_weights`, a config.json makes
        it one. The message names `key`, the recipe key that sets the path.
        """
        folder = self.roots.models / path
        if not folder.is_dir():
            raise UsageError(
                f"{folder}: no such model folder; {_download_advice(path)}set {key} to a folder below LORRY_MODELS"
                f" ({self.roots.models}){_folders_in(self.roots.models)}"
            )
        for needed in ("config.json", "*.safetensors") if needs_weights else ("config.json",):
            if not any(folder.glob(needed)):
                raise UsageError(
                    f"{folder}: no {needed} in this folder; set {key} to the folder of a Hugging Face model"
                )
        return folder

    def refuse_other_job(self) -> None:
        """Raise UsageError if the run's folder holds results of another task, data folder or base than the recipe's:
        this run would replace them.

        A folder without a finished stage or adapter is free for any job.
        """
        made = ("*/manifest.json", "shards/*/*/manifest.json", *(f"{folder}/made.json" for folder in _TRAINED))
        recipe = self.folder / "recipe.yaml"
        if not recipe.is_file() or not any(next(self.folder.glob(one), None) for one in made):
            return
        before = job_of_recipe(recipe)
        now = {"task": self.recipe.task, "data.path": self.recipe.data.path, "model.path": self.recipe.model.path}
        others = [key for key in before if not self._is_same(key, before[key], now[key])]
        if others:
            held, asked = (", ".join(f"{key} {job[key]}" for key in others) for job in (before, now))
            raise UsageError(
                f"{self.folder}: holds results of {held}, but this recipe has {asked}; give this job a run of its own:"
                " --run NAME"
            )

    def _is_same(self, key: str, before: str, now: str) -> bool:
        """Whether two values of `task` are the same, or two of `data.path` or `model.path` name the same folder."""
        if key == "task":
            return before == now
        one, other = (
            data_path(self.roots.data, path) if key == "data.path" else self.roots.models / path
            for path in (before, now)
        )
        return one.resolve() == other.resolve()

    @property
    def chat_template_file(self) -> Path | None:
        """The file that `model.chat_template` names, which need not exist; None if it names none."""
        name = self.recipe.model.chat_template
        return None if name is None or name in CHAT_TEMPLATES else self.roots.models / name

    def prompt_date(self) -> str:
        """The date (ISO 8601) that chat templates of this run write as today's.

        It is that of the first call, which records it in the run folder: all stages and all starts of a run have the
        same prompts. Raises UsageError if the recorded date cannot be read.
        """
        path = self.folder / "date.json"
        recorded = read_json(path)
        if recorded is None:
            partial = path.with_name(f".{path.name}.{socket.gethostname()}-{os.getpid()}.partial")
            write_json(partial, {"date": datetime.now().date().isoformat()})
            try:
                os.link(partial, path)
            except FileExistsError:  # another stage or shard was first
                pass
            except OSError:  # a mount without links: the last of several that begin at once counts
                partial.replace(path)
            partial.unlink(missing_ok=True)
            recorded = read_json(path)
        try:
            return date.fromisoformat(recorded["date"]).isoformat()
        except (TypeError, KeyError, ValueError) as error:
            raise UsageError(f'{path}: found {recorded!r}; write {{"date": "2026-01-31"}}') from error

    def inputs(self, stage: str, hashes: FileHashes) -> dict[str, str]:
        """sha256 (hex) of each input of a stage, by name, such as `models/base` or `preprocess/samples/test.jsonl`.

        Raises UsageError if an earlier stage is not done, ran with another recipe or another version of Lorry, or read
        outputs that have changed since; if its own outputs no longer match its manifest; and if a data or model folder
        that `stage` reads is missing.
        """
        found: dict[str, str] = {}
        for earlier, wanted in UPSTREAM[stage].items():
            self.refuse_other_version(earlier, reader=stage)
            manifest = self.manifest(earlier)
            if manifest is None:
                raise UsageError(f"{self.folder}: {stage} needs {earlier}, which is not done; run {earlier} first")
            self._refuse_stale(earlier, manifest)
            for name, output in manifest["outputs"].items():
                if not name.startswith(wanted):
                    continue
                if not output_is_intact(self.stage_folder(earlier), name, output, hashes):
                    path = self.path(earlier, name)
                    state = f"changed since {earlier} wrote it" if path.exists() else "missing"
                    raise UsageError(f"{path}: {state}; run {earlier} again")
                found[f"{earlier}/{name}"] = output["sha256"]
        if stage == "preprocess":
            data = self.data
            for path in data_files(data):
                name = path.relative_to(data if data.is_dir() else data.parent)
                found[f"data/{stored_name(name)}"] = hashes.file_digest(path)
            retrieval = self.recipe.preprocess.retrieval
            if retrieval is not None:
                folder = self.model(retrieval.embedder, "preprocess.retrieval.embedder")
                found["models/embedder"] = hashes.tree_digest(folder)[0]
            juicer = self.recipe.preprocess.data_juicer
            for key, weights in juicer.weight_folders().items() if juicer else ():
                found[f"models/{weights}"] = hashes.tree_digest(self.model(weights, key))[0]
        asks_the_model = stage == "preprocess" and self.recipe.preprocess.classifier == "model"
        if stage in ("train", "infer") or asks_the_model:
            found |= self._base_inputs(hashes)
        if asks_the_model:
            # digests that earlier versions computed lack these keys
            model = self.recipe.model.model_dump(mode="json", include=set(ADDED["model"]))
            found |= {"model": digest_of(model)} if model != ADDED["model"] else {}
        return found

    def _base_inputs(self, hashes: FileHashes) -> dict[str, str]:
        """sha256 (hex) of the base and of the file that replaces its chat template, by name. Raises UsageError if one
        is missing."""
        found = {"models/base": hashes.tree_digest(self.model(self.recipe.model.path, "model.path"))[0]}
        template = self.chat_template_file
        if template is not None:
            if not template.is_file():
                raise UsageError(
                    f"{template}: no such file; set model.chat_template to a .jinja file below LORRY_MODELS"
                    f" ({self.roots.models})"
                )
            found["models/chat_template"] = hashes.file_digest(template)
        return found

    def refuse_other_version(self, stage: str, shard: Shard | None = None, reader: str | None = None) -> None:
        """Raise UsageError if a stage, or a shard of it, was done by another major.minor version of Lorry.

        `reader` is the later stage that would read the result; None: the stage itself would resume.
        """
        manifest = read_json(self.stage_folder(stage, shard) / "manifest.json")
        ours = importlib.metadata.version("lorry")
        if manifest is None or is_same_series(str(manifest.get("version")), ours):
            return
        made = f"Lorry {manifest.get('version')} ({manifest.get('image') or 'a local process'})"
        this = f"Lorry {ours} ({os.environ.get('LORRY_IMAGE') or 'a local process'})"
        what = f"{stage} (shard {shard})" if shard else stage
        raise UsageError(
            f"{self.folder}: {what} was done by {made}, but this {reader or stage} is {this}; use the"
            f" images of that version, give the run another name (--run), or run {stage} again with --force"
        )

    def _refuse_stale(self, stage: str, manifest: dict[str, Any]) -> None:
        """Raise UsageError if a stage ran with another recipe, or if outputs that it read have changed since.

        Data and models are not checked. Without this check, an adapter trained on one split could be scored on the test
        set of another split.
        """
        if manifest["key"] != self.key(stage, manifest["inputs"]):
            raise UsageError(f"{self.folder}: {stage} ran with another recipe; run {stage} again")
        for name, digest in manifest["inputs"].items():
            earlier, _, output = name.partition("/")
            if earlier in STAGES:
                current = (self.manifest(earlier) or {"outputs": {}})["outputs"].get(output, {})
                if current.get("sha256") != digest:
                    raise UsageError(f"{self.folder}: {earlier} has changed since {stage} used it; run {stage} again")

    def key(self, stage: str, inputs: dict[str, str], replaced: Mapping[str, Mapping[str, Any]] | None = None) -> str:
        """sha256 (hex) of all that a stage's result depends on. Equal keys mean equal results.

        With `replaced`, it is the key that an earlier version of Lorry computed (`Recipe.digest`).
        """
        recipe = self.recipe.digest(*SECTIONS[stage], replaced=replaced)
        return digest_of({"contract": CONTRACT_VERSION, "stage": stage, "recipe": recipe, "inputs": inputs})

    def is_done(self, stage: str, hashes: FileHashes, shard: Shard | None = None) -> bool:
        """Whether a stage, or a shard of it, is done with the present recipe and inputs, and its outputs are intact.

        False also if adapters failed to train. Raises UsageError if another version of Lorry did the stage, and the
        errors of `inputs`.
        """
        self.refuse_other_version(stage, shard)
        if (self.manifest(stage, shard) or {}).get("untrained"):
            return False  # later stages use the other adapters; each start of train tries these again
        return self._is_done_with_key(stage, shard, self.key(stage, self.inputs(stage, hashes)), hashes)

    def _is_done_with_key(self, stage: str, shard: Shard | None, key: str, hashes: FileHashes) -> bool:
        """Whether a stage, or a shard of it, is done with this key and has intact outputs."""
        manifest = self.manifest(stage, shard)
        if manifest is None or manifest.get("key") != key:
            return False
        folder = self.stage_folder(stage, shard)
        return all(output_is_intact(folder, name, entry, hashes) for name, entry in manifest["outputs"].items())

    def shards(self, stage: str) -> list[Shard]:
        """All shards of a stage that have a folder, finished or not, sorted by count and index."""
        found = []
        for folder in (self.folder / "shards" / stage).glob("*-of-*"):
            index, _, count = folder.name.partition("-of-")
            found.append(Shard(int(index), int(count)))
        return sorted(found, key=lambda shard: (shard.count, shard.index))

    def finished_shards(self, stage: str, key: str, hashes: FileHashes) -> list[Shard]:
        """The shards of a stage that are done with this key and have intact outputs.

        Raises UsageError if another version of Lorry did one of them.
        """
        matching = [shard for shard in self.shards(stage) if self._is_done_with_key(stage, shard, key, hashes)]
        for shard in matching:
            self.refuse_other_version(stage, shard)
        return matching


def _download_advice(path: str) -> str:
    """Text that says how to get a model, if `path` looks like its name on a hub, such as Qwen/Qwen3-0.6B, or is a
    folder relative to the current one."""
    if Path(path).is_dir():
        return f"a path is relative to the model mount, and {Path(path).absolute()} is elsewhere; "
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", path) or path.startswith("."):
        return ""
    return f"if this is its name on a hub, run `lorry fetch {path}`; "


def _folders_in(models: Path) -> str:
    """The names of at most ten folders in the model mount, in brackets; empty if it has none or cannot be read."""
    try:
        names = sorted(one.name for one in models.iterdir() if one.is_dir() and not one.name.startswith("."))
    except OSError:
        return ""
    return f", which has {', '.join(names[:10])}{' and others' if names[10:] else ''}" if names else ""


def is_same_series(version: str, other: str) -> bool:
    """Whether two versions of Lorry have the same major and minor number, so that they can read each other's runs."""
    return version.split(".")[:2] == other.split(".")[:2]


def describe_output(folder: Path, name: str, records: int | None, hashes: FileHashes) -> dict[str, Any]:
    """The manifest's entry for an output: sha256 (hex), size in bytes, and a folder's number of files.

    A name that ends in `/` is a whole folder. For a file, `records` is the number of records; None: left out.
    """
    path = folder / name
    if name.endswith("/"):
        digest, files = hashes.tree_digest(path)
        return {"sha256": digest, "files": files, "bytes": sum(p.stat().st_size for p in visible_files(path))}
    entry: dict[str, Any] = {"sha256": hashes.file_digest(path), "bytes": path.stat().st_size}
    return entry if records is None else {**entry, "records": records}


def output_is_intact(folder: Path, name: str, entry: dict[str, Any], hashes: FileHashes) -> bool:
    """Whether an output still has the content that its manifest entry records."""
    path = folder / name
    if name.endswith("/"):
        return path.is_dir() and hashes.tree_digest(path)[0] == entry["sha256"]
    return path.is_file() and path.stat().st_size == entry["bytes"] and hashes.file_digest(path) == entry["sha256"]


@contextmanager
def lock_stage_folder(folder: Path) -> Iterator[int]:
    """Lock a stage's folder, and create it first if it is missing. Yields the lock's file descriptor.

    Children that inherit the descriptor hold the lock too. The kernel releases it when the last holder dies, even by
    SIGKILL. Raises InterruptedRunError (75) if another process holds it, and UsageError if its path is not a folder.
    """
    refuse_other_than_folder(folder, "name another --run, or move it away")
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
    try:
        try:
            _lock(descriptor)
        except BlockingIOError as error:
            holder = os.read(descriptor, 200).decode(errors="replace") or "another process"
            raise InterruptedRunError(
                f"{folder}: {holder} is running this stage; wait until it ends, then run again"
            ) from error
        except OSError as error:  # without the file's name, as the lock is on a descriptor
            raise OSError(error.errno, error.strerror, str(folder / ".lock")) from error
        os.ftruncate(descriptor, 0)
        os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}".encode())
        yield descriptor
    finally:
        os.close(descriptor)


def _lock(descriptor: int, tries: int = 5) -> None:
    """Lock a file for this process alone. Raises BlockingIOError if all `tries`, 0.1 s apart, find it locked.

    It tries again because `lorry status` holds the lock for a moment.
    """
    for left in range(tries - 1, -1, -1):
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            if not left:
                raise
            time.sleep(0.1)


def is_held(folder: Path) -> bool:
    """Whether a running process holds the lock of a stage's folder. False also if the lock cannot be opened."""
    try:
        with (folder / ".lock").open("r") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False
