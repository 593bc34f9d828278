"""Compare runs: their scores on the same samples, paired differences, and suspicious answers.

All of it is read from the runs' recipes and manifests, and from eval's scores.json and scored.jsonl, and with held-out
losses from losses.json and losses.jsonl.
"""

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from stages.contract.errors import UsageError
from stages.contract.files import digest_of
from stages.contract.records import BASE, VOTE
from stages.contract.roots import Roots
from stages.contract.run import Run
from stages.results.held_out import Loss, loss_comparisons
from stages.results.intervals import Figures, Values, difference_figures
from stages.results.run_reader import DamagedError, RunReader, read_recipe
from stages.results.uncertainty import outdated_note

LEAST_ANSWERS = 10
"""Smallest number of answers for a report that they are identical or repetitive: with fewer, that may be chance."""

REPETITIVE = 10
"""A model with this many distinct references for each distinct answer, or more, is suspicious."""


@dataclass(frozen=True)
class EvaluatedRun:
    """A run that eval has scored."""

    run: str
    task: str
    scoring: Mapping[str, Any]
    """eval.scoring of the recipe."""
    shown: Mapping[str, Any]
    """preprocess.samples of the recipe: what the prompts show."""
    base_model: str
    """sha256 of the base; empty if infer's manifest has none."""
    figures: Mapping[str, Figures]
    """scores.json."""
    lines: Sequence[Mapping[str, Any]]
    """scored.jsonl."""
    held_out: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """losses.json; empty without held-out losses."""
    loss_lines: Sequence[Mapping[str, Any]] = ()
    """losses.jsonl."""

    @property
    def models(self) -> list[str]:
        """The names of the models, in the order of scores.json."""
        return list(self.figures)

    @cached_property
    def by_id(self) -> dict[str, Mapping[str, Any]]:
        """The lines by sample id."""
        return {line["id"]: line for line in self.lines}

    @cached_property
    def samples(self) -> dict[str, str]:
        """By sample id, a digest of its references and of its key in `together`."""
        return {line["id"]: digest_of([line["references"], line["together"]]) for line in self.lines}

    def losses(self, model: str) -> dict[str, Loss]:
        """A model's held-out losses by sample id."""
        own = {line["id"]: line["models"][model] for line in self.loss_lines if model in line["models"]}
        return {name: Loss(loss["loss"], loss["tokens"]) for name, loss in own.items()}

    @cached_property
    def groups(self) -> dict[str, str]:
        """The document of each key in `together`: samples with the same key are counted once."""
        groups: dict[str, str] = {}
        for line in self.lines:
            groups.setdefault(line["together"], line["group"])
        return groups

    def answers(self, model: str, source: str | None = None) -> dict[str, str]:
        """A model's answers by sample id, on all data sets or on the data set `source`, without failed answers."""
        return {
            line["id"]: line["models"][model]["answer"]
            for line in self.lines
            if source in (None, line["source"])
            and model in line["models"]
            and line["models"][model]["answer"] is not None
        }

    def scores(self, model: str, metric: str) -> dict[str, float]:
        """A model's scores in 0..1, by the key in `together`: the lowest score of the samples that count together."""
        found: dict[str, float] = {}
        for line in self.lines:
            value = line["models"].get(model, {}).get("scores", {}).get(metric)
            if value is not None:
                found[line["together"]] = min(value, found.get(line["together"], value))
        return found


@dataclass(frozen=True)
class ComparisonRow:
    """One model's score by one metric, beside that of the reference model."""

    run: str
    model: str
    metric: str
    figure: Mapping[str, Any]
    """The entry of scores.json."""
    difference: Mapping[str, Any] | None
    """Points over the reference model, as in differences.json, on the samples that both have scores for; None for the
    reference model itself, and if there are no such samples. `p` is corrected for all rows of the metric."""
    same_answers: float | None
    """Percent of the samples answered by both models that have the same answer; None for the reference model itself,
    and if no sample was answered by both."""


def evaluated_run(
    run: Run,
    figures: Mapping[str, Figures],
    lines: Sequence[Mapping[str, Any]],
    held_out: Mapping[str, Mapping[str, Any]] | None = None,
    loss_lines: Sequence[Mapping[str, Any]] | None = None,
) -> EvaluatedRun:
    """A run with these contents of scores.json, scored.jsonl, losses.json and losses.jsonl."""
    recipe = run.recipe
    base = (run.manifest("infer") or {"inputs": {}})["inputs"].get("models/base", "")
    known = (run.name, recipe.task, recipe.eval.scoring, recipe.preprocess.samples, base)
    return EvaluatedRun(*known, figures, lines, held_out or {}, loss_lines or ())


def comparable_runs(roots: Roots, names: Sequence[str]) -> tuple[list[EvaluatedRun], list[str]]:
    """The runs among `names` that eval has scored, at least two, and for each other run a note that says why it is not
    compared.

    Raises UsageError for fewer than two scored runs, for a recipe that is missing or invalid, for scores that are
    stale, damaged or without a score per sample, and for runs of another task, scoring or test set than the first.
    """
    runs, notes = [], []
    for name in names:
        found = _read_run(roots, name)
        if isinstance(found, str):
            notes.append(f"{name}: not compared, because {found}")
        else:
            runs.append(found)
    if len(runs) < 2:
        why = f" ({'; '.join(notes)})" if notes else ""
        raise UsageError(
            f"{', '.join(names)}: a comparison needs two scored runs, and {len(runs)} can be compared{why}; run the"
            " missing stages, or name other runs"
        )
    refuse_incomparable_runs(runs)
    return runs, notes


def _read_run(roots: Roots, name: str) -> EvaluatedRun | str:
    """The run `name`, or the reason why it cannot be compared. Raises UsageError if its recipe is missing or invalid,
    or if its scores are stale, damaged or without a score per sample."""
    folder = roots.runs / name
    try:
        recipe = read_recipe(folder)
        reader = RunReader(Run(name, recipe, roots))
        if "eval" not in reader.manifests:
            return next(iter(reader.troubles.values()))
        for stage in ("infer", "eval"):
            if stage in reader.troubles:
                raise UsageError(f"{folder}: {reader.troubles[stage]}; run eval again, then compare")
        figures, lines = reader.read_output("eval", "scores.json"), reader.read_output("eval", "scored.jsonl")
        held_out, losses = reader.read_output("eval", "losses.json"), reader.read_output("eval", "losses.jsonl")
    except DamagedError as error:
        raise UsageError(f"{folder}: {error}; run eval again") from error
    if lines is None:
        raise UsageError(
            f"{folder}: an older version of Lorry scored it and kept no score per sample; run eval again with --force"
        )
    scored = any(figure["n"] for model in (figures or {}).values() for figure in model.values()) and lines
    if not scored and not losses:
        return "eval scored no sample"
    return evaluated_run(reader.run, figures, lines, held_out, losses)


def refuse_incomparable_runs(runs: Sequence[EvaluatedRun]) -> None:
    """Raise UsageError if a run has another task, scoring or test set than the first run."""
    first = runs[0]
    for other in runs[1:]:
        if other.task != first.task:
            raise UsageError(
                f"{other.run}: has task {other.task}, but {first.run} has {first.task}; compare runs of one task"
            )
        if other.scoring != first.scoring:
            raise UsageError(
                f"{other.run}: scored by other rules than {first.run} (eval.scoring is {dict(other.scoring)} instead of"
                f" {dict(first.scoring)}); make them equal and run eval again"
            )
        names = dict.fromkeys([*first.samples, *other.samples])
        differ = [name for name in names if first.samples.get(name) != other.samples.get(name)]
        if differ:
            raise UsageError(
                f"{other.run}: scored on another test set than {first.run} ({len(differ)} of {len(names)} samples are"
                f" in only one of them, or have other references; the first is {differ[0]!r}); compare runs with the"
                " same test data and seed"
            )


def reference_model(run: EvaluatedRun) -> str:
    """The model that all models are compared with if `run` is the first run: its vote, else its first adapter, else
    base."""
    adapters = [name for name in run.models if name not in (BASE, VOTE)]
    return VOTE if VOTE in run.models else [*adapters, BASE][0]


def comparison_rows(runs: Sequence[EvaluatedRun]) -> list[ComparisonRow]:
    """A row for every metric of every model of every run, grouped by metric. The runs must have the same test set. A
    sample's document is the one that the first run has for it."""
    first, model = runs[0], reference_model(runs[0])
    metrics = dict.fromkeys(metric for run in runs for line in run.lines for metric in _line_metrics(line))
    rows = []
    for metric in metrics:
        beside = first.scores(model, metric)
        places = [(run, name) for run in runs for name in run.models if metric in run.figures[name]]
        pairs = {
            (run.run, name): _paired_differences(first, run.scores(name, metric), beside)
            for run, name in places
            if run is not first or name != model
        }
        compared = {place: pair for place, pair in pairs.items() if len(pair[0])}
        figures = dict(zip(compared, difference_figures(list(compared.values())), strict=True))
        for run, name in places:
            place = (run.run, name)
            same = _percent_equal(run.answers(name), first.answers(model)) if place in pairs else None
            rows.append(ComparisonRow(*place, metric, run.figures[name][metric], figures.get(place), same))
    return rows


@dataclass(frozen=True)
class LossRow:
    """One model's held-out loss, beside that of the reference model."""

    run: str
    model: str
    figure: Mapping[str, Any]
    """The entry of losses.json."""
    comparison: Mapping[str, Any] | None
    """As `over_base` in losses.json, but with the reference model; None for the reference model itself, and if the two
    share no sample with the same tokens."""


def loss_reference(runs: Sequence[EvaluatedRun]) -> str | None:
    """The model of the first run with which all others are compared by held-out loss: its first adapter that has any,
    else base; None if neither has."""
    return next((name for name in runs[0].held_out if name != BASE), next(iter(runs[0].held_out), None))


def loss_rows(runs: Sequence[EvaluatedRun]) -> list[LossRow]:
    """A row for each model with held-out losses. Losses are compared on the samples that both models read as the same
    number of tokens. Empty if the first run has none."""
    model = loss_reference(runs)
    if model is None:
        return []
    first, beside = runs[0], runs[0].losses(model)
    groups = {line["id"]: line["group"] for line in first.loss_lines}
    contents = {line["id"]: line["content"] for line in first.loss_lines}
    places = [(run, name) for run in runs for name in run.held_out]
    shared: dict[str, dict[str, Loss]] = {}
    for run, name in places:
        if run is first and name == model:
            continue
        same = {line["id"] for line in run.loss_lines if contents.get(line["id"]) == line["content"]}
        shared[f"{run.run}/{name}"] = {
            one: loss
            for one, loss in run.losses(name).items()
            if one in same and one in beside and beside[one].tokens == loss.tokens
        }
    found = loss_comparisons(shared, beside, groups)
    return [LossRow(run.run, name, run.held_out[name], found.get(f"{run.run}/{name}")) for run, name in places]


def _line_metrics(line: Mapping[str, Any]) -> list[str]:
    """The metrics of a line of scored.jsonl, once for each model that has them."""
    return [metric for model in line["models"].values() for metric in model["scores"]]


def _paired_differences(
    first: EvaluatedRun, scores: Mapping[str, float], beside: Mapping[str, float]
) -> tuple[Values, list[str]]:
    """The differences `scores` - `beside`, of shape (keys,), for the keys that both have, and the first run's documents
    of these keys. The keys are those in `together`."""
    both = [name for name in first.groups if name in scores and name in beside]
    return np.array([scores[name] - beside[name] for name in both]), [first.groups[name] for name in both]


def _percent_equal(answers: Mapping[str, str], others: Mapping[str, str]) -> float | None:
    """Percent of the samples with both answers that have the same answer; None if no sample has both."""
    both = answers.keys() & others.keys()
    return 100 * sum(answers[name] == others[name] for name in both) / len(both) if both else None


def prompt_differences(runs: Sequence[EvaluatedRun]) -> list[str]:
    """A sentence for each run whose recipe shows other things in prompts than the first run's recipe: that may explain
    differences in scores."""
    first, found = runs[0], []
    for other in runs[1:]:
        keys = sorted(key for key in {*first.shown, *other.shown} if first.shown.get(key) != other.shown.get(key))
        if keys:
            values = ", ".join(f"{key} {other.shown.get(key)!r} instead of {first.shown.get(key)!r}" for key in keys)
            found.append(f"{other.run} has other prompts than {first.run} (preprocess.samples: {values})")
    return found


# -- suspicious answers ------------------------------------------------------------------------------------------


def comparison_warnings(runs: Sequence[EvaluatedRun]) -> list[str]:
    """Sentences that say why a comparison of these runs is doubtful."""
    return [
        *prompt_differences(runs),
        *outdated_interval_notes(runs),
        *_loss_differences(runs),
        *(f"suspicious: {line}" for line in suspicions(runs)),
    ]


def _loss_differences(runs: Sequence[EvaluatedRun]) -> list[str]:
    """A sentence for each run that does not have the first run's held-out losses on the same tokens."""
    first, found = runs[0], []
    mine = _read_tokens(first)
    for other in runs[1:]:
        own = _read_tokens(other)
        differ = [name for name, what in mine.items() if own.get(name) != what]
        if differ:
            found.append(
                f"{other.run}: {len(differ)} of {len(mine)} held-out losses, such as that of {differ[0]}, are not on"
                f" the same tokens as in {first.run}, and are not compared"
            )
    return found


def _read_tokens(run: EvaluatedRun) -> dict[str, tuple[str, int]]:
    """By sample id, the digest of what a run's held-out losses are of, and the number of tokens."""
    return {line["id"]: (line["content"], next(iter(line["models"].values()))["tokens"]) for line in run.loss_lines}


def outdated_interval_notes(runs: Sequence[EvaluatedRun]) -> list[str]:
    """A note for each run whose intervals are from an older version of Lorry."""
    old = [
        run.run for run in runs if any("groups" not in cell for own in run.figures.values() for cell in own.values())
    ]
    return [outdated_note(name) for name in old]


def suspicions(runs: Sequence[EvaluatedRun]) -> list[str]:
    """Sentences on models that failed on every sample of a data set, gave empty answers only, answer repetitively, or
    share another model's wrong answers."""
    found = [line for run in runs for name in run.models for line in _model_suspicions(run, name)]
    models = [(run, name) for run in runs for name in run.models]
    alike: dict[str, list[tuple[set[int], int]]] = defaultdict(list)  # by data set: places in `models`, and answers
    for first, (run, name) in enumerate(models):
        for second, (other, other_name) in enumerate(models[first + 1 :], first + 1):
            if _may_be_identical(run, name, other, other_name):
                continue
            for source, count in _identical_answers(run, name, other, other_name).items():
                # models that are alike in pairs are reported as one group
                joined, counts = {first, second}, [count]
                for group in [group for group in alike[source] if group[0] & joined]:
                    alike[source].remove(group)
                    joined |= group[0]
                    counts.append(group[1])
                alike[source].append((joined, min(counts)))
    for source, groups in alike.items():
        for places, count in groups:
            *others, last = (f"{models[place][0].run}/{models[place][1]}" for place in sorted(places))
            number = "two" if len(places) == 2 else len(places)
            found.append(
                f"{', '.join(others)} and {last}: all {count} answers{_source_phrase(source, runs[0])} are identical,"
                f" wrong ones included; check that they are {number} models"
            )
    return found


def _sources(run: EvaluatedRun) -> list[str]:
    """The data sets of a run's samples, in the order in which they first occur."""
    return list(dict.fromkeys(str(line["source"]) for line in run.lines))


def _source_phrase(source: str, run: EvaluatedRun) -> str:
    """` of <data set>` if the run has several data sets, else an empty text."""
    return f" of {source}" if source and len(_sources(run)) > 1 else ""


def _model_suspicions(run: EvaluatedRun, model: str) -> list[str]:
    """Sentences on data sets on which a model failed on every sample, gave empty answers only, or few distinct ones.
    One sentence if it failed on all data sets."""
    found, where = [], f"{run.run}/{model}"
    asked = Counter(line["source"] for line in run.lines if model in line["models"])
    if asked and not run.answers(model):
        return [f"{where}: all {asked.total()} answers failed"]
    for source, count in asked.items():
        answers = run.answers(model, source)
        distinct = len(set(answers.values()))
        wanted = len({run.by_id[name]["references"] for name in answers})
        if not answers:
            found.append(f"{where}: all {count} answers{_source_phrase(source, run)} failed")
        elif len(answers) >= LEAST_ANSWERS and not any(map(str.strip, answers.values())):
            found.append(
                f"{where}: all {len(answers)} answers{_source_phrase(source, run)} are empty; check its prompts"
            )
        elif len(answers) >= LEAST_ANSWERS and (distinct * REPETITIVE <= wanted or distinct == 1 < wanted):
            found.append(
                f"{where}: only {distinct} distinct answer{'' if distinct == 1 else 's'} among {len(answers)}"
                f"{_source_phrase(source, run)}, and {wanted} distinct references; check its prompts"
            )
    return found


def _may_be_identical(run: EvaluatedRun, name: str, other: EvaluatedRun, other_name: str) -> bool:
    """Whether two models may give the same answers: the same base in two runs, or a vote and a model of its run."""
    if run is other:
        return VOTE in (name, other_name)
    return name == other_name == BASE and run.base_model == other.base_model


def _identical_answers(run: EvaluatedRun, name: str, other: EvaluatedRun, other_name: str) -> dict[str, int]:
    """The data sets on which two models give the same answer to every sample that both answered, each with the number
    of these samples. Leaves out data sets with fewer than LEAST_ANSWERS such samples, and those on which all answers
    are right: all good models share these."""
    found = {}
    for source in _sources(run):
        answers, others = run.answers(name, source), other.answers(other_name, source)
        both = answers.keys() & others.keys()
        if len(both) < LEAST_ANSWERS or any(answers[sample] != others[sample] for sample in both):
            continue
        if any(next(iter(run.by_id[sample]["models"][name]["scores"].values()), 1.0) < 1 for sample in both):
            found[source] = len(both)
    return found
