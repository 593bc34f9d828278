"""The data sets of the data folder, and the questions in their records."""

import hashlib
import re
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from stages.contract.errors import DataError
from stages.contract.recipe import Recipe
from stages.tasks.common.data_sets import data_sets_in, file_of, skip_other_entries, uses_of_splits
from stages.tasks.common.groups import Groups
from stages.tasks.common.json_lines import BadRecordError, found_keys, is_given, text_or_number, texts_of
from stages.tasks.common.skips import Skips
from stages.tasks.common.tables import Split, read_rows
from stages.tasks.task import Given, Skip


@dataclass(frozen=True)
class ContextQuestion:
    """A question about a context."""

    id: str
    """Begins with the data set's name."""
    text: str
    context: str
    """Empty if the record has none."""
    answers: tuple[str, ...]
    """Reference answers, without blank lines; training learns the first."""
    source: str
    group: str
    split: Given | None


# -- data sets ---------------------------------------------------------------------------------------------------


def sources(folder: Path) -> list[str]:
    """The names of the data sets in the data folder, sorted. Raises DataError if there is none, or if two have the same
    name."""
    return sorted(data_sets_in(folder))


# -- questions ---------------------------------------------------------------------------------------------------


def read_questions(recipe: Recipe, folder: Path, documents: set[str], skip: Skip) -> list[ContextQuestion]:
    """All usable questions, in the order of the data sets' names. Unusable records go to `skip` with file and line.
    Files and folders that are not data sets go there by name, except README, LICENSE and NOTICE. Raises DataError if no
    question is usable, and as `sources` does."""
    data_sets, skip = data_sets_in(folder), Skips(skip)
    skip_other_entries(folder, data_sets, skip)
    questions = [question for name in sorted(data_sets) for question in _read_data_set(name, data_sets[name], skip)]
    if not questions:
        raise DataError(f"{folder}: no usable question in {', '.join(sorted(data_sets))}; {skip.why}")
    return _with_groups(questions)


def _read_data_set(source: str, path: Path, skip: Skip) -> list[ContextQuestion]:
    """The usable questions of one data set; unusable records go to `skip`. `group` is the record's own group; empty if
    it has none, or if all questions share one."""
    found: dict[str, ContextQuestion] = {}
    stated: dict[str, Split | None] = {}
    files: dict[str, str] = {}
    for row in read_rows(path):
        if row.bad is not None:
            skip(row.where, *row.bad)
            continue
        for number, part in enumerate(_nested_records(row.record)):
            try:
                name, question = _parse_record(part)
            except BadRecordError as error:
                skip(row.where, error.reason, str(error))
                continue
            file = file_of(row, path)
            place = f"{file}-{row.place}" + (f".{number + 1}" if number else "")
            while name and files.get(name, row.file) != row.file:  # ids of each file may start at 1
                name = f"{file}-{name}"
            key = f"{source}/{name or place}"
            if key in found:
                skip(row.where, "duplicate id", key)
                continue
            files[name] = row.file
            stated[key] = row.split
            found[key] = replace(question, id=key, source=source)
    splits = uses_of_splits({split for split in stated.values() if split})
    one = len({question.group for question in found.values()}) == 1  # such as a title that names the data set
    return [
        replace(question, split=splits.get(stated[key]), group="" if one else question.group)  # type: ignore[arg-type]
        for key, question in found.items()
    ]


def _with_groups(questions: list[ContextQuestion]) -> list[ContextQuestion]:
    """The questions with their final groups.

    Questions about the same context fall into one group, whatever their data sets. So do questions of one data set that
    state the same group. The name of a group does not depend on the order of questions.
    """
    groups = Groups()
    shared = [_group_name(question) for question in questions]
    for question, name in zip(questions, shared, strict=True):
        if question.group:
            groups.join(name, f"{question.source}/{question.group}")
    return [replace(question, group=groups.name_of(name)) for question, name in zip(questions, shared, strict=True)]


def _group_name(question: ContextQuestion) -> str:
    """A name for a question's context, or for its text if it has none. Case, width and white space do not count."""
    kind, text = ("context", question.context) if question.context else ("question", question.text)
    normal = " ".join(unicodedata.normalize("NFKC", text).casefold().split())
    return f"{kind}-{hashlib.sha256(normal.encode()).hexdigest()[:16]}"


def asked_rows(folder: Path, tested: list[ContextQuestion]) -> list[dict[str, Any]]:
    """A row of the submission for each test question, in the order of `tested`."""
    return [{"ids": [one.id], "id": one.id, "dataset": one.source, "question": one.text} for one in tested]


# -- one record --------------------------------------------------------------------------------------------------


def _nested_records(record: Any) -> Iterator[Any]:
    """The records of single questions in a record of SQuAD's own files, where articles contain paragraphs and
    paragraphs contain questions. A record of another form is yielded unchanged."""
    if not isinstance(record, dict):
        yield record
    elif isinstance(record.get("data"), list):
        for article in record["data"]:
            yield from _nested_records(article)
    elif isinstance(record.get("paragraphs"), list):
        for paragraph in record["paragraphs"]:
            yield from _nested_records(_with_inherited_fields(paragraph, record, "title"))
    elif isinstance(record.get("qas"), list):
        for question in record["qas"]:
            yield _with_inherited_fields(question, record, "title", "group", "context")
    else:
        yield record


def _with_inherited_fields(nested: Any, record: dict[str, Any], *fields: str) -> Any:
    """A nested record, with each of `fields` that it lacks copied from the record that contains it. Anything but an
    object is returned unchanged."""
    if not isinstance(nested, dict):
        return nested
    return {**nested, **{field: record.get(field) for field in fields if not is_given(nested.get(field))}}


def _parse_record(record: Any) -> tuple[str, ContextQuestion]:
    """A record's id, empty if it has none, and its question, whose id, source and split are not set yet. Raises
    BadRecordError if the record is unusable."""
    if not isinstance(record, dict):
        raise BadRecordError("not a JSON object", f"found {type(record).__name__}")
    messages = record.get("messages")
    if messages is not None and (is_given(messages) or not is_given(record.get("question"))):
        context, text, answers = _parse_messages(messages)
    else:
        context = _text(record, "context") if is_given(record.get("context")) else ""
        text, answers = _text(record, "question"), _answers(record)
    if not text:
        raise BadRecordError("empty question")
    if not answers:
        raise BadRecordError("no answer", found_keys(record))
    group = _string_or_integer(record, "group") or _string_or_integer(record, "title")
    return _string_or_integer(record, "id"), ContextQuestion("", text, context, answers, "", group, None)


_CONTEXT = re.compile(r"\s*(?:context|上下文)\s*[:：]", re.IGNORECASE)
_QUESTION = re.compile(r"^[^\S\n]*(?:question|问题)\s*[:：]", re.IGNORECASE | re.MULTILINE)
_QUESTION_IN_LINE = re.compile(r"(?<=[\s.!?;。！？；…”」）)])(?:question|问题)\s*[:：]", re.IGNORECASE)


def _parse_messages(messages: Any) -> tuple[str, str, tuple[str, ...]]:
    """Context, question and answers of a conversation. A system message is allowed and ignored: the task has its own.
    Raises BadRecordError for another form.

    The context begins after the marker at the start of the text, and the question after the last marker at the start of
    a line, so context and question may contain the words of a marker. If no question marker is at the start of a line,
    the last one after a sentence or white space counts. Unless both markers are found, the whole text is the question.
    """
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        raise BadRecordError("messages is not a list of objects", repr(messages)[:100])
    roles = [message.get("role") for message in messages]
    if roles[:1] == ["system"]:
        messages, roles = messages[1:], roles[1:]
    if roles != ["user", "assistant"]:
        raise BadRecordError("not one user and one assistant message", f"found {roles}"[:100])
    asked, answer = _text(messages[0], "content"), _texts(messages[1], "content")
    context = _CONTEXT.match(asked)
    questions = list(_QUESTION.finditer(asked)) or list(_QUESTION_IN_LINE.finditer(asked))
    found = ("", asked)
    if context and questions and questions[-1].start() >= context.end():
        found = (asked[context.end() : questions[-1].start()].strip(), asked[questions[-1].end() :].strip())
    return *found, _tidy_answers(answer)


def _text(record: dict[str, Any], field: str) -> str:
    """The text of a field, stripped. Raises BadRecordError if it is missing or not a string."""
    if record.get(field) is None:
        raise BadRecordError(f"no {field}", found_keys(record))
    if not isinstance(record[field], str):
        raise BadRecordError(f"{field} is not a string", repr(record[field])[:100])
    return str(record[field]).strip()


def _texts(record: dict[str, Any], field: str) -> list[str]:
    """A field's text, number or truth value as text, in a list of one. Raises BadRecordError if the field is missing or
    has another value."""
    number = None if isinstance(record.get(field), str) else text_or_number(record.get(field))
    return [_text(record, field) if number is None else number]


def _answers(record: dict[str, Any]) -> tuple[str, ...]:
    """The answers in `answers`, or in `answer` if `answers` has none; empty if both have none. Either field is a text
    or number, a list of them or of `{"text"}`, or `{"text": [...]}`. Raises BadRecordError for any other value."""
    for value in (record.get("answers"), record.get("answer")):
        given = value.get("text") if isinstance(value, dict) else value
        texts = texts_of([one.get("text") if isinstance(one, dict) else one for one in _as_list(given)])
        if texts is None:
            raise BadRecordError("answer is neither a text nor a number, nor a list of them", repr(value)[:100])
        if texts:
            return _tidy_answers(texts)
    return ()


def _as_list(value: Any) -> list[Any]:
    """A list unchanged; any other value as the only element of a list."""
    return value if isinstance(value, list) else [value]


def _tidy_answers(texts: list[str]) -> tuple[str, ...]:
    """The answers without blank lines, and with one blank for each run of white space in a line. Empty and repeated
    answers are left out."""
    found = ("\n".join(" ".join(line.split()) for line in text.splitlines() if line.strip()) for text in texts)
    return tuple(dict.fromkeys(filter(None, found)))


def _string_or_integer(record: dict[str, Any], field: str) -> str:
    """A field's string or integer as text; empty for anything else."""
    value = record.get(field)
    return str(value).strip() if isinstance(value, str) or type(value) is int else ""
