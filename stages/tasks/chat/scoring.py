"""Scores of answers in a conversation: chrF and ROUGE-L, and exact match and F1 where answers are short."""

from collections.abc import Sequence

from stages.contract.recipe import Recipe
from stages.contract.records import Sample
from stages.tasks.common.open_answers import NOTE, open_scores


def score(recipe: Recipe, answer: str, sample: Sample) -> dict[str, float]:
    """The scores of an open answer. chrF, the first, ranks adapters."""
    return open_scores(answer, sample["references"])


def score_notes(recipe: Recipe, samples: Sequence[Sample]) -> list[str]:
    """A sentence on the rules by which each metric is computed."""
    return [NOTE]
