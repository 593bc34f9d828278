"""A line of a questions file as a JSON object, and what of it can be used. Tasks read their data with it."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any


class BadRecordError(Exception):
    """A line, or a part of it, that cannot be used."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(detail)
        self.reason = reason


def lines_in(path: Path) -> Iterator[tuple[int, bytes]]:
    """The lines of a file that are not blank, each with its 1-based number, one after the other."""
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                yield number, line.removesuffix(b"\n")  # an error's place in it must not be on a second line


def object_in(line: bytes) -> dict[str, Any]:
    """The JSON object that a line is. Raises BadRecordError for what is none."""
    try:
        record = json.loads(line.decode("utf-8-sig"))
        json.dumps(record, ensure_ascii=False).encode()  # half a character, "\\ud83d", is valid JSON but no text
    except (ValueError, RecursionError) as error:
        raise BadRecordError("not JSON", str(error)) from error
    if not isinstance(record, dict):
        raise BadRecordError("not a JSON object", f"found {type(record).__name__}")
    return record


def text_of(record: dict[str, Any], field: str) -> str:
    """A field's text, stripped; an `id` may be a whole number, too. Raises BadRecordError where there is none."""
    if field not in record:
        raise BadRecordError(f"no {field}")
    value = record[field]
    if type(value) is int and field == "id":
        value = str(value)
    if not isinstance(value, str):
        raise BadRecordError(f"{field} is no text", repr(value)[:100])
    if not value.strip():
        raise BadRecordError(f"empty {field}")
    return value.strip()
