"""A comparison of runs as text for the console: a table for each metric."""

import io
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from stages.results.comparison import ComparisonRow, EvaluatedRun, comparison_rows, reference_model
from stages.results.uncertainty import documents_note, interval_text, is_clear, star_note

if TYPE_CHECKING:
    from rich.table import Table


def comparison_tables(runs: Sequence[EvaluatedRun], coloured: bool) -> Iterator[str]:
    """Yield a table for each metric, then a line that says how the scores are counted, and a note if there are few
    documents. The runs must have the same test set. `coloured`: with ANSI colours."""
    from rich.console import Console

    first = runs[0]
    rows = comparison_rows(runs)
    for metric in dict.fromkeys(row.metric for row in rows):
        text = io.StringIO()
        console = Console(
            file=text, width=Console().width, force_terminal=coloured, highlight=False, markup=False, emoji=False
        )
        console.print(_table([row for row in rows if row.metric == metric], f"{first.run}/{reference_model(first)}"))
        yield text.getvalue().removesuffix("\n")
    samples, questions = len(first.lines), len(first.groups)
    counted = f"{samples} test samples" + (f", counted as {questions}" if questions < samples else "")
    compared = max(Counter(row.metric for row in rows if row.difference is not None).values(), default=0)
    yield f"{counted}; percent and points with 95% intervals; {star_note(compared)}"
    note = documents_note(figure.get("groups") for row in rows for figure in (row.figure, row.difference or row.figure))
    if note:
        yield note


def _table(rows: Sequence[ComparisonRow], reference: str) -> "Table":
    """The table of one metric's rows. `reference` names the model that the others are compared with."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    table = Table("run", "model", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for head in (rows[0].metric, f"over {reference}", "same answers", "n", "failed"):
        table.add_column(Text(head), justify="right", overflow="fold")
    for row in rows:
        score = row.figure
        cells = [row.run, row.model, interval_text(score["value"], score["low"], score["high"]), _gain_text(row)]
        cells += ["" if row.same_answers is None else f"{row.same_answers:.1f}%", str(score["n"]), str(score["failed"])]
        table.add_row(*map(Text, cells), style="dim" if row.model == "base" else "")
    return table


def _gain_text(row: ComparisonRow) -> str:
    """The difference with its interval, then a star if it is clear, else blanks for alignment; empty if there is no
    difference."""
    if row.difference is None:
        return ""
    value, low, high = (row.difference[name] for name in ("value", "low", "high"))
    return interval_text(value, low, high, "+") + (" *" if is_clear(row.difference) else "  ")
