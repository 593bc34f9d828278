"""Default members of a task's module: a plain submission, and no results besides `score`."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from stages.contract.recipe import Recipe
from stages.contract.records import Prediction, Sample


def asked_rows(folder: Path, tested: list[Any]) -> list[dict[str, Any]]:
    """One line of the submission for each test question, in their order."""
    return [{"id": question.id, "ids": [question.id]} for question in tested]


def submission(row: Mapping[str, Any], predictions: Mapping[str, Prediction]) -> dict[str, Any]:
    """`id` and `answer`; the answer is empty where there is none."""
    prediction = predictions.get(row["id"])
    return {"id": row["id"], "answer": (prediction["answer"] if prediction else None) or ""}


def uploads(folder: Path, samples: Sequence[Sample], predictions: Mapping[str, Prediction]) -> list[str]:
    """No files beside the submission."""
    return []


def facts(sample: Sample) -> dict[str, float]:
    """No metrics that are independent of the answer."""
    return {}


def together(sample: Sample) -> str:
    """Each sample counts by itself."""
    return sample["id"]


def measures(recipe: Recipe, answer: str | None, sample: Sample) -> dict[str, list[float]]:
    """No measures with a unit."""
    return {}


def picture(recipe: Recipe, sample: Sample, prediction: Prediction | None) -> str | None:
    """No drawing."""
    return None
