"""Data sets on disk, read record by record: JSON arrays, JSON Lines, CSV, TSV, Parquet, Arrow, and folders saved by
`datasets`.

A record that cannot be read becomes a row that says why; where possible, all other records are still read. The content
of a JSON file decides its form, and that of any text file its encoding, not its name: an array in a `.jsonl` and lines
in a `.json` are read too. NaN, which Python writes for a missing value, is read as null. An object with a key that
comes twice is refused, as only one of the two values could be read.
"""

import csv
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

from stages.contract.errors import DataError
from stages.contract.files import data_files
from stages.contract.machine_errors import raise_machine_fault
from stages.tasks.common.encodings import utf8_lines

Split = Literal["train", "validation", "test"]

JSON = (".json", ".jsonl", ".ndjson")
TEXT = (*JSON, ".csv", ".tsv")
BINARY = (".parquet", ".arrow")
ENDINGS = (*TEXT, *BINARY)
"""Endings of data files, in lower case."""

_DESCRIPTIONS = {"dataset_dict.json", "dataset_info.json", "dataset_infos.json", "state.json"}
"""JSON files without records that `datasets` writes beside the data."""

_SPLITS: dict[str, Split] = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "dev", "val"), "validation"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
}
"""Words in names of files and folders that state a split, as on Hugging Face's hub."""


@dataclass(frozen=True)
class Row:
    """A record, or a place where one cannot be read."""

    file: str
    """Path relative to the folder of the data sets."""
    number: int
    """1-based line of a text file on which it begins, or row of a table."""
    place: str
    """The number; line and record, such as `1-500`, if another record begins earlier on the same line."""
    where: str
    """File and place for messages: `a.jsonl:7`, `a.json:1 record 500`, `b.parquet row 7`."""
    split: Split | None
    """The split that the name of its file or folder states; None without one."""
    record: Any
    """The JSON value; None if it cannot be read. In a bad row, `?` is in place of what is not UTF-8."""
    bad: tuple[str, str] | None = None
    """Why it cannot be read: a reason and a detail."""


def data_set_name(path: Path) -> str | None:
    """The name of the data set at a path; None if the path is not a data set. Raises DataError for a folder with
    missing parts."""
    if path.is_dir():
        return path.name if _files(path) else None
    return path.stem if path.suffix.lower() in ENDINGS and path.is_file() else None


def names_in(folder: Path) -> str:
    """The names of a folder's first five entries, for an error message; `nothing` if it is empty or missing."""
    names = sorted(path.name for path in folder.iterdir() if not path.name.startswith(".")) if folder.is_dir() else []
    return ", ".join([*names[:5], *["..."] * (len(names) > 5)]) or "nothing"


def read_rows(path: Path) -> Iterator[Row]:
    """The rows of a data set, which is a file or a folder of files. Raises DataError for a folder with missing
    parts."""
    if path.is_dir():
        for file, split in _files(path):
            yield from _read_file(file, str(file.relative_to(path.parent)), split)
    else:
        yield from _read_file(path, path.name, None)


def _files(folder: Path) -> list[tuple[Path, Split | None]]:
    """The data files of a folder in the order in which to read them, each with the split that its name or its folder's
    name states. Raises DataError if the folder's metadata list a missing part."""
    saved = _json(folder / "dataset_dict.json")
    if isinstance(saved, dict) and isinstance(saved.get("splits"), list):
        parts = [folder / str(name) for name in saved["splits"]]
        return [(file, _split_in(part.name)) for part in parts for file, _ in _files(_existing_path(part))]
    state = _json(folder / "state.json")
    if isinstance(state, dict) and isinstance(state.get("_data_files"), list):
        # other arrow files here are the cache of `datasets`; `_split` only records where the rows came from
        return [(_existing_path(folder / str(part["filename"])), None) for part in state["_data_files"]]
    found = [file for file in data_files(folder) if file.suffix.lower() in ENDINGS and file.name not in _DESCRIPTIONS]
    return [(file, _split_of(file.relative_to(folder))) for file in found]


def _existing_path(path: Path) -> Path:
    """The path. Raises DataError if it does not exist."""
    if not path.exists():
        raise DataError(f"{path}: missing, but listed by the data set's metadata; copy the whole folder")
    return path


def _json(path: Path) -> Any:
    """The JSON value in a file; None if it cannot be read."""
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return None


def _split_of(path: Path) -> Split | None:
    """The split that a file's name states, or else the innermost of its folders that states one; None without one."""
    names = [path.name.partition(".")[0], *[parent.name for parent in path.parents]]
    return next((split for split in map(_split_in, names) if split), None)


def _split_in(name: str) -> Split | None:
    """The first split that a word of a name states; None without one."""
    words = re.split(r"[^a-z]+", name.lower())
    return next((_SPLITS[word] for word in words if word in _SPLITS), None)


def names_a_split(name: str) -> bool:
    """Whether a name is a split's name and nothing else but a part's number: `test` and `train-00000-of-00002`, but not
    `law-test`."""
    return re.sub(r"-\d+-of-\d+$", "", name.lower()) in _SPLITS


def is_saved_data_set(folder: Path) -> bool:
    """Whether `datasets` saved this folder."""
    return any((folder / name).is_file() for name in ("dataset_dict.json", "state.json"))


class MakeRow(Protocol):
    """Makes the Row of a record, or of the fault `bad` in all rows from `number` to `last`."""

    def __call__(
        self, number: int, record: Any = None, *, bad: tuple[str, str] | None = None, last: int | None = None
    ) -> Row: ...


def _read_file(path: Path, file: str, split: Split | None) -> Iterator[Row]:
    """The rows of one file. `file` is its path as the rows state it."""
    ending = path.suffix.lower()
    count = before = 0

    def row(number: int, record: Any = None, *, bad: tuple[str, str] | None = None, last: int | None = None) -> Row:
        """The Row at `number`. Its place also has the record's number if the row before it has the same line."""
        nonlocal count, before
        count, shared, before = count + 1, number == before, number
        if ending in TEXT:
            where = f"{file}:{number} record {count}" if shared else f"{file}:{number}"
        else:
            where = f"{file} row {number}" if last in (None, number) else f"{file} rows {number} to {last}"
        return Row(file, number, f"{number}-{count}" if shared else f"{number}", where, split, record, bad)

    if ending in JSON:
        yield from _read_text(path, row)
    elif ending in TEXT:
        yield from _read_cells(path, row)
    elif ending == ".parquet":
        yield from _read_parquet(path, row)
    else:
        yield from _read_arrow(path, row)


# -- text --------------------------------------------------------------------------------------------------------


class JsonFloat(float):
    """A float that keeps its spelling in JSON in `written`: `3.50`, not `3.5`."""

    written: str

    def __new__(cls, written: str) -> "JsonFloat":
        number = super().__new__(cls, written)
        number.written = written
        return number


def _read_constant(name: str) -> None:
    """None, in place of NaN. Raises ValueError for `Infinity` and `-Infinity`."""
    if name != "NaN":
        raise ValueError(f"{name} is not JSON")


def _object_of(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The object with these keys and values. Raises ValueError if a key comes twice."""
    found = dict(pairs)
    if len(found) != len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"the key {next(key for key in keys if keys.count(key) > 1)!r} comes twice")
    return found


DECODER = json.JSONDecoder(parse_float=JsonFloat, parse_constant=_read_constant, object_pairs_hook=_object_of)
"""Decodes the JSON of data."""
_SPACE = re.compile(r"\s*")
_TABLE = re.compile(r'\{\s*(?:"[^"]*"\s*:\s*(?:"[^"]*"|[\d.]+)\s*,\s*)*"data"\s*:\s*\[')
"""Start of a file in SQuAD's published form: the records are in `data`, perhaps after a version."""
_END = re.compile(r'\]\s*(?:(?:,\s*"[^"]*"\s*:\s*(?:"[^"]*"|[\d.]+)\s*)*\}\s*)?\Z')
"""End of an array that is the whole file, or that is `data` in SQuAD's form."""
_FIRST_KEY = re.compile(r'\{\s*("[^"]*")')
_AFTER = re.compile(r'\s*(?:,?\s*\{\s*"|,?\s*\]|$)')
"""What may follow an element. If anything else follows, the closing bracket was part of a text."""
_BRACKETS = re.compile(r'"(?:[^"\\\n]|\\.)*"?|[{}\[\]]')
"""Strings and brackets. A string contains no line end; an unclosed one ends there."""


def _read_text(path: Path, row: MakeRow) -> Iterator[Row]:
    """The rows of a text file: an array, SQuAD's form, values one after the other, or JSON Lines."""
    beginning = _beginning(path)
    lines = _begins_with_json_line(path)  # each of them may be a table or an array
    table = None if lines else _TABLE.match(beginning)
    array_at_once = beginning.startswith("[") and not lines
    if path.suffix.lower() != ".json" and table is None and not array_at_once:
        yield from _read_lines(path, row)
        return
    text = _text_in(path)
    array = text.index("[", table.end() - 1) if table else _after_space(text, 0)
    if text.startswith("[", array):
        yield from _read_elements(text, array + 1, True, row)
    else:
        yield from _read_elements(text, 0, False, row)


def _beginning(path: Path) -> str:
    """The start of a file as text: 4,096 bytes from the first character that is not white space."""
    found = b""
    for line in utf8_lines(path):
        found = (found + line).lstrip()
        if len(found) > 4096:
            break
    return found[:4096].decode("utf-8", "replace")


def _text_in(path: Path) -> str:
    """The text of a file, with bytes that are not UTF-8 as lone surrogates."""
    return b"".join(utf8_lines(path)).decode("utf-8", "surrogateescape")


def _begins_with_json_line(path: Path) -> bool:
    """Whether a file's first line is a JSON value, even a broken one, and more lines follow. Blank lines do not
    count."""
    lines = (line for line in utf8_lines(path) if line.strip())
    first, more = next(lines, b""), next(lines, None) is not None
    text = first.decode("utf-8", "surrogateescape").strip()
    try:
        DECODER.decode(text)
    except (ValueError, RecursionError):
        return more and _closing_place(text, 0) == len(text)
    return more


def _read_lines(path: Path, row: MakeRow) -> Iterator[Row]:
    """The rows of a JSON Lines file."""
    for number, line in enumerate(utf8_lines(path), start=1):
        if not line.strip():
            continue
        text = line.decode("utf-8", "surrogateescape").strip()
        try:
            yield _utf8_row(DECODER.decode(text), number, row)
        except (ValueError, RecursionError) as error:
            yield row(number, bad=("not JSON", f"{_error_text(error)}, found {text[:60]!a}"))


def _read_elements(text: str, place: int, array: bool, row: MakeRow) -> Iterator[Row]:
    """The rows of an array whose elements begin at `place`, or of values that follow each other, with or without
    commas. After a broken element, reading resumes at the next one."""
    number, counted, key, broken = 1, 0, "", False
    while True:
        place = _after_space(text, place)
        number, counted = number + text.count("\n", counted, place), place
        if place == len(text):
            if array and not broken:
                yield row(number, bad=("cut off", "the file ends inside its array"))
            return
        if array and _END.match(text, place):
            return
        if broken and text[place] in "]}":  # belongs to the broken element
            place += 1
            continue
        try:
            record, end = DECODER.raw_decode(text, place)
        except (ValueError, RecursionError) as error:
            end = _next_element(text, place, key)
            cut = array and end == len(text) and text.rstrip()[-1] not in "]}"
            yield row(number, bad=("cut off" if cut else "not JSON", _error_text(error)))
            broken = True
        else:
            yield _utf8_row(record, number, row)
            key, broken = _first_key(text, place), False
        end = _after_space(text, end)
        place = end + text.startswith(",", end)


def _after_space(text: str, place: int) -> int:
    """The place of the next character that is not white space, at `place` or later; the end of the text if none is."""
    found = _SPACE.match(text, place)
    return found.end() if found else place


def _first_key(text: str, place: int) -> str:
    """The first key of the object at a place, as written, with its quotation marks; empty without one."""
    found = _FIRST_KEY.match(text, place)
    return found.group(1) if found else ""


def _next_element(text: str, place: int, key: str) -> int:
    """The place at which reading resumes after a broken element.

    That is after its closing bracket, or at a complete element that begins before the bracket. Without a closing
    bracket, it is the next object that begins with the first key of this element or of the one before, else the end of
    the text.
    """
    keys = {_first_key(text, place), key} - {""}
    opening = re.compile(r"\{\s*(?:" + ("|".join(map(re.escape, keys)) or '"') + ")")
    end = _closing_place(text, place)
    if end is not None and not _AFTER.match(text, end):
        end = None
    for found in opening.finditer(text, place + 1, len(text) if end is None else end):
        if end is None or _is_element(text, found.start(), opening):
            return found.start()
    return len(text) if end is None else end


def _is_element(text: str, place: int, opening: re.Pattern[str]) -> bool:
    """Whether the object at a place is complete, and followed by an object that `opening` matches or by the end of the
    array."""
    try:
        _, end = DECODER.raw_decode(text, place)
    except (ValueError, RecursionError):
        return False
    end = _after_space(text, end)
    return _END.match(text, end) is not None or (
        text.startswith(",", end) and opening.match(text, _after_space(text, end + 1)) is not None
    )


def _closing_place(text: str, place: int) -> int | None:
    """The place after the bracket that closes the one at a place; None if brackets do not match."""
    awaited = []
    for found in _BRACKETS.finditer(text, place):
        token = found.group()
        if token in "{[":
            awaited.append("}" if token == "{" else "]")
        elif token in "}]":
            if not awaited or awaited.pop() != token:
                return None
            if not awaited:
                return found.end()
        elif not awaited:
            return None
    return None


def _utf8_row(record: Any, number: int, row: MakeRow) -> Row:
    """The row of a record; a bad row if the record cannot be written as UTF-8: wrong bytes, or a lone surrogate."""
    text = json.dumps(record, ensure_ascii=False)
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return row(number, json.loads(text.encode("utf-8", "replace")), bad=("not UTF-8", _error_text(error)))
    return row(number, record)


def _error_text(error: BaseException) -> str:
    """The error's message in ASCII, at most 200 characters."""
    return str(error).encode("ascii", "backslashreplace").decode()[:200]


# -- cells -------------------------------------------------------------------------------------------------------


_LONGEST_CELL = 2**31 - 1
"""Characters of a cell; Python's own limit is 131,072."""


def _read_cells(path: Path, row: MakeRow) -> Iterator[Row]:
    """The rows of a CSV or TSV file, whose first line names the columns. Each record is an object of texts.

    A cell in quotation marks may contain line breaks, which stay as they are. In a CSV file the separator is what the
    first line has most of: a comma, a semicolon, a tab or a bar.
    """
    lines = (line.decode("utf-8", "surrogateescape") for line in utf8_lines(path))
    header, first = next(((number, line) for number, line in enumerate(lines, start=1) if line.strip()), (1, ""))
    separator = "\t" if path.suffix.lower() == ".tsv" else max(",;\t|", key=re.sub('"[^"]*"', "", first).count)
    csv.field_size_limit(_LONGEST_CELL)
    columns = [column.strip() for column in next(csv.reader([first], delimiter=separator), [])]
    twice = next((column for column in columns if column and columns.count(column) > 1), None)
    if twice is not None:
        yield row(header, bad=("a column that comes twice", twice.encode("ascii", "backslashreplace").decode()[:100]))
        return
    # strict, or text after a closing quotation mark would silently lose that mark
    reader = csv.reader(lines, delimiter=separator, strict=True)
    while True:
        begun = header + reader.line_num + 1
        try:
            cells = next(reader, None)
        except csv.Error as error:
            yield row(begun, bad=("not CSV", _error_text(error)))
            continue
        if cells is None:
            return
        if len(cells) == len(columns):
            yield _utf8_row({name: cell for name, cell in zip(columns, cells, strict=True) if name}, begun, row)
        elif any(cell.strip() for cell in cells):
            yield row(begun, bad=("not one cell for each column", f"{len(cells)} cells, {len(columns)} columns"))


# -- tables ------------------------------------------------------------------------------------------------------


def _read_parquet(path: Path, row: MakeRow) -> Iterator[Row]:
    """The rows of a Parquet file, read by row group, so that a damaged group affects no other."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pq.ParquetFile(path)
    except (pa.ArrowException, OSError) as error:
        raise_machine_fault(error)
        yield row(1, bad=("unreadable file", _error_text(error)))
        return
    with table:
        number = 0
        for group in range(table.num_row_groups):
            last = number + table.metadata.row_group(group).num_rows
            try:
                for batch in table.iter_batches(batch_size=1000, row_groups=[group]):
                    yield from _read_batch(batch, number, row)
                    number += batch.num_rows
            except (pa.ArrowException, OSError, ValueError) as error:
                raise_machine_fault(error)
                yield row(number + 1, bad=("unreadable rows", _error_text(error)), last=last)
            number = last


def _read_arrow(path: Path, row: MakeRow) -> Iterator[Row]:
    """The rows of an Arrow stream, as `datasets` writes it, or of an Arrow file, read by record batch. Rows
    after a damaged batch are lost, because only reading a batch shows where the next one begins."""
    import pyarrow as pa

    number = 0
    try:
        with pa.OSFile(str(path)) as source:
            is_file = source.read(6) == b"ARROW1"
            source.seek(0)
            for batch in _batches(pa.ipc.open_file(source)) if is_file else pa.ipc.open_stream(source):
                yield from _read_batch(batch, number, row)
                number += batch.num_rows
    except (pa.ArrowException, OSError, ValueError) as error:
        raise_machine_fault(error)
        yield row(number + 1, bad=("unreadable file" if number == 0 else "cut off", _error_text(error)))


def _read_batch(batch: Any, before: int, row: MakeRow) -> Iterator[Row]:
    """The rows of a batch that follows `before` rows. A row with bytes that are not UTF-8 becomes a bad row."""
    try:
        records = batch.to_pylist()
    except ValueError:
        records = None
    for index in range(batch.num_rows):
        try:
            yield row(before + index + 1, records[index] if records else batch.slice(index, 1).to_pylist()[0])
        except ValueError as error:
            yield row(before + index + 1, bad=("not UTF-8", _error_text(error)))


def _batches(file: Any) -> Iterator[Any]:
    """The record batches of an Arrow file, read one at a time."""
    for number in range(file.num_record_batches):
        yield file.get_batch(number)
