"""The contract's defaults: what most tasks leave as it is.

A task imports them by name and defines the rest, so that its module has all of the contract. `stages.tasks.task` says
what each name means.
"""

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from stages.contract.recipe import Recipe, Section
from stages.contract.records import Prediction, Sample
from stages.tasks.task import Ask

READS_DOCUMENTS = False
READS_RECORDS = False

COMPONENTS: tuple[str, ...] = ()

SHARED: tuple[str, ...] = ()


class Samples(Section):
    """`preprocess.samples`: no settings."""


class Passes(Section):
    """`infer.passes`: no settings."""


class Scoring(Section):
    """`eval.scoring`: no settings."""


def asked_rows(folder: Path, tested: list[Any]) -> list[dict[str, Any]]:
    """One line of the submission for each test question, in their order."""
    return [{"id": question.id, "ids": [question.id]} for question in tested]


def passes(recipe: Recipe) -> tuple[str, ...]:
    """One pass."""
    return ("answer",)


def ask(recipe: Recipe, sample: Sample, name: str, before: Mapping[str, str], without: Collection[str]) -> Ask:
    """The sample's own messages and images, as in training."""
    return Ask(sample["messages"], sample["images"])


def rehearsal(recipe: Recipe, sample: Sample, without: Collection[str]) -> list[tuple[Ask, int]]:
    """The one prompt of `ask`."""
    return [(Ask(sample["messages"], sample["images"]), 0)]


def narrowed_sample(sample: Sample, answers: Sequence[str]) -> Sample | None:
    """None: answers are free text, so there are no options to choose from."""
    return None


def submission(row: Mapping[str, Any], predictions: Mapping[str, Prediction]) -> dict[str, Any]:
    """`id` and `answer`; the answer is empty where there is none."""
    prediction = predictions.get(row["id"])
    return {"id": row["id"], "answer": (prediction["answer"] if prediction else None) or ""}


def facts(sample: Sample) -> dict[str, float]:
    """No metrics that are independent of the answer."""
    return {}


def together(sample: Sample) -> str:
    """Each sample counts by itself."""
    return sample["id"]


def uploads(folder: Path, samples: Sequence[Sample], predictions: Mapping[str, Prediction]) -> list[str]:
    """No files beside the submission."""
    return []


def measures(recipe: Recipe, answer: str | None, sample: Sample) -> dict[str, list[float]]:
    """No measures with a unit."""
    return {}


def picture(recipe: Recipe, sample: Sample, prediction: Prediction | None) -> str | None:
    """No drawing."""
    return None
