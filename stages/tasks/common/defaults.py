"""What most tasks have to say where the protocol asks for something that only few have: nothing.

A task takes these as its own (`stages.tasks.Task` tells what each one means) and writes those that it has.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

from stages.contract.recipe import Recipe
from stages.contract.records import Prediction, Sample


def facts(sample: Sample) -> dict[str, float]:
    """Nothing that no answer changes: nothing is searched."""
    return {}


def together(sample: Sample) -> str:
    """Each sample counts by itself."""
    return sample["id"]


def uploads(folder: Path, samples: Sequence[Sample], predictions: Mapping[str, Prediction]) -> list[str]:
    """The submission is all that is handed in."""
    return []


def measures(recipe: Recipe, answer: str | None, sample: Sample) -> dict[str, list[float]]:
    """Nothing has a unit."""
    return {}


def picture(recipe: Recipe, sample: Sample, prediction: Prediction | None) -> str | None:
    """There is nothing to draw."""
    return None
