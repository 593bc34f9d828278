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
from stages.tasks.common.tables import ENDINGS, Split, data_set_name, names_a_split, read_rows
from stages.tasks.common.wording import break_placeholders
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
    """The names of the data sets in the data folder, sorted. Raises DataError for no data set and ambiguous names."""
    return sorted(_data_sets(folder))


def _data_sets(folder: Path) -> dict[str, Path]:
    """The paths of the data sets in the data folder by name."""
    found: dict[str, Path] = {}
    for path in _entries(folder):
        name = data_set_name(path)
        if name in found:
            raise DataError(
                f"{folder}: {found[name].name} and {path.name} are both named {name!r}; rename one, or put both into"
                f" one folder if they are parts of one data set"
            )
        if name is not None:
            found[name] = path
    if len(found) > 1 and all(map(names_a_split, found)):
        raise DataError(
            f"{folder}: {' and '.join(sorted(path.name for path in found.values()))} are named after splits but would"
            f" be separate data sets; put them into a subfolder with the name of the data set"
        )
    if not found:
        raise DataError(
            f"{folder}: no data set; put files with an ending of {', '.join(ENDINGS)} there, or folders of such files"
        )
    return found


def _entries(folder: Path) -> list[Path]:
    """The files and folders in the data folder, sorted, without hidden ones."""
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder; put the data sets there")
    return sorted(path for path in folder.iterdir() if not path.name.startswith("."))


# -- questions ---------------------------------------------------------------------------------------------------


def read_questions(recipe: Recipe, folder: Path, documents: set[str], skip: Skip) -> list[ContextQuestion]:
    """Usable questions by data set. Others go to `skip` with file and line. Raises DataError if none is usable."""
    data_sets = _data_sets(folder)
    for path in _entries(folder):
        if path not in data_sets.values() and path.stem.upper() not in ("README", "LICENSE", "NOTICE"):
            skip(path.name, "not a data set", f"its ending is none of {', '.join(ENDINGS)}")
    questions = [question for name in sorted(data_sets) for question in _read_data_set(name, data_sets[name], skip)]
    if not questions:
        raise DataError(
            f"{folder}: no usable question in {', '.join(sorted(data_sets))}; see the skipped records in the log"
        )
    return _with_groups(questions)


def _read_data_set(source: str, path: Path, skip: Skip) -> list[ContextQuestion]:
    """The questions of one data set. `group` is the record's own group, or empty."""
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
            except _BadRecordError as error:
                skip(row.where, error.reason, str(error))
                continue
            file = str(Path(row.file).with_suffix("")).removeprefix(f"{source}/")
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
    splits = _split_uses({split for split in stated.values() if split})
    one = len({question.group for question in found.values()}) == 1  # such as a title that names the data set
    return [
        replace(question, split=splits.get(stated[key]), group="" if one else question.group)  # type: ignore[arg-type]
        for key, question in found.items()
    ]


def _split_uses(stated: set[Split]) -> dict[Split, Given]:
    """The split that Lorry makes of each split that a data set states.

    The test split is the test set. With a test split, the validation split is trained on, because Lorry holds out its
    own part of the training data to choose checkpoints. Without a test split, the validation split is the test set, as
    for SQuAD, whose test set is not public. A training split alone states nothing: Lorry splits the data set itself.
    """
    splits: dict[Split, Given] = {"test": "test"}
    if stated & {"test", "validation"}:
        splits["train"] = "train"
    if "test" in stated:
        splits["validation"] = "train"
    elif "train" in stated:
        splits["validation"] = "test"
    return splits


def _with_groups(questions: list[ContextQuestion]) -> list[ContextQuestion]:
    """The questions with their final groups.

    Questions about the same context fall into one group, whatever their data sets. So do questions of one data set that
    state the same group. The name of a group does not depend on the order of questions.
    """
    above: dict[str, str] = {}

    def top(name: str) -> str:
        while above.setdefault(name, name) != name:
            above[name] = name = above[above[name]]
        return name

    shared = [_group_name(question) for question in questions]
    for question, name in zip(questions, shared, strict=True):
        if question.group:
            first, second = sorted((top(name), top(f"{question.source}/{question.group}")))
            above[second] = first
    return [replace(question, group=top(name)) for question, name in zip(questions, shared, strict=True)]


def _group_name(question: ContextQuestion) -> str:
    """A name for a question's context, or for its text if it has none. Case, width and white space do not count."""
    kind, text = ("context", question.context) if question.context else ("question", question.text)
    normal = " ".join(unicodedata.normalize("NFKC", text).casefold().split())
    return f"{kind}-{hashlib.sha256(normal.encode()).hexdigest()[:16]}"


def asked_rows(folder: Path, tested: list[ContextQuestion]) -> list[dict[str, Any]]:
    """A row of the submission for each test question, in the order of the data."""
    return [{"ids": [one.id], "id": one.id, "dataset": one.source, "question": one.text} for one in tested]


# -- one record --------------------------------------------------------------------------------------------------


class _BadRecordError(Exception):
    """A record that cannot be used: `reason`, and the value found as its message."""

    def __init__(self, reason: str, detail: Any = "") -> None:
        super().__init__(detail if isinstance(detail, str) else repr(detail)[:100])
        self.reason = reason


def _nested_records(record: Any) -> Iterator[Any]:
    """The questions nested in a record: in SQuAD's own files, articles contain paragraphs with questions."""
    if not isinstance(record, dict):
        yield record
    elif isinstance(record.get("data"), list):
        for article in record["data"]:
            yield from _nested_records(article)
    elif isinstance(record.get("paragraphs"), list):
        for paragraph in record["paragraphs"]:
            yield from _nested_records(
                {"title": record.get("title"), **paragraph} if isinstance(paragraph, dict) else paragraph
            )
    elif isinstance(record.get("qas"), list):
        above = {key: record.get(key) for key in ("title", "group", "context")}
        for question in record["qas"]:
            yield {**above, **question} if isinstance(question, dict) else question
    else:
        yield record


def _parse_record(record: Any) -> tuple[str, ContextQuestion]:
    """A record's id, empty if it has none, and its question without id and source."""
    if not isinstance(record, dict):
        raise _BadRecordError("not a JSON object", f"found {type(record).__name__}")
    if record.get("messages") is not None:
        context, text, answers = _parse_messages(record["messages"])
    else:
        context = _text(record, "context") if record.get("context") is not None else ""
        text, answers = _text(record, "question"), _answers(record)
    if not text:
        raise _BadRecordError("empty question")
    if not answers:
        raise _BadRecordError("no answer")
    if break_placeholders(answers[0]) != answers[0]:  # training would read it as a picture or as the end of the text
        raise _BadRecordError("answer contains a placeholder", answers[0][:100])
    group = _name(record, "group") or _name(record, "title")
    return _name(record, "id"), ContextQuestion("", text, context, answers, "", group, None)


_CONTEXT = re.compile(r"\s*(?:context|上下文)\s*[:：]", re.IGNORECASE)
_QUESTION = re.compile(r"^[^\S\n]*(?:question|问题)\s*[:：]", re.IGNORECASE | re.MULTILINE)
_QUESTION_IN_LINE = re.compile(r"(?<=[\s.!?;。！？；…”」）)])(?:question|问题)\s*[:：]", re.IGNORECASE)


def _parse_messages(messages: Any) -> tuple[str, str, tuple[str, ...]]:
    """Context, question and answers of a conversation. A system message is allowed and ignored: the task has its own.

    The context begins after the marker at the start of the text, and the question after the last marker at the start
    of a line, so both may contain the marker's words. If no marker is at the start of a line, the last one after a
    sentence or white space counts. Without both markers, the whole text is the question.
    """
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        raise _BadRecordError("messages is not a list of objects", messages)
    roles = [message.get("role") for message in messages]
    if roles[:1] == ["system"]:
        messages, roles = messages[1:], roles[1:]
    if roles != ["user", "assistant"]:
        raise _BadRecordError("not one user and one assistant message", f"found {roles}"[:100])
    asked, answer = (_text(message, "content") for message in messages)
    context = _CONTEXT.match(asked)
    questions = list(_QUESTION.finditer(asked)) or list(_QUESTION_IN_LINE.finditer(asked))
    found = ("", asked)
    if context and questions and questions[-1].start() >= context.end():
        found = (asked[context.end() : questions[-1].start()].strip(), asked[questions[-1].end() :].strip())
    return *found, _lines([answer])


def _text(record: dict[str, Any], field: str) -> str:
    """The text of a field, stripped. Raises _BadRecordError if it is missing or not a string."""
    if record.get(field) is None:
        raise _BadRecordError(f"no {field}")
    if not isinstance(record[field], str):
        raise _BadRecordError(f"{field} is not a string", record[field])
    return str(record[field]).strip()


def _answers(record: dict[str, Any]) -> tuple[str, ...]:
    """The answers in `answers` or `answer`: a text, a list of texts or of `{"text"}`, or `{"text": [...]}`."""
    value = record["answers"] if record.get("answers") is not None else record.get("answer")
    if isinstance(value, dict):
        value = value.get("text")
    values = value if isinstance(value, list) else [] if value is None else [value]
    texts = [one.get("text") if isinstance(one, dict) else one for one in values]
    if not all(isinstance(text, str) for text in texts):
        raise _BadRecordError("answer is neither a string nor a list of strings", value)
    return _lines(texts)


def _lines(texts: list[Any]) -> tuple[str, ...]:
    """The texts without blank lines and superfluous blanks, and without empty and repeated ones."""
    found = ("\n".join(" ".join(line.split()) for line in text.splitlines() if line.strip()) for text in texts)
    return tuple(dict.fromkeys(filter(None, found)))


def _name(record: dict[str, Any], field: str) -> str:
    """A field's string or integer as text; empty for anything else. A record without an id is named by its place."""
    value = record.get(field)
    return str(value).strip() if isinstance(value, str) or type(value) is int else ""
