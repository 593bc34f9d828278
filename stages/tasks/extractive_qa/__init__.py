"""extractive_qa: questions about a context, answered with words of the context; usually one adapter for each data set.

Data folder: each entry directly below it is a data set, named after the entry without its ending. A data set is a JSON
array, JSON Lines, CSV, TSV, Parquet or Arrow file, a folder of such files, or a folder saved by `datasets`. In a
folder, files or folders named train, validation and test state the splits. Records have one of two forms, or that of
SQuAD's own files:

    {"messages": [{"role": "user", "content": "Context: ...\\nQuestion: ..."}, {"role": "assistant", "content": "..."}]}
    {"context": "...", "question": "...", "answers": {"text": ["...", ...]}, "id": "", "group": "" or "title": ""}

A field that is null or empty counts as missing. A number as an answer is read as text.

All questions about the same context, or with the same `group` (or `title`), fall into the same split.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import Field

from stages.contract.recipe import Recipe, Section
from stages.contract.records import Meta, Prediction, Sample
from stages.tasks.common import metrics, short_answers
from stages.tasks.common.default_prompts import SHARED, ask, narrowed_sample, passes, possible_prompts
from stages.tasks.common.default_results import facts, measures, picture, together, uploads
from stages.tasks.common.default_settings import (
    COMPONENTS,
    READS_CONVERSATIONS,
    READS_DOCUMENTS,
    READS_RECORDS,
    Passes,
    Samples,
)
from stages.tasks.extractive_qa import prompts
from stages.tasks.extractive_qa.questions import ContextQuestion, asked_rows, read_questions, sources
from stages.tasks.task import Found


class ExtractiveMeta(Meta):
    """Metadata of a sample."""

    context_characters: int


class Scoring(Section):
    """Settings of `eval.scoring`."""

    normalization: metrics.Normalization = Field(
        "squad",
        description="Normalisation of answer and reference before they are compared; squad: SQuAD's rules; original:"
        " first the rules of the original, for scores to set beside its own, then SQuAD's",
    )


def build_samples(recipe: Recipe, question: ContextQuestion, found: Found | None, split: str) -> list[Sample]:
    """The one sample of a question, the same in every split except for the target, which the test split lacks."""
    meta: ExtractiveMeta = {
        "group": question.group,
        "source": question.source,
        "kind": question.source,
        "question": question.text,
        "context_characters": len(question.context),
    }
    target = short_answers.learnt_answer(question.answers)
    if split != "test" and target is not None:
        meta["target"] = target
    return [
        {
            "id": question.id,
            "messages": prompts.answer_prompt(question.context, question.text),
            "images": [],
            "references": list(question.answers),
            "meta": meta,
        }
    ]


def read_answer(text: str, sample: Sample) -> str | None:
    """The first line of a completion, or as many lines as the longest reference has; None if all lines are blank."""
    return short_answers.first_lines(text, sample) or None


def submission(row: Mapping[str, Any], predictions: Mapping[str, Prediction]) -> dict[str, Any]:
    """A line with the question's id, data set, text and answer. The answer is empty if there is none."""
    prediction = predictions.get(row["id"])
    answer = (prediction["answer"] if prediction else None) or ""
    return {"id": row["id"], "dataset": row["dataset"], "question": row["question"], "answer": answer}


def score(recipe: Recipe, answer: str, sample: Sample) -> dict[str, float]:
    """Exact match and F1 by the rules of SQuAD, of CMRC 2018 for Chinese, and of Lorry; see `short_answers.scores`."""
    settings = Scoring.model_validate(recipe.eval.scoring)
    first = metrics.normalize_original if settings.normalization == "original" else str
    return short_answers.scores(answer, sample, squad_first=first)


def score_notes(recipe: Recipe, samples: Sequence[Sample]) -> list[str]:
    """Sentences on the rules by which each metric is computed; see `short_answers.score_notes`."""
    return short_answers.score_notes(samples)
