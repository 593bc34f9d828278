"""The ledger's rows: the data, training and score of each adapter of each run.

All is read from manifests and from files whose sha256 a manifest records. A row has a score only if the training that
was scored is still there; if it has been replaced since, the row's state says what the score was. Nothing is written,
and of large files only the training samples of data mixes are hashed.
"""

import hashlib
import importlib.metadata
import json
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from stages.contract.errors import LorryError, UsageError
from stages.contract.files import digest_of, read_json, stored_name
from stages.contract.mixes import training_samples
from stages.contract.recipe import Adapter
from stages.contract.records import BASE, VOTE
from stages.contract.roots import Roots
from stages.contract.run import CONTRACT_VERSION, STAGES, Run, is_held, is_same_series
from stages.results.run_reader import DamagedError, RunReader, read_recipe, suggestion
from stages.results.summary import dataset_name, read_summary

LONGEST_TEXT = 500
"""Largest number of characters in a cell; a traceback must not fill the table."""

FIGURE_COLUMNS = ("low", "high", "n", "failed", "empty", "groups")
"""Columns of a row that have the same names in scores.json."""


@dataclass(frozen=True)
class Row:
    """One adapter of a run, its base, or its vote. An unknown number is None, an unknown text is empty."""

    run: str
    task: str = ""
    adapter: str = ""
    data_mix: str = ""
    """The mix that the adapter was trained on, in words."""
    sources: str = ""
    """Data sets, each with the number of its samples that the adapter was trained on."""
    data_recipe: str = ""
    """Data-Juicer's operators in short, and the start of a digest of them with their parameters."""
    records_read: int | None = None
    """Records that Data-Juicer read."""
    records_kept: int | None = None
    connector_samples: int | None = None
    """Samples that the connector was trained on, before the adapter."""
    samples: int | None = None
    steps: int | None = None
    loss: float | None = None
    """The last one logged in training."""
    base_model: str = ""
    seed: int | None = None
    recipe: str = ""
    """The start of the recipe's digest, from the manifest that the row is read from; without one, that of the run's own
    recipe."""
    metric: str = ""
    score: float | None = None
    """In percent, like all scores here; None if untested."""
    low: float | None = None
    high: float | None = None
    n: int | None = None
    failed: int | None = None
    empty: int | None = None
    """Answers without text; None if an earlier version of Lorry scored it."""
    groups: int | None = None
    """Documents behind the score."""
    validation: float | None = None
    """The score on the validation samples, if the adapters vote."""
    gain: float | None = None
    """Points over base, on the same samples."""
    gain_low: float | None = None
    gain_high: float | None = None
    gain_p: float | None = None
    """Two-sided, after Holm's correction for the models of the run; below 0.05 the gain gets a star."""
    perplexity: float | None = None
    """Per token of the test samples' own answers; None without `infer.losses`."""
    perplexity_low: float | None = None
    perplexity_high: float | None = None
    win_rate: float | None = None
    """Percent of the test samples with a lower loss per token than base's, with half of the ties."""
    win_rate_low: float | None = None
    win_rate_high: float | None = None
    in_vote: str = ""
    """`yes` or `no`; empty without a vote, for base, for the vote itself, and for an adapter that has been trained
    again since."""
    weight: float | None = None
    """The weight of its vote."""
    scored_on: str = ""
    """`test data`, or `training data` and how many of the samples; empty without a score."""
    state: str = ""
    date: str = ""
    version: str = ""


@dataclass(frozen=True)
class Ledger:
    """The rows of several runs."""

    rows: list[Row]
    metrics: list[str]
    """The names of all metrics by which any of the runs is scored."""


def read_ledger(roots: Roots, names: Sequence[str], metric: str | None) -> Ledger:
    """Return the rows of the runs `names`, in that order, and the runs' metrics. Each run has a row for base, for each
    of the recipe's adapters in order, for each other adapter that it has, and for the vote if there is one or the
    recipe wants one.

    `metric` is the metric of the scores; None: each run's first. A damaged run raises no error: the state of its rows
    says what is damaged. A run that cannot be read at all has only one row.
    """
    rows: list[Row] = []
    metrics: dict[str, None] = {}
    for name in names:
        folder, shown = roots.runs / name, _one_line(stored_name(Path(name)))
        try:
            reader = _RowReader(shown, Run(name, read_recipe(folder), roots), metric)
            found = reader.rows()
            metrics |= dict.fromkeys(reader.metrics)
        except Exception as error:  # noqa: BLE001 - one damaged folder must not hide the others
            found = [
                Row(
                    shown,
                    state=_one_line(f"broken: {_contract_note(folder)}{_error_text(error, folder)}"),
                )
            ]
        rows += found
    return Ledger(rows, list(metrics))


def parse_order(order: str | None) -> tuple[str | None, bool]:
    """Return the column in `COLUMN` or `COLUMN:desc`, and whether the order is descending. The column is None if
    `order` is None. Raises UsageError for an unknown column or direction."""
    if order is None:
        return None, False
    column, colon, direction = order.partition(":")
    names = [field.name for field in fields(Row)]
    if column not in names:
        raise UsageError(f"--sort {order}: no column {column!r}; {suggestion(column, names, 'columns')}")
    if colon and direction != "desc":
        raise UsageError(f"--sort {order}: unknown direction {direction!r}; write {column} or {column}:desc")
    return column, bool(colon)


def refuse_unknown_metric(metric: str | None, known: Sequence[str]) -> None:
    """Raise UsageError for a metric by which no run is scored, unless no run is scored at all."""
    if metric is not None and known and metric not in known:
        raise UsageError(f"--metric {metric}: no run is scored by it; {suggestion(metric, known, 'metrics')}")


def sorted_rows(rows: Sequence[Row], column: str | None, descending: bool) -> list[Row]:
    """The rows sorted by a column, or unchanged if `column` is None. Equal rows keep their order, and rows without a
    value come last in either direction.

    Numbers sort as numbers, within texts too; texts are compared without regard to case.
    """
    if column is None:
        return list(rows)

    def sort_key(row: Row) -> Any:
        """What a row sorts by: its value, or its text without regard to case and with padded numbers."""
        value = getattr(row, column)
        if not isinstance(value, str):
            return value
        return re.sub(r"\d+", lambda number: number[0].zfill(20), value.casefold())  # so that mix-2 comes before mix-10

    missing = [row for row in rows if getattr(row, column) in (None, "")]
    known = [row for row in rows if getattr(row, column) not in (None, "")]
    return sorted(known, key=sort_key, reverse=descending) + missing


class _RowReader(RunReader):
    """Makes the rows of one run."""

    def __init__(self, name: str, run: Run, metric: str | None) -> None:
        super().__init__(run)
        self._name, self._metric = name, metric

    # -- models --------------------------------------------------------------------------------------------------

    @cached_property
    def _scores(self) -> dict[str, Any]:
        """Figures by model and metric; empty if eval is not done. Raises DamagedError if scores.json has changed."""
        return self.read_output("eval", "scores.json") or {}

    @cached_property
    def _held_out(self) -> dict[str, Any]:
        """Figures of held-out losses by model; empty without any. Raises DamagedError if losses.json has changed."""
        return self.read_output("eval", "losses.json") or {}

    @cached_property
    def _differences(self) -> dict[str, Any]:
        """Gains over base by model and metric; empty if eval is not done. Raises DamagedError if differences.json has
        changed."""
        return self.read_output("eval", "differences.json") or {}

    @property
    def metrics(self) -> list[str]:
        """The run's metrics, the main one first; empty if its scores are damaged."""
        try:
            return list(dict.fromkeys(metric for figures in self._scores.values() for metric in figures))
        except DamagedError:
            return []

    @property
    def _row_metric(self) -> str:
        """The metric of the run's scores: the requested one, else the run's first; empty if it has none."""
        return self._metric or next(iter(self.metrics), "")

    @cached_property
    def _vote(self) -> dict[str, Any]:
        """The vote in infer's manifest; empty without one, or if another recipe made it."""
        if "infer" not in self.manifests or not self.fits_recipe("infer"):
            return {}
        return self.manifests["infer"].get("vote") or {}

    @cached_property
    def _failed_adapters(self) -> dict[str, str]:
        """Adapters that could not be trained, with the reason: from train's manifest if there is one, else from train's
        summary. Empty while train runs without a manifest, and if the summary is damaged."""
        manifest = self.manifests.get("train")
        if manifest is not None:
            return manifest.get("untrained", {})  # type: ignore[no-any-return]
        if is_held(self.run.stage_folder("train")):  # they are being trained again
            return {}
        return {name: error for name, error in self._summarised_adapters.items() if error is not None}

    @cached_property
    def _summarised_adapters(self) -> dict[str, str | None]:
        """The adapters in train's summary, each with the reason why it could not be trained; None: it is trained.

        They are those that train, while it has no manifest, has finished or tried with the present recipe. Empty if the
        summary is missing or damaged.
        """
        adapters = self.run.recipe.train.adapters
        try:
            summary = read_summary(self.run, "train")
            found = [(adapters[e["dataset_index"]], e) for e in summary["dataset_results"]]
            return {
                a.name: str(e["error"]) if e.get("error") else None
                for a, e in found
                if e["dataset_name"] == dataset_name(a)
            }
        except (LorryError, LookupError, TypeError, AttributeError):
            return {}  # people may edit the summary: no manifest records its digest

    def rows(self) -> list[Row]:
        """The rows of base, each adapter, and the vote if there is one or the recipe wants one."""
        adapters = {adapter.name: adapter for adapter in self.run.recipe.train.adapters}
        folder = self.run.path("train", "adapters")
        # until train is done, adapters of an earlier recipe are in the folder
        done = "train" in self.manifests
        there = sorted(path.name for path in folder.glob("*/") if done and not path.name.startswith("."))
        try:
            scored = list(self._scores)
        except DamagedError:
            scored = []
        names = dict.fromkeys([BASE, *adapters, *scored, *there])
        if VOTE in names or self.run.recipe.infer.vote is not None:
            names.pop(VOTE, None)
            names[VOTE] = None  # after the adapters
        return [self._row(name, adapters.get(name)) for name in names]

    def _row(self, name: str, adapter: Adapter | None) -> Row:
        """The row of one model. `adapter` is its entry in the recipe, None for others. If a file is damaged, the row's
        state says so."""
        row = Row(
            self._name,
            task=_one_line(self.run.recipe.task),
            adapter=_one_line(name),
            data_mix=_one_line(adapter.mix) if adapter else "",
            base_model=_one_line(self.run.recipe.model.path),
            seed=self.run.recipe.seed,
            recipe=self.run.recipe.digest()[:12],
        )
        if name == BASE:
            row = replace(row, data_mix="not trained")
        if name == VOTE:
            row = replace(
                row, data_mix=_one_line(f"the vote of {', '.join(self._vote['adapters'])}" if self._vote else "")
            )
        try:
            trained = {} if name in (BASE, VOTE) else self._training_columns(name, adapter)
            row = replace(row, **self._vote_columns(name), **trained)
            return replace(row, **self._score_columns(name, trained))
        except Exception as error:  # noqa: BLE001 - one damaged file must not hide the other adapters
            return replace(row, state=_one_line(f"broken: {_error_text(error, self.run.folder)}"))

    # -- training ------------------------------------------------------------------------------------------------

    def _training_columns(self, name: str, adapter: Adapter | None) -> dict[str, Any]:
        """The columns of an adapter's training; empty if it is not trained."""
        output = f"adapters/{name}/training.json"
        if "train" in self.manifests:
            training = self.read_output("train", output)
        else:  # the folder of another adapter is of an earlier recipe
            finished = name in self._summarised_adapters and self._summarised_adapters[name] is None
            training = read_json(self.run.path("train", output)) if finished else None
        if training is None:
            return {}
        losses = [entry["loss"] for entry in training["log"] if "loss" in entry]
        config = read_json(self.run.path("train", "adapters", name, "adapter_config.json")) or {}
        made = self.manifests.get("train", {})
        mix = training.get("mix", adapter.mix if adapter else "")
        return {
            "data_mix": _one_line(mix),
            **self._data_columns,
            "sources": self._sources_text(adapter if adapter and adapter.mix == mix else None, training),
            "samples": _finite_number(training["samples"]["train"]),
            "steps": _finite_number(training["steps"]),
            "loss": _finite_number(losses[-1]) if losses else None,
            "base_model": _one_line(config.get("base_model_name_or_path") or self.run.recipe.model.path),
            "seed": _finite_number(made.get("seed", self.run.recipe.seed)),
            **_provenance_columns(made),
        }

    @cached_property
    def _data_columns(self) -> dict[str, Any]:
        """The columns of the connector's training and of Data-Juicer's work on the data; empty if train is not done.
        Data-Juicer's are left out if the training samples have changed since train read them, or if preprocess ran with
        another recipe than the run's."""
        made: dict[str, Any] = {}
        if "train" not in self.manifests:
            return made
        connector = self.read_output("train", "connector/training.json")
        if connector is not None:
            made["connector_samples"] = _finite_number(connector["samples"]["train"])
        samples = "samples/train.jsonl"
        if self.manifests["train"]["inputs"].get(f"preprocess/{samples}") != self.output_digest("preprocess", samples):
            return made
        operators = self.read_output("preprocess", "records/operators.json")
        settings = self.run.recipe.preprocess.data_juicer
        if operators and settings is not None and self.fits_recipe("preprocess"):
            names = ", ".join(re.sub(r"_(filter|mapper|deduplicator|selector)$", "", o["operator"]) for o in operators)
            made["data_recipe"] = _one_line(f"{names} ({digest_of(settings.process)[:8]})")
            made["records_read"] = _finite_number(operators[0]["read"])
            made["records_kept"] = _finite_number(operators[-1]["kept"])
        return made

    def _sources_text(self, adapter: Adapter | None, training: Mapping[str, Any]) -> str:
        """The text of `sources`: each data set with the number of samples trained on; empty if that is unknown.
        `adapter` is the recipe's entry, None if the adapter was trained on another mix than that."""
        total = training["samples"]["train"]
        if adapter is None:
            return ""
        if len(adapter.data) == 1:
            return _one_line(f"{adapter.data[0].source} {total}")
        samples = self._train_samples
        if not samples:
            return ""
        too_long = set(training["left_out"]["train"])
        kept = [
            s for s in training_samples(samples, adapter, self.manifests["train"]["seed"]) if s["id"] not in too_long
        ]
        if len(kept) != total:  # trained by a program that mixes differently
            return ""
        counts = Counter(str(sample["meta"]["source"]) for sample in kept)
        return _one_line(", ".join(f"{source} {count}" for source, count in counts.items()))

    @cached_property
    def _train_samples(self) -> list[dict[str, Any]]:
        """The id and data set of each sample that train read; empty if train is not done, or if the file is missing or
        has changed since."""
        wanted = self.manifests.get("train", {}).get("inputs", {}).get("preprocess/samples/train.jsonl")
        path = self.run.path("preprocess", "samples", "train.jsonl")
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

    def _vote_columns(self, name: str) -> dict[str, Any]:
        """The columns of an adapter's part in the vote; empty without a vote, for base and the vote, and if the adapter
        has been trained again since."""
        if not self._vote or name in (BASE, VOTE) or not self._has_current_answers(name):
            return {}
        weight = _finite_number(self._vote["weights"].get(name))
        share = _finite_number(self._vote["validation"].get(name))
        validation = None if share is None else round(100 * share, 4)
        return {"in_vote": "no" if weight is None else "yes", "weight": weight, "validation": validation}

    def _score_columns(self, name: str, trained: Mapping[str, Any]) -> dict[str, Any]:
        """The columns of a model's score, and its state. `trained` has the columns of its training, and is empty if it
        is not trained."""
        untrained = self._failed_adapters.get(name)
        if untrained is not None:
            return {"state": _one_line(f"not trained: {untrained}")}
        if name not in self._scores:
            return {"state": _one_line(self._unscored_state(name, bool(trained)))}
        figures, made = self._scores[name], self.manifests["eval"]
        columns = {"metric": _one_line(self._row_metric), **_provenance_columns(made)}
        figure, losses = figures.get(self._row_metric), self._loss_columns(name)
        if figure is None and not (losses and not figures):
            why = f" by {self._row_metric}, but by {', '.join(figures)}" if figures else ": it got no test sample"
            return {**columns, "state": _one_line(f"not scored{why}")}
        replaced = self._stale_reason(name)
        if replaced is not None:  # the row's other columns are of a newer training than the score
            why = next(iter(self.troubles.values()), replaced)
            was = f"score was {figure['value']:.1f}" if figure else f"perplexity was {losses['perplexity']:.2f}"
            return {"state": _one_line(f"stale: {why}; the {was}")}
        gain = self._differences.get(name, {}).get(self._row_metric, {})
        columns |= losses
        if figure is not None:
            columns |= {
                "score": _finite_number(figure["value"]),
                **{column: _finite_number(figure.get(column)) for column in FIGURE_COLUMNS},
                "gain": _finite_number(gain.get("value")),
                **{f"gain_{name}": _finite_number(gain.get(name)) for name in ("low", "high", "p")},
            }
        counts = made["counts"]
        scored = counts.get("scored", 0) or counts.get("with a loss", 0)
        seen = counts.get("scored on training data", 0)
        columns["scored_on"] = "test data" if not seen else "training data"
        if 0 < seen < scored:
            columns["scored_on"] = f"training data ({seen} of {scored} samples)"
        state = f"scored on {columns['scored_on']}" if seen else "scored"
        if self.troubles:
            state = f"stale: {next(iter(self.troubles.values()))}" + (f"; {state}" if seen else "")
        ours = importlib.metadata.version("lorry")
        if not is_same_series(str(made.get("version")), ours):
            state += f", by Lorry {made.get('version')} (this is {ours})"
        return {**columns, "state": _one_line(state)}

    def _loss_columns(self, name: str) -> dict[str, Any]:
        """The columns of a model's held-out loss; empty without one."""
        figure = self._held_out.get(name)
        if figure is None:
            return {}
        rate = (figure.get("over_base") or {}).get("win_rate") or {}
        return {
            "perplexity": _finite_number(figure["perplexity"]["value"]),
            **{f"perplexity_{end}": _finite_number(figure["perplexity"][end]) for end in ("low", "high")},
            "win_rate": _finite_number(rate.get("value")),
            **{f"win_rate_{end}": _finite_number(rate.get(end)) for end in ("low", "high")},
        }

    def _stale_reason(self, name: str) -> str | None:
        """Why eval's figures are not those of the model that the folder holds now; None if they are."""
        for stage in ("infer", "eval"):
            if stage not in self.manifests or not self.fits_recipe(stage):
                return self.troubles[stage]
        predictions = f"predictions/{name}.jsonl"
        if self.manifests["eval"]["inputs"].get(f"infer/{predictions}") != self.output_digest("infer", predictions):
            return "infer has changed since eval used it"
        if name in (BASE, VOTE):
            return None
        if not self._has_current_answers(name):
            return "train has changed since infer used it"
        return None

    def _has_current_answers(self, name: str) -> bool:
        """Whether infer answered with the adapter that the folder holds now."""
        training = f"adapters/{name}/training.json"
        path = self.run.path("train", training)
        digest = hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else None
        return bool(self.manifests["infer"]["inputs"].get(f"train/{training}") == digest)

    def _unscored_state(self, name: str, trained: bool) -> str:
        """The state of a model for which eval has no figures."""
        troubles = [self.troubles[stage] for stage in ("infer", "eval") if stage in self.troubles]
        reason = next(iter(troubles), "eval did not score it")
        if name in (BASE, VOTE):
            return f"not scored: {reason}"
        if trained:
            return f"trained, not scored: {self.troubles.get('train', reason)}"
        shard = next(self.run.folder.glob(f"shards/train/*/adapters/{name}/training.json"), None)
        if shard is not None:
            return f"trained in shard {shard.parents[2].name}, which is not merged; run train without --shard"
        return f"not trained: {self.troubles.get('train', 'train left no record of it')}"


def _provenance_columns(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """The columns `recipe`, `date` and `version` of a stage, from its manifest; empty if the stage is not done."""
    if not manifest:
        return {}
    return {
        "recipe": _one_line(str(manifest.get("recipe", ""))[:12]),
        "date": _one_line(str(manifest.get("end", ""))),
        "version": _one_line(str(manifest.get("version", ""))),
    }


def _contract_note(folder: Path) -> str:
    """A note that a run was made under another version of the contract; empty if it was not. Reads no recipe."""
    for stage in STAGES:
        try:
            contract = json.loads((folder / stage / "manifest.json").read_text(encoding="utf-8"))["contract"]
        except (OSError, ValueError, KeyError, TypeError):
            continue
        if contract != CONTRACT_VERSION:
            return f"made under version {contract} of the contract, this Lorry reads {CONTRACT_VERSION}; "
    return ""


def _error_text(error: Exception, folder: Path) -> str:
    """The text of an error. Errors of Lorry and of the operating system have paths relative to the run's folder; any
    other begins with its type."""
    if isinstance(error, LorryError | DamagedError | OSError):
        return str(error).replace(f"{folder}/", "")
    return f"{type(error).__name__}: {error}"


def _finite_number(value: Any) -> Any:
    """The value if it is a finite number, else None: other values cannot be sorted among numbers."""
    known = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return value if known else None


def _one_line(text: Any) -> str:
    """The text on one line, without control characters and cut to LONGEST_TEXT. Names and errors may hold anything."""
    line = " ".join(str(text).split())
    line = "".join(letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}" for letter in line)
    return line if len(line) <= LONGEST_TEXT else line[: LONGEST_TEXT - 1] + "…"
