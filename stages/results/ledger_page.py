"""The ledger as one HTML file: without network, sortable by mouse and keyboard, readable without its script.

Written with `html.escape`, not with a template engine: hosts that only launch stages have none installed.
"""

import base64
import hashlib
import re
from collections.abc import Sequence
from html import escape
from pathlib import Path
from string import Template
from typing import NamedTuple

from stages.results.ledger import Row
from stages.results.ledger_table import score_notes, table_columns

TEMPLATE = Path(__file__).with_name("ledger.html")
"""The page, with `$name` for its content. Its security policy allows its script by digest, and no other."""


class Head(NamedTuple):
    """The head of a column."""

    title: str
    number: bool
    sorted: str | None
    """`ascending` or `descending` if the rows are sorted by this column."""


class Cell(NamedTuple):
    """A cell of the table."""

    text: str
    key: str | float | None
    """What it sorts by; None is missing, and last."""


def render_html(rows: Sequence[Row], sorted_by: str | None, descending: bool) -> str:
    """Return the ledger as an HTML page with all columns of `table_columns`. `sorted_by` is the column by which the
    rows are already sorted, None if there is none; `descending` is the direction."""
    columns = table_columns(rows)
    direction = "descending" if descending else "ascending"
    heads = [Head(each.title, each.number, direction if sorted_by == each.values[0] else None) for each in columns]
    body = []
    for row in rows:
        keys = [getattr(row, each.values[0]) for each in columns]
        cells = [Cell(each.text(row), None if key == "" else key) for each, key in zip(columns, keys, strict=True)]
        body.append((_style_class(row), cells))
    runs = len({row.run for row in rows})
    notes = ["Percent [95% interval]; a failed answer scores 0 and counts in n. Gains are points over base, paired."]
    return _page_html(
        heads, body, f"{len(rows)} rows of {runs} run{'' if runs == 1 else 's'}", [*score_notes(rows), *notes]
    )


def _style_class(row: Row) -> str:
    """The style class of a row: `base`, `vote` or `adapter` if its score is current and on test data only, else
    `doubtful`."""
    if not row.state.startswith("scored") or row.scored_on.startswith("training"):
        return "doubtful"
    return row.adapter if row.adapter in ("base", "vote") else "adapter"


def _page_html(
    heads: Sequence[Head], rows: Sequence[tuple[str, Sequence[Cell]]], lead: str, notes: Sequence[str]
) -> str:
    """The HTML of the page. `rows` has each row's style class and its cells, one for each head. `lead` is the text
    above the table, `notes` are the paragraphs below it. Every text is escaped."""
    template = TEMPLATE.read_text(encoding="utf-8")
    script = re.search(r"<script>(.*?)</script>", template, re.DOTALL)
    assert script is not None
    allowed = base64.b64encode(hashlib.sha256(script[1].encode()).digest()).decode()
    return Template(template).substitute(
        allowed=allowed,
        lead=escape(lead),
        heads="\n".join(_head_html(head) for head in heads),
        rows="\n".join(_row_html(kind, cells, heads) for kind, cells in rows),
        notes="\n".join(f"<p>{escape(note)}</p>" for note in notes),
    )


def _head_html(head: Head) -> str:
    """The HTML of a column's head, with a button that sorts by the column."""
    order = f' aria-sort="{escape(head.sorted)}"' if head.sorted else ""
    number = ' class="number"' if head.number else ""
    return f'<th scope="col"{number}{order}><button type="button">{escape(head.title)}</button></th>'


def _row_html(kind: str, cells: Sequence[Cell], heads: Sequence[Head]) -> str:
    """The HTML of a row of style class `kind`, with a cell for each head."""
    inner = "".join(_cell_html(cell, head) for cell, head in zip(cells, heads, strict=True))
    return f'<tr class="{escape(kind)}">{inner}</tr>'


def _cell_html(cell: Cell, head: Head) -> str:
    """The HTML of a cell, with its sort key."""
    number = ' class="number"' if head.number else ""
    key = "" if cell.key is None else f' data-key="{escape(str(cell.key))}"'
    return f"<td{number}{key}>{escape(cell.text)}</td>"
