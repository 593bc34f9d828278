"""What a task measures in units, such as degrees, centimetres or pieces, next to the scores, which are shares."""

from collections import defaultdict
from dataclasses import dataclass
from statistics import fmean, median
from typing import Any

from stages.contract.recipe import Recipe
from stages.eval.scores import Scores


@dataclass(frozen=True)
class Measure:
    """One measure over one model's answers. An answer may have any number of values: `n` counts the values."""

    n: int
    mean: float
    median: float
    most: float


def measure_answers(task: Any, recipe: Recipe, scores: Scores) -> dict[str, dict[str, Measure]]:
    """Return the measures by model and by the measure's name; empty if no model has one. Values are rounded to four
    decimals.

    The task gets None for a failed answer. Samples that a model was not asked are left out.
    """
    found: dict[str, dict[str, Measure]] = {}
    for name, model in scores.models.items():
        values: dict[str, list[float]] = defaultdict(list)
        for sample, prediction, error in zip(scores.samples, model.predictions, model.errors, strict=True):
            if prediction is None and error is None:
                continue  # not asked
            answer = prediction["answer"] if prediction is not None and error is None else None
            for measure, each in task.measures(recipe, answer, sample).items():
                values[measure] += each
        found[name] = {
            measure: Measure(len(each), round(fmean(each), 4), round(median(each), 4), round(max(each), 4))
            for measure, each in values.items()
            if each
        }
    return found if any(found.values()) else {}
