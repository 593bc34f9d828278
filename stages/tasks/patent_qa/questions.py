"""The questions files, and the documents that the questions are about."""

import unicodedata
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from stages.contract.errors import DataError
from stages.contract.files import data_files, unread_data
from stages.contract.recipe import Recipe
from stages.tasks.common.json_lines import BadRecordError, is_given, lines_in, object_in, text_of, texts_of
from stages.tasks.common.mentions import figure_named, pages_named
from stages.tasks.common.skips import Skips
from stages.tasks.common.tables import Row, names_in
from stages.tasks.task import Skip

SOURCE = "questions"
"""The name of the one data set."""


@dataclass(frozen=True)
class PatentQuestion:
    """A question about a patent document."""

    id: str
    text: str
    document: str
    """Path of the PDF relative to `documents/`, with its ending."""
    pages: tuple[int, ...]
    """1-based pages that the text names, in order of mention."""
    figure: str | None
    """Figure that the text names, such as `2a`; None without one."""
    answers: tuple[str, ...]
    evidence: tuple[int, ...]
    """1-based pages that hold the answer, according to the data."""
    kind: str
    split: Literal["train", "test"] | None
    """The split that the data state; None: Lorry chooses it."""
    row: int
    """0-based position among the non-blank lines of its file, as in the original's submissions."""

    @property
    def source(self) -> str:
        """Name of the one data set."""
        return SOURCE

    @property
    def group(self) -> str:
        """The document, because all its questions fall into the same split."""
        return self.document

    @property
    def page(self) -> int | None:
        """The first page (1-based) that the text names; None if it names none."""
        return self.pages[0] if self.pages else None


def find_documents(folder: Path) -> list[Path]:
    """Paths of all files below `documents/`, sorted. Rendering reports those that are not PDFs. Raises DataError if
    there is no file."""
    documents = folder / "documents"
    found = [path for path in data_files(folder) if documents in path.parents]
    if not found:
        reasons = [
            f": {path.name} is a {why}"
            for path, (why, _) in unread_data(folder).items()
            if path.is_relative_to(documents)
        ]
        raise DataError(f"{documents}: no documents{''.join(reasons[:1])}; put the PDFs there")
    return found


def read_questions(recipe: Recipe, folder: Path, documents: set[str], skip: Skip) -> list[PatentQuestion]:
    """All usable questions. Unusable lines go to `skip` with file and line; so do training questions about a test
    document, with their ids. Raises DataError if a file is missing or no line is usable."""
    sources: list[tuple[Path, Literal["train", "test"] | None]] = [
        (folder / "test.jsonl", "test"),
        (folder / "train.jsonl", "train"),
    ]
    pair = [path.is_file() for path, _ in sources]
    if any(pair) and not all(pair):
        raise DataError(
            f"{folder}: {sources[pair.index(False)][0].name} is missing; add it, or put all questions into"
            " questions.jsonl"
        )
    if not any(pair):
        sources = [(folder / "questions.jsonl", None)]
    skip = Skips(skip)
    questions: dict[str, PatentQuestion] = {}
    for path, split in sources:
        if not path.is_file():
            raise DataError(
                f"{folder}: no questions, found {names_in(folder)}; put questions.jsonl there, or train.jsonl and"
                " test.jsonl"
            )
        for row, (place, line) in enumerate(lines_in(path)):
            where = f"{path.name}:{place}"
            try:
                question = replace(_parse_line(line, f"{path.stem}-{place}", split, documents), row=row)
            except BadRecordError as error:
                skip(where, error.reason, str(error))
                continue
            if question.id in questions and questions[question.id].split != split:  # ids of both files may start at 1
                question = replace(question, id=f"{split}-{question.id}")
            if question.id in questions:
                skip(where, "duplicate id", question.id)
                continue
            questions[question.id] = question
    if not questions:
        raise DataError(f"{folder}: no usable question in {' or '.join(path.name for path, _ in sources)}; {skip.why}")
    return _without_leaks(list(questions.values()), skip)


def asked_rows(folder: Path, tested: list[PatentQuestion]) -> list[dict[str, Any]]:
    """The rows of the submission in the order of the file, one for each line of test.jsonl, including unusable
    lines. Without that file, one for each question about the held-out documents.

    A row has `idx` (0-based, as text), `ids` (empty for an unusable line), `document` and `question`.
    """
    found = {question.row: question for question in tested}
    given = folder / "test.jsonl"
    if not given.is_file():
        return [_row(row, found[row], {}) for row in sorted(found)]
    return [_row(row, found.get(row), line.record) for row, (_, line) in enumerate(lines_in(given))]


def _row(row: int, question: PatentQuestion | None, record: Any) -> dict[str, Any]:
    """The row of the submission for a line. For an unusable line `question` is None, and `record` is its JSON value."""
    if question is not None:
        return {"idx": str(row), "ids": [question.id], "document": question.document, "question": question.text}
    given = record if isinstance(record, dict) else {}
    texts = {key: str(given[key]) if is_given(given.get(key)) else "" for key in ("document", "question")}
    return {"idx": str(row), "ids": [], **texts}


def _parse_line(
    line: Row, default_id: str, split: Literal["train", "test"] | None, documents: set[str]
) -> PatentQuestion:
    """The question in a line, whose `row` is not set yet. Raises BadRecordError if it is unusable."""
    record = object_in(line)
    text = text_of(record, "question")
    document = text_of(record, "document")
    if document not in documents:  # as spelled, if names differ only by composition
        document = unicodedata.normalize("NFC", document)
    if document not in documents:
        raise BadRecordError("unknown document", document)
    return PatentQuestion(
        id=text_of(record, "id") if is_given(record.get("id")) else default_id,
        text=text,
        document=document,
        pages=tuple(pages_named(text)),
        figure=figure_named(text),
        answers=_answers(record),
        evidence=_evidence(record),
        kind=str(record["kind"]) if is_given(record.get("kind")) else "",
        split=split,
        row=0,
    )


def _answers(record: dict[str, Any]) -> tuple[str, ...]:
    """The answers of a record, with numbers as text; empty if it has none. Raises BadRecordError for other values."""
    found = texts_of(record.get("answer"))
    if found is None:
        raise BadRecordError("answer is neither a text nor a number, nor a list of them", repr(record["answer"])[:100])
    return tuple(found)


def _evidence(record: dict[str, Any]) -> tuple[int, ...]:
    """The pages of a record's evidence; empty if it has none. Raises BadRecordError for values that are not page
    numbers."""
    value = record["pages"] if is_given(record.get("pages")) else []
    if not isinstance(value, list) or not all(type(v) is int and v >= 1 for v in filter(is_given, value)):
        raise BadRecordError("pages is not a list of page numbers", repr(value)[:100])
    return tuple(filter(is_given, value))


def _without_leaks(questions: list[PatentQuestion], skip: Skip) -> list[PatentQuestion]:
    """The questions without training questions about a document that also has test questions. Those go to `skip`."""
    tested = {question.document for question in questions if question.split == "test"}
    usable = []
    for question in questions:
        if question.split == "train" and question.document in tested:
            skip(question.id, "training question on a test document", question.document)
        else:
            usable.append(question)
    return usable
