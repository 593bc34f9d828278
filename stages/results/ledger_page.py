"""The ledger as one HTML file: no network, sortable by mouse and keyboard, readable without its script.

Written with `html.escape`, not with a template engine: a host that only launches stages has none installed.
"""

import base64
import hashlib
import re
from collections.abc import Sequence
from html import escape
from pathlib import Path
from string import Template
from typing import NamedTuple

TEMPLATE = Path(__file__).with_name("ledger.html")
"""With `$` names where the content goes; the script is allowed by its digest, and no other could run."""


class Head(NamedTuple):
    title: str
    number: bool
    sorted: str | None
    """`ascending` or `descending`, where the rows come in this column's order."""


class Cell(NamedTuple):
    text: str
    key: str | float | None
    """What it sorts by; None is missing, and last."""


def page(heads: Sequence[Head], rows: Sequence[tuple[str, Sequence[Cell]]], lead: str, notes: Sequence[str]) -> str:
    """The page. Each row has a kind, which its style goes by, and a cell for each head. Every text is escaped."""
    template = TEMPLATE.read_text(encoding="utf-8")
    script = re.search(r"<script>(.*?)</script>", template, re.DOTALL)
    assert script is not None
    allowed = base64.b64encode(hashlib.sha256(script[1].encode()).digest()).decode()
    return Template(template).substitute(
        allowed=allowed,
        lead=escape(lead),
        heads="\n".join(_head(head) for head in heads),
        rows="\n".join(_row(kind, cells, heads) for kind, cells in rows),
        notes="\n".join(f"<p>{escape(note)}</p>" for note in notes),
    )


def _head(head: Head) -> str:
    order = f' aria-sort="{escape(head.sorted)}"' if head.sorted else ""
    number = ' class="number"' if head.number else ""
    return f'<th scope="col"{number}{order}><button type="button">{escape(head.title)}</button></th>'


def _row(kind: str, cells: Sequence[Cell], heads: Sequence[Head]) -> str:
    inner = "".join(_cell(cell, head) for cell, head in zip(cells, heads, strict=True))
    return f'<tr class="{escape(kind)}">{inner}</tr>'


def _cell(cell: Cell, head: Head) -> str:
    number = ' class="number"' if head.number else ""
    key = "" if cell.key is None else f' data-key="{escape(str(cell.key))}"'
    return f"<td{number}{key}>{escape(cell.text)}</td>"
