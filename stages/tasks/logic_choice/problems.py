"""The problem files: problems with their sub-questions, and answers to these that somebody guessed."""

import json
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from stages.contract.errors import DataError
from stages.contract.files import digest_of, visible_files
from stages.tasks.common.json_lines import BadRecordError, lines_in, object_in, text_of
from stages.tasks.task import Given, Skip

LETTERS = "ABCDEFG"
TRAIN, TEST = "train", "test"
"""Names of files. They are one data set, `train`: what an adapter learns from the one is asked in the other."""


@dataclass(frozen=True)
class LogicQuestion:
    """A sub-question of a problem."""

    id: str
    """`<problem>/<index>`; behind it `@<data set>`, but for test.jsonl and what of train.jsonl has another name."""
    problem_id: str
    index: int
    """0-based place among the sub-questions of its problem."""
    problem: str
    text: str
    options: tuple[str, ...]
    answers: tuple[str, ...]
    """The letter of the right option; none where it is not known."""
    source: str
    group: str
    split: Given | None
    label_source: str | None
    """The file of guessed answers that its answer is from; None where the answer is the data's own."""


@dataclass(frozen=True)
class _Part:
    """A sub-question as it is read."""

    text: str
    options: tuple[str, ...]
    answer: str | None


@dataclass(frozen=True)
class _Problem:
    """A line of a problem file; None stands for a sub-question that cannot be used."""

    id: str
    text: str
    parts: tuple[_Part | None, ...]

    @property
    def group(self) -> str:
        """The same for the same text, however it is spaced and encoded, under whatever id."""
        return "problem-" + digest_of(" ".join(unicodedata.normalize("NFKC", self.text).split()))[:16]

    @property
    def asked(self) -> tuple[tuple[str, tuple[str, ...]] | None, ...]:
        """The sub-questions and options, whatever their answers: a file may have the problem without them."""
        return tuple((part.text, part.options) if part else None for part in self.parts)

    def question(self, index: int, source: str) -> LogicQuestion | None:
        """A sub-question, to train on only."""
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
    """The data sets in the data folder that an adapter can be trained on. Raises DataError where there is none, or two
    have one name."""
    found = [TRAIN] if (folder / "train.jsonl").is_file() else []
    found += [path.stem for part in ("sources", "labels") for path in _files(folder, part)]
    clash = sorted({name for name in found if found.count(name) > 1 or name == TEST})
    if clash:
        raise DataError(
            f"{folder}: data mixes name a file of sources/ or labels/ by its name without ending, which must be its"
            f" own, and not {TEST}: rename {', '.join(clash)}"
        )
    if not found:
        raise DataError(f"{folder}: nothing to train on: no train.jsonl, and no file in sources/ or labels/")
    return sorted(found)


def _files(folder: Path, part: str) -> list[Path]:
    inside = folder / part
    return [path for path in visible_files(inside) if path.suffix == ".jsonl"] if inside.is_dir() else []


def read_problems(folder: Path, skip: Skip) -> list[LogicQuestion]:
    """The sub-questions of all files, those of test.jsonl first. What cannot be used, a line or a sub-question, is
    skipped and counted with its line number. Raises DataError where nothing is left."""
    sources(folder)
    problems = _read(folder / "test.jsonl", skip) if (folder / "test.jsonl").is_file() else []
    scored = any(part and part.answer for _, problem in problems for part in problem.parts)
    by_id: dict[str, list[_Problem]] = {}
    questions: dict[str, LogicQuestion] = {}
    for where, problem in problems:
        by_id.setdefault(problem.id, []).append(problem)
        for question in _questions(problem, TEST, where, skip):
            split: Given = "test" if question.answers else "asked"
            _add(questions, replace(question, id=f"{problem.id}/{question.index}", source=TRAIN, split=split))
    if (folder / "train.jsonl").is_file():
        for where, problem in _read(folder / "train.jsonl", skip):
            by_id.setdefault(problem.id, []).append(problem)
            for question in _questions(problem, TRAIN, where, skip):
                plain = f"{problem.id}/{question.index}"
                name = question.id if plain in questions else plain
                _add(questions, replace(question, id=name, split="train" if scored else None))
    for path in _files(folder, "sources"):
        for where, problem in _read(path, skip):
            by_id.setdefault(problem.id, []).append(problem)
            for question in _questions(problem, path.stem, where, skip):
                _add(questions, question)
    for path in _files(folder, "labels"):
        for question in _guessed(path, by_id, skip):
            _add(questions, question)
    if not questions:
        raise DataError(f"{folder}: no usable question in train.jsonl, test.jsonl, sources/ and labels/")
    return list(questions.values())


def _add(questions: dict[str, LogicQuestion], question: LogicQuestion) -> None:
    assert question.id not in questions, question.id  # ids are each file's own, and files differ in name
    questions[question.id] = question


def _read(path: Path, skip: Skip) -> list[tuple[str, _Problem]]:
    """The problems of a file, each with its file and line."""
    found: dict[str, tuple[str, _Problem]] = {}
    for where, line in _lines(path):
        try:
            problem = _problem(line, where, skip)
        except BadRecordError as error:
            skip(where, error.reason, str(error))
            continue
        if problem.id in found:
            skip(where, "duplicate id", problem.id)
            continue
        found[problem.id] = (where, problem)
    return list(found.values())


def _lines(path: Path) -> Iterator[tuple[str, bytes]]:
    """The lines of a file that are not blank, each with its file and 1-based number."""
    name = path.name if path.stem in (TRAIN, TEST) else f"{path.parent.name}/{path.name}"
    yield from ((f"{name}:{number}", line) for number, line in lines_in(path))


def _questions(problem: _Problem, source: str, where: str, skip: Skip) -> Iterator[LogicQuestion]:
    """The sub-questions of a problem that can be used; without an answer only those of test.jsonl."""
    for index in range(len(problem.parts)):
        question = problem.question(index, source)
        if question is None:
            continue  # counted when it was read
        if not question.answers and source != TEST:
            skip(f"{where}, question {index + 1}", "no answer to train on")
            continue
        yield question


def _guessed(path: Path, by_id: dict[str, list[_Problem]], skip: Skip) -> Iterator[LogicQuestion]:
    """Sub-questions with the answers that a file of guesses gives them, joined by problem id and index."""
    seen: set[str] = set()
    for where, line in _lines(path):
        try:
            name, answers = _labels(line)
            if name in seen:
                raise BadRecordError("duplicate id", name)
            seen.add(name)
            problem = _labelled(name, answers, by_id)
        except BadRecordError as error:
            skip(where, error.reason, str(error))
            continue
        for index, answer in enumerate(answers):
            question, place = problem.question(index, path.stem), f"{where}, question {index + 1}"
            if question is None:
                skip(place, "label of a question that cannot be used", name)
                continue
            try:
                letter = letter_of(answer, question.options)
            except BadRecordError as error:
                skip(place, f"label: {error.reason}", str(error))
                continue
            if letter is None:
                skip(place, "label: no answer")
                continue
            yield replace(question, answers=(letter,), label_source=path.stem)


def _labels(line: bytes) -> tuple[str, list[Any]]:
    record = object_in(line)
    questions = record.get("questions")
    if not isinstance(questions, list) or not all(isinstance(one, dict) for one in questions):
        raise BadRecordError("questions is no list of objects", repr(questions)[:100])
    return text_of(record, "id"), [one.get("answer") for one in questions]


def _labelled(name: str, answers: list[Any], by_id: dict[str, list[_Problem]]) -> _Problem:
    """The problem that labels are for."""
    found = by_id.get(name, [])
    if not found:
        raise BadRecordError("label of an unknown problem", name)
    if len({(problem.group, problem.asked) for problem in found}) > 1:
        raise BadRecordError("label of an id that several problems have", name)
    if len(answers) != len(found[0].parts):
        raise BadRecordError(
            "label with another number of sub-questions", f"found {len(answers)}, {name} has {len(found[0].parts)}"
        )
    return found[0]


# -- lines -------------------------------------------------------------------------------------------------------


def _problem(line: bytes, where: str, skip: Skip) -> _Problem:
    record = object_in(line)
    name, text = text_of(record, "id"), text_of(record, "problem")
    questions = record.get("questions")
    if not isinstance(questions, list) or not questions:
        raise BadRecordError("no questions", repr(questions)[:100])
    parts: list[_Part | None] = []
    for number, question in enumerate(questions, start=1):
        try:
            parts.append(_part(question))
        except BadRecordError as error:
            skip(f"{where}, question {number}", error.reason, str(error))
            parts.append(None)  # keeps the place of those behind it
    return _Problem(name, text, tuple(parts))


def _part(question: Any) -> _Part:
    if not isinstance(question, dict):
        raise BadRecordError("question is no JSON object", repr(question)[:100])
    options = question.get("options")
    if not isinstance(options, list) or not all(isinstance(option, str) and option.strip() for option in options):
        raise BadRecordError("options are no list of texts", repr(options)[:100])
    if not 2 <= len(options) <= len(LETTERS):
        raise BadRecordError(f"not 2 to {len(LETTERS)} options", f"found {len(options)}")
    found = tuple(option.strip() for option in options)
    return _Part(text_of(question, "question"), found, letter_of(question.get("answer"), found))


def letter_of(answer: Any, options: tuple[str, ...]) -> str | None:
    """The letter that an answer in the data means: a letter, or the text of an option; None where there is none.

    Raises BadRecordError for one that means no option, or may mean two.
    """
    if answer is None or answer == "":
        return None
    if not isinstance(answer, str):
        raise BadRecordError("answer is no text", repr(answer)[:100])
    folded = unicodedata.normalize("NFKC", answer).strip()
    valid = LETTERS[: len(options)]
    if len(folded) == 1 and folded in valid:
        return folded  # as the data are said to write it, whatever the options say
    meant = {valid[place] for place, option in enumerate(options) if _same(option, folded)}
    if len(folded) == 1 and folded.upper() in valid:
        meant.add(folded.upper())
    if len(meant) != 1:
        raise BadRecordError("ambiguous answer" if meant else "answer is no option", answer[:100])
    return meant.pop()


def _same(option: str, answer: str) -> bool:
    return " ".join(unicodedata.normalize("NFKC", option).split()).casefold() == " ".join(answer.split()).casefold()


# -- submission --------------------------------------------------------------------------------------------------


def asked_rows(folder: Path, tested: list[LogicQuestion]) -> list[dict[str, Any]]:
    """What a submission has a line for: every line of test.jsonl in its order, whatever is wrong with it; where there
    is none, the problems that were held out, in the order of train.jsonl.

    A row has the problem's `id` as the file has it, a number or a text, as `places` the sample of each sub-question,
    None for one that could not be used, and as `ids` those that there are. Where test.jsonl has no answers, what
    was held out of train.jsonl is tested too: in a last row, which gets no line.
    """
    given = folder / f"{TEST}.jsonl"
    lines = list(_lines(given)) if given.is_file() else []
    there = [question for question in tested if not lines or question.split in ("test", "asked")]
    own = {(question.problem_id, question.index): question.id for question in there}
    rows: list[dict[str, Any]] = []
    for _, line in lines or _lines(folder / f"{TRAIN}.jsonl"):
        name, count = _as_read(line)
        problem = str(name).strip()
        places = [own.pop((problem, index), None) for index in range(count)]  # an id that comes again has no sample
        ids = [place for place in places if place is not None]
        if ids or lines:
            rows.append({"id": name, "ids": ids, "places": places})
    held_out = [question.id for question in tested if question.split not in ("test", "asked")]
    if lines and held_out:
        rows.append({"id": None, "ids": held_out, "places": [], "line": False})
    return rows


def _as_read(line: bytes) -> tuple[str | int, int]:
    """A line's problem id and number of sub-questions, as far as they can be read."""
    try:
        record = json.loads(line.decode("utf-8-sig", "replace"))
    except (ValueError, RecursionError):
        return "", 0
    if not isinstance(record, dict):
        return "", 0
    name, questions = record.get("id", ""), record.get("questions")
    if type(name) is not int:
        name = str(name).encode("utf-8", "replace").decode()  # half a character can be in JSON, but in no file
    return name, len(questions) if isinstance(questions, list) else 0
