"""What a task measures in units: degrees, centimetres, pieces. Beside the scores, which are shares of what there is."""

from collections import defaultdict
from dataclasses import dataclass
from statistics import fmean, median
from typing import Any

from stages.contract.recipe import Recipe
from stages.eval.scores import Scores


@dataclass(frozen=True)
class Measure:
    """All values that one model's answers have of a measure. An answer may have none: `n` says how many there are."""

    n: int
    mean: float
    median: float
    most: float


def measured(task: Any, recipe: Recipe, scores: Scores) -> dict[str, dict[str, Measure]]:
    """By model and by name of the measure; empty where the task measures nothing. A failed answer is one without."""
    found: dict[str, dict[str, Measure]] = {}
    for name, model in scores.models.items():
        values: dict[str, list[float]] = defaultdict(list)
        for sample, prediction, error in zip(scores.samples, model.predictions, model.errors, strict=True):
            if prediction is None and error is None:
                continue  # was not asked
            answer = prediction["answer"] if prediction is not None and error is None else None
            for measure, each in task.measures(recipe, answer, sample).items():
                values[measure] += each
        found[name] = {
            measure: Measure(len(each), round(fmean(each), 4), round(median(each), 4), round(max(each), 4))
            for measure, each in values.items()
            if each
        }
    return found if any(found.values()) else {}
