"""Default members of the contract for tasks.

A task imports those that fit by name and defines the rest, so that its module has all members. `stages.tasks.task`
explains each member.
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
    """Settings of `preprocess.samples`: none."""


class Passes(Section):
    """Settings of `infer.passes`: none."""


class Scoring(Section):
    """Settings of `eval.scoring`: none."""


def asked_rows(folder: Path, tested: list[Any]) -> list[dict[str, Any]]:
    """A row of the submission for each test question, in the order of the questions."""
    return [{"id": question.id, "ids": [question.id]} for question in tested]


def passes(recipe: Recipe) -> tuple[str, ...]:
    """The name of the one pass."""
    return ("answer",)


def ask(recipe: Recipe, sample: Sample, name: str, before: Mapping[str, str], without: Collection[str]) -> Ask:
    """The prompt with the sample's own messages and images, as in training."""
    return Ask(sample["messages"], sample["images"])


def rehearsal(recipe: Recipe, sample: Sample, without: Collection[str]) -> list[tuple[Ask, int]]:
    """The one prompt of `ask`, to which no earlier completion adds tokens."""
    return [(Ask(sample["messages"], sample["images"]), 0)]


def narrowed_sample(sample: Sample, answers: Sequence[str]) -> Sample | None:
    """None, because answers are free text, without options to choose from."""
    return None


def submission(row: Mapping[str, Any], predictions: Mapping[str, Prediction]) -> dict[str, Any]:
    """A line with `id` and `answer`. The answer is empty if there is none."""
    prediction = predictions.get(row["id"])
    return {"id": row["id"], "answer": (prediction["answer"] if prediction else None) or ""}


def facts(sample: Sample) -> dict[str, float]:
    """An empty dictionary: all metrics depend on the answer."""
    return {}


def together(sample: Sample) -> str:
    """The sample's id, because each sample counts alone."""
    return sample["id"]


def uploads(folder: Path, samples: Sequence[Sample], predictions: Mapping[str, Prediction]) -> list[str]:
    """An empty list: no server needs other files than the submission."""
    return []


def measures(recipe: Recipe, answer: str | None, sample: Sample) -> dict[str, list[float]]:
    """An empty dictionary: the task measures nothing in units."""
    return {}


def picture(recipe: Recipe, sample: Sample, prediction: Prediction | None) -> str | None:
    """None: the task draws nothing."""
    return None
