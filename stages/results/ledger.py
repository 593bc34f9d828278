"""The ledger's rows: what each run folder tells of its adapters, their data and their scores.

Everything is read from manifests, and from files that have the digest which a manifest gives them. A score stands only
beside the training that made it: where that has been replaced since, the row says what the score was, in words. Nothing
is written, and no file that is large is hashed but the training samples of mixes.
"""

import hashlib
import importlib.metadata
import json
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from stages.contract.errors import LorryError
from stages.contract.files import digest_of, read_json, stored_name
from stages.contract.mixes import mixed
from stages.contract.recipe import Adapter, Recipe, load_recipe
from stages.contract.records import BASE, VOTE
from stages.contract.roots import Roots
from stages.contract.run import CONTRACT_VERSION, STAGES, Run, is_held, same_series
from stages.results.summary import dataset_name, read_summary

LONGEST = 500
"""Characters of a text; somebody's traceback must not fill a table."""


@dataclass(frozen=True)
class Row:
    """One adapter of a run, its base model, or its vote. A number that is not known is None, a text is empty."""

    run: str
    task: str = ""
    adapter: str = ""
    data_mix: str = ""
    """In words, as it was trained."""
    sources: str = ""
    """Data sets, each with how many samples of it were trained on."""
    data_recipe: str = ""
    """Data-Juicer's operators in short, and the beginning of the digest of these with their parameters."""
    records_read: int | None = None
    """By Data-Juicer."""
    records_kept: int | None = None
    connector_samples: int | None = None
    """That the connector was trained on, before the adapter."""
    samples: int | None = None
    steps: int | None = None
    loss: float | None = None
    """The last that was logged in training."""
    base_model: str = ""
    seed: int | None = None
    recipe: str = ""
    """The beginning of the recipe's digest in the manifest that the row goes by."""
    metric: str = ""
    score: float | None = None
    """Percent, as all scores here; None is untested."""
    low: float | None = None
    high: float | None = None
    n: int | None = None
    failed: int | None = None
    validation: float | None = None
    """The score on the validation samples, where the adapters vote."""
    gain: float | None = None
    """Points over base, on the same samples."""
    gain_low: float | None = None
    gain_high: float | None = None
    in_vote: str = ""
    """`yes` or `no`; empty in a run without a vote."""
    weight: float | None = None
    """What its vote counts."""
    scored_on: str = ""
    state: str = ""
    date: str = ""
    version: str = ""


@dataclass(frozen=True)
class Ledger:
    rows: list[Row]
    metrics: list[str]
    """All that any run is scored by."""


class DamagedError(Exception):
    """A file is not what its manifest says."""


def read_ledger(roots: Roots, names: Sequence[str], metric: str | None) -> Ledger:
    """The rows of these runs, in their order: base, the adapters in the recipe's order, the vote. `metric` is what they
    are scored by; None takes each run's first. Nothing that a run folder holds makes this raise."""
    rows: list[Row] = []
    metrics: dict[str, None] = {}
    for name in names:
        shown = _word(stored_name(Path(name)))
        try:
            reader = RunReader(shown, Run(name, recipe_of(roots.runs / name), roots), metric)
            found = reader.rows()
            metrics |= dict.fromkeys(reader.metrics)
        except Exception as error:  # noqa: BLE001 - one damaged folder must not hide the others
            found = [Row(shown, state=_word(f"broken: {_older(roots.runs / name)}{_reason(error, roots.runs / name)}"))]
        rows += found
    return Ledger(rows, list(metrics))


def recipe_of(folder: Path) -> Recipe:
    """A run's recipe, resolved as it ran."""
    path = folder / "recipe.yaml"
    if not path.is_file():
        raise DamagedError("there is no recipe.yaml")
    return load_recipe(path)


def run_names(runs: Path) -> list[str]:
    """The folders below the runs mount that are runs, or what is left of one."""
    if not runs.is_dir():
        return []
    return sorted(path.name for path in runs.iterdir() if not path.name.startswith(".") and _is_run(path))


def _is_run(path: Path) -> bool:
    try:
        return path.is_dir() and any((path / part).exists() for part in ("recipe.yaml", "shards", *STAGES))
    except OSError:  # a folder that may not be looked into is told, too
        return True


class RunReader:
    """Reads one run."""

    def __init__(self, name: str, run: Run, metric: str | None) -> None:
        self._name, self._run, self._metric = name, run, metric
        self.manifests: dict[str, dict[str, Any]] = {}
        """Of the stages that are done, under this version of the contract."""
        self.troubles: dict[str, str] = {}
        """Why a stage's result is not there, or not what the stage would make now, the first stage first."""
        for stage in STAGES:
            try:
                self._look_at(stage)
            except (LorryError, OSError, KeyError, TypeError, AttributeError):
                self.manifests.pop(stage, None)
                self.troubles[stage] = f"{stage}/manifest.json is damaged"

    def _look_at(self, stage: str) -> None:
        manifest = read_json(self._run.path(stage, "manifest.json"))
        if manifest is None:
            self.troubles[stage] = _unfinished(self._run, stage)
            return
        if manifest["contract"] != CONTRACT_VERSION:
            made = f"{stage} was made under version {manifest['contract']} of the contract"
            self.troubles[stage] = f"{made}, this Lorry reads {CONTRACT_VERSION}"
            return
        self.manifests[stage] = manifest
        if not self._fits_recipe(stage):
            self.troubles[stage] = f"{stage} was made with another recipe than recipe.yaml"
            return
        for name, digest in manifest["inputs"].items():
            earlier, _, output = name.partition("/")
            if earlier in STAGES and self._output(earlier, output) != digest:
                self.troubles[stage] = f"{earlier} has changed since {stage} used it"
                return

    def _fits_recipe(self, stage: str) -> bool:
        manifest = self.manifests[stage]
        return bool(manifest["key"] == self._run.key(stage, manifest["inputs"]))

    def _output(self, stage: str, name: str) -> str | None:
        """The digest of an output, by the manifest of its stage."""
        outputs: Mapping[str, Any] = self.manifests.get(stage, {}).get("outputs", {})
        digest: str | None = outputs.get(name, {}).get("sha256")
        return digest

    def proved(self, stage: str, name: str) -> Any:
        """A stage's output, JSON or JSON Lines; None where it has none of the name. Raises DamagedError where the file
        is not the one that the manifest names."""
        wanted = self._output(stage, name)
        if wanted is None:
            return None
        path = self._run.path(stage, name)
        content = path.read_bytes() if path.is_file() else b""
        if hashlib.sha256(content).hexdigest() != wanted:
            raise DamagedError(f"{stage}/{name} is not as {stage} wrote it")
        if name.endswith(".jsonl"):
            return [json.loads(line) for line in content.split(b"\n") if line]
        return json.loads(content)

    # -- what there is -------------------------------------------------------------------------------------------

    @cached_property
    def _scores(self) -> dict[str, Any]:
        """Figures by model and metric; empty where eval is not done."""
        return self.proved("eval", "scores.json") or {}

    @cached_property
    def _differences(self) -> dict[str, Any]:
        return self.proved("eval", "differences.json") or {}

    @property
    def metrics(self) -> list[str]:
        """What the run is scored by, the one that counts first."""
        try:
            return list(dict.fromkeys(metric for figures in self._scores.values() for metric in figures))
        except DamagedError:
            return []

    @property
    def _by(self) -> str:
        """The metric of the run's rows."""
        return self._metric or next(iter(self.metrics), "")

    @cached_property
    def _vote(self) -> dict[str, Any]:
        """Who voted, as infer's manifest tells it; empty where nobody did, or by another recipe."""
        if "infer" not in self.manifests or not self._fits_recipe("infer"):
            return {}
        return self.manifests["infer"].get("vote") or {}

    @cached_property
    def _untrained(self) -> dict[str, str]:
        """Adapters that could not be trained, with the reason: by the manifest where train went on without them, and
        by its summary where it did not."""
        manifest = self.manifests.get("train")
        if manifest is not None:
            return manifest.get("untrained", {})  # type: ignore[no-any-return]
        if is_held(self._run.stage_folder("train")):  # they are being tried again
            return {}
        adapters = self._run.recipe.train.adapters
        try:
            summary = read_summary(self._run, "train")
            failed = [(adapters[e["dataset_index"]], e) for e in summary["dataset_results"] if e.get("error")]
            return {a.name: str(e["error"]) for a, e in failed if e["dataset_name"] == dataset_name(a)}
        except (LorryError, LookupError, TypeError, AttributeError):  # it is for people, and no manifest vouches for it
            return {}

    def rows(self) -> list[Row]:
        """Base, each adapter, and the vote, where there is one or is to be one."""
        adapters = {adapter.name: adapter for adapter in self._run.recipe.train.adapters}
        folder = self._run.path("train", "adapters")
        there = sorted(path.name for path in folder.glob("*/") if not path.name.startswith("."))
        try:
            scored = list(self._scores)
        except DamagedError:
            scored = []
        names = dict.fromkeys([BASE, *adapters, *scored, *there])
        if VOTE in names or self._run.recipe.infer.vote is not None:
            names.pop(VOTE, None)
            names[VOTE] = None  # after the adapters
        return [self._told(name, adapters.get(name)) for name in names]

    def _told(self, name: str, adapter: Adapter | None) -> Row:
        row = Row(
            self._name,
            task=_word(self._run.recipe.task),
            adapter=_word(name),
            data_mix=_word(adapter.mix) if adapter else "",
            base_model=_word(self._run.recipe.model.path),
            seed=self._run.recipe.seed,
            recipe=self._run.recipe.digest()[:12],
        )
        if name == BASE:
            row = replace(row, data_mix="not trained")
        if name == VOTE:
            row = replace(row, data_mix=_word(f"the vote of {', '.join(self._vote['adapters'])}" if self._vote else ""))
        try:
            trained = {} if name in (BASE, VOTE) else self._training(name, adapter)
            row = replace(row, **self._in_vote(name), **trained)
            return replace(row, **self._tested(name, trained))
        except Exception as error:  # noqa: BLE001 - one damaged file must not hide the other adapters
            return replace(row, state=_word(f"broken: {_reason(error, self._run.folder)}"))

    # -- training ------------------------------------------------------------------------------------------------

    def _training(self, name: str, adapter: Adapter | None) -> dict[str, Any]:
        """The columns of an adapter's training; none where it is not trained."""
        output = f"adapters/{name}/training.json"
        if "train" in self.manifests:
            training = self.proved("train", output)
        else:  # an adapter is there only once it is whole
            training = read_json(self._run.path("train", output))
        if training is None:
            return {}
        losses = [entry["loss"] for entry in training["log"] if "loss" in entry]
        config = read_json(self._run.path("train", "adapters", name, "adapter_config.json")) or {}
        made = self.manifests.get("train", {})
        mix = training.get("mix", adapter.mix if adapter else "")
        return {
            "data_mix": _word(mix),
            **self._data,
            "sources": self._sources(adapter if adapter and adapter.mix == mix else None, training),
            "samples": _number(training["samples"]["train"]),
            "steps": _number(training["steps"]),
            "loss": _number(losses[-1]) if losses else None,
            "base_model": _word(config.get("base_model_name_or_path") or self._run.recipe.model.path),
            "seed": _number(made.get("seed", self._run.recipe.seed)),
            **_made_by(made),
        }

    @cached_property
    def _data(self) -> dict[str, Any]:
        """The columns of what was done to the data before the adapters were trained, and of the connector's training;
        none of data that are others now."""
        made: dict[str, Any] = {}
        if "train" not in self.manifests:
            return made
        connector = self.proved("train", "connector/training.json")
        if connector is not None:
            made["connector_samples"] = _number(connector["samples"]["train"])
        samples = "samples/train.jsonl"
        if self.manifests["train"]["inputs"].get(f"preprocess/{samples}") != self._output("preprocess", samples):
            return made
        operators = self.proved("preprocess", "records/operators.json")
        settings = self._run.recipe.preprocess.data_juicer
        if operators and settings is not None and self._fits_recipe("preprocess"):
            names = ", ".join(re.sub(r"_(filter|mapper|deduplicator|selector)$", "", o["operator"]) for o in operators)
            made["data_recipe"] = _word(f"{names} ({digest_of(settings.process)[:8]})")
            made["records_read"] = _number(operators[0]["read"])
            made["records_kept"] = _number(operators[-1]["kept"])
        return made

    def _sources(self, adapter: Adapter | None, training: Mapping[str, Any]) -> str:
        """How many samples of each data set were trained on; empty where that can no longer be known."""
        total = training["samples"]["train"]
        if adapter is None:
            return ""
        if len(adapter.data) == 1:
            return _word(f"{adapter.data[0].source} {total}")
        samples = self._train_samples
        if not samples:
            return ""
        too_long = set(training["left_out"]["train"])
        kept = [s for s in mixed(samples, adapter, self.manifests["train"]["seed"]) if s["id"] not in too_long]
        if len(kept) != total:  # trained by a program that mixed in another way
            return ""
        counts = Counter(str(sample["meta"]["source"]) for sample in kept)
        return _word(", ".join(f"{source} {count}" for source, count in counts.items()))

    @cached_property
    def _train_samples(self) -> list[dict[str, Any]]:
        """Name and data set of each sample that train read; none where the file is another one now."""
        wanted = self.manifests.get("train", {}).get("inputs", {}).get("preprocess/samples/train.jsonl")
        path = self._run.path("preprocess", "samples", "train.jsonl")
        if wanted is None or not path.is_file():
            return []
        digest, samples = hashlib.sha256(), []
        with path.open("rb") as file:
            for line in file:
                digest.update(line)
                sample = json.loads(line)
                samples.append({"id": sample["id"], "meta": {"source": sample["meta"]["source"]}})
        return samples if digest.hexdigest() == wanted else []

    # -- scores --------------------------------------------------------------------------------------------------

    def _in_vote(self, name: str) -> dict[str, Any]:
        """The columns of an adapter's part in the vote; none where it has been trained again since."""
        if not self._vote or name in (BASE, VOTE) or not self._answered(name):
            return {}
        weight = _number(self._vote["weights"].get(name))
        share = _number(self._vote["validation"].get(name))
        validation = None if share is None else round(100 * share, 4)
        return {"in_vote": "no" if weight is None else "yes", "weight": weight, "validation": validation}

    def _tested(self, name: str, trained: Mapping[str, Any]) -> dict[str, Any]:
        """The columns of a model's score, and its state."""
        untrained = self._untrained.get(name)
        if untrained is not None:
            return {"state": _word(f"not trained: {untrained}")}
        if name not in self._scores:
            return {"state": _word(self._not_scored(name, bool(trained)))}
        figures, made = self._scores[name], self.manifests["eval"]
        columns = {"metric": _word(self._by), **_made_by(made)}
        figure = figures.get(self._by)
        if figure is None:
            why = f" by {self._by}, but by {', '.join(figures)}" if figures else ": it was asked no test sample"
            return {**columns, "state": _word(f"not scored{why}")}
        replaced = self._replaced(name)
        if replaced is not None:  # then what else the row tells is of another training than the score
            why = next(iter(self.troubles.values()), replaced)
            return {"state": _word(f"stale: {why}; the score was {figure['value']:.1f}")}
        gain = self._differences.get(name, {}).get(self._by, {})
        columns |= {
            "score": _number(figure["value"]),
            **{column: _number(figure.get(column)) for column in ("low", "high", "n", "failed")},
            "gain": _number(gain.get("value")),
            **{f"gain_{end}": _number(gain.get(end)) for end in ("low", "high")},
        }
        counts = made["counts"]
        seen, scored = counts.get("scored on training data", 0), counts.get("scored", 0)
        columns["scored_on"] = "test data" if not seen else "training data"
        if 0 < seen < scored:
            columns["scored_on"] = f"training data ({seen} of {scored} samples)"
        state = f"scored on {columns['scored_on']}" if seen else "scored"
        if self.troubles:
            state = f"stale: {next(iter(self.troubles.values()))}" + (f"; {state}" if seen else "")
        ours = importlib.metadata.version("lorry")
        if not same_series(str(made.get("version")), ours):
            state += f", by Lorry {made.get('version')} (this is {ours})"
        return {**columns, "state": _word(state)}

    def _replaced(self, name: str) -> str | None:
        """Why eval's figures are not of the model that the folder holds now; None where they are."""
        for stage in ("infer", "eval"):
            if stage not in self.manifests or not self._fits_recipe(stage):
                return self.troubles[stage]
        predictions = f"predictions/{name}.jsonl"
        if self.manifests["eval"]["inputs"].get(f"infer/{predictions}") != self._output("infer", predictions):
            return "infer has changed since eval used it"
        if name in (BASE, VOTE):
            return None
        if not self._answered(name):
            return "train has changed since infer used it"
        return None

    def _answered(self, name: str) -> bool:
        """Whether infer's answers of an adapter are of the training that the folder holds now."""
        training = f"adapters/{name}/training.json"
        path = self._run.path("train", training)
        there = hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else None
        return bool(self.manifests["infer"]["inputs"].get(f"train/{training}") == there)

    def _not_scored(self, name: str, trained: bool) -> str:
        """The state of a model that eval has no figures of."""
        late = next((self.troubles[stage] for stage in ("infer", "eval") if stage in self.troubles), "not in the eval")
        if name in (BASE, VOTE):
            return f"not scored: {late}"
        if trained:
            return f"trained, not scored: {self.troubles.get('train', late)}"
        shard = next(self._run.folder.glob(f"shards/train/*/adapters/{name}/training.json"), None)
        if shard is not None:
            return f"trained in shard {shard.parents[2].name}, which is not merged: run train without a shard"
        return f"not trained: {self.troubles.get('train', 'train left no record of it')}"


def _made_by(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """Which recipe and Lorry made a row, and when; nothing of a stage that is not done."""
    if not manifest:
        return {}
    return {
        "recipe": _word(str(manifest.get("recipe", ""))[:12]),
        "date": _word(str(manifest.get("end", ""))),
        "version": _word(str(manifest.get("version", ""))),
    }


def _unfinished(run: Run, stage: str) -> str:
    """What has become of a stage that has no manifest."""
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
    """What the last start of a stage ended with, if it was an error."""
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


def _older(folder: Path) -> str:
    """That a run whose recipe cannot be read was made under another version of the contract, where it was."""
    for stage in STAGES:
        try:
            contract = json.loads((folder / stage / "manifest.json").read_text(encoding="utf-8"))["contract"]
        except (OSError, ValueError, KeyError, TypeError):
            continue
        if contract != CONTRACT_VERSION:
            return f"made under version {contract} of the contract, this Lorry reads {CONTRACT_VERSION}; "
    return ""


def _reason(error: Exception, folder: Path) -> str:
    """An error in words, with paths as they are below the run's folder."""
    if isinstance(error, LorryError | DamagedError | OSError):
        return str(error).replace(f"{folder}/", "")
    return f"{type(error).__name__}: {error}"


def _number(value: Any) -> Any:
    """The number; None for anything else, which could not be sorted among numbers."""
    known = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return value if known else None


def _word(text: Any) -> str:
    """A text on one line that no terminal obeys: names and errors may hold anything."""
    line = " ".join(str(text).split())
    line = "".join(letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}" for letter in line)
    return line if len(line) <= LONGEST else line[: LONGEST - 1] + "…"
