"""logic_choice: logic problems with several single-choice questions each, answered one by one with a letter.

Data folder: `train.jsonl`; optionally `test.jsonl`, with or without answers, and `sources/<name>.jsonl` with more
problems to train on. One problem a line:

    {"id": "p1", "problem": "...", "questions": [{"question": "...", "options": ["...", "..."], "answer": "A"}]}

with 2 to 7 options for each question. `options` may also be an object by letter, and `answer` another form of the
letter (`(A)`, `a.`), the text of an option, or its number. Numbers count from 1 in a file where one of them equals
the number of its options and none is 0, else from 0. An answer that is null or empty counts as missing.
`labels/<name>.jsonl` has guessed answers to problems of these files:

    {"id": "p1", "questions": [{"answer": "A"}]}

matched by problem id and position of the question. They are only trained on, and `label_source` names their file. A
data mix names these files without their endings: `train`, `<name>`. Problems with the same text fall into the same
split, whatever their ids.
"""

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from pydantic import Field

from stages.contract.files import digest_of
from stages.contract.recipe import Recipe, Section
from stages.contract.records import Meta, Prediction, Sample
from stages.tasks.common.default_prompts import SHARED
from stages.tasks.common.default_results import facts, measures, picture, score_notes, together, uploads
from stages.tasks.common.default_settings import (
    READS_CONVERSATIONS,
    READS_DOCUMENTS,
    READS_RECORDS,
    Samples,
    Scoring,
)
from stages.tasks.common.reasoning import without_reasoning
from stages.tasks.logic_choice import prompts
from stages.tasks.logic_choice.problems import LETTERS, LogicQuestion, asked_rows, read_problems, sources
from stages.tasks.task import Ask, Found, Skip

COMPONENTS = ("retry", "adapter")


class LogicMeta(Meta):
    """Metadata of a sample."""

    problem: str
    options: dict[str, str]
    """Option texts by letter."""
    problem_id: str
    index: int
    """0-based position of the sub-question in its problem."""
    label_source: str | None
    """The file of guessed answers that has the answer; None if the answer is the data's own."""


class Passes(Section):
    """Settings of `infer.passes`."""

    retries: int = Field(
        2, ge=0, description="Maximum number of retries for a question whose completion has no valid letter"
    )
    retry_temperature: float = Field(
        0.7, gt=0, description="Sampling temperature of retries; above 0, because greedy decoding would repeat itself"
    )


def read_questions(recipe: Recipe, folder: Path, documents: set[str], skip: Skip) -> list[LogicQuestion]:
    """The usable sub-questions of all files. Unusable ones go to `skip`. Raises DataError if none is usable, or if
    there is no file to train on."""
    return read_problems(folder, skip)


def build_samples(recipe: Recipe, question: LogicQuestion, found: Found | None, split: str) -> list[Sample]:
    """The one sample of a sub-question. Training learns only the line with the letter: reasoning is slow to generate
    and does not improve votes."""
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
        meta["target"] = prompts.target_completion(question.problem, question.answers[0])
    return [
        {
            "id": question.id,
            "messages": prompts.choice_prompt(question.problem, question.text, options),
            "images": [],
            "references": list(question.answers),
            "meta": meta,
        }
    ]


def passes(recipe: Recipe) -> tuple[str, ...]:
    """Names of the passes: `answer`, then one for each retry."""
    return ("answer", *(f"retry_{number}" for number in range(1, _pass_settings(recipe).retries + 1)))


def _pass_settings(recipe: Recipe) -> Passes:
    """The settings of `infer.passes`."""
    return Passes.model_validate(recipe.infer.passes)


def ask(recipe: Recipe, sample: Sample, name: str, before: Mapping[str, str], without: Collection[str]) -> Ask | None:
    """The prompt of the question; a retry samples at `retry_temperature`. None for a retry if an earlier completion has
    a letter, or if `without` has `retry`."""
    if name == "answer":
        return Ask(sample["messages"])
    if "retry" in without or any(read_answer(text, sample) for text in before.values()):
        return None
    # a seed for each sample and pass, so that other prompts and their order do not change the completion
    seed = int(digest_of([recipe.seed, sample["id"], name])[:8], 16) & 0x7FFFFFFF
    return Ask(sample["messages"], temperature=_pass_settings(recipe).retry_temperature, seed=seed)


def possible_prompts(recipe: Recipe, sample: Sample, without: Collection[str]) -> list[tuple[Ask, int]]:
    """The one prompt, which retries repeat and to which no earlier completion adds tokens."""
    return [(Ask(sample["messages"]), 0)]


def read_answer(text: str, sample: Sample) -> str | None:
    """The letter of the option that a completion chooses; None if it chooses none, as there is no default."""
    return prompts.letter_in(without_reasoning(text), _meta(sample)["options"])


def narrowed_sample(sample: Sample, answers: Sequence[str]) -> Sample | None:
    """The sample with only these options, which keep their letters. None if fewer than two options would remain, or if
    none would be removed."""
    meta = _meta(sample)
    options = {letter: option for letter, option in meta["options"].items() if letter in answers}
    if len(options) < 2 or len(options) == len(meta["options"]):
        return None  # nothing to choose, or no option removed
    messages = prompts.choice_prompt(meta["problem"], meta["question"], options)
    fewer: LogicMeta = {**meta, "options": options}
    return {**sample, "messages": messages, "meta": fewer}


def _meta(sample: Sample) -> LogicMeta:
    """The metadata of a sample, with the keys of this task."""
    return cast(LogicMeta, sample["meta"])


def submission(row: Mapping[str, Any], predictions: Mapping[str, Prediction]) -> dict[str, Any]:
    """A line with the answers to a problem's sub-questions, in order. An answer is empty if there is none."""
    found = [predictions.get(place) if place else None for place in row["places"]]
    return {"id": row["id"], "questions": [{"answer": (one["answer"] if one else None) or ""} for one in found]}


def score(recipe: Recipe, answer: str, sample: Sample) -> dict[str, float]:
    """Accuracy: 1 for the right letter, else 0."""
    return {"accuracy": float(answer in sample["references"])}
