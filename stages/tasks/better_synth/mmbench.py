"""MMBench: its TSV as a stream, the rotations of its circular evaluation, the letter in an answer, and its upload.

Liu et al. 2024, 'MMBench: Is Your Multi-modal Model an All-around Player?' (arXiv:2307.06281): each question is asked
as often as it has options, these rotated by one each time, and is right only if it is right every time. Columns of the
TSV, tab-separated with a header, quoted as CSV is:

    index question hint A B C D ... answer category l2-category image (base64) source split comment

`hint`, `answer` and what follows may lack. An `image` may also be the index of the row that has it. Some TSVs hold the
rotations themselves: copy r of question i has the index i + r * 1,000,000.
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
from stages.contract.files import written_atomically
from stages.tasks.common.json_lines import BadRecordError
from stages.tasks.task import Skip

LETTERS = "ABCDEFGH"

COPIES = 1_000_000
"""Distance between the indices of a question's rotations, in TSVs that hold them."""

LONGEST_FIELD = 256 * 1024**2
"""Characters of a picture in base64."""

SHORTEST_PICTURE = 64
"""Characters in base64: what is shorter is the index of another row, as in VLMEvalKit."""

NOT_UPLOADED = ("hint", "category", "source", "image", "comment", "l2-category")
"""Columns that LLaVA's convert_mmbench_for_submission.py drops."""


@dataclass(frozen=True)
class MMBenchRow:
    """A row of the TSV."""

    index: int
    question: str
    hint: str
    """Empty where there is none."""
    options: tuple[str, ...]
    """Texts of A, B, ...; at least two."""
    answer: str | None
    """The right letter; None where the TSV has none, as for the test set."""
    category: str
    l2_category: str
    image: str
    """In base64, or the index of the row that has it; see `picture_bytes` and `picture_of`."""
    uploaded: dict[str, str]
    """The columns of the upload but for the prediction, in their order."""
    where: str
    """File and line."""

    @property
    def group(self) -> int:
        """The question that it is a rotation of."""
        return self.index % COPIES

    @property
    def picture_of(self) -> int:
        """The index of the row that holds its picture: its own, or another's."""
        text = self.image.strip()
        return int(text) if len(text) < SHORTEST_PICTURE and text.isascii() and text.isdigit() else self.index


# -- the TSV -----------------------------------------------------------------------------------------------------


def read_rows(path: Path, skip: Skip) -> Iterator[MMBenchRow]:
    """The rows of a TSV, read one after the other: of a file of any size one row is in memory. What cannot be used is
    skipped with the line that it ends on. Raises DataError where a column lacks that a question needs."""
    seen: set[int] = set()
    for where, columns in _rows(path):
        try:
            row = _row(columns, where)
            if row.index in seen:
                raise BadRecordError("duplicate index", str(row.index))
            seen.add(row.index)
        except BadRecordError as error:
            skip(where, error.reason, str(error))
            continue
        yield row


def has_rotations(path: Path) -> bool:
    """Whether a TSV holds the rotations of its questions itself. Reads it until it finds one."""
    return any((_index(columns) or 0) >= COPIES for _, columns in _rows(path))


def _rows(path: Path) -> Iterator[tuple[str, dict[str, str]]]:
    """Each row's place and all its columns: editors cut off the tabs at a line's end, which leaves the last ones out.

    What is no UTF-8 becomes U+FFFD, so that one row alone is lost for it.
    """
    csv.field_size_limit(LONGEST_FIELD)
    with path.open(encoding="utf-8-sig", errors="replace", newline="") as file:
        lines = csv.reader(file, delimiter="\t")
        try:
            header = next(lines, [])
            missing = [name for name in ("index", "question", "A", "B", "image") if name not in header]
            if missing:
                raise DataError(f"{path}: no MMBench TSV, it has no column {missing[0]!r}; found {header[:20]}")
            for values in lines:
                if values:
                    columns = dict.fromkeys(header, "") | dict(zip(header, values, strict=False))
                    yield f"{path.name}:{lines.line_num}", columns
        except csv.Error as error:
            raise DataError(f"{path}:{lines.line_num}: no row of a TSV ({error})") from error


def _index(columns: Mapping[str, str]) -> int | None:
    """A row's index; None for anything but ASCII digits."""
    text = columns["index"].strip()
    return int(text) if re.fullmatch(r"[0-9]{1,12}", text) else None


def _row(columns: Mapping[str, str], where: str) -> MMBenchRow:
    index = _index(columns)
    if index is None:
        raise BadRecordError("index is no number", columns["index"][:100])
    for name in ("question", "hint", *LETTERS):
        if "\N{REPLACEMENT CHARACTER}" in columns.get(name, ""):
            raise BadRecordError("not UTF-8", f"{name} reads {columns[name][:60]!r}: save the table as UTF-8")
    question, image = columns.get("question", ""), columns.get("image", "")
    for name, text in (("question", question), ("image", image)):
        if _is_none(text):
            raise BadRecordError(f"no {name}")
    options = _options(columns)
    if len(options) < 2:
        raise BadRecordError("fewer than two options", str(index))
    answer = columns.get("answer", "").strip().upper()
    if not _is_none(answer) and answer not in LETTERS[: len(options)]:
        raise BadRecordError("answer is no option", answer[:100])
    return MMBenchRow(
        index,
        question,
        hint="" if _is_none(columns.get("hint", "")) else columns["hint"],
        options=options,
        answer=None if _is_none(answer) else answer,
        category=columns.get("category", ""),
        l2_category=columns.get("l2-category", ""),
        image=image,
        uploaded={name: text for name, text in columns.items() if name not in NOT_UPLOADED},
        where=where,
    )


def _options(columns: Mapping[str, str]) -> tuple[str, ...]:
    """From A on until the first that is empty."""
    found: list[str] = []
    for letter in LETTERS:
        if _is_none(columns.get(letter, "")):
            break
        found.append(columns[letter])
    return tuple(found)


def _is_none(text: str) -> bool:
    """Whether a cell is empty to LLaVA: also `nan` and `none`, as pandas writes it."""
    return text.strip().lower() in ("", "nan", "none")


def picture_bytes(row: MMBenchRow) -> bytes:
    """The picture file that a row holds. Raises BadRecordError for what is no base64."""
    try:
        return base64.b64decode(re.sub(r"\s", "", row.image), validate=True)
    except (binascii.Error, ValueError) as error:
        raise BadRecordError("image is no base64", str(error)) from error


# -- circular evaluation -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Round:
    """One rotation of a question."""

    index: int
    """Its row's."""
    number: int
    """0-based; how often the options were rotated."""
    options: dict[str, str]
    """As they are shown: letter -> text."""
    meant: dict[str, str]
    """The letter shown -> the option's letter in the TSV."""
    answer: str | None
    """The letter that is right as they are shown."""

    @property
    def id(self) -> str:
        """`<index>`, behind it `#<number>` where it was rotated here."""
        return f"{self.index}#{self.number}" if self.number else str(self.index)


def rounds(row: MMBenchRow, rotate: bool = True) -> list[Round]:
    """A row's rotations: as many as it has options, rotated to the left by one more each; without `rotate`, where the
    TSV holds them, the row as it is."""
    letters = LETTERS[: len(row.options)]
    found = []
    for number in range(len(letters) if rotate else 1):
        meant = dict(zip(letters, letters[number:] + letters[:number], strict=True))
        options = {shown: row.options[letters.index(letter)] for shown, letter in meant.items()}
        answer = next((shown for shown, letter in meant.items() if letter == row.answer), None)
        found.append(Round(row.index, number, options, meant, answer))
    return found


def incomplete(options: Iterable[tuple[int, int]]) -> list[int]:
    """The questions that lack a rotation: of each round its question's group, and how many options it shows.

    Circular evaluation would be easier for them: leave them out.
    """
    rows = list(options)
    count = Counter(group for group, _ in rows)
    return sorted({group for group, wanted in rows if count[group] != wanted})


ASKS = "Answer with the option's letter from the given choices directly."
ASKS_IN_CHINESE = "请直接回答选项字母。"
_CHINESE = re.compile(r"[\u4e00-\u9fff]")


def prompt(question: str, hint: str, options: Mapping[str, str]) -> str:
    """What a model is asked below the picture, in LLaVA's words: a hint, the question, the options, what to answer."""
    lines = [hint] if hint else []
    lines += [question, *(f"{letter}. {text}" for letter, text in options.items())]
    return "\n".join([*lines, ASKS_IN_CHINESE if _CHINESE.search(question) else ASKS])


# -- the letter in an answer -------------------------------------------------------------------------------------

_SIGNS = str.maketrans("。、【】〔〕「」『』“”‘’", ".,[][]" + '"' * 6 + "'" * 2)
"""Chinese signs that NFKC leaves as they are, and what they are here; it turns those as wide as a character, such as
a comma or a colon, itself."""
_LETTER = r"([A-H])(?![A-Za-z0-9'])"
_ALONE = re.compile(r"(?<![A-Za-z0-9'])(A(?!\s+[a-z])|[B-H])(?![A-Za-z0-9'])")
"""A letter that is no part of a word, and no article."""
_LEADING = re.compile(rf"[(\[\"]?{_LETTER}(?:\"|\s*[)\].:,;]|\s*选?项)")
_STATED = re.compile(
    rf"(?:(?i:\b(?:answer|option|choice))|答案|选项|(?<!不)选择?)\s*(?:(?i:is)|[是为])?\s*:?[\s*(\[\"]*{_LETTER}"
)
_IS = re.compile(rf"(?<!不)是[\s*(\[\"]*{_LETTER}[\s*)\]\"]*(?:选?项|[.,;!]|$)")
"""A letter that more words follow may be part of one, as in 这是B超."""
_BRACKETED = re.compile(rf"[(\[]{_LETTER}[)\]]")
_LAST = re.compile(rf"(?:^|[\s:*]){_LETTER}[.!*]*$")


def letter_in(text: str, options: Mapping[str, str]) -> str | None:
    """The letter that an answer means, of those of `options` (letter -> text); None where it means none, or several.

    By rule alone, the first that finds anything decides: a bare letter; the text of an option; where only one letter is
    named, one in front, as "B.", "(B) dog" or B选项, "Answer: B" or 答案是B, a last 是B, "(B)" anywhere, a lone letter
    at the end, B猫 where 猫 is B's text; and the text of just one option within an answer that is not much longer, as
    in VLMEvalKit. "A dog" names no letter.
    """
    folded = _folded(text)
    bare = folded.strip("()[].:,;!*\"' ").upper()
    if bare in options and len(bare) == 1:
        return bare
    whole = [letter for letter, option in options.items() if _plain(option) == _plain(folded)]
    rules = [whole, _mentioned(_plain(folded), options)]
    if len(set(_ALONE.findall(folded))) < 2:
        leading = _LEADING.match(folded)
        named = [pattern.findall(folded) for pattern in (_STATED, _IS, _BRACKETED, _LAST)]
        joined = [
            letter
            for letter, option in options.items()
            if _CHINESE.match(option) and _plain(folded) == _plain(letter + option)
        ]
        rules[1:1] = [[leading.group(1)] if leading else [], *named, joined]
    letters = set(next((found for found in rules if found), []))
    return letters.pop() if len(letters) == 1 and letters <= options.keys() else None


def _folded(text: str) -> str:
    """On one line, with signs and letters of one width."""
    return " ".join(unicodedata.normalize("NFKC", text).translate(_SIGNS).split())


def _plain(text: str) -> str:
    return _folded(text).casefold().strip(".,!?:;\"' ")


def _mentioned(text: str, options: Mapping[str, str]) -> list[str]:
    """The options whose text is in a text as words of its own, but for those that are part of another that is."""
    texts = {letter: _plain(option) for letter, option in options.items()}
    if len(text) > 2 * sum(map(len, texts.values())):
        return []
    inside = [letter for letter, option in texts.items() if option and _holds(text, option)]
    return [
        letter
        for letter in inside
        if not any(texts[letter] != texts[other] and _holds(texts[other], texts[letter]) for other in inside)
    ]


def _holds(text: str, part: str) -> bool:
    """Chinese has no blanks between words; letters and digits of others must not go on."""
    return re.search(rf"(?<![a-z0-9]){re.escape(part)}(?![a-z0-9])", text) is not None


# -- the upload --------------------------------------------------------------------------------------------------


def upload_row(uploaded: Mapping[str, str], answer: str | None, text: str | None) -> dict[str, str | int]:
    """A row's line in the upload: its columns, and behind the last option what was answered: the letter; where there is
    none the model's own words, which the server reads by rules of its own; empty where there are none."""
    row: dict[str, str | int] = dict(uploaded)
    row["index"] = int(uploaded["index"])
    last = max(place for place, name in enumerate(row) if name in LETTERS)
    cells = list(row.items())
    return dict([*cells[: last + 1], ("prediction", answer or (text or "").strip()), *cells[last + 1 :]])


LONGEST_CELL = 32_767

_AS_TEXT = {"in_memory": True, "strings_to_formulas": False, "strings_to_urls": False}


def write_xlsx(path: Path, rows: Sequence[Mapping[str, str | int]]) -> None:
    """Write rows as the one sheet of a workbook, the first one's keys as its head. Equal rows give equal bytes. Raises
    DataError for a text that no cell can hold."""
    import xlsxwriter

    lines: list[list[str | int]] = [list(rows[0])] if rows else []
    lines += [[row[name] for name in rows[0]] for row in rows]
    for text in (value for line in lines for value in line if isinstance(value, str) and len(value) > LONGEST_CELL):
        raise DataError(f"a text of {len(text)} characters, where an xlsx cell holds {LONGEST_CELL}: {text[:60]!r}")
    with written_atomically(path, "wb") as file, xlsxwriter.Workbook(file, _AS_TEXT) as book:
        book.set_properties({"created": datetime(1980, 1, 1)})  # else it notes when it is written
        sheet = book.add_worksheet()
        for number, line in enumerate(lines):
            sheet.write_row(number, 0, line)
