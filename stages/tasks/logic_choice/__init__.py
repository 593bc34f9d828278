"""logic_choice: logic problems with several single-choice questions each, answered one by one with a letter.

Data folder: `train.jsonl`; where there are, `test.jsonl`, with or without answers, and `sources/<name>.jsonl`, further
problems to train on. One problem a line:

    {"id": "p1", "problem": "...", "questions": [{"question": "...", "options": ["...", "..."], "answer": "A"}]}

with 2 to 7 options a question, without letters. `answer` may also be the text of an option. `labels/<name>.jsonl` holds
answers that somebody guessed, to problems of these files:

    {"id": "p1", "questions": [{"answer": "A"}]}

joined by problem and place of the question; only trained on, and marked with their file. A data mix names these files
without their endings: `train`, `<name>`. Problems of the same text are split together, under whatever ids.
"""

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from pydantic import Field

from stages.contract.files import digest_of
from stages.contract.recipe import Recipe, Section
from stages.contract.records import Meta, Prediction, Sample
from stages.tasks.common.defaults import (
    READS_DOCUMENTS,
    READS_RECORDS,
    SHARED,
    Samples,
    Scoring,
    facts,
    measures,
    picture,
    together,
    uploads,
)
from stages.tasks.logic_choice import prompts
from stages.tasks.logic_choice.problems import LETTERS, LogicQuestion, asked_rows, read_problems, sources
from stages.tasks.task import Ask, Found, Skip

COMPONENTS = ("retry", "adapter")


class LogicMeta(Meta):
    problem: str
    options: dict[str, str]
    """By letter."""
    problem_id: str
    index: int
    """0-based place of the sub-question in its problem."""
    label_source: str | None


class Passes(Section):
    """`infer.passes`."""

    retries: int = Field(2, ge=0, description="Times that a question is asked again whose answer holds no valid letter")
    retry_temperature: float = Field(0.7, gt=0, description="Of those: greedily the same would come again")


def read_questions(recipe: Recipe, folder: Path, documents: set[str], skip: Skip) -> list[LogicQuestion]:
    """The sub-questions of all files; what cannot be used goes to `skip`, with its file and line."""
    return read_problems(folder, skip)


def build_samples(recipe: Recipe, question: LogicQuestion, found: Found | None, split: str) -> list[Sample]:
    """The one sample of a sub-question. What is to be learnt is the line with the letter alone: reasoning is slow to
    write, and makes votes no better."""
    options = dict(zip(LETTERS, question.options, strict=False))
    meta: LogicMeta = {
        "group": question.group,
        "source": question.source,
        "kind": f"{len(options)} options",
        "problem": question.problem,
        "question": question.text,
        "options": options,
        "problem_id": question.problem_id,
        "index": question.index,
        "label_source": question.label_source,
    }
    if split != "test":
        meta["target"] = prompts.target(question.problem, question.answers[0])
    return [
        {
            "id": question.id,
            "messages": prompts.choice(question.problem, question.text, options),
            "images": [],
            "references": list(question.answers),
            "meta": meta,
        }
    ]


def passes(recipe: Recipe) -> tuple[str, ...]:
    """`answer`, and as many retries as there may be."""
    return ("answer", *(f"retry_{number}" for number in range(1, _passes(recipe).retries + 1)))


def _passes(recipe: Recipe) -> Passes:
    return Passes.model_validate(recipe.infer.passes)


def ask(recipe: Recipe, sample: Sample, name: str, before: Mapping[str, str], without: Collection[str]) -> Ask | None:
    """The question; again, with a temperature, while no completion held a valid letter."""
    if name == "answer":
        return Ask(sample["messages"])
    if "retry" in without or any(read_answer(text, sample) for text in before.values()):
        return None
    # the sample's own random numbers: whatever else is asked, and in which order, changes nothing
    seed = int(digest_of([recipe.seed, sample["id"], name])[:8], 16) & 0x7FFFFFFF
    return Ask(sample["messages"], temperature=_passes(recipe).retry_temperature, seed=seed)


def rehearsal(recipe: Recipe, sample: Sample, without: Collection[str]) -> list[tuple[Ask, int]]:
    """The one prompt that there is."""
    return [(Ask(sample["messages"]), 0)]


def read_answer(text: str, sample: Sample) -> str | None:
    """The letter in a completion, of those that the question has; None where there is none: no letter is a default."""
    return prompts.letter_in(text, _meta(sample)["options"])


def narrowed(sample: Sample, answers: Sequence[str]) -> Sample | None:
    """The question with only these options, which keep their letters."""
    meta = _meta(sample)
    options = {letter: option for letter, option in meta["options"].items() if letter in answers}
    if len(options) < 2 or len(options) == len(meta["options"]):
        return None  # nothing is left to choose, or the question is the one that was asked
    messages = prompts.choice(meta["problem"], meta["question"], options)
    fewer: LogicMeta = {**meta, "options": options}
    return {**sample, "messages": messages, "meta": fewer}


def _meta(sample: Sample) -> LogicMeta:
    return cast(LogicMeta, sample["meta"])


def submission(row: Mapping[str, Any], predictions: Mapping[str, Prediction]) -> dict[str, Any]:
    """A problem's answers in the order of its questions; an empty one where there is none."""
    found = [predictions.get(place) if place else None for place in row["places"]]
    return {"id": row["id"], "questions": [{"answer": (one["answer"] if one else None) or ""} for one in found]}


def score(recipe: Recipe, answer: str, sample: Sample) -> dict[str, float]:
    """Whether it is the right letter."""
    return {"accuracy": float(answer in sample["references"])}
