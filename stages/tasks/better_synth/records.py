"""The questions of better_synth: those to train on, TextVQA's and MMBench's."""

import re
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import Any

from pydantic import Field

from stages.contract.errors import DataError
from stages.contract.files import digest_of
from stages.contract.recipe import Section
from stages.contract.records import PLACE, Message, escape_places, unescape_places
from stages.tasks.better_synth import mmbench, textvqa
from stages.tasks.better_synth.llava import (
    Llava,
    Original,
    from_dj,
    has_turns,
    id_of,
    pictures_of,
    restored_record,
    to_messages,
    turns_of,
)
from stages.tasks.common.json_lines import BadRecordError, object_in
from stages.tasks.common.pictures import Pictures, StoredPicture
from stages.tasks.common.skips import Skips
from stages.tasks.common.tables import Row, names_in, read_rows
from stages.tasks.task import Given, Skip

PRETRAIN, FINETUNE, TEXTVQA, MMBENCH = "pretrain", "finetune", "textvqa", "mmbench"
"""The data sets. Data mixes name the first two, which are trained on."""

FILES = {PRETRAIN: "records.jsonl", FINETUNE: "finetune.json", TEXTVQA: "textvqa.jsonl", MMBENCH: "mmbench.tsv"}
ORIGINALS = "records_llava.json"
ANNOTATIONS = "textvqa_annotations.json"

AHEAD = 512
"""Number of records whose pictures are stored in parallel."""


class Samples(Section):
    """Settings of `preprocess.samples`."""

    pad: bool = Field(
        True,
        description="Pad pictures to squares, as LLaVA-1.5 does (image_aspect_ratio pad). false: its picture processor"
        " crops the longer side, and the model never sees the cropped parts",
    )
    ocr: bool = Field(True, description="Keep the OCR words in TextVQA's prompts; false: remove them")
    circular: bool = Field(
        True,
        description="MMBench's circular evaluation: a question is right if it is right with every rotation of its"
        " options. false: each question is asked once",
    )
    textvqa_images: str = Field(
        "",
        description="Folder of the pictures that textvqa.jsonl names, relative to data.path; empty: data.path itself",
    )


@dataclass(frozen=True)
class PictureQuestion:
    """A conversation to train on, or a question of a test set."""

    id: str
    """Begins with the data set's name."""
    source: str
    messages: tuple[Message, ...]
    """All messages before the last answer, with `<image>` for each of `images`."""
    images: tuple[str, ...]
    """File names in <run>/preprocess/pictures."""
    answers: tuple[str, ...]
    group: str
    """The first picture, because training samples must show no picture of a test set; without one, the text or the
    id."""
    split: Given
    meta: dict[str, Any] = field(default_factory=dict)
    """Values for reading an answer, scoring it and submitting it."""
    error: str | None = None
    """Why it cannot be answered. It stays in the test set and counts as failed."""

    @property
    def text(self) -> str:
        """The last message of the question."""
        return self.messages[-1]["content"]


# -- all questions -----------------------------------------------------------------------------------------------


def _picture_group(digest: str) -> str:
    """The group of all questions that show the picture with this digest."""
    return f"picture-{digest[:16]}"


def sources(folder: Path) -> list[str]:
    """The data sets in the data folder that can be trained on, sorted. Raises DataError if there is none."""
    found = [name for name in (FINETUNE, PRETRAIN) if (folder / FILES[name]).is_file()]
    if not found:
        raise DataError(
            f"{folder}: nothing to train on, found {names_in(folder)}; put {FILES[PRETRAIN]} or {FILES[FINETUNE]} there"
        )
    return found


def records_file(folder: Path) -> Path:
    """Path of the file of Data-Juicer records. Raises DataError if it is missing, or if it has captions and the file
    with their questions is missing."""
    path, originals = folder / FILES[PRETRAIN], folder / ORIGINALS
    if not path.is_file():
        raise DataError(f"{path}: no such file; put the records in Data-Juicer's form there")
    if not originals.is_file():
        for row in read_rows(path):
            with suppress(BadRecordError):
                if not has_turns(object_in(row)):
                    raise DataError(
                        f"{originals}: no such file, but {row.where} has only a caption; put the records with the"
                        " questions there"
                    )
    return path


def other_questions(folder: Path, pictures: Path, settings: Samples, skip: Skip) -> list[PictureQuestion]:
    """The questions of the test sets, then the conversations to train on. Unusable ones go to `skip` with file and
    line. Raises DataError if there is no data set to train on, or no usable question to test on."""
    sources(folder)
    skip = Skips(skip)
    store = Pictures(folder, pictures, settings.pad)
    tested = [*_textvqa_questions(folder, settings, store, skip), *_mmbench_questions(folder, settings, store, skip)]
    if not tested:
        files = [FILES[name] for name in (TEXTVQA, MMBENCH)]
        if not any((folder / name).is_file() for name in files):
            raise DataError(
                f"{folder}: no question to test on, found {names_in(folder)}; put {' or '.join(files)} there"
            )
        raise DataError(f"{folder}: no usable question to test on in {' or '.join(files)}; {skip.why}")
    return [*tested, *_finetune_questions(folder, store, _picture_groups(tested), skip)]


def caption_questions(
    folder: Path, records: Path, pictures: Path, settings: Samples, others: list[PictureQuestion], skip: Skip
) -> list[PictureQuestion]:
    """The questions to train on in the file `records`, which has captions or whole conversations.

    `others` has all other questions. Unusable and duplicate records, and records with a picture that a test question in
    `others` shows, go to `skip`. Returns an empty list if `records` does not exist.
    """
    tested = [question for question in others if question.source in (TEXTVQA, MMBENCH)]
    store = Pictures(folder, pictures, settings.pad)
    return list(_pretrain_questions(folder, records, store, _picture_groups(tested), skip))


def _picture_groups(tested: list[PictureQuestion]) -> set[str]:
    """The groups of the pictures that the test sets show."""
    return {question.group for question in tested}


# -- training sets -----------------------------------------------------------------------------------------------


def _finetune_questions(folder: Path, store: Pictures, tested: set[str], skip: Skip) -> Iterator[PictureQuestion]:
    """The conversations of finetune.json; none if that file is missing. See `_conversations` for what goes to
    `skip`."""
    path = folder / FILES[FINETUNE]
    if path.is_file():
        yield from _conversations(FINETUNE, path, object_in, store, tested, skip)


def _pretrain_questions(
    folder: Path, records: Path, store: Pictures, tested: set[str], skip: Skip
) -> Iterator[PictureQuestion]:
    """The questions to train on in the file `records`; none if that file is missing. The question of a caption comes
    from LLaVA's file. See `_conversations` for what goes to `skip`."""
    if not records.is_file():
        return
    path = folder / ORIGINALS
    originals = read_originals(path, skip) if path.is_file() else {}

    def read(row: Row) -> Llava:
        """The LLaVA record of a row, which has all turns or only a caption. Raises BadRecordError if it is unusable."""
        record = object_in(row)
        if has_turns(record):
            return from_dj(record)
        return restored_record(record, originals)

    yield from _conversations(PRETRAIN, records, read, store, tested, skip)


def read_originals(path: Path, skip: Skip) -> dict[str, Original | None]:
    """The first question of each record of a LLaVA file, by id as text; None for an id whose records have different
    questions. Unusable records go to `skip`."""
    found: dict[str, Original | None] = {}
    for row in read_rows(path):
        try:
            record = object_in(row)
            name = id_of(record)
            question = next(value for speaker, value in turns_of(record) if speaker == "human")
        except StopIteration:
            skip(row.where, "no turn from human")
            continue
        except BadRecordError as error:
            skip(row.where, error.reason, str(error))
            continue
        known = found.setdefault(str(name), Original(name, question))
        if known is not None and known.question != question:
            found[str(name)] = None
    return found


def _conversations(
    source: str, path: Path, read: Callable[[Row], Llava], store: Pictures, tested: set[str], skip: Skip
) -> Iterator[PictureQuestion]:
    """The conversations of a file; `read` converts a row to a LLaVA record. If an id repeats, as in LLaVA's own mix and
    when Data-Juicer adds a second caption, `#2`, `#3` and so on make the later ids unique. Unusable and duplicate
    records, and those that show a picture of a test set, go to `skip`."""
    times: dict[str, int] = {}
    seen: set[str] = set()
    for row, record in _read_records(path, read, store):
        try:
            if isinstance(record, BadRecordError):
                raise record
            digest = digest_of(record)
            if digest in seen:
                raise BadRecordError("duplicate record", str(record["id"]))
            seen.add(digest)
            question = _conversation(record, source, store)
            if not tested.isdisjoint(question.meta["pictures"]):
                raise BadRecordError("shows a picture of a test set", question.id)
        except BadRecordError as error:
            skip(row.where, error.reason, str(error))
            continue
        count = times[question.id] = times.get(question.id, 0) + 1
        yield question if count == 1 else replace(question, id=f"{question.id}#{count}")


def _read_records(
    path: Path, read: Callable[[Row], Llava], store: Pictures
) -> Iterator[tuple[Row, Llava | BadRecordError]]:
    """The rows of a file, each with its LLaVA record or the record's error. Stores the pictures of a batch of AHEAD
    records before it yields the first of them."""

    def record_or_error(row: Row) -> Llava | BadRecordError:
        """The LLaVA record of a row, or the error that makes it or its list of pictures unusable."""
        try:
            record = read(row)
            pictures_of(record)
        except BadRecordError as error:
            return error
        return record

    rows = read_rows(path)
    while batch := list(islice(rows, AHEAD)):
        records = [record_or_error(row) for row in batch]
        store.fetch(name for one in records if not isinstance(one, BadRecordError) for name in pictures_of(one))
        yield from zip(batch, records, strict=True)


def _conversation(record: Llava, source: str, store: Pictures) -> PictureQuestion:
    """The conversation of a LLaVA record. Raises BadRecordError if it or one of its pictures is unusable."""
    name = id_of(record)
    messages, names = to_messages(record)
    images = [store.of_file(each) for each in names]
    groups = [_picture_group(image.digest) for image in images]
    *asked, answer = messages
    return PictureQuestion(
        id=f"{source}/{name}",
        source=source,
        messages=tuple(map(_escape_answer, asked)),
        images=tuple(image.name for image in images),
        answers=(answer["content"].strip(),),
        group=groups[0] if groups else f"text-{digest_of(messages[0])[:16]}",
        split="train only",
        meta={"kind": source, "pictures": groups},
    )


def _escape_answer(message: Message) -> Message:
    """The message, with `<image>` escaped in an answer. In other messages `<image>` stays: it is the place of a
    picture."""
    pieces = message["content"].split(PLACE) if message["role"] != "assistant" else [message["content"]]
    return {"role": message["role"], "content": PLACE.join(map(escape_places, pieces))}


# -- test sets ---------------------------------------------------------------------------------------------------


def _picture_message(text: str) -> tuple[Message, ...]:
    """One user message in a tuple: the place of a picture, then the text."""
    return ({"role": "user", "content": f"{PLACE}\n{escape_places(text)}"},)


def _textvqa_questions(folder: Path, settings: Samples, store: Pictures, skip: Skip) -> Iterator[PictureQuestion]:
    """TextVQA's questions with their pictures; none if textvqa.jsonl is missing. Unusable lines go to `skip`. Raises
    DataError if the annotations are unusable."""
    path, annotations = folder / FILES[TEXTVQA], folder / ANNOTATIONS
    if not path.is_file():
        return
    answers = textvqa.read_annotations(annotations) if annotations.is_file() else None
    times: dict[str, int] = {}
    for question in textvqa.read_questions(path, answers, skip):
        name = question.question_id
        times[name] = times.get(name, 0) + 1
        yield _with_picture(
            store,
            str(PurePosixPath(settings.textvqa_images) / question.image),
            PictureQuestion(
                id=f"{TEXTVQA}/{name}/{times[name]}",
                source=TEXTVQA,
                messages=_picture_message(question.prompt if settings.ocr else without_ocr_words(question.prompt)),
                images=(),
                answers=question.answers,
                group="",
                split="test only" if question.answers else "asked",
                meta={"kind": TEXTVQA, "question_id": name, "prompt": question.prompt},
            ),
        )


_WORDS_LINE = re.compile(r"^Reference OCR token:[^\n]*\n?|\n?^Reference OCR token:[^\n]*\Z", re.MULTILINE)
_WORDS_BEFORE = re.compile(r"\A((?:<image>\n)?)OCR tokens: .*?(?=Question: )", re.DOTALL)


def without_ocr_words(prompt: str) -> str:
    """A TextVQA prompt without its OCR words, in either of LLaVA's forms."""
    return _WORDS_BEFORE.sub(r"\1", _WORDS_LINE.sub("", prompt))


def _with_picture(store: Pictures, name: str, question: PictureQuestion) -> PictureQuestion:
    """A test question with its picture, or with the error of its picture: test questions are never left out."""
    try:
        return _with_stored_picture(question, store.of_file(name))
    except BadRecordError as error:
        return replace(question, group=question.id, error=f"{error.reason}: {error}")


def _with_stored_picture(question: PictureQuestion, picture: StoredPicture) -> PictureQuestion:
    """The question with its picture, in the picture's group."""
    return replace(question, images=(picture.name,), group=_picture_group(picture.digest))


def _mmbench_questions(folder: Path, settings: Samples, store: Pictures, skip: Skip) -> list[PictureQuestion]:
    """MMBench's questions, each once for every rotation of its options; none if mmbench.tsv is missing.

    Without `circular`, a row is asked once. So is a row without an answer, and a row of a table that contains the
    rotations. With `circular`, if such a table lacks a rotation of a question, all rounds of that question go to
    `skip`, because it would be easier to get right. Unusable rows also go to `skip`.
    """
    path = folder / FILES[MMBENCH]
    if not path.is_file():
        return []
    rotate = settings.circular and not mmbench.has_rotations(path)
    found: list[PictureQuestion] = []
    shown: dict[int, StoredPicture] = {}
    for row in mmbench.read_rows(path, skip):
        picture, error = _picture_of(row, shown, store)
        for turn in mmbench.rounds(row, rotate=rotate and row.answer is not None):
            question = _mmbench_question(row, turn, settings.circular)
            found.append(
                _with_stored_picture(question, picture)
                if picture
                else replace(question, group=question.id, error=error)
            )
    if rotate or not settings.circular:
        return found
    lacking = set(mmbench.incomplete_questions([(each.meta["of"], len(each.meta["options"])) for each in found]))
    for question in found:
        if question.meta["of"] in lacking:
            skip(question.id, "rotations are missing", f"of question {question.meta['of']}")
    return [question for question in found if question.meta["of"] not in lacking]


def _picture_of(
    row: mmbench.MMBenchRow, shown: dict[int, StoredPicture], store: Pictures
) -> tuple[StoredPicture | None, str | None]:
    """A row's picture and None, or None and the reason why there is none.

    `shown` has the pictures of earlier rows by index, because a row may name another row's picture. A row's own picture
    is added to it.
    """
    if row.picture_of != row.index:
        other = shown.get(row.picture_of)
        return other, None if other else f"its picture is that of row {row.picture_of}, which has none before it"
    try:
        shown[row.index] = store.of_bytes(mmbench.picture_bytes(row), row.where)
    except BadRecordError as error:
        return None, f"{error.reason}: {error}"
    return shown[row.index], None


def _mmbench_question(row: mmbench.MMBenchRow, turn: mmbench.Round, circular: bool) -> PictureQuestion:
    """The question of one rotation, without its picture."""
    name = f"{MMBENCH}/{turn.id}"
    return PictureQuestion(
        id=name,
        source=MMBENCH,
        messages=_picture_message(mmbench.prompt(row.question, row.hint, turn.options)),
        images=(),
        answers=(turn.answer,) if turn.answer else (),
        group="",
        split="test only" if turn.answer else "asked",
        meta={
            "kind": f"{MMBENCH}: {row.category}" if row.category else MMBENCH,
            "of": row.group,
            "index": row.index,
            "options": turn.options,
            "round": turn.number,
            "together": f"{MMBENCH}/{row.group}" if circular else name,
            "uploaded": row.uploaded,
        },
    )


# -- submission --------------------------------------------------------------------------------------------------


def asked_rows(folder: Path, tested: list[PictureQuestion]) -> list[dict[str, Any]]:
    """The rows of the submission: one for each TextVQA question and each row of MMBench's table, in the files' order.

    `asked` has the keys of LLaVA's lines that describe the question, `ids` the ids of its samples, one for each
    rotation. The completion for the first sample is submitted.
    """
    rows: dict[str, dict[str, Any]] = {}
    for question in tested:
        meta = question.meta
        if question.source == TEXTVQA:
            key, asked = question.id, {"question_id": meta["question_id"], "prompt": meta["prompt"]}
        else:
            key, options = f"{MMBENCH}/{meta['index']}", meta["options"]
            asked = {"question_id": meta["index"], "round_id": meta["round"], "prompt": _without_picture(question.text)}
            asked |= {"options": list(options.values()), "option_char": list(options)}
        rows.setdefault(key, {"asked": asked, "ids": []})["ids"].append(question.id)
    return list(rows.values())


def _without_picture(text: str) -> str:
    """The text of a prompt, without the place of its picture, and with `<image>` in the data's text no longer
    escaped."""
    return unescape_places(text.removeprefix(f"{PLACE}\n"))
