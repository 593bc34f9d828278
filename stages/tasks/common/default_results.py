"""Default members of a task's module: a plain submission, and no results besides `score`."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from stages.contract.recipe import Recipe
from stages.contract.records import Prediction, Sample


def asked_rows(folder: Path, tested: list[Any]) -> list[dict[str, Any]]:
    """A row of the submission for each test question, in the order of the questions."""
    return [{"id": question.id, "ids": [question.id]} for question in tested]


def submission(row: Mapping[str, Any], predictions: Mapping[str, Prediction]) -> dict[str, Any]:
    """A line with `id` and `answer`. The answer is empty if there is none."""
    prediction = predictions.get(row["id"])
    return {"id": row["id"], "answer": (prediction["answer"] if prediction else None) or ""}


def uploads(folder: Path, samples: Sequence[Sample], predictions: Mapping[str, Prediction]) -> list[str]:
    """An empty list: no benchmark's server needs files besides the submission."""
    return []


def facts(sample: Sample) -> dict[str, float]:
    """An empty dictionary: all metrics depend on the answer."""
    return {}


def score_notes(recipe: Recipe, samples: Sequence[Sample]) -> list[str]:
    """An empty list: nothing needs to be noted about the scores."""
    return []


def together(sample: Sample) -> str:
    """The sample's id, because each sample counts alone."""
    return sample["id"]


def measures(recipe: Recipe, answer: str | None, sample: Sample) -> dict[str, list[float]]:
    """An empty dictionary: the task measures nothing in units."""
    return {}


def picture(recipe: Recipe, sample: Sample, prediction: Prediction | None) -> str | None:
    """None: the task draws nothing."""
    return None
