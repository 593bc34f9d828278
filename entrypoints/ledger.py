"""`lorry ledger`: data mix, adapter, score, and whether it is in the vote, over all runs; table, CSV and HTML."""

import csv
import difflib
import io
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from entrypoints.common import one_line_errors

if TYPE_CHECKING:
    from stages.results.ledger import Row

UNTESTED = "untested"
"""In the place of a score that is not there: never a number."""

ON_TRAINING_DATA = "Scored on the data that was trained on: such a score says nothing about other data."

FORMULAS = tuple("=+-@＝＋－＠")
"""What a text that a spreadsheet would take for a formula begins with."""

MOST_WIDTH = 40
"""Characters of a column in a terminal; longer texts are folded."""

LEAST_WIDTH = 24
"""Of those columns whose texts may as well be folded, where that makes room for others."""

BETWEEN = 2
"""Blanks between columns."""

RARE = ("data_recipe", "records_read", "records_kept", "connector_samples")
"""What is left out of the CSV where no row has it: what only some tasks do to their data."""


@dataclass(frozen=True)
class Column:
    """A column as people see it; the CSV has a column for each number instead."""

    title: str
    text: Callable[["Row"], str]
    shows: tuple[str, ...]
    """The row's values in it; the first is what it sorts by."""
    rank: int = 0
    """Where there is no room for all, those with the least rank stay; 0 always does."""
    number: bool = False
    long: bool = False
    """Its texts may be sentences."""
    rare: bool = False
    """It is there only where some row has a text for it."""


@click.command()
@click.argument("runs", metavar="[RUN]...", nargs=-1)
@click.option(
    "--sort",
    "order",
    metavar="COLUMN[:desc]",
    help="By a column, as the CSV names it, upward or downward; what is missing is last. Default: run by run.",
)
@click.option(
    "--format",
    "form",
    type=click.Choice(["table", "csv", "html"]),
    help="Default: what the name of --out ends in, else a table.",
)
@click.option("--out", type=click.Path(path_type=Path), metavar="FILE", help="Write it there; default: to the console.")
@click.option("--metric", metavar="NAME", help="What the score is of; default: each run's first metric.")
@one_line_errors
def ledger(runs: tuple[str, ...], order: str | None, form: str | None, out: Path | None, metric: str | None) -> None:
    """Show what every adapter of every RUN was trained on and what it scored, beside base and the vote.

    Scores are percent with 95% intervals; gains are points over base on the same samples. All is read from the runs'
    manifests and the files that these vouch for: a score is shown only beside the training that made it.
    """
    from stages.contract.errors import UsageError
    from stages.contract.roots import Roots
    from stages.results.ledger import read_ledger

    column, descending = _order(order)
    roots = Roots.from_environment()
    names = named_runs(runs, roots.runs)
    found = read_ledger(roots, names, metric)
    if metric is not None and metric not in found.metrics and found.metrics:
        known = nearest(metric, found.metrics, "metrics")
        raise UsageError(f"--metric {metric}: no run is scored by it; {known}")
    rows = sorted_rows(found.rows, column, descending)
    if not rows:
        click.echo(f"no run in {roots.runs}", err=True)
    form = form or {".csv": "csv", ".html": "html"}.get(out.suffix if out else "", "table")
    if form == "csv":
        # spreadsheets read a file as UTF-8 only with the mark in front
        text = ("\ufeff" if out else "") + as_csv(rows)
    elif form == "html":
        text = as_html(rows, column, descending)
    else:
        text = as_table(rows, column, sys.stdout.isatty() and out is None) if rows else ""
    if out is None:
        click.echo(text, nl=False)
    else:
        _write(out, text)


def _order(order: str | None) -> tuple[str | None, bool]:
    """The column to sort by, and whether downward."""
    from stages.contract.errors import UsageError
    from stages.results.ledger import Row

    if order is None:
        return None, False
    column, colon, direction = order.partition(":")
    names = [field.name for field in fields(Row)]
    if column not in names:
        raise UsageError(f"--sort {order}: no column {column!r}; {nearest(column, names, 'columns')}")
    if colon and direction != "desc":
        raise UsageError(f"--sort {order}: write it as {column}, or as {column}:desc for downward")
    return column, bool(colon)


def named_runs(runs: Sequence[str], mount: Path) -> list[str]:
    """The runs that are asked for, or all."""
    from stages.contract.errors import UsageError
    from stages.results.ledger import run_names

    there = run_names(mount)
    for name in runs:
        if name not in there:
            known = nearest(name, there, "runs") if there else "there is none"
            raise UsageError(f"{mount / name}: no such run; {known}")
    return list(dict.fromkeys(runs)) or there


def nearest(name: str, known: Sequence[str], what: str) -> str:
    near = difflib.get_close_matches(name, known, 1, cutoff=0.5)
    hint = f"did you mean {near[0]!r}? " if near else ""
    return f"{hint}{what}: {', '.join(known)}"


def sorted_rows(rows: Sequence["Row"], column: str | None, descending: bool) -> list["Row"]:
    """Numbers as numbers, also those within texts, which are compared without regard to case; rows without a value last
    in either direction, and equal ones in the order that they had."""
    if column is None:
        return list(rows)

    def value(row: "Row") -> Any:
        held = getattr(row, column)
        if not isinstance(held, str):
            return held
        return re.sub(r"\d+", lambda number: number[0].zfill(20), held.casefold())  # mix-2 before mix-10

    missing = [row for row in rows if getattr(row, column) in (None, "")]
    known = [row for row in rows if getattr(row, column) not in (None, "")]
    return sorted(known, key=value, reverse=descending) + missing


def _write(path: Path, text: str) -> None:
    from stages.contract.errors import UsageError
    from stages.contract.files import machine_error, written_atomically

    try:
        with written_atomically(path.absolute()) as file:
            file.write(text)
    except OSError as error:
        raise machine_error(error) or UsageError(f"--out {path}: cannot be written ({error.strerror})") from error


# -- CSV ---------------------------------------------------------------------------------------------------------


def as_csv(rows: Sequence["Row"]) -> str:
    """All columns, a line for each row. No text in it is a formula to a spreadsheet: an apostrophe is put before."""
    from stages.results.ledger import Row

    every = [field.name for field in fields(Row)]
    names = [n for n in every if n not in RARE or any(getattr(row, n) not in (None, "") for row in rows)]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(names)
    for row in rows:
        cells = {name: getattr(row, name) for name in names}
        if row.score is None:
            cells["score"] = UNTESTED
        writer.writerow(_not_a_formula(cell) if isinstance(cell, str) else cell for cell in cells.values())
    return text.getvalue()


def _not_a_formula(text: str) -> str:
    return f"'{text}" if text.startswith(FORMULAS) else text


# -- what people see ---------------------------------------------------------------------------------------------


def columns_of(rows: Sequence["Row"]) -> list[Column]:
    """The columns in their order. What all rows have in common needs less room: the one metric stands in its head."""
    metrics = list(dict.fromkeys(row.metric for row in rows if row.metric))
    one = len(metrics) == 1
    votes = any(row.in_vote for row in rows)
    weighed = len({row.weight for row in rows} - {None}) > 1
    columns = [
        Column("run", lambda row: row.run, ("run",)),
        Column("task", lambda row: row.task, ("task",), 12),
        Column("adapter", lambda row: row.adapter, ("adapter",)),
        Column("data recipe", lambda row: row.data_recipe, ("data_recipe",), long=True, rare=True),
        Column("records kept", _kept, ("records_kept", "records_read"), number=True, rare=True),
        Column(
            "connector samples", lambda row: _digits(row.connector_samples), ("connector_samples",), 1, True, rare=True
        ),
        Column("data mix", lambda row: row.data_mix, ("data_mix",), long=True),
        Column("sources", lambda row: row.sources, ("sources",), 8, long=True),
        Column("samples", lambda row: _digits(row.samples), ("samples",), 4, number=True),
        Column("steps", lambda row: _digits(row.steps), ("steps",), 9, number=True),
        Column("loss", lambda row: _digits(row.loss, ".4f"), ("loss",), 7, number=True),
        Column("metric", lambda row: row.metric, ("metric",), 17 if one else 0),
        Column(metrics[0] if one else "score", _score, ("score", "low", "high"), number=True),
        Column("over base", _gain, ("gain", "gain_low", "gain_high"), 1, number=True),
        Column("n", lambda row: _digits(row.n), ("n",), 2, number=True),
        Column("failed", lambda row: _digits(row.failed), ("failed",), 3, number=True),
        Column("validation", lambda row: _digits(row.validation, ".1f"), ("validation",), 5 if votes else 16, True),
        Column("in the vote", lambda row: _voice(row, weighed), ("in_vote", "weight"), 0 if votes else 15),
        Column("state", lambda row: row.state, ("state", "scored_on"), long=True),
        Column("base model", lambda row: row.base_model, ("base_model",), 10),
        Column("seed", lambda row: _digits(row.seed), ("seed",), 13, number=True),
        Column("recipe", lambda row: row.recipe, ("recipe",), 11),
        Column("date", lambda row: row.date[:16].replace("T", " "), ("date",), 6),
        Column("lorry", lambda row: row.version, ("version",), 14),
    ]
    return [column for column in columns if not column.rare or any(column.text(row) for row in rows)]


def _digits(value: float | None, form: str = "") -> str:
    return "" if value is None else format(value, form)


def _kept(row: "Row") -> str:
    return "" if row.records_kept is None else f"{row.records_kept} of {row.records_read}"


def _score(row: "Row") -> str:
    return with_interval(row.score, row.low, row.high, "") or UNTESTED


def _gain(row: "Row") -> str:
    return with_interval(row.gain, row.gain_low, row.gain_high, "+")


def with_interval(value: float | None, low: float | None, high: float | None, sign: str) -> str:
    """`34.4 [25.0, 43.8]`."""
    if value is None or low is None or high is None:
        return _digits(value, f"{sign}.1f")
    return f"{value:{sign}.1f} [{low:{sign}.1f}, {high:{sign}.1f}]"


def _voice(row: "Row", weighed: bool) -> str:
    return f"{row.in_vote}, {row.weight:.2f}" if weighed and row.weight is not None else row.in_vote


def as_table(rows: Sequence["Row"], column: str | None, coloured: bool) -> str:
    """A table with as many columns as the terminal has room for, and a line on what is left out."""
    from rich.box import SIMPLE_HEAD
    from rich.cells import cell_len
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    text = io.StringIO()
    console = Console(
        file=text, width=Console().width, force_terminal=coloured, highlight=False, markup=False, emoji=False
    )
    every = columns_of(rows)

    def room(column: Column) -> int:
        # heads break between words, folded texts anywhere
        head = max(map(cell_len, column.title.split()))
        longest = max(cell_len(column.text(row)) for row in rows)
        return max(head, min(LEAST_WIDTH if column.long else MOST_WIDTH, longest)) + BETWEEN

    stays = [each for each in every if not each.rank or column in each.shows]
    left = console.width - 2 - sum(map(room, stays))  # the box has an edge
    for each in sorted((each for each in every if each not in stays), key=lambda each: each.rank):
        if room(each) <= left:
            stays.append(each)
            left -= room(each)
    table = Table(box=SIMPLE_HEAD, padding=(0, BETWEEN - 1, 0, 0))
    shown = [each for each in every if each in stays]
    for each in shown:
        table.add_column(
            Text(each.title),
            justify="right" if each.number else "left",
            vertical="top",
            overflow="fold",
            no_wrap=each.number,
            max_width=MOST_WIDTH,
        )
    for row in rows:
        table.add_row(*(Text(each.text(row)) for each in shown), style=_style(row))
    console.print(table)
    console.print("percent [95% interval]; failed answers score 0 and count in n", style="dim")
    if any(row.scored_on.startswith("training") for row in rows):
        console.print(ON_TRAINING_DATA, style="bold")
    missing = [each.title for each in every if each not in shown]
    if missing:
        console.print(f"no room for: {', '.join(missing)}; --format csv has them", style="dim")
    return text.getvalue()


def _style(row: "Row") -> str:
    if row.adapter in ("base", "vote"):
        return "bold" if row.adapter == "vote" else "dim"
    return ""


def as_html(rows: Sequence["Row"], column: str | None, descending: bool) -> str:
    """One page with everything, sortable by a click on a column's head."""
    from stages.results.ledger_page import Cell, Head, page

    columns = columns_of(rows)
    direction = "descending" if descending else "ascending"
    heads = [Head(each.title, each.number, direction if column == each.shows[0] else None) for each in columns]
    body = [
        (
            _kind(row),
            [Cell(each.text(row), held if (held := getattr(row, each.shows[0])) != "" else None) for each in columns],
        )
        for row in rows
    ]
    runs = len({row.run for row in rows})
    notes = ["Percent [95% interval]; a failed answer scores 0 and counts in n. Gains are points over base, paired."]
    if any(row.scored_on.startswith("training") for row in rows):
        notes.insert(0, ON_TRAINING_DATA)
    return page(heads, body, f"{len(rows)} rows of {runs} run{'' if runs == 1 else 's'}", notes)


def _kind(row: "Row") -> str:
    """How a row looks: by what it is, or by what is wrong with it."""
    if not row.state.startswith("scored") or row.scored_on.startswith("training"):
        return "doubtful"
    return row.adapter if row.adapter in ("base", "vote") else "adapter"
