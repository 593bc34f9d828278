"""Held-out losses as tables for the console, for eval and for comparisons of runs."""

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from stages.contract.records import BASE
from stages.results.fitted_tables import Row, fitted_tables
from stages.results.uncertainty import interval_text, is_clear, star_note

if TYPE_CHECKING:
    from rich.table import Table

NOTES = (
    "loss: mean cross entropy per token of the test samples' own answers, in nats; perplexity: its exponential",
    "wins, ties, losses: samples by loss per token; ties differ by at most 0.001; the win rate counts half of them",
)
"""What the columns mean."""


def held_out_tables(
    rows: Sequence[tuple[tuple[str, ...], Mapping[str, Any], Mapping[str, Any] | None]],
    labels: Sequence[str],
    reference: str,
    width: int,
    caption: str | None = None,
) -> Iterator["Table"]:
    """Yield tables of at most `width` columns for rich.

    Each row has its labels, a model's figures and its comparison with the model `reference`, in the form of
    `held_out.held_out_figures`. `labels` are the titles of the rows' labels.
    """
    shown = []
    for own, figure, comparison in rows:
        if comparison is not None and comparison["n"] != figure["n"]:
            beside = (*own[:-1], f"  {reference}, of {own[-1]}'s samples")
            shown.append(Row(beside, _cells(comparison["beside"], None), "dim"))
        shown.append(Row(own, _cells(figure, comparison), "dim" if own[-1] == BASE else ""))
    heads = ("perplexity [95%]", "loss", f"over {reference} [95%]", "wins", "ties", "losses", "win rate % [95%]")
    yield from fitted_tables(labels, (*heads, "n", "tokens"), shown, width, caption)


def held_out_notes(compared: int) -> list[str]:
    """The notes below the tables. `compared` is the number of comparisons."""
    return [*NOTES, *([star_note(compared)] if compared else [])]


def _cells(figure: Mapping[str, Any], comparison: Mapping[str, Any] | None) -> tuple[str, ...]:
    """The cells of a row."""
    beside: tuple[str, ...] = ("",) * 5
    if comparison is not None:
        counts = (str(comparison[key]) for key in ("wins", "ties", "losses"))
        beside = (loss_gain_text(comparison), *counts, range_text(comparison["win_rate"], 1))
    return (
        range_text(figure["perplexity"], 2),
        f"{figure['loss']['value']:.3f}",
        *beside,
        str(figure["n"]),
        str(figure["tokens"]),
    )


def range_text(value: Mapping[str, Any], digits: int, sign: str = "") -> str:
    """A value with its interval, rounded to a number of decimals. `sign` is that of `interval_text`."""
    return interval_text(value["value"], value["low"], value["high"], sign, digits)


def loss_gain_text(comparison: Mapping[str, Any]) -> str:
    """The difference in loss with its interval, then a star if it is clear, else a blank for alignment."""
    return range_text(comparison["loss"], 3, "+") + ("*" if is_clear(comparison["loss"]) else " ")
