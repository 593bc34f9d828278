"""Score every model's answers to the same samples: means, intervals, breakdowns, worst answers.

A failed answer scores 0 in every metric and counts in `n`; no answer is left out to improve a figure. Samples that
belong together, such as the rotations of a question, are scored one by one and counted once.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from stages.contract.errors import DataError
from stages.contract.files import digest_of
from stages.contract.recipe import Recipe
from stages.contract.records import BASE, Prediction, Sample, is_empty
from stages.results.intervals import Figures, Values, difference_figures, mean_figures, percent


@dataclass(frozen=True)
class Model:
    """One model's answers; entry i of every field belongs to sample i."""

    predictions: list[Prediction | None]
    """None if infer wrote no record of the sample."""
    errors: list[str | None]
    """Why there is no answer; None if there is one, or if the model was not asked."""
    empty: list[bool]
    """Whether there is an answer, but one without text."""
    values: Values
    """Shape (samples, metrics), 0..1; NaN where a metric does not apply or the model was not asked."""


@dataclass(frozen=True)
class Scores:
    """All models' scores on the same samples."""

    samples: list[Sample]
    metrics: list[str]
    """Columns of every model's `values`: the scores of answers, then the facts of the samples."""
    facts: list[str]
    """The metrics that do not depend on the answer, such as retrieval recall; they are the same for every model."""
    models: dict[str, Model]
    """By name, `base` first."""
    together: list[str]
    """A key per sample: samples with the same key count once."""

    def groups(self, key: str) -> list[str]:
        """Return each sample's value of `meta[key]`, as text; empty if it has none."""
        return [str(sample["meta"].get(key, "")) for sample in self.samples]


Asked = Callable[[str, Sample], bool]
"""Whether the model of this name was asked a sample."""


def score_models(
    task: Any,
    recipe: Recipe,
    samples: Sequence[Sample],
    predictions: Mapping[str, Sequence[Prediction]],
    asked: Asked = lambda name, sample: True,
) -> Scores:
    """Return the scores of every model's predictions. A missing prediction is a failed answer, except for a sample that
    the model was not asked: that sample does not count for the model.

    All `samples` have references; `predictions` has the predictions by model name. `asked` says which models were asked
    which samples.

    Raises DataError if a model has two predictions for one sample.
    """
    answered = {name: _align_predictions(samples, records, name) for name, records in predictions.items()}
    errors = {
        name: [failure_reason(record) if asked(name, s) else None for s, record in zip(samples, records, strict=True)]
        for name, records in answered.items()
    }
    facts = [task.facts(sample) for sample in samples]
    scored = {name: _score_rows(task, recipe, samples, answered[name], errors[name]) for name in answered}
    names = _merge_metrics(tuple(row) for rows in scored.values() for row in rows)
    fact_names = list(dict.fromkeys(fact for row in facts for fact in row))
    models = {}
    for name, rows in scored.items():
        full = [{**row, **fact} if row else {} for row, fact in zip(rows, facts, strict=True)]  # {}: not asked
        table = [[row.get(metric, np.nan) for metric in names + fact_names] for row in full]
        empty = [is_empty(record) for record in answered[name]]
        values = np.array(table, dtype=np.float64).reshape(len(samples), len(names + fact_names))
        models[name] = Model(answered[name], errors[name], empty, values)
    return Scores(list(samples), names + fact_names, fact_names, models, [task.together(sample) for sample in samples])


def _merge_metrics(rows: Iterable[tuple[str, ...]]) -> list[str]:
    """Merge the metrics of all rows into one list. The metrics of each row keep their order; if rows contradict each
    other, the first one decides."""
    names: list[str] = []
    for row in dict.fromkeys(rows):
        place = next((names.index(metric) for metric in row if metric in names), len(names))
        for metric in row:
            if metric in names:
                place = names.index(metric)
            else:
                names.insert(place, metric)
            place += 1
    return names


def scored_lines(scores: Scores) -> list[dict[str, Any]]:
    """Return each sample with every model's answer, error and scores (0..1, without the facts): the lines of
    scored.jsonl, which `lorry compare` reads.

    `references` is a digest of the sample's references. `models` leaves out models without a score, because they were
    not asked the sample or no metric applies to it.
    """
    metrics = [metric for metric in scores.metrics if metric not in scores.facts]
    lines = []
    for row, sample in enumerate(scores.samples):
        models = {}
        for name, model in scores.models.items():
            prediction, values = model.predictions[row], model.values[row].tolist()
            held = {metric: value for metric, value in zip(metrics, values, strict=False) if not math.isnan(value)}
            if held:
                answer = prediction["answer"] if prediction else None
                models[name] = {"answer": answer, "error": model.errors[row], "scores": held}
        lines.append(
            {
                "id": sample["id"],
                "group": str(sample["meta"].get("group", "")),
                "source": str(sample["meta"].get("source", "")),
                "together": scores.together[row],
                "references": digest_of(sample["references"]),
                "models": models,
            }
        )
    return lines


def failure_reason(prediction: Prediction | None) -> str | None:
    """Return the reason why a prediction counts as failed; None if it does not."""
    if prediction is None:
        return "no prediction"
    if prediction["error"] is None and prediction["answer"] is None:
        return "neither answer nor error"
    return prediction["error"]


def _align_predictions(
    samples: Sequence[Sample], predictions: Sequence[Prediction], name: str
) -> list[Prediction | None]:
    """A model's predictions in the order of the samples, with None for a missing one. Raises DataError if a sample has
    two predictions."""
    by_id: dict[str, Prediction] = {}
    for prediction in predictions:
        if prediction["id"] in by_id:
            raise DataError(f"infer/predictions/{name}.jsonl: two predictions of {prediction['id']!r}; run infer again")
        by_id[prediction["id"]] = prediction
    return [by_id.get(sample["id"]) for sample in samples]


def _score_rows(
    task: Any,
    recipe: Recipe,
    samples: Sequence[Sample],
    predictions: Sequence[Prediction | None],
    errors: Sequence[str | None],
) -> list[dict[str, float]]:
    """The scores of each sample by metric: 0 for a failed answer, and an empty dict for a sample that was not asked."""
    rows = []
    for sample, prediction, error in zip(samples, predictions, errors, strict=True):
        if error is not None:
            # scoring a reference as if it were the answer gives the metrics of this sample
            rows.append(dict.fromkeys(task.score(recipe, sample["references"][0], sample), 0.0))
        elif prediction is None:  # not asked
            rows.append({})
        else:
            rows.append(task.score(recipe, prediction["answer"], sample))
    return rows


def scores_by_question(scores: Scores) -> Scores:
    """Return scores with one row for samples that count together: the first sample, the lowest score in each metric,
    the first error, if any, and whether any answer is empty. Returns `scores` itself if every sample counts by
    itself."""
    places: dict[str, list[int]] = defaultdict(list)
    for row, name in enumerate(scores.together):
        places[name].append(row)
    if len(places) == len(scores.samples):
        return scores
    first = [rows[0] for rows in places.values()]
    models = {}
    for name, model in scores.models.items():
        failed = [next((model.errors[row] for row in rows if model.errors[row]), None) for rows in places.values()]
        least = [np.fmin.reduce(model.values[rows]) for rows in places.values()]  # fmin: NaN only where all are
        empty = [any(model.empty[row] for row in rows) for rows in places.values()]
        models[name] = Model([model.predictions[row] for row in first], failed, empty, np.array(least))
    return Scores([scores.samples[row] for row in first], scores.metrics, scores.facts, models, list(places))


# -- means and their intervals -----------------------------------------------------------------------------------


def overall_figures(scores: Scores) -> tuple[dict[str, Figures], dict[str, Figures]]:
    """Return every model's figures, in percent, and the differences of every other model from base, in percentage
    points. Both have 95% intervals.

    Differences are paired: both models answered the same samples. A difference has `beside`, base's figure on these
    samples. Differences do not include the facts, which are the same for every model.
    """
    scores = scores_by_question(scores)
    groups = scores.groups("group")
    figures = {name: _model_figures(scores, model, groups) for name, model in scores.models.items()}
    base = scores.models[BASE]
    adapters = [name for name in scores.models if name != BASE]
    beside = {name: _figures_beside(scores, base, figures[BASE], scores.models[name], groups) for name in adapters}
    differences: dict[str, Figures] = {name: {} for name in adapters}
    for column, metric in enumerate(scores.metrics):
        compared = [name for name in adapters if metric in beside[name] and metric not in scores.facts]
        pairs = [(scores.models[name].values[:, column] - base.values[:, column], groups) for name in compared]
        for name, figure in zip(compared, difference_figures(pairs), strict=True):
            differences[name][metric] = {**figure, "beside": beside[name][metric]}
    return figures, differences


def _model_figures(scores: Scores, model: Model, groups: Sequence[str]) -> Figures:
    """A model's figures by metric. `groups` has each sample's document."""
    cells = dict(zip(scores.metrics, mean_figures(model.values, groups), strict=True))
    counts = _count_rows(scores, model, range(len(scores.samples)))
    return {metric: {**cells[metric], **counts[metric]} for metric in counts}


def _figures_beside(scores: Scores, base: Model, figures: Figures, other: Model, groups: Sequence[str]) -> Figures:
    """Base's figures on the samples that another model has scores for. `figures` are those on all samples."""
    missing = np.isnan(other.values)
    if (missing <= np.isnan(base.values)).all():
        lacking = [metric for column, metric in enumerate(scores.metrics) if missing[:, column].all()]
        return {metric: figure for metric, figure in figures.items() if metric not in lacking}
    return _model_figures(scores, replace(base, values=np.where(missing, np.nan, base.values)), groups)


def breakdown(scores: Scores, key: str) -> dict[str, dict[str, Figures]]:
    """Return each model's figures, without intervals, for each value of `meta[key]`: model -> value -> metric ->
    figures."""
    scores = scores_by_question(scores)
    rows: dict[str, list[int]] = defaultdict(list)
    for row, group in enumerate(scores.groups(key)):
        rows[group].append(row)
    result: dict[str, dict[str, Figures]] = {name: {} for name in scores.models}
    for name, model in scores.models.items():
        for group, chosen in sorted(rows.items()):
            counts = _count_rows(scores, model, chosen)
            part = model.values[chosen]
            result[name][group] = {
                metric: {"value": percent(float(np.nanmean(part[:, column]))), **counts[metric]}
                for column, metric in enumerate(scores.metrics)
                if metric in counts
            }
    return result


def _count_rows(scores: Scores, model: Model, chosen: Sequence[int]) -> dict[str, dict[str, int]]:
    """Count a model's scored, failed and empty rows among those chosen, as `n`, `failed` and `empty` by metric. Facts
    never fail.

    Leaves out metrics that none of these rows has.
    """
    present = ~np.isnan(model.values[chosen])
    lost = {"failed": np.array([error is not None for error in model.errors])[chosen]}
    lost["empty"] = np.array(model.empty)[chosen]
    counts = {}
    for column, metric in enumerate(scores.metrics):
        if present[:, column].any():
            is_fact = metric in scores.facts
            found = {key: 0 if is_fact else int((present[:, column] & rows).sum()) for key, rows in lost.items()}
            counts[metric] = {"n": int(present[:, column].sum()), **found}
    return counts


# -- the worst answers -------------------------------------------------------------------------------------------


def worst_rows(scores: Scores, name: str, count: int) -> list[int]:
    """Return the rows of a model's worst answers, at most `count`, worst first: failures, then by score, ties by sample
    id. Perfect answers and samples that the model was not asked are left out.

    Scores are ordered by a task's last metric first: tasks list the strictest metric first, and the most lenient says
    most about how wrong an answer is.
    """
    model = scores.models[name]
    answers = model.values[:, : len(scores.metrics) - len(scores.facts)]

    def rank(row: int) -> tuple[bool, tuple[float, ...], str]:
        """The key by which a row is sorted: failures first, then by scores, then by sample id."""
        own = answers[row, ::-1]
        return model.errors[row] is None, tuple(own[~np.isnan(own)]), scores.samples[row]["id"]

    imperfect = [row for row in range(len(scores.samples)) if np.nanmin(answers[row], initial=1.0) < 1]
    return sorted(imperfect, key=rank)[:count]
