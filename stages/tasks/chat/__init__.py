"""chat: conversations of any form, as people have them: the model learns the assistant's answers.

Data path: a file, or a folder in which each entry is a data set, as JSON, JSON Lines, CSV, TSV, Parquet, Arrow, or a
folder of these, such as `datasets` saves. In a folder, files or folders named train, validation and test state the
splits. `stages.tasks.chat.forms` lists the forms of records, which are found by looking at each record. Texts reach the
model as they are in the data, byte for byte. Pictures are files below the data folder.

Conversations fall into splits as a whole, and so do near-duplicates. A plain text is learnt from and never asked.
"""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from stages.contract.recipe import Recipe, Section
from stages.contract.records import Sample, unescape_places
from stages.tasks.chat.conversations import ChatQuestion, Reading, grouped_questions, with_small_sets_together
from stages.tasks.chat.forms import COLUMNS, Form
from stages.tasks.chat.scoring import score, score_notes
from stages.tasks.common.data_sets import data_sets_in
from stages.tasks.common.default_prompts import SHARED, ask, narrowed_sample, passes, possible_prompts
from stages.tasks.common.default_results import asked_rows, facts, measures, picture, submission, together, uploads
from stages.tasks.common.default_settings import COMPONENTS, READS_DOCUMENTS, READS_RECORDS, Passes, Scoring
from stages.tasks.common.reasoning import without_reasoning
from stages.tasks.task import Found, Say, Skip

READS_CONVERSATIONS = True

PICTURES = "preprocess/pictures"
"""Folder in which pictures are stored, relative to the run."""


def _check_columns(columns: dict[str, str]) -> dict[str, str]:
    """The columns. Raises ValueError for an unknown name."""
    unknown = next((name for name in columns if name not in COLUMNS), None)
    if unknown is not None:
        raise ValueError(f"columns: found {unknown!r}; name one of {', '.join(COLUMNS)}")
    return columns


class Samples(Section):
    """Settings of `preprocess.samples`."""

    form: Literal["auto", Form] = Field(
        "auto", description="Form of the records; auto: found by looking at each of them"
    )
    columns: Annotated[dict[str, str], AfterValidator(_check_columns)] = Field(
        {},
        description="The data's own names of keys or columns, by the names that Lorry knows, such as {question: Frage,"
        " answer: Antwort}; for turns with other keys {messages: dialogue, role: speaker, content: said}",
    )
    near_duplicates: float | None = Field(
        0.8,
        gt=0,
        le=1,
        description="Share of their text that two conversations must have in common to be near-duplicates, which are"
        " never on both sides of a split; null: only those with the same text or the same prompt",
    )


def sources(folder: Path) -> list[str]:
    """The names of the data sets in the data path, sorted. Raises DataError if there is none, or if two have the same
    name."""
    return sorted(data_sets_in(folder))


def read_conversations(recipe: Recipe, path: Path, pictures: Path, skip: Skip, say: Say) -> list[ChatQuestion]:
    """All usable conversations, and plain texts, in the order of the data sets' names. Unusable records go to `skip`
    with file and line. Says the form and the number of conversations of each data set, and the number of
    near-duplicates. Raises DataError if no record is usable."""
    settings = Samples.model_validate(recipe.preprocess.samples)
    form = None if settings.form == "auto" else settings.form
    named = {part.source for adapter in recipe.train.adapters for part in adapter.data}
    questions = with_small_sets_together(Reading(path, pictures, form, settings.columns, skip).questions(say), named)
    return grouped_questions(questions, settings.near_duplicates, say)


def build_samples(recipe: Recipe, question: ChatQuestion, found: Found | None, split: str) -> list[Sample]:
    """The one sample of a conversation. In the test split it is asked at its last answer, which is in
    `meta["answer"]`."""
    sample: Sample = {
        "id": question.id,
        "messages": list(question.messages),
        "images": [f"{PICTURES}/{name}" for name in question.images],
        "references": [],
        "meta": {"group": question.group, "source": question.source, "kind": question.source},
    }
    if question.plain is not None:
        sample["text"] = question.plain
        return [sample]
    *asked, answer = question.messages
    sample["references"] = [unescape_places(answer["content"])] if answer["content"].strip() else []
    sample["meta"]["question"] = question.text
    if question.tools:
        sample["tools"] = list(question.tools)
    if split == "test":
        sample["messages"] = asked
        sample["meta"]["answer"] = answer
    return [sample]


def read_answer(text: str, sample: Sample) -> str | None:
    """A completion without its reasoning, otherwise unchanged; None if nothing but white space is left."""
    answer = without_reasoning(text)
    return answer if answer.strip() else None
