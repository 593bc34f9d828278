"""The problem files: problems with their sub-questions, and guessed answers to them."""

import unicodedata
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from stages.contract.errors import DataError
from stages.contract.files import data_files, digest_of
from stages.tasks.common.json_lines import BadRecordError, found_keys, is_given, lines_in, object_in, text_of
from stages.tasks.common.options import first_index, letter_of, options_of
from stages.tasks.common.skips import Skips
from stages.tasks.common.tables import Row, names_in
from stages.tasks.task import Given, Skip

LETTERS = "ABCDEFG"
"""Letters of options, in order."""
TRAIN, TEST = "train", "test"
"""Names of files. Both belong to the data set `train`, because its adapters are tested on test.jsonl."""


@dataclass(frozen=True)
class LogicQuestion:
    """A sub-question of a problem."""

    id: str
    """`<problem>/<index>` for test.jsonl, and for train.jsonl if test.jsonl lacks it; others add `@<data set>`."""
    problem_id: str
    index: int
    """0-based position among the sub-questions of its problem."""
    problem: str
    text: str
    options: tuple[str, ...]
    answers: tuple[str, ...]
    """The letter of the right option; empty if it is unknown."""
    source: str
    group: str
    split: Given | None
    label_source: str | None
    """The file of guessed answers that has its answer; None if the answer is the data's own."""


@dataclass(frozen=True)
class _Part:
    """A sub-question as read from a file."""

    text: str
    options: tuple[str, ...]
    labels: tuple[str, ...]
    """The labels that the file gives the options; empty if there are none."""
    answer: str | None


@dataclass(frozen=True)
class _Problem:
    """A line of a problem file. `parts` has None in the place of an unusable sub-question."""

    id: str
    text: str
    parts: tuple[_Part | None, ...]

    @property
    def group(self) -> str:
        """A name that all problems with the same text share, whatever their ids, white space and Unicode form."""
        return "problem-" + digest_of(" ".join(unicodedata.normalize("NFKC", self.text).split()))[:16]

    @property
    def parts_without_answers(self) -> tuple[tuple[str, tuple[str, ...]] | None, ...]:
        """The text and options of each sub-question; None for an unusable one. Answers are left out, because some files
        may lack them."""
        return tuple((part.text, part.options) if part else None for part in self.parts)

    def question(self, index: int, source: str) -> LogicQuestion | None:
        """The sub-question at a position, as in a file that is only trained on: its id ends with `@<source>`, and its
        split is `train only`. None if it is unusable."""
        part = self.parts[index]
        if part is None:
            return None
        answers = (part.answer,) if part.answer else ()
        place = (self.id, index, self.text, part.text, part.options)
        return LogicQuestion(
            f"{self.id}/{index}@{source}", *place, answers, source, self.group, split="train only", label_source=None
        )


# -- files -------------------------------------------------------------------------------------------------------


def sources(folder: Path) -> list[str]:
    """The data sets in the data folder that an adapter can be trained on, sorted. Raises DataError if there is
    none, or a name is ambiguous."""
    found = [TRAIN] if (folder / "train.jsonl").is_file() else []
    found += [path.stem for part in ("sources", "labels") for path in _jsonl_files(folder, part)]
    clash = sorted({name for name in found if found.count(name) > 1 or name == TEST})
    if clash:
        raise DataError(
            f"{folder}: ambiguous names {', '.join(clash)}; rename the files of sources/ and labels/ so that no name is"
            f" used twice and none is {TEST}, as data mixes name them without endings"
        )
    if not found:
        raise DataError(
            f"{folder}: nothing to train on, found {names_in(folder)}; put train.jsonl there, or files into sources/ or"
            " labels/"
        )
    return sorted(found)


def _jsonl_files(folder: Path, part: str) -> list[Path]:
    """The `.jsonl` files in a subfolder of the data folder; none without that subfolder."""
    inside = folder / part
    return [path for path in data_files(inside) if path.suffix == ".jsonl"] if inside.is_dir() else []


def read_problems(folder: Path, skip: Skip) -> list[LogicQuestion]:
    """The sub-questions of all files, those of test.jsonl first. Unusable lines and sub-questions go to `skip` with
    file and line. Raises DataError if no sub-question is usable, and as `sources` does."""
    sources(folder)
    skip = Skips(skip)
    problems = _read_file(folder / "test.jsonl", skip) if (folder / "test.jsonl").is_file() else []
    scored = any(part and part.answer for _, problem in problems for part in problem.parts)
    by_id: dict[str, list[_Problem]] = {}
    questions: dict[str, LogicQuestion] = {}
    for where, problem in problems:
        by_id.setdefault(problem.id, []).append(problem)
        for question in _questions(problem, TEST, where, skip):
            split: Given = "test" if question.answers else "asked"
            _add(questions, replace(question, id=f"{problem.id}/{question.index}", source=TRAIN, split=split))
    if (folder / "train.jsonl").is_file():
        for where, problem in _read_file(folder / "train.jsonl", skip):
            by_id.setdefault(problem.id, []).append(problem)
            for question in _questions(problem, TRAIN, where, skip):
                plain = f"{problem.id}/{question.index}"
                name = question.id if plain in questions else plain
                _add(questions, replace(question, id=name, split="train" if scored else None))
    for path in _jsonl_files(folder, "sources"):
        for where, problem in _read_file(path, skip):
            by_id.setdefault(problem.id, []).append(problem)
            for question in _questions(problem, path.stem, where, skip):
                _add(questions, question)
    for path in _jsonl_files(folder, "labels"):
        for question in _labelled_questions(path, by_id, skip):
            _add(questions, question)
    if not questions:
        raise DataError(f"{folder}: no usable question in train.jsonl, test.jsonl, sources/ and labels/; {skip.why}")
    return list(questions.values())


def _add(questions: dict[str, LogicQuestion], question: LogicQuestion) -> None:
    """Add a question under its id, which must be new."""
    assert question.id not in questions, question.id  # ids contain the file's name, which is unique
    questions[question.id] = question


def _read_file(path: Path, skip: Skip) -> list[tuple[str, _Problem]]:
    """The usable problems of a file, each with file and line. Unusable lines and sub-questions go to `skip`, and so do
    lines with the id of an earlier problem."""
    found: dict[str, tuple[str, _Problem]] = {}
    lines = list(_lines(path))
    first = first_index(_answers(line.record for _, line in lines))
    for where, line in lines:
        try:
            problem = _problem(line, where, first, skip)
        except BadRecordError as error:
            skip(where, error.reason, str(error))
            continue
        if problem.id in found:
            skip(where, "duplicate id", problem.id)
            continue
        found[problem.id] = (where, problem)
    return list(found.values())


def _answers(records: Iterable[Any]) -> Iterator[tuple[Any, int]]:
    """Each answer in problem records, with the number of options of its sub-question. Sub-questions with unusable
    options are left out."""
    for record in records:
        questions = record.get("questions") if isinstance(record, dict) else None
        for question in questions if isinstance(questions, list) else []:
            if isinstance(question, dict):
                with suppress(BadRecordError):
                    yield question.get("answer"), len(options_of(question.get("options"))[0])


def _lines(path: Path) -> Iterator[tuple[str, Row]]:
    """The lines of a file, each as a pair: file name with line number, such as `sources/a.jsonl:7`, and row."""
    name = path.name if path.stem in (TRAIN, TEST) else f"{path.parent.name}/{path.name}"
    yield from ((f"{name}:{place}", line) for place, line in lines_in(path))


def _questions(problem: _Problem, source: str, where: str, skip: Skip) -> Iterator[LogicQuestion]:
    """The usable sub-questions of a problem. Only those of test.jsonl may lack an answer; without an answer, those of
    other files go to `skip`."""
    for index in range(len(problem.parts)):
        question = problem.question(index, source)
        if question is None:
            continue  # reported when the file was read
        if not question.answers and source != TEST:
            skip(f"{where}, question {index + 1}", "no answer to train on")
            continue
        yield question


def _labelled_questions(path: Path, by_id: dict[str, list[_Problem]], skip: Skip) -> Iterator[LogicQuestion]:
    """The sub-questions that a file of guessed answers covers, each with its guess. Guesses are matched by problem id
    and index. Unusable guesses go to `skip`."""
    seen: set[str] = set()
    lines = list(_lines(path))
    first = first_index(_guesses((line for _, line in lines), by_id))
    for where, line in lines:
        try:
            name, answers = _labels(line)
            if name in seen:
                raise BadRecordError("duplicate id", name)
            seen.add(name)
            problem = _labelled_problem(name, answers, by_id)
        except BadRecordError as error:
            skip(where, error.reason, str(error))
            continue
        for index, answer in enumerate(answers):
            part, question = problem.parts[index], problem.question(index, path.stem)
            place = f"{where}, question {index + 1}"
            if part is None or question is None:
                skip(place, "label of an unusable question", name)
                continue
            try:
                letter = letter_of(answer, part.options, part.labels, first)
            except BadRecordError as error:
                skip(place, f"label: {error.reason}", str(error))
                continue
            if letter is None:
                skip(place, "label: no answer")
                continue
            yield replace(question, answers=(letter,), label_source=path.stem)


def _guesses(lines: Iterable[Row], by_id: dict[str, list[_Problem]]) -> Iterator[tuple[Any, int]]:
    """Each guessed answer to a usable sub-question, with the number of options of that sub-question."""
    for line in lines:
        with suppress(BadRecordError):
            name, answers = _labels(line)
            parts = _labelled_problem(name, answers, by_id).parts
            yield from ((answer, len(part.options)) for part, answer in zip(parts, answers, strict=True) if part)


def _labels(line: Row) -> tuple[str, list[Any]]:
    """The problem id and the guessed answers in a line of labels. Raises BadRecordError for another form."""
    record = object_in(line)
    questions = record.get("questions")
    if not isinstance(questions, list) or not all(isinstance(one, dict) for one in questions):
        raise BadRecordError("questions is not a list of objects", repr(questions)[:100])
    return text_of(record, "id"), [one.get("answer") for one in questions]


def _labelled_problem(name: str, answers: list[Any], by_id: dict[str, list[_Problem]]) -> _Problem:
    """The problem that a line of labels belongs to. Raises BadRecordError if there is none, if different problems have
    its id, or if the number of sub-questions differs."""
    found = by_id.get(name, [])
    if not found:
        raise BadRecordError("label of an unknown problem", name)
    if len({(problem.group, problem.parts_without_answers) for problem in found}) > 1:
        raise BadRecordError("label of an id with several problems", name)
    if len(answers) != len(found[0].parts):
        raise BadRecordError(
            "label with a different number of sub-questions", f"found {len(answers)}, {name} has {len(found[0].parts)}"
        )
    return found[0]


# -- lines -------------------------------------------------------------------------------------------------------


def _problem(line: Row, where: str, first: int, skip: Skip) -> _Problem:
    """The problem in a line. Its unusable sub-questions go to `skip`. `first` is the number of the first option, for
    answers that are numbers. Raises BadRecordError for an unusable line."""
    record = object_in(line)
    name, text = text_of(record, "id"), text_of(record, "problem")
    questions = record.get("questions")
    if not isinstance(questions, list) or not questions:
        raise BadRecordError("no questions", repr(questions)[:100] if is_given(questions) else found_keys(record))
    parts: list[_Part | None] = []
    for number, question in enumerate(questions, start=1):
        try:
            parts.append(_part(question, first))
        except BadRecordError as error:
            skip(f"{where}, question {number}", error.reason, str(error))
            parts.append(None)  # so that later sub-questions keep their positions
    return _Problem(name, text, tuple(parts))


def _part(question: Any, first: int) -> _Part:
    """A sub-question from its JSON value. Raises BadRecordError for another form."""
    if not isinstance(question, dict):
        raise BadRecordError("question is not a JSON object", repr(question)[:100])
    if not is_given(question.get("options")):
        raise BadRecordError("options are not a list of non-empty strings", found_keys(question))
    options, labels = options_of(question["options"])
    if not 2 <= len(options) <= len(LETTERS):
        raise BadRecordError(f"not 2 to {len(LETTERS)} options", f"found {len(options)}")
    answer = letter_of(question.get("answer"), options, labels, first)
    return _Part(text_of(question, "question"), options, labels, answer)


# -- submission --------------------------------------------------------------------------------------------------


def asked_rows(folder: Path, tested: list[LogicQuestion]) -> list[dict[str, Any]]:
    """The rows of the submission, one for each line of test.jsonl, including unusable lines. Without that file, one for
    each problem held out from train.jsonl, in the order of that file.

    A row has the problem's `id` as written in the file, a number or a text. `places` has the sample id of each
    sub-question, None for one that is unusable or in a line with a repeated id. `ids` has those sample ids without
    None. If test.jsonl has no answers, problems held out from train.jsonl are tested too. They are in a last row, which
    is not submitted.
    """
    given = folder / f"{TEST}.jsonl"
    lines = list(_lines(given)) if given.is_file() else []
    there = [question for question in tested if not lines or question.split in ("test", "asked")]
    own = {(question.problem_id, question.index): question.id for question in there}
    rows: list[dict[str, Any]] = []
    for _, line in lines or _lines(folder / f"{TRAIN}.jsonl"):
        name, count = _id_and_count(line)
        problem = str(name).strip()
        places = [own.pop((problem, index), None) for index in range(count)]  # a repeated id has no sample
        ids = [place for place in places if place is not None]
        if ids or lines:
            rows.append({"id": name, "ids": ids, "places": places})
    held_out = [question.id for question in tested if question.split not in ("test", "asked")]
    if lines and held_out:
        rows.append({"id": None, "ids": held_out, "places": [], "line": False})
    return rows


def _id_and_count(line: Row) -> tuple[str | int, int]:
    """A line's problem id and number of sub-questions. The id is empty if it cannot be read, and the number is 0 if
    `questions` is not a list."""
    if not isinstance(line.record, dict):
        return "", 0
    name, questions = line.record.get("id"), line.record.get("questions")
    if type(name) is not int:
        name = str(name) if is_given(name) else ""
    return name, len(questions) if isinstance(questions, list) else 0
