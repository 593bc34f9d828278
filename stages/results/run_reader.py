"""Read one run folder as it is: its manifests, which stages are stale, and files whose digest a manifest records.

Nothing is written. What is read here may be damaged, half done, or of another version of Lorry.
"""

import difflib
import hashlib
import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from stages.contract.errors import LorryError, UsageError
from stages.contract.files import read_json
from stages.contract.recipe import Recipe, load_recipe, replaced_values
from stages.contract.run import CONTRACT_VERSION, STAGES, Run, is_held


class DamagedError(Exception):
    """A file is not what its manifest says."""


class RunReader:
    """Reads the manifests of one run, and the outputs that they record."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self.manifests: dict[str, dict[str, Any]] = {}
        """Manifest by stage, for stages that are done under this version of the contract."""
        self.troubles: dict[str, str] = {}
        """By stage, why its result is missing or stale; the first stage first."""
        for stage in STAGES:
            try:
                self._check_stage(stage)
            except (LorryError, OSError, KeyError, TypeError, AttributeError):
                self.manifests.pop(stage, None)
                self.troubles[stage] = f"{stage}/manifest.json is damaged"

    def _check_stage(self, stage: str) -> None:
        """Add a stage's manifest to `manifests` if the stage is done, and the reason why its result is missing or
        stale, if it is, to `troubles`. May raise any of the errors that `__init__` handles if the manifest is
        damaged."""
        manifest = read_json(self.run.path(stage, "manifest.json"))
        if manifest is None:
            self.troubles[stage] = _unfinished_state(self.run, stage)
            return
        if manifest["contract"] != CONTRACT_VERSION:
            found = f"{stage} ran under version {manifest['contract']} of the contract"
            self.troubles[stage] = f"{found}, this Lorry reads {CONTRACT_VERSION}"
            return
        self.manifests[stage] = manifest
        if not self.fits_recipe(stage):
            self.troubles[stage] = f"{stage} ran with another recipe than recipe.yaml"
            return
        for name, digest in manifest["inputs"].items():
            earlier, _, output = name.partition("/")
            if earlier in STAGES and self.output_digest(earlier, output) != digest:
                self.troubles[stage] = f"{earlier} has changed since {stage} used it"
                return

    def fits_recipe(self, stage: str) -> bool:
        """Whether a finished stage ran with the run's recipe, as this or an earlier version of Lorry reads it."""
        key, inputs = self.manifests[stage]["key"], self.manifests[stage]["inputs"]
        return bool(key == self.run.key(stage, inputs) or key == self.run.key(stage, inputs, self._replaced))

    @cached_property
    def _replaced(self) -> dict[str, dict[str, Any]]:
        """The values in the run's recipe that this version of Lorry ignores, but an earlier one read."""
        return replaced_values(self.run.folder / "recipe.yaml")

    def output_digest(self, stage: str, name: str) -> str | None:
        """sha256 of a stage's output, as its manifest records it; None without such an output."""
        outputs: Mapping[str, Any] = self.manifests.get(stage, {}).get("outputs", {})
        digest: str | None = outputs.get(name, {}).get("sha256")
        return digest

    def read_output(self, stage: str, name: str) -> Any:
        """Return a stage's output, JSON or JSON Lines; None without such an output. Raises DamagedError if the file is
        not the one that the manifest records."""
        wanted = self.output_digest(stage, name)
        if wanted is None:
            return None
        path = self.run.path(stage, name)
        content = path.read_bytes() if path.is_file() else b""
        if hashlib.sha256(content).hexdigest() != wanted:
            raise DamagedError(f"{stage}/{name} has changed since {stage} wrote it")
        if name.endswith(".jsonl"):
            return [json.loads(line) for line in content.split(b"\n") if line]
        return json.loads(content)


def read_recipe(folder: Path) -> Recipe:
    """Return the recipe in a run's folder, with profile and overrides applied. Raises DamagedError if the file is
    missing, and UsageError if it is not a valid recipe."""
    path = folder / "recipe.yaml"
    if not path.is_file():
        raise DamagedError("recipe.yaml is missing")
    return load_recipe(path)


def run_names(runs: Path) -> list[str]:
    """The sorted names of the folders in `runs` that are runs or remains of runs; empty without such a folder."""
    if not runs.is_dir():
        return []
    return sorted(path.name for path in runs.iterdir() if not path.name.startswith(".") and _is_run(path))


def select_runs(wanted: Sequence[str], runs: Path) -> list[str]:
    """Return the names of the wanted runs, each once; of all runs if `wanted` is empty. Raises UsageError for an
    unknown run."""
    names = run_names(runs)
    for name in wanted:
        if name not in names:
            hint = suggestion(name, names, "runs") if names else "there are none yet; start one with `lorry run RECIPE`"
            raise UsageError(f"{runs / name}: no such run; {hint}")
    return list(dict.fromkeys(wanted)) or names


def suggestion(name: str, known: Sequence[str], what: str) -> str:
    """A hint for an unknown name: the most similar known name, if one is similar, then all known names. `what` is the
    plural noun for the names."""
    near = difflib.get_close_matches(name, known, 1, cutoff=0.5)
    hint = f"did you mean {near[0]!r}? " if near else ""
    return f"{hint}{what}: {', '.join(known)}"


def _is_run(path: Path) -> bool:
    """Whether a path is the folder of a run, or the remains of one; also if the folder cannot be read."""
    try:
        return path.is_dir() and any((path / part).exists() for part in ("recipe.yaml", "shards", *STAGES))
    except OSError:  # a folder that cannot be read is listed, too
        return True


def _unfinished_state(run: Run, stage: str) -> str:
    """The reason why a stage has no manifest, in words."""
    folder = run.stage_folder(stage)
    if is_held(folder):
        return f"{stage} is running"
    if (folder / "state.json").is_file():
        error = _last_error(folder / "events.jsonl")
        return f"{stage} is half done" + (f": {error}" if error else "")
    if run.shards(stage):
        return f"{stage} was done in shards, which are not merged"
    return f"{stage} has not run"


def _last_error(events: Path) -> str | None:
    """The error with which the last start of a stage ended; None if it ended without one, or if there is no event
    log."""
    try:
        with events.open("rb") as file:
            file.seek(max(0, events.stat().st_size - 65_536))
            lines = file.read().split(b"\n")
    except OSError:
        return None
    for line in reversed(lines):
        try:
            event = json.loads(line)
        except ValueError:
            continue
        if event["event"] in ("stopped", "crashed"):
            return str(event["error"])
        if event["event"] == "start":
            return None
    return None
