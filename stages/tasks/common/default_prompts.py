"""Default members of a task's module: one pass, whose prompt is the sample itself."""

from collections.abc import Collection, Mapping, Sequence

from stages.contract.recipe import Recipe
from stages.contract.records import Sample
from stages.tasks.task import Ask

SHARED: tuple[str, ...] = ()


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
