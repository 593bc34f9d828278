"""Default members of a task's module: one pass, whose prompt is the sample itself."""

from collections.abc import Collection, Mapping, Sequence

from stages.contract.recipe import Recipe
from stages.contract.records import Sample
from stages.tasks.task import Ask

SHARED: tuple[str, ...] = ()


def passes(recipe: Recipe) -> tuple[str, ...]:
    """The name of the only pass, `answer`, in a tuple."""
    return ("answer",)


def ask(recipe: Recipe, sample: Sample, name: str, before: Mapping[str, str], without: Collection[str]) -> Ask:
    """The prompt with the sample's own messages and images, as in training."""
    return Ask(sample["messages"], sample["images"], tools=sample.get("tools") or [])


def possible_prompts(recipe: Recipe, sample: Sample, without: Collection[str]) -> list[tuple[Ask, int]]:
    """The one prompt of `ask`, to which no earlier completion adds tokens."""
    return [(ask(recipe, sample, "answer", {}, without), 0)]


def narrowed_sample(sample: Sample, answers: Sequence[str]) -> Sample | None:
    """None, because answers are free text, without options to choose from."""
    return None
