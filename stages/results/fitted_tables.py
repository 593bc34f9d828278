"""Tables for the console that fit its width: columns without room go into another table below, with the same rows."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from stages.contract.columns import text_width, wrap_text

if TYPE_CHECKING:
    from rich.table import Table

LEAST_LABEL_WIDTH = 14
"""Columns that a longer label is folded into, if there is no more room."""

GAP = 1
"""Blanks between columns."""

EDGES = 2
"""Blanks at both edges of a table."""


@dataclass(frozen=True)
class Row:
    """A row of a table."""

    labels: tuple[str, ...]
    """What the row is about: repeated in each table, folded if too long."""
    cells: tuple[str, ...]
    """Its figures, which are never folded."""
    style: str = ""


def fitted_tables(
    labels: Sequence[str], heads: Sequence[str], rows: Sequence[Row], width: int, caption: str | None = None
) -> Iterator["Table"]:
    """Yield tables of at most `width` columns for rich: one, or several with the same rows and some of the figures.

    `labels` and `heads` are the titles of the rows' labels and cells; titles break at blanks.
    """
    least = [
        min(max([_title_width(title), *(text_width(row.labels[place]) for row in rows)]), LEAST_LABEL_WIDTH)
        for place, title in enumerate(labels)
    ]
    own = [
        max([_title_width(head), *(text_width(row.cells[place]) for row in rows)]) for place, head in enumerate(heads)
    ]
    room = width - EDGES - sum(each + GAP for each in least)
    parts: list[list[int]] = [[]]
    left = room
    for place, needed in enumerate(own):
        if parts[-1] and needed + GAP > left:
            parts.append([])
            left = room
        parts[-1].append(place)
        left -= needed + GAP
    for part in parts:
        yield _table(labels, [heads[place] for place in part], rows, part, caption)


def _title_width(title: str) -> int:
    """The number of columns that a title needs, which breaks at blanks."""
    return max(map(text_width, title.split()), default=0)


def _table(
    labels: Sequence[str], heads: Sequence[str], rows: Sequence[Row], part: Sequence[int], caption: str | None
) -> "Table":
    """The table of the figures at the places `part`."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    table = Table(box=SIMPLE_HEAD, padding=0, caption=caption)  # the box has a blank between columns
    for title in labels:
        table.add_column(Text(title), overflow="fold", vertical="bottom")
    for place, head in zip(part, heads, strict=True):
        longest = max([_title_width(head), *(text_width(row.cells[place]) for row in rows)])
        table.add_column(Text("\n".join(wrap_text(head, longest, 0))), justify="right", vertical="bottom", no_wrap=True)
    for row in rows:
        cells = (*row.labels, *(row.cells[place] for place in part))
        table.add_row(*map(Text, cells), style=row.style)
    return table
