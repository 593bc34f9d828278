"""A comparison of runs as text for the console: a table for each metric."""

import io
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from stages.contract.records import BASE
from stages.results.comparison import (
    ComparisonRow,
    EvaluatedRun,
    comparison_rows,
    loss_reference,
    loss_rows,
    reference_model,
)
from stages.results.fitted_tables import Row, fitted_tables
from stages.results.held_out_table import held_out_notes, held_out_tables
from stages.results.uncertainty import documents_note, interval_text, is_clear, star_note

if TYPE_CHECKING:
    from rich.table import Table


def comparison_tables(runs: Sequence[EvaluatedRun], coloured: bool) -> Iterator[str]:
    """Yield a table of held-out losses with notes, if the first run has any. Then yield a table for each metric, a line
    that says how the scores are counted, and a note if there are few documents. The runs must have the same test set.
    `coloured`: with ANSI colours."""
    from rich.console import Console

    first, width = runs[0], Console().width

    def shown(table: "Table") -> str:
        """The text of a table."""
        text = io.StringIO()
        Console(file=text, width=width, force_terminal=coloured, highlight=False, markup=False, emoji=False).print(
            table
        )
        return text.getvalue().removesuffix("\n")

    losses = loss_rows(runs)
    if losses:
        figures = [((row.run, row.model), row.figure, row.comparison) for row in losses]
        reference = f"{first.run}/{loss_reference(runs)}"
        yield from map(shown, held_out_tables(figures, ["run", "held-out loss"], reference, width))
        yield from held_out_notes(sum(row.comparison is not None for row in losses))
    if not first.lines:
        return
    rows = comparison_rows(runs)
    for metric in dict.fromkeys(row.metric for row in rows):
        own = [row for row in rows if row.metric == metric]
        yield from map(shown, _tables(own, f"{first.run}/{reference_model(first)}", width))
    samples, questions = len(first.lines), len(first.groups)
    counted = f"{samples} test samples" + (f", counted as {questions}" if questions < samples else "")
    compared = max(Counter(row.metric for row in rows if row.difference is not None).values(), default=0)
    yield f"{counted}; percent and points with 95% intervals; {star_note(compared)}"
    note = documents_note(figure.get("groups") for row in rows for figure in (row.figure, row.difference or row.figure))
    if note:
        yield note


def _tables(rows: Sequence[ComparisonRow], reference: str, width: int) -> Iterator["Table"]:
    """The table of one metric's rows, or several with some of the figures each. `reference` names the model that the
    others are compared with, `width` is in columns."""
    shown = []
    for row in rows:
        score = row.figure
        cells = [interval_text(score["value"], score["low"], score["high"]), _gain_text(row)]
        cells += ["" if row.same_answers is None else f"{row.same_answers:.1f}%"]
        cells += [str(score.get(key, "")) for key in ("n", "failed", "empty")]  # earlier versions counted no empty ones
        shown.append(Row((row.run, row.model), tuple(cells), "dim" if row.model == BASE else ""))
    heads = [rows[0].metric, f"over {reference}", "same answers", "n", "failed", "empty"]
    return fitted_tables(["run", "model"], heads, shown, width)


def _gain_text(row: ComparisonRow) -> str:
    """The difference with its interval, then a star if it is clear, else blanks for alignment, and its number of
    samples if that is not the model's own; empty if there is no difference."""
    if row.difference is None:
        return ""
    value, low, high = (row.difference[name] for name in ("value", "low", "high"))
    pairs = "" if row.difference["n"] == row.figure["n"] else f" n {row.difference['n']}"
    return interval_text(value, low, high, "+") + (" *" if is_clear(row.difference) else "  ") + pairs
