"""Runs side by side: what they scored on the same samples, with paired differences, and what is suspicious about it.

Everything is read from what eval kept of each sample (scored.jsonl).
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from stages.contract.errors import UsageError
from stages.contract.files import digest_of
from stages.contract.records import BASE, VOTE
from stages.results.intervals import Figures, cluster_bootstrap

LEAST = 10
"""Answers; fewer may well be the same, or alike, by chance."""

FEW = 10
"""Reference answers for each distinct answer of a model, from which on these are few."""


@dataclass(frozen=True)
class Evaluated:
    """What a run's eval left."""

    run: str
    task: str
    scoring: Mapping[str, Any]
    """eval.scoring of the recipe."""
    shown: Mapping[str, Any]
    """preprocess.samples of the recipe: what the samples show."""
    base_model: str
    """Digest of the base model."""
    figures: Mapping[str, Figures]
    """scores.json."""
    lines: Sequence[Mapping[str, Any]]
    """scored.jsonl: never empty."""

    @property
    def models(self) -> list[str]:
        return list(self.figures)

    @cached_property
    def by_id(self) -> dict[str, Mapping[str, Any]]:
        return {line["id"]: line for line in self.lines}

    @cached_property
    def samples(self) -> dict[str, str]:
        """Sample id -> a digest of what it is scored against, and what it counts with."""
        return {line["id"]: digest_of([line["references"], line["together"]]) for line in self.lines}

    def answers(self, model: str, source: str | None = None) -> dict[str, str]:
        """Its answers by sample id, of all or of one data set; failures have none."""
        return {
            line["id"]: line["models"][model]["answer"]
            for line in self.lines
            if source in (None, line["source"])
            and model in line["models"]
            and line["models"][model]["answer"] is not None
        }

    def scores(self, model: str, metric: str) -> dict[str, float]:
        """Its scores in 0..1 by what counts once: the least of the samples that count together."""
        found: dict[str, float] = {}
        for line in self.lines:
            value = line["models"].get(model, {}).get("scores", {}).get(metric)
            if value is not None:
                found[line["together"]] = min(value, found.get(line["together"], value))
        return found


@dataclass(frozen=True)
class Compared:
    """A model of a run beside the one that all are compared with."""

    run: str
    model: str
    metric: str
    figure: Mapping[str, Any]
    """Of scores.json."""
    difference: Mapping[str, float] | None
    """Points over that one, with `low` and `high`, on what both were asked; None for itself, and where that is
    nothing."""
    same_answers: float | None
    """Percent of the samples that both answered; None for itself."""


def refuse_other_sets(runs: Sequence[Evaluated]) -> None:
    """Raise UsageError where a run is not scored on the samples of the first, or otherwise."""
    first = runs[0]
    for other in runs[1:]:
        if other.task != first.task:
            raise UsageError(f"{other.run} is of task {other.task}, {first.run} of {first.task}: nothing to compare")
        if other.scoring != first.scoring:
            raise UsageError(
                f"{other.run} is scored by other rules than {first.run} (eval.scoring: {dict(other.scoring)} and"
                f" {dict(first.scoring)}); set them alike and run eval again"
            )
        names = dict.fromkeys([*first.samples, *other.samples])
        differ = [name for name in names if first.samples.get(name) != other.samples.get(name)]
        if differ:
            raise UsageError(
                f"{other.run} is not scored on the test set of {first.run}: {len(differ)} of {len(names)} samples are"
                f" in one alone, or have other reference answers there (the first: {differ[0]!r}); a difference in"
                " score would be that of the data: compare runs with the same test data and seed"
            )


def compared_with(run: Evaluated) -> str:
    """The model of the first run that all others are compared with: its vote, else its first adapter, else base."""
    adapters = [name for name in run.models if name not in (BASE, VOTE)]
    return VOTE if VOTE in run.models else [*adapters, BASE][0]


def compare(runs: Sequence[Evaluated], resamples: int, seed: int) -> list[Compared]:
    """Every model of every run by every metric, metric by metric. The runs must be of the same test set."""
    first, model = runs[0], compared_with(runs[0])
    metrics = dict.fromkeys(metric for run in runs for line in run.lines for metric in _metrics(line))
    rows = []
    for metric in metrics:
        beside = first.scores(model, metric)
        for run in runs:
            for name in run.models:
                if metric not in run.figures[name]:
                    continue
                itself = run is first and name == model
                difference = None if itself else _difference(first, run.scores(name, metric), beside, resamples, seed)
                same = None if itself else _share(run.answers(name), first.answers(model))
                rows.append(Compared(run.run, name, metric, run.figures[name][metric], difference, same))
    return rows


def _metrics(line: Mapping[str, Any]) -> list[str]:
    return [metric for model in line["models"].values() for metric in model["scores"]]


def _difference(
    first: Evaluated, scores: Mapping[str, float], beside: Mapping[str, float], resamples: int, seed: int
) -> dict[str, float] | None:
    """The mean paired difference in points with its 95% interval; whole groups of the first run are drawn."""
    groups: dict[str, str] = {}
    for line in first.lines:
        groups.setdefault(line["together"], line["group"])
    both = [name for name in groups if name in scores and name in beside]
    if not both:
        return None
    values = np.array([[scores[name] - beside[name]] for name in both])
    low, high = cluster_bootstrap(values, [groups[name] for name in both], resamples, seed)[:, 0]
    points = {"value": values.mean(), "low": low, "high": high}
    return {name: round(100 * float(value), 4) + 0.0 for name, value in points.items()}


def _share(answers: Mapping[str, str], others: Mapping[str, str]) -> float | None:
    both = answers.keys() & others.keys()
    return 100 * sum(answers[name] == others[name] for name in both) / len(both) if both else None


def asked_otherwise(runs: Sequence[Evaluated]) -> list[str]:
    """Sentences on runs that were asked the same questions in another way than the first: a difference may be that."""
    first, told = runs[0], []
    for other in runs[1:]:
        keys = sorted(key for key in {*first.shown, *other.shown} if first.shown.get(key) != other.shown.get(key))
        if keys:
            values = ", ".join(f"{key} {other.shown.get(key)!r} for {first.shown.get(key)!r}" for key in keys)
            told.append(f"{other.run} was asked otherwise than {first.run} (preprocess.samples: {values})")
    return told


# -- what is suspicious ------------------------------------------------------------------------------------------


def suspicions(runs: Sequence[Evaluated]) -> list[str]:
    """Sentences on answers that no two models give, or that none gives who looks at the questions."""
    told = [line for run in runs for name in run.models for line in _alike(run, name)]
    places = [(run, name) for run in runs for name in run.models]
    for place, (run, name) in enumerate(places):
        for other, other_name in places[place + 1 :]:
            if not _may_be_the_same(run, name, other, other_name):
                told += _identical(run, name, other, other_name)
    return told


def _sources(run: Evaluated) -> list[str]:
    return list(dict.fromkeys(str(line["source"]) for line in run.lines))


def _of(source: str, run: Evaluated) -> str:
    return f" of {source}" if source and len(_sources(run)) > 1 else ""


def _alike(run: Evaluated, model: str) -> list[str]:
    """That a model failed on all of a data set, or has few answers for many."""
    told, where = [], f"{run.run}/{model}"
    asked = Counter(line["source"] for line in run.lines if model in line["models"])
    if asked and not run.answers(model):
        return [f"{where}: every one of {asked.total()} answers failed"]
    for source, count in asked.items():
        answers = run.answers(model, source)
        distinct = len(set(answers.values()))
        wanted = len({run.by_id[name]["references"] for name in answers})
        if not answers:
            told.append(f"{where}: every one of {count} answers{_of(source, run)} failed")
        if len(answers) >= LEAST and (distinct * FEW <= wanted or distinct == 1 < wanted):
            told.append(
                f"{where}: only {distinct} distinct answer{'' if distinct == 1 else 's'} among {len(answers)}"
                f"{_of(source, run)}, where the right ones are {wanted}: were the questions looked at?"
            )
    return told


def _may_be_the_same(run: Evaluated, name: str, other: Evaluated, other_name: str) -> bool:
    """Base is the same model in runs that share it, and a vote may follow one of those who vote."""
    if run is other:
        return VOTE in (name, other_name)
    return name == other_name == BASE and run.base_model == other.base_model


def _identical(run: Evaluated, name: str, other: Evaluated, other_name: str) -> list[str]:
    """That two models give the same answers, wrong ones too: right ones are the same in any good models."""
    told = []
    for source in _sources(run):
        answers, others = run.answers(name, source), other.answers(other_name, source)
        both = answers.keys() & others.keys()
        if len(both) < LEAST or any(answers[sample] != others[sample] for sample in both):
            continue
        if any(next(iter(run.by_id[sample]["models"][name]["scores"].values()), 1.0) < 1 for sample in both):
            told.append(
                f"{run.run}/{name} and {other.run}/{other_name}: all {len(both)} answers{_of(source, run)} are the"
                " same, wrong ones too: is it one model, or did none answer?"
            )
    return told
