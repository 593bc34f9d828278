"""The records of a questions file, each as a JSON object, and the fields of that object.

A field counts as missing if it is null, NaN, an empty list or object, or a text of white space only (`is_given`).
"""

import json
import math
from collections.abc import Iterator, Mapping
from decimal import Decimal
from pathlib import Path
from typing import Any

from stages.tasks.common.encodings import decode
from stages.tasks.common.tables import JsonFloat, Row, read_rows


class BadRecordError(Exception):
    """A line, or a part of a line, that cannot be used.

    Skipped records are counted by `reason`, the kind of fault. The message holds the value found.
    """

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(detail)
        self.reason = reason


def lines_in(path: Path) -> Iterator[tuple[str, Row]]:
    """The records of a JSON Lines file, read one at a time, each with its place: the 1-based line.

    A file that holds one JSON array is read too, record by record. There, record 500 has the
    place `1-500` if it and an earlier record begin on line 1.
    """
    yield from ((row.place, row) for row in read_rows(path))


def object_in(line: Row) -> dict[str, Any]:
    """The JSON object in a line. Raises BadRecordError for anything else."""
    if line.bad is not None:
        raise BadRecordError(*line.bad)
    if not isinstance(line.record, dict):
        raise BadRecordError("not a JSON object", f"found {type(line.record).__name__}")
    return line.record


def object_of(content: bytes) -> dict[str, Any]:
    """The JSON object that is the content of a file. Raises BadRecordError for anything else."""
    try:
        record = json.loads(decode(content))
    except (ValueError, RecursionError) as error:
        raise BadRecordError("not JSON", str(error)) from error
    if not isinstance(record, dict):
        raise BadRecordError("not a JSON object", f"found {type(record).__name__}")
    return record


# -- fields ------------------------------------------------------------------------------------------------------


def is_given(value: Any) -> bool:
    """Whether data give a value: False if it is null, NaN, an empty list or object, or a text of white space only."""
    if isinstance(value, str):
        return value.strip() != ""
    if isinstance(value, float):
        return not math.isnan(value)
    return value is not None and value not in ([], {})


def found_keys(record: Mapping[str, Any]) -> str:
    """The keys of a record, for a message: `found the keys instruction, output`. At most 200 characters."""
    return ("found the keys " + ", ".join(map(str, record)))[:200] if record else "found no keys"


def text_of(record: dict[str, Any], field: str) -> str:
    """The text of a field, stripped. An `id` may be an integer. Raises BadRecordError for other and empty values."""
    value = record.get(field)
    if value is None:
        raise BadRecordError(f"no {field}", found_keys(record))
    if type(value) is int and field == "id":
        value = str(value)
    if not isinstance(value, str):
        raise BadRecordError(f"{field} is not a string", repr(value)[:100])
    if not value.strip():
        raise BadRecordError(f"empty {field}")
    return value.strip()


def text_or_number(value: Any) -> str | None:
    """A text unchanged; a number or a truth value as JSON writes it (`3.50`, `true`); None for other values.

    A whole float of a binary table is written without a fraction, because integer columns with missing values hold
    floats.
    """
    if isinstance(value, str):
        return value
    if isinstance(value, bool):
        return json.dumps(value)
    if isinstance(value, JsonFloat):
        return value.written
    if isinstance(value, float):
        return str(value).removesuffix(".0")
    return str(value) if isinstance(value, int | Decimal) else None


def texts_of(value: Any) -> list[str] | None:
    """The texts and numbers in a value or a list of values, as stripped texts, without missing ones (`is_given`). None
    if there is any other value."""
    values = [one for one in (value if isinstance(value, list) else [value]) if is_given(one)]
    texts = [text for text in map(text_or_number, values) if text is not None]
    return [text.strip() for text in texts] if len(texts) == len(values) else None
