"""JSON Lines: the lines of a questions file, each as a JSON object, and the fields of that object."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any


class BadRecordError(Exception):
    """A line, or a part of a line, that cannot be used.

    Skipped records are counted by `reason`, the kind of fault. The message holds the value found.
    """

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(detail)
        self.reason = reason


def lines_in(path: Path) -> Iterator[tuple[int, bytes]]:
    """The non-blank lines of a file, each with its 1-based number, read one at a time."""
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                yield number, line.removesuffix(b"\n")  # else an error there would seem to be on the next line


def object_in(line: bytes) -> dict[str, Any]:
    """The JSON object in a line. Raises BadRecordError for anything else."""
    try:
        record = json.loads(line.decode("utf-8-sig"))
        json.dumps(record, ensure_ascii=False).encode()  # a lone surrogate, "\\ud83d", is valid JSON, not Unicode
    except (ValueError, RecursionError) as error:
        raise BadRecordError("not JSON", str(error)) from error
    if not isinstance(record, dict):
        raise BadRecordError("not a JSON object", f"found {type(record).__name__}")
    return record


def text_of(record: dict[str, Any], field: str) -> str:
    """The text of a field, stripped. An `id` may be an integer. Raises BadRecordError for other and empty values."""
    if field not in record:
        raise BadRecordError(f"no {field}")
    value = record[field]
    if type(value) is int and field == "id":
        value = str(value)
    if not isinstance(value, str):
        raise BadRecordError(f"{field} is not a string", repr(value)[:100])
    if not value.strip():
        raise BadRecordError(f"empty {field}")
    return value.strip()
