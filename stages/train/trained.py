"""Which adapters and connectors are finished: by a key, the digest of everything that one depends on.

If one data mix changes, one adapter is trained again; if a setting or the connector changes, all are.
"""

from collections.abc import Collection
from pathlib import Path
from typing import Any

from stages.contract.errors import LorryError, UsageError
from stages.contract.files import (
    FileHashes,
    digest_of,
    link_or_copy,
    read_jsonl,
    remove,
    visible_files,
)
from stages.contract.mixes import samples_with_pictures, training_samples, validation_samples
from stages.contract.recipe import CONNECTOR, RESULT_NEUTRAL, Adapter, Train, without_added
from stages.contract.run import CONTRACT_VERSION
from stages.contract.stage import Stage
from stages.contract.superseded import publish, put_back, remove_other_checkpoints, set_aside, trained_key
from stages.models.chat_settings import chat_settings
from stages.train.nodes import folder_parts

LEARNT = set(Train.model_fields) - {*RESULT_NEUTRAL, "adapters", "adapter_for_each_source", "lora_config", "connector"}
"""Fields of `train` that every adapter depends on."""

LORAS_OWN = {"rank", "alpha", "dropout", "target_modules", "lora_plus_ratio", "freeze_vision", "load_in_4bit"}
"""Fields of `train` that a connector does not depend on."""

Mixes = dict[str, list[list[dict[str, Any]]]]
"""By adapter name: its training samples and its validation samples."""


def read_mixes(stage: Stage, adapters: list[Adapter]) -> tuple[Mixes, dict[str, LorryError]]:
    """Return two dicts by adapter name: its samples, or an error if its mix names a data set without samples.

    Raises the error instead, a UsageError, if `adapters` has only one entry or train.keep_going is not set.
    """
    train, validation = _read_samples(stage)
    mixes: Mixes = {}
    failures: dict[str, LorryError] = {}
    for adapter in adapters:
        try:
            mixes[adapter.name] = [
                training_samples(train, adapter, stage.run.recipe.seed),
                validation_samples(validation, adapter),
            ]
        except UsageError as error:
            if len(adapters) == 1 or not stage.run.recipe.train.keep_going:  # report a mistyped name before training
                raise
            failures[adapter.name] = error
    return mixes, failures


def _read_samples(stage: Stage) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Return the training samples and the validation samples of all data sets."""
    train, validation = (
        read_jsonl(stage.run.path("preprocess", "samples", f"{name}.jsonl")) for name in ("train", "validation")
    )
    return train, validation


def connector_key(stage: Stage, settings: Train) -> str:
    """Digest of everything that the connector depends on, which excludes the adapters' own settings and mixes."""
    run = stage.run
    assert settings.connector is not None
    train, validation = _read_samples(stage)
    mix = settings.adapters[0]
    samples, _ = samples_with_pictures(
        training_samples(train, mix, run.recipe.seed), settings.connector.most_samples, run.recipe.seed
    )
    validated_on = samples_with_pictures(
        validation_samples(validation, mix), settings.connector.most_samples, run.recipe.seed
    )[0]
    learnt = without_added("train", settings.model_dump(mode="json", include=LEARNT - LORAS_OWN))
    hashes = FileHashes(stage.path(".hashes.json"))  # has model and pictures from hashing the stage's inputs
    pictures = _picture_hashes(stage, [samples, validated_on], hashes)
    model, recipe = _model_digest(stage, hashes), run.recipe.digest("seed", "model")
    return _key(stage, recipe, learnt, model, samples, validated_on, pictures)


def adapter_keys(stage: Stage, mixes: Mixes, connector: tuple[Path, str] | None) -> dict[str, str]:
    """The key of each adapter in `mixes`, by name."""
    run = stage.run
    hashes = FileHashes(stage.path(".hashes.json"))
    model = _model_digest(stage, hashes)
    recipe = run.recipe.digest("seed", "model", *(f"train.{name}" for name in Train.model_fields if name in LEARNT))
    of_connector = [connector[1]] if connector else []
    return {
        name: _key(stage, recipe, model, samples, _picture_hashes(stage, samples, hashes), *of_connector)
        for name, samples in mixes.items()
    }


def _key(stage: Stage, *parts: Any) -> str:
    """Digest of these parts, the contract's version and what the run sets for the chat template, if anything."""
    chat = chat_settings(stage.run).facts
    return digest_of([CONTRACT_VERSION, *parts, *([chat] if chat else [])])


def _model_digest(stage: Stage, hashes: FileHashes) -> str:
    """Digest of all files of the base."""
    return hashes.tree_digest(stage.run.model(stage.run.recipe.model.path, "model.path"))[0]


def _picture_hashes(stage: Stage, samples: list[list[dict[str, Any]]], hashes: FileHashes) -> Any:
    """The hashes of the samples' pictures, as part of a key; None if the samples have no pictures.

    They cover the whole folder `pages/`, but in `pictures/`, which also holds test sets, only the samples' own files.
    """
    names = {name for part in samples for sample in part for name in sample["images"]}
    if not names:
        return None
    outputs = (stage.run.manifest("preprocess") or {}).get("outputs") or {}
    pages = outputs.get("pages/", {}).get("sha256")
    if "pictures/" not in outputs:
        return pages
    files = {name: stage.run.folder / name for name in names if name.startswith("preprocess/pictures/")}
    # training reports a missing file
    return {
        "pages/": pages,
        "pictures/": {name: hashes.file_digest(path) for name, path in files.items() if path.is_file()},
    }


class Trained:
    """The finished adapters in the stage's folder."""

    def __init__(self, stage: Stage, keys: dict[str, str]) -> None:
        """`keys` has the keys of the adapters that the recipe wants, by name."""
        self.keys = keys
        self._stage, self._hashes = stage, FileHashes(stage.path(".hashes.json"))

    def has(self, name: str) -> bool:
        """Whether an adapter is there, intact and what the recipe says."""
        folder = self._stage.path("adapters", name)
        return name in self.keys and trained_key(folder, self._hashes) == self.keys[name]

    def put_back(self) -> None:
        """Put back the adapters that a training with other settings replaced and that the recipe wants again. A forced
        start does not use them."""
        for name, key in self.keys.items():
            if not self._stage.forced and not self.has(name):
                put_back(self._stage.path("adapters", name), self._stage.folder, key)

    def set_others_aside(self) -> None:
        """Set aside the adapters that are not what the recipe says, and the connector if the recipe has none."""
        for folder in self._stage.path("adapters").glob("*/"):
            if not folder.name.startswith(".") and not self.has(folder.name):
                set_aside(folder, self._stage.folder)
        if self._stage.run.recipe.train.connector is None:
            set_aside(self._stage.path(*folder_parts(CONNECTOR)), self._stage.folder)


def copy_from_shard(stage: Stage, name: str) -> None:
    """Copy an adapter's folder from the shard that trained it. Does nothing if no finished shard has it.

    The copy appears only when it is complete.
    """
    for shard in stage.finished_shards:
        source = shard / "adapters" / name
        if source.is_dir():
            partial = stage.path("adapters", f".{name}")
            remove(partial)
            for path in visible_files(source):
                link_or_copy(path, partial / path.relative_to(source))
            publish(partial, stage.path("adapters", name), stage.folder)
            return


def remove_checkpoints(stage: Stage, failures: Collection[str]) -> None:
    """Remove the checkpoints of trained adapters, and if none failed, those of trainings with other settings too. The
    next start resumes from those of failed adapters."""
    for path in stage.path("checkpoints").glob("*"):
        if path.name not in failures:
            remove(path)
    if not failures:
        remove(stage.path("checkpoints"))
        remove_other_checkpoints(stage.folder)
