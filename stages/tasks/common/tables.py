"""Data sets on disk, read record by record: JSON arrays, JSON Lines, Parquet, Arrow, and what `datasets` saves.

A record that cannot be read is a row that says why, and costs no other where that is possible. What a text file
holds is told by its first character, not by its name: an array in a `.jsonl` and lines in a `.json` are read too.
"""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

from stages.contract.errors import DataError
from stages.contract.files import visible_files

Split = Literal["train", "validation", "test"]

TEXT = (".json", ".jsonl", ".ndjson")
ENDINGS = (*TEXT, ".parquet", ".arrow")

_DESCRIPTIONS = {"dataset_dict.json", "dataset_info.json", "dataset_infos.json", "state.json"}
"""JSON files that `datasets` writes beside the data."""

_SPLITS: dict[str, Split] = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "dev", "val"), "validation"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
}
"""Words in the names of files and folders that name a split; those of Hugging Face's hub."""


@dataclass(frozen=True)
class Row:
    """A record, or what stands where one should be."""

    file: str
    """Path relative to the folder of the data sets, or the file's name where it stands there itself."""
    number: int
    """1-based line of a text file that it begins on, or row of a table."""
    place: str
    """The number, or where others begin on the same line before it, the line's and the record's own: `1-500`."""
    where: str
    """File and place as a person writes them: `a.jsonl:7`, `a.json:1 record 500`, `b.parquet row 7`."""
    split: Split | None
    """The split that its file or folder is named after."""
    record: Any
    """The JSON value; None where it is bad."""
    bad: tuple[str, str] | None = None
    """Why it could not be read, and the detail."""


def data_set_name(path: Path) -> str | None:
    """The name of the data set that an entry of a data folder is; None where it is none."""
    if path.is_dir():
        return path.name if _files(path) else None
    return path.stem if path.suffix.lower() in ENDINGS and path.is_file() else None


def read_rows(path: Path) -> Iterator[Row]:
    """The rows of a data set: a file, or a folder of files. Raises DataError for a folder whose parts are not there."""
    if path.is_dir():
        for file, split in _files(path):
            yield from _read(file, str(file.relative_to(path.parent)), split)
    else:
        yield from _read(path, path.name, None)


def _files(folder: Path) -> list[tuple[Path, Split | None]]:
    """The data files of a folder with the splits they are named after, in order."""
    saved = _json(folder / "dataset_dict.json")
    if isinstance(saved, dict) and isinstance(saved.get("splits"), list):
        parts = [folder / str(name) for name in saved["splits"]]
        return [(file, _split_in(part.name)) for part in parts for file, _ in _files(_there(part))]
    state = _json(folder / "state.json")
    if isinstance(state, dict) and isinstance(state.get("_data_files"), list):
        # other arrow files here are the cache of `datasets`; `_split` is where the rows once came from, no statement
        return [(_there(folder / str(part["filename"])), None) for part in state["_data_files"]]
    found = [
        file for file in visible_files(folder) if file.suffix.lower() in ENDINGS and file.name not in _DESCRIPTIONS
    ]
    return [(file, _split_of(file.relative_to(folder))) for file in found]


def _there(path: Path) -> Path:
    if not path.exists():
        raise DataError(f"{path}: missing, though the data set beside it names it; copy the whole folder")
    return path


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return None


def _split_of(path: Path) -> Split | None:
    """The split that a file is named after, or else the innermost of its folders that is."""
    names = [path.name.partition(".")[0], *[parent.name for parent in path.parents]]
    return next((split for split in map(_split_in, names) if split), None)


def _split_in(name: str) -> Split | None:
    words = re.split(r"[^a-z]+", name.lower())
    return next((_SPLITS[word] for word in words if word in _SPLITS), None)


def names_a_split(name: str) -> bool:
    """Whether a name says a split and nothing else: `test`, but not `law-test`."""
    return name.lower() in _SPLITS


class MakeRow(Protocol):
    def __call__(
        self, number: int, record: Any = None, *, bad: tuple[str, str] | None = None, last: int | None = None
    ) -> Row: ...


def _read(path: Path, file: str, split: Split | None) -> Iterator[Row]:
    ending = path.suffix.lower()
    count = before = 0

    def row(number: int, record: Any = None, *, bad: tuple[str, str] | None = None, last: int | None = None) -> Row:
        nonlocal count, before
        count, shared, before = count + 1, number == before, number
        if ending in TEXT:
            where = f"{file}:{number} record {count}" if shared else f"{file}:{number}"
        else:
            where = f"{file} row {number}" if last in (None, number) else f"{file} rows {number} to {last}"
        return Row(file, number, f"{number}-{count}" if shared else f"{number}", where, split, record, bad)

    if ending in TEXT:
        yield from _read_text(path, row)
    elif ending == ".parquet":
        yield from _read_parquet(path, row)
    else:
        yield from _read_arrow(path, row)


# -- text --------------------------------------------------------------------------------------------------------


def _no_number(name: str) -> Any:
    raise ValueError(f"{name} is no JSON")


_DECODER = json.JSONDecoder(parse_constant=_no_number)
_SPACE = re.compile(r"\s*")
_TABLE = re.compile(r'\{\s*(?:"[^"]*"\s*:\s*(?:"[^"]*"|[\d.]+)\s*,\s*)*"data"\s*:\s*\[')
"""The beginning of a file in SQuAD's published form: its records are in `data`, perhaps behind a version."""
_END = re.compile(r'\]\s*(?:(?:,\s*"[^"]*"\s*:\s*(?:"[^"]*"|[\d.]+)\s*)*\}\s*)?\Z')
"""The end of an array that is all of the file, or `data` in that form."""
_FIRST_KEY = re.compile(r'\{\s*("[^"]*")')
_AFTER = re.compile(r'\s*(?:,?\s*\{\s*"|,?\s*\]|$)')
"""What may follow an element: without it, its bracket was only text."""
_BRACKETS = re.compile(r'"(?:[^"\\\n]|\\.)*"?|[{}\[\]]')
"""Strings and brackets. No string holds a line's end: one that is left open ends there."""


def _read_text(path: Path, row: MakeRow) -> Iterator[Row]:
    with path.open("rb") as file:
        beginning = file.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip().decode("utf-8", "replace")
    lines = _first_of_several_lines(path)  # each may be a table, or an array, too
    table = None if lines else _TABLE.match(beginning)
    array_at_once = beginning.startswith("[") and not lines
    if path.suffix.lower() != ".json" and table is None and not array_at_once:
        yield from _read_lines(path, row)
        return
    text = path.read_text(encoding="utf-8-sig", errors="surrogateescape")
    array = text.index("[", table.end() - 1) if table else _space(text, 0)
    if text.startswith("[", array):
        yield from _read_elements(text, array + 1, True, row)
    else:
        yield from _read_elements(text, 0, False, row)


def _first_of_several_lines(path: Path) -> bool:
    """Whether a file's first line is a JSON value that others follow."""
    with path.open("rb") as file:
        lines = (line for line in file if line.removeprefix(b"\xef\xbb\xbf").strip())
        first, more = next(lines, b""), next(lines, None) is not None
    try:
        _DECODER.decode(first.decode("utf-8-sig", "surrogateescape").strip())
    except (ValueError, RecursionError):
        return False
    return more


def _read_lines(path: Path, row: MakeRow) -> Iterator[Row]:
    with path.open("rb") as lines:  # of bytes: text is also split at U+2028, which JSON may hold
        for number, line in enumerate(lines, start=1):
            text = line.decode("utf-8-sig" if number == 1 else "utf-8", "surrogateescape").strip()
            if not text:
                continue
            try:
                yield _checked(_DECODER.decode(text), number, row)
            except (ValueError, RecursionError) as error:
                yield row(number, bad=("not JSON", _printable(error)))


def _read_elements(text: str, place: int, array: bool, row: MakeRow) -> Iterator[Row]:
    """The elements of an array, or the values that follow each other in a file. Commas may lack. After a broken element
    reading goes on at the next."""
    number, counted, key, broken = 1, 0, "", False
    while True:
        place = _space(text, place)
        number, counted = number + text.count("\n", counted, place), place
        if place == len(text):
            if array and not broken:
                yield row(number, bad=("cut off", "the file ends within its array"))
            return
        if array and _END.match(text, place):
            return
        if broken and text[place] in "]}":  # of the element that was broken
            place += 1
            continue
        try:
            record, end = _DECODER.raw_decode(text, place)
        except (ValueError, RecursionError) as error:
            end = _next_element(text, place, key)
            cut = array and end == len(text) and text.rstrip()[-1] not in "]}"
            yield row(number, bad=("cut off" if cut else "not JSON", _printable(error)))
            broken = True
        else:
            yield _checked(record, number, row)
            key, broken = _first_key(text, place), False
        end = _space(text, end)
        place = end + text.startswith(",", end)


def _space(text: str, place: int) -> int:
    """Where white space that begins at a place ends."""
    found = _SPACE.match(text, place)
    return found.end() if found else place


def _first_key(text: str, place: int) -> str:
    """The first key of an object, as it is written."""
    found = _FIRST_KEY.match(text, place)
    return found.group(1) if found else ""


def _next_element(text: str, place: int, key: str) -> int:
    """Where to go on after a broken element: where its brackets close, unless a whole element stands before; or else
    where an object begins with the key of this one or of the one before. The end of the text where that is nowhere."""
    keys = {_first_key(text, place), key} - {""}
    opening = re.compile(r"\{\s*(?:" + ("|".join(map(re.escape, keys)) or '"') + ")")
    end = _closed(text, place)
    if end is not None and not _AFTER.match(text, end):
        end = None
    for found in opening.finditer(text, place + 1, len(text) if end is None else end):
        if end is None or _is_element(text, found.start(), opening):
            return found.start()
    return len(text) if end is None else end


def _is_element(text: str, place: int, opening: re.Pattern[str]) -> bool:
    """Whether an object is whole, and followed by another or by the end of the array."""
    try:
        _, end = _DECODER.raw_decode(text, place)
    except (ValueError, RecursionError):
        return False
    end = _space(text, end)
    return _END.match(text, end) is not None or (
        text.startswith(",", end) and opening.match(text, _space(text, end + 1)) is not None
    )


def _closed(text: str, place: int) -> int | None:
    """Where the bracket at a place is closed; None where brackets do not match."""
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


def _checked(record: Any, number: int, row: MakeRow) -> Row:
    """A row, unless it cannot be written as UTF-8: bytes that were none, or half a character, `\\ud83d`."""
    try:
        json.dumps(record, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        return row(number, bad=("not UTF-8", _printable(error)))
    return row(number, record)


def _printable(error: BaseException) -> str:
    """What is wrong, in characters that can be printed anywhere."""
    return str(error).encode("ascii", "backslashreplace").decode()[:200]


# -- tables ------------------------------------------------------------------------------------------------------


def _read_parquet(path: Path, row: MakeRow) -> Iterator[Row]:
    """Row group by row group: one that is damaged costs no other."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pq.ParquetFile(path)
    except (pa.ArrowException, OSError) as error:
        yield row(1, bad=("unreadable file", _printable(error)))
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
                yield row(number + 1, bad=("unreadable rows", _printable(error)), last=last)
            number = last


def _read_arrow(path: Path, row: MakeRow) -> Iterator[Row]:
    """Record batch by record batch, of a stream, as `datasets` writes it, or of a file. What is behind a damaged one is
    lost: only reading finds where the next begins."""
    import pyarrow as pa

    number = 0
    try:
        with pa.OSFile(str(path)) as source:
            whole = source.read(6) == b"ARROW1"
            source.seek(0)
            for batch in _batches(pa.ipc.open_file(source)) if whole else pa.ipc.open_stream(source):
                yield from _read_batch(batch, number, row)
                number += batch.num_rows
    except (pa.ArrowException, OSError, ValueError) as error:
        yield row(number + 1, bad=("unreadable file" if number == 0 else "cut off", _printable(error)))


def _read_batch(batch: Any, before: int, row: MakeRow) -> Iterator[Row]:
    """The rows of a batch, of which there are some before. Where one has bytes that are no UTF-8, it alone is bad."""
    try:
        records = batch.to_pylist()
    except ValueError:
        records = None
    for index in range(batch.num_rows):
        try:
            yield row(before + index + 1, records[index] if records else batch.slice(index, 1).to_pylist()[0])
        except ValueError as error:
            yield row(before + index + 1, bad=("not UTF-8", _printable(error)))


def _batches(file: Any) -> Iterator[Any]:
    for number in range(file.num_record_batches):
        yield file.get_batch(number)
