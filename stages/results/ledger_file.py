"""The ledger in each of its formats, as text and as a file."""

from collections.abc import Sequence
from pathlib import Path

from stages.contract.errors import UsageError
from stages.contract.files import open_atomically
from stages.contract.machine_errors import machine_error
from stages.results.ledger import Row
from stages.results.ledger_page import render_html
from stages.results.ledger_table import render_csv, render_table

SUFFIXES = {".csv": "csv", ".html": "html"}
"""Formats by a file's suffix; any other suffix means a table."""


def render_ledger(rows: Sequence[Row], form: str, sorted_by: str | None, descending: bool, coloured: bool) -> str:
    """Return the ledger as text in the format `form`: `table`, `csv` or `html`. A table without rows is empty."""
    if form == "csv":
        return render_csv(rows)
    if form == "html":
        return render_html(rows, sorted_by, descending)
    return render_table(rows, sorted_by, coloured) if rows else ""


def write_ledger(path: Path, text: str, form: str) -> None:
    """Write a rendered ledger, as UTF-8. Raises DoesNotFitError if the disk is full, and UsageError if the file cannot
    be written for any other reason."""
    mark = "\ufeff" if form == "csv" else ""  # spreadsheets read a file as UTF-8 only if it starts with this
    try:
        with open_atomically(path.absolute()) as file:
            file.write(mark + text)
    except OSError as error:
        raise machine_error(error) or UsageError(
            f"--out {path}: cannot be written ({error.strerror}); name another file"
        ) from error
