"""The ledger as a table on the console and as CSV, and the columns that the table and the HTML page show."""

import csv
import io
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

from stages.results.ledger import Row
from stages.results.uncertainty import documents_note, interval_text, is_clear, outdated_note, star_note

if TYPE_CHECKING:
    from rich.table import Table

UNTESTED = "untested"
"""Shown instead of a missing score: never a number."""

ON_TRAINING_DATA = "Scored on training data: such a score says nothing about other data."

FORMULAS = tuple("=+-@＝＋－＠")
"""The characters that a spreadsheet takes for the start of a formula."""

MOST_WIDTH = 40
"""Largest width of a column in a terminal, in characters; longer texts are folded."""

LEAST_WIDTH = 24
"""Width for which a column of long texts needs room, in characters: its texts are folded sooner to make room for
others."""

GAP = 2
"""Blanks between columns."""

LOSS_COLUMNS = tuple(f"{name}{end}" for name in ("perplexity", "win_rate") for end in ("", "_low", "_high"))

RARE_COLUMNS = ("data_recipe", "records_read", "records_kept", "connector_samples", *LOSS_COLUMNS)
"""Left out of the CSV if no row has them: only some tasks process their data, and only some runs have losses."""


@dataclass(frozen=True)
class Column:
    """A column of table and page; the CSV has one column for each value instead."""

    title: str
    text: Callable[[Row], str]
    values: tuple[str, ...]
    """The fields of Row that it shows; it sorts by the first."""
    rank: int = 0
    """If there is no room for all columns, those with the lowest rank stay. A column of rank 0 always stays."""
    number: bool = False
    long: bool = False
    """Whether its texts may be sentences."""
    rare: bool = False
    """Whether it is left out if no row has a text for it."""


def table_columns(rows: Sequence[Row]) -> list[Column]:
    """The columns for these rows, in order. If all rows have the same metric, it is the title of the score's column."""
    metrics = list(dict.fromkeys(row.metric for row in rows if row.metric))
    one = len(metrics) == 1
    votes = any(row.in_vote for row in rows)
    weighted = len({row.weight for row in rows} - {None}) > 1
    columns = [
        Column("run", lambda row: row.run, ("run",)),
        Column("task", lambda row: row.task, ("task",), 12),
        Column("adapter", lambda row: row.adapter, ("adapter",)),
        Column("data recipe", lambda row: row.data_recipe, ("data_recipe",), long=True, rare=True),
        Column("records kept", _kept_text, ("records_kept", "records_read"), number=True, rare=True),
        Column(
            "connector samples",
            lambda row: _format(row.connector_samples),
            ("connector_samples",),
            1,
            True,
            rare=True,
        ),
        Column("data mix", lambda row: row.data_mix, ("data_mix",), long=True),
        Column("sources", lambda row: row.sources, ("sources",), 8, long=True),
        Column("samples", lambda row: _format(row.samples), ("samples",), 4, number=True),
        Column("steps", lambda row: _format(row.steps), ("steps",), 9, number=True),
        Column("loss", lambda row: _format(row.loss, ".4f"), ("loss",), 7, number=True),
        Column("metric", lambda row: row.metric, ("metric",), 17 if one else 0),
        Column(metrics[0] if one else "score", _score_text, ("score", "low", "high"), number=True),
        Column("over base", _gain_text, ("gain", "gain_low", "gain_high"), 1, number=True),
        Column("perplexity", _perplexity_text, LOSS_COLUMNS[:3], 1, number=True, rare=True),
        Column("wins over base %", _win_rate_text, LOSS_COLUMNS[3:], 1, number=True, rare=True),
        Column("n", lambda row: _format(row.n), ("n",), 2, number=True),
        Column("failed", lambda row: _format(row.failed), ("failed",), 3, number=True),
        Column("empty", lambda row: _format(row.empty), ("empty",), 3, number=True),
        Column("validation", lambda row: _format(row.validation, ".1f"), ("validation",), 5 if votes else 16, True),
        Column("in the vote", lambda row: _vote_text(row, weighted), ("in_vote", "weight"), 0 if votes else 15),
        Column("state", lambda row: row.state, ("state", "scored_on"), long=True),
        Column("base model", lambda row: row.base_model, ("base_model",), 10),
        Column("seed", lambda row: _format(row.seed), ("seed",), 13, number=True),
        Column("recipe", lambda row: row.recipe, ("recipe",), 11),
        Column("date", lambda row: row.date[:16].replace("T", " "), ("date",), 6),
        Column("lorry", lambda row: row.version, ("version",), 14),
        Column("documents", lambda row: _format(row.groups), ("groups",), 18, number=True),
    ]
    return [column for column in columns if not column.rare or any(column.text(row) for row in rows)]


def _format(value: float | None, form: str = "") -> str:
    """Format a number by the format specification `form`. Returns an empty text for None."""
    return "" if value is None else format(value, form)


def _kept_text(row: Row) -> str:
    """The records that Data-Juicer kept, as `<kept> of <read>`; empty without Data-Juicer."""
    return "" if row.records_kept is None else f"{row.records_kept} of {row.records_read}"


def _score_text(row: Row) -> str:
    """The score with its interval, or UNTESTED; empty if there is only a held-out loss."""
    return interval_text(row.score, row.low, row.high) or ("" if row.perplexity is not None else UNTESTED)


def _gain_text(row: Row) -> str:
    """The gain with its interval, and a star if it is clear; empty without a gain."""
    return interval_text(row.gain, row.gain_low, row.gain_high, "+") + ("*" if is_clear({"p": row.gain_p}) else "")


def _perplexity_text(row: Row) -> str:
    """The held-out perplexity with its interval; empty without one."""
    return interval_text(row.perplexity, row.perplexity_low, row.perplexity_high, digits=2)


def _win_rate_text(row: Row) -> str:
    """The share of wins over base with its interval; empty without one."""
    return interval_text(row.win_rate, row.win_rate_low, row.win_rate_high)


def _vote_text(row: Row, weighted: bool) -> str:
    """`yes` or `no` for whether the adapter votes, with its weight if weights differ; empty without a vote."""
    return f"{row.in_vote}, {row.weight:.2f}" if weighted and row.weight is not None else row.in_vote


def score_notes(rows: Sequence[Row]) -> list[str]:
    """Sentences on how far the scores of these rows can be trusted."""
    notes = [ON_TRAINING_DATA] if any(row.scored_on.startswith("training") for row in rows) else []
    gains = Counter(row.run for row in rows if row.gain is not None)
    if gains:
        notes.append(star_note(max(gains.values()), "models of a run"))
    scored = [row for row in rows if row.score is not None]
    few = defaultdict(list)
    for run in dict.fromkeys(row.run for row in scored):
        few[documents_note(row.groups for row in scored if row.run == run)].append(run)
    notes += [f"{', '.join(runs)}: {note}" for note, runs in few.items() if note is not None]
    return notes + [outdated_note(run) for run in dict.fromkeys(row.run for row in scored if row.groups is None)]


# -- CSV ---------------------------------------------------------------------------------------------------------


def render_csv(rows: Sequence[Row]) -> str:
    """Return the ledger as CSV: a head, then one line for each row. Columns of RARE_COLUMNS without any value are left
    out, a missing score is UNTESTED, and a text that a spreadsheet would take for a formula gets an apostrophe in
    front."""
    every = [field.name for field in fields(Row)]
    names = [n for n in every if n not in RARE_COLUMNS or any(getattr(row, n) not in (None, "") for row in rows)]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(names)
    for row in rows:
        cells = {name: getattr(row, name) for name in names}
        if row.score is None and row.perplexity is None:
            cells["score"] = UNTESTED
        writer.writerow(_escape_formula(cell) if isinstance(cell, str) else cell for cell in cells.values())
    return text.getvalue()


def _escape_formula(text: str) -> str:
    """Put an apostrophe in front of a text that a spreadsheet would take for a formula. Returns the text."""
    return f"'{text}" if text.startswith(FORMULAS) else text


# -- table -------------------------------------------------------------------------------------------------------


def render_table(rows: Sequence[Row], sorted_by: str | None, coloured: bool) -> str:
    """Return the ledger as a table with the columns that fit the terminal, then notes, and a line that names the
    columns left out. The column `sorted_by` is always shown."""
    from rich.console import Console

    text = io.StringIO()
    console = Console(
        file=text, width=Console().width, force_terminal=coloured, highlight=False, markup=False, emoji=False
    )
    every = table_columns(rows)
    shown = _fitting_columns(every, rows, sorted_by, console.width)
    console.print(_table(shown, rows))
    console.print("percent [95% interval]; failed answers score 0 and count in n", style="dim")
    for note in score_notes(rows):
        console.print(note, style="bold")
    missing = [each.title for each in every if each not in shown]
    if missing:
        console.print(f"no room for: {', '.join(missing)}; --format csv has them", style="dim")
    return text.getvalue()


def _fitting_columns(every: list[Column], rows: Sequence[Row], sorted_by: str | None, width: int) -> list[Column]:
    """The columns that always stay, that of `sorted_by` among them, and those that a terminal of `width` characters has
    room for, in order."""
    from rich.cells import cell_len

    def needed_width(column: Column) -> int:
        """The width of a column with its gap, in characters: titles break between words, folded texts anywhere."""
        title = max(map(cell_len, column.title.split()))
        longest = max(cell_len(column.text(row)) for row in rows)
        return max(title, min(LEAST_WIDTH if column.long else MOST_WIDTH, longest)) + GAP

    shown = [each for each in every if not each.rank or sorted_by in each.values]
    left = width - 2 - sum(map(needed_width, shown))  # the box has an edge
    for each in sorted((each for each in every if each not in shown), key=lambda each: each.rank):
        if needed_width(each) <= left:
            shown.append(each)
            left -= needed_width(each)
    return [each for each in every if each in shown]


def _table(columns: list[Column], rows: Sequence[Row]) -> "Table":
    """The table of these columns for rich, without notes."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    table = Table(box=SIMPLE_HEAD, padding=(0, GAP - 1, 0, 0))
    for each in columns:
        table.add_column(
            Text(each.title),
            justify="right" if each.number else "left",
            vertical="top",
            overflow="fold",
            no_wrap=each.number,
            max_width=MOST_WIDTH,
        )
    for row in rows:
        table.add_row(*(Text(each.text(row)) for each in columns), style=_style(row))
    return table


def _style(row: Row) -> str:
    """The style of a row for rich: base is dim, the vote bold."""
    return {"base": "dim", "vote": "bold"}.get(row.adapter, "")
