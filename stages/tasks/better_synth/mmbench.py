"""MMBench: reading its TSV, the rotations of circular evaluation, and the upload.

Liu et al. 2024, 'MMBench: Is Your Multi-modal Model an All-around Player?' (arXiv:2307.06281): each question is asked
as often as it has options, which are rotated by one each time. It counts as right only if every answer is right. The
TSV is tab-separated with a header, quoted like CSV, with the columns:

    index question hint A B C D ... answer category l2-category image (base64) source split comment

Only `index`, `question`, `A`, `B` and `image` are required. An `image` may also be the index of the row that has
it. Some TSVs contain the rotations: copy r of question i has the index i + r * 1,000,000.
"""

import base64
import binascii
import csv
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from stages.contract.errors import DataError
from stages.contract.files import open_atomically
from stages.tasks.common.encodings import UTF8, encoding_of
from stages.tasks.common.json_lines import BadRecordError
from stages.tasks.common.options import first_index, letter_of
from stages.tasks.task import Skip

LETTERS = "ABCDEFGH"
"""Letters of options; the columns of the TSV."""

COPIES = 1_000_000
"""Distance between the indices of a question's rotations in TSVs that contain them."""

LONGEST_FIELD = 256 * 1024**2
"""Largest number of characters of a field; pictures in base64 are long."""

SHORTEST_PICTURE = 64
"""Smallest number of characters of a picture in base64. A shorter text of digits is the index of another row
(VLMEvalKit)."""

NOT_UPLOADED = ("hint", "category", "source", "image", "comment", "l2-category")
"""Columns that LLaVA's convert_mmbench_for_submission.py drops."""


@dataclass(frozen=True)
class MMBenchRow:
    """A row of the TSV."""

    index: int
    question: str
    hint: str
    """Empty if the TSV has none."""
    options: tuple[str, ...]
    """Texts of options A, B, ...; at least two."""
    answer: str | None
    """The right letter; None if the TSV has none, as for the test set."""
    category: str
    l2_category: str
    image: str
    """The picture in base64, or the index of the row that has it; see `picture_bytes` and `picture_of`."""
    uploaded: dict[str, str]
    """The columns of the upload in order, without the prediction."""
    where: str
    """File and line."""

    @property
    def group(self) -> int:
        """The index of the question of which this row is a rotation."""
        return self.index % COPIES

    @property
    def picture_of(self) -> int:
        """The index of the row that has its picture: its own or another row's."""
        text = self.image.strip()
        return int(text) if len(text) < SHORTEST_PICTURE and text.isascii() and text.isdigit() else self.index


# -- the TSV -----------------------------------------------------------------------------------------------------


def read_rows(path: Path, skip: Skip) -> Iterator[MMBenchRow]:
    """The usable rows of a TSV, read one at a time. The others go to `skip` with the line on which they end. Raises
    DataError if a required column is missing, or if the TSV cannot be read."""
    seen: set[int] = set()
    first = first_index((_cell(columns, "answer"), len(_options(columns))) for _, columns in _rows(path))
    for where, columns in _rows(path):
        try:
            row = _row(columns, where, first)
            if row.index in seen:
                raise BadRecordError("duplicate index", str(row.index))
            seen.add(row.index)
        except BadRecordError as error:
            skip(where, error.reason, str(error))
            continue
        yield row


def has_rotations(path: Path) -> bool:
    """Whether a TSV contains the rotations of its questions. Reads rows until it finds a rotation. Raises DataError as
    `read_rows` does."""
    return any((_index(columns) or 0) >= COPIES for _, columns in _rows(path))


def _rows(path: Path) -> Iterator[tuple[str, dict[str, str]]]:
    """Each row's place and columns. Columns missing at the end of a line are empty: editors strip trailing tabs.

    Invalid bytes become U+FFFD, so that only their row is lost. Raises DataError if a required column is missing, or if
    the TSV cannot be read.
    """
    csv.field_size_limit(LONGEST_FIELD)
    encoding = encoding_of(path)
    with path.open(encoding="utf-8-sig" if encoding == UTF8 else encoding, errors="replace", newline="") as file:
        lines = csv.reader(file, delimiter="\t")
        try:
            header = next(lines, [])
            missing = [name for name in ("index", "question", "A", "B", "image") if name not in header]
            if missing:
                raise DataError(
                    f"{path}: no column {missing[0]!r}, found {header[:20]}; use the TSV as MMBench publishes it"
                )
            for values in lines:
                if values:
                    columns = dict.fromkeys(header, "") | dict(zip(header, values, strict=False))
                    yield f"{path.name}:{lines.line_num}", columns
        except csv.Error as error:
            raise DataError(
                f"{path}:{lines.line_num}: cannot read a TSV row ({error}); download the file again"
            ) from error


def _index(columns: Mapping[str, str]) -> int | None:
    """A row's index; None if it is not 1 to 12 ASCII digits."""
    text = columns["index"].strip()
    return int(text) if re.fullmatch(r"[0-9]{1,12}", text) else None


def _row(columns: Mapping[str, str], where: str, first: int) -> MMBenchRow:
    """The row with these columns. Raises BadRecordError for an unusable one."""
    index = _index(columns)
    if index is None:
        raise BadRecordError("index is not a number", columns["index"][:100])
    for name in ("question", "hint", *LETTERS):
        if "\N{REPLACEMENT CHARACTER}" in columns.get(name, ""):
            raise BadRecordError("not UTF-8", f"{name} is {columns[name][:60]!r}; save the table as UTF-8")
    question, image = _cell(columns, "question"), _cell(columns, "image")
    for name, text in (("question", question), ("image", image)):
        if not text:
            raise BadRecordError(f"no {name}")
    options = _options(columns)
    if len(options) < 2:
        raise BadRecordError("fewer than two options", str(index))
    answer = letter_of(_cell(columns, "answer"), options, first=first)
    return MMBenchRow(
        index,
        question,
        hint=_cell(columns, "hint"),
        options=options,
        answer=answer,
        category=_cell(columns, "category"),
        l2_category=_cell(columns, "l2-category"),
        image=image,
        uploaded={name: _cell(columns, name) for name in columns if name not in NOT_UPLOADED},
        where=where,
    )


def _options(columns: Mapping[str, str]) -> tuple[str, ...]:
    """The texts of the options from A on, up to the first empty one."""
    found: list[str] = []
    for letter in LETTERS:
        text = _cell(columns, letter)
        if not text:
            break
        found.append(text)
    return tuple(found)


_EMPTY = frozenset(
    (
        *("#N/A", "#N/A N/A", "#NA", "-1.#IND", "-1.#QNAN", "-NaN", "-nan", "1.#IND", "1.#QNAN", "<NA>", "N/A", "NA"),
        *("NULL", "NaN", "None", "n/a", "nan", "null"),
    )
)
"""Texts that pandas reads as an empty cell, and with it the programs of LLaVA and VLMEvalKit."""


def _is_empty(text: str) -> bool:
    """Whether a cell counts as empty: if pandas reads it so, or if it is blank, `nan` or `none` in any case, as in
    LLaVA's programs."""
    return text in _EMPTY or text.strip().lower() in ("", "nan", "none")


def _cell(columns: Mapping[str, str], name: str) -> str:
    """A cell's text; an empty text if the column is missing or the cell counts as empty."""
    text = columns.get(name, "")
    return "" if _is_empty(text) else text


def picture_bytes(row: MMBenchRow) -> bytes:
    """The content of a row's picture file. Raises BadRecordError if it is not base64."""
    try:
        return base64.b64decode(re.sub(r"\s", "", row.image), validate=True)
    except (binascii.Error, ValueError) as error:
        raise BadRecordError("image is not base64", str(error)) from error


# -- circular evaluation -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Round:
    """One rotation of a question."""

    index: int
    """Index of the question's row."""
    number: int
    """Number of places by which the options are rotated; 0: as in the TSV."""
    options: dict[str, str]
    """The options as shown: letter -> text."""
    meant: dict[str, str]
    """Letter shown -> letter in the TSV."""
    answer: str | None
    """The right letter as shown; None if the TSV has no answer."""

    @property
    def id(self) -> str:
        """`<index>`, or `<index>#<number>` for a rotated round."""
        return f"{self.index}#{self.number}" if self.number else str(self.index)


def rounds(row: MMBenchRow, rotate: bool = True) -> list[Round]:
    """The rounds of a row, one for each option. In round n the option texts are rotated by n letters towards A. Without
    `rotate`, only round 0, which is the row as it is."""
    letters = LETTERS[: len(row.options)]
    found = []
    for number in range(len(letters) if rotate else 1):
        meant = dict(zip(letters, letters[number:] + letters[:number], strict=True))
        options = {shown: row.options[letters.index(letter)] for shown, letter in meant.items()}
        answer = next((shown for shown, letter in meant.items() if letter == row.answer), None)
        found.append(Round(row.index, number, options, meant, answer))
    return found


def incomplete_questions(options: Iterable[tuple[int, int]]) -> list[int]:
    """The indices of the questions that lack a rotation, sorted: those whose number of rounds is not their number of
    options. `options` has a pair for each round: the question's index, and its number of options.

    Circular evaluation is easier for these questions, so they must be left out.
    """
    rows = list(options)
    count = Counter(group for group, _ in rows)
    return sorted({group for group, wanted in rows if count[group] != wanted})


ASKS = "Answer with the option's letter from the given choices directly."
ASKS_IN_CHINESE = "请直接回答选项字母。"
_CHINESE = re.compile(r"[\u4e00-\u9fff]")


def prompt(question: str, hint: str, options: Mapping[str, str]) -> str:
    """The prompt below the picture, as LLaVA words it: hint, question, options and instruction."""
    lines = [hint] if hint else []
    lines += [question, *(f"{letter}. {text}" for letter, text in options.items())]
    return "\n".join([*lines, ASKS_IN_CHINESE if _CHINESE.search(question) else ASKS])


# -- the upload --------------------------------------------------------------------------------------------------


LONGEST_CELL = 32_767
"""Largest number of characters of an xlsx cell."""


def upload_row(uploaded: Mapping[str, str], text: str | None) -> dict[str, str | int]:
    """A row of the upload: the columns of `uploaded`, with the completion after the last option. The completion is
    unchanged but cut to LONGEST_CELL characters, because the server reads the letter by its own rules."""
    row: dict[str, str | int] = dict(uploaded)
    row["index"] = int(uploaded["index"])
    last = max(place for place, name in enumerate(row) if name in LETTERS)
    cells = list(row.items())
    prediction = (text or "").strip()[:LONGEST_CELL]
    return dict([*cells[: last + 1], ("prediction", prediction), *cells[last + 1 :]])


_AS_TEXT = {"in_memory": True, "strings_to_formulas": False, "strings_to_urls": False}


def write_xlsx(path: Path, rows: Sequence[Mapping[str, str | int]]) -> None:
    """Write rows as the only sheet of a workbook, with the first row's keys as header. Equal rows give equal bytes.
    Raises DataError for a text that is too long for a cell."""
    import xlsxwriter

    lines: list[list[str | int]] = [list(rows[0])] if rows else []
    lines += [[row[name] for name in rows[0]] for row in rows]
    for text in (value for line in lines for value in line if isinstance(value, str) and len(value) > LONGEST_CELL):
        raise DataError(
            f"{path}: text of {len(text)} characters, but an xlsx cell holds {LONGEST_CELL}; shorten {text[:60]!r}"
        )
    with open_atomically(path, "wb") as file, xlsxwriter.Workbook(file, _AS_TEXT) as book:
        book.set_properties({"created": datetime(1980, 1, 1)})  # else the file would contain the time of writing
        sheet = book.add_worksheet()
        for number, line in enumerate(lines):
            sheet.write_row(number, 0, line)
