"""The results on the console: tables of the scores, of the vote and of the ablations, with notes and warnings."""

import os
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from stages.contract.columns import terminal_width
from stages.contract.records import BASE, VOTE
from stages.contract.stage import Stage
from stages.eval.ablation import EVERYTHING, Ablation, ablated_adapter, seconds_per_question
from stages.eval.losses import HeldOut
from stages.eval.report import ON_TRAINING_DATA, format_interval
from stages.eval.scores import Scores
from stages.eval.votes import VoteOutcome
from stages.results.fitted_tables import Row, fitted_tables
from stages.results.held_out_table import held_out_notes, held_out_tables
from stages.results.intervals import Figures
from stages.results.uncertainty import documents_note, is_clear, star_note

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

FILE_WIDTH = 100
"""Columns of a table that is not printed on a terminal."""

COUNTS = ("n", "failed", "empty")
"""Counts of a figure."""


def print_results(
    stage: Stage,
    scores: Scores,
    figures: dict[str, Figures],
    differences: dict[str, Figures],
    ablated: list[Ablation],
    vote: VoteOutcome | None,
    held_out: HeldOut | None,
    notes: Sequence[str],
    suspicious: Sequence[str],
) -> None:
    """Print the results on standard output: a table of all models' scores with notes, tables of the held-out losses, of
    the vote and of the ablations if there are any, and warnings of suspicious answers."""
    from rich.console import Console

    with os.fdopen(os.dup(stage.output), "w", encoding="utf-8") as file:
        width = terminal_width(file) or FILE_WIDTH
        caption = ON_TRAINING_DATA if stage.counts["scored on training data"] else None
        console = Console(file=file, width=width, highlight=False, markup=False, emoji=False)
        if caption:
            console.print(caption, style="bold")
        if scores.samples:
            _print_scores(stage, console, width, caption, (scores, figures, differences), notes)
        if held_out is not None:
            losses = [((name,), figure, figure.get("over_base")) for name, figure in held_out.figures.items()]
            for table in held_out_tables(losses, ["held-out loss"], BASE, width, caption):
                console.print(table)
            for each in [*held_out_notes(len(held_out.adapters)), *held_out.missing_notes()]:
                console.print(each, style="dim")
        if vote is not None:
            for table in _vote_tables(vote, figures, width, caption):
                console.print(table)
            console.print(_vote_line(vote), style="dim")
        if ablated:
            adapter = str(ablated_adapter(stage.run.recipe, scores.models))
            for table in _ablation_tables(adapter, ablated, width, caption):
                console.print(table)
            stars = star_note(len(ablated) - 1, "components")
            console.print(f"percent, then gain or loss in points; {stars}", style="dim")
        shown = [figure for each in figures.values() for figure in each.values()]
        note = documents_note(figure["groups"] for figure in [*shown, *(held_out.figures.values() if held_out else ())])
        if note:
            console.print(note, style="bold")
        for line in suspicious:
            console.print(f"suspicious: {line}", style="bold red")


def _print_scores(
    stage: Stage,
    console: "Console",
    width: int,
    caption: str | None,
    scored: tuple[Scores, dict[str, Figures], dict[str, Figures]],
    notes: Sequence[str],
) -> None:
    """Print the table of all models' scores, and notes on them. `scored` has scores, figures and differences."""
    scores, figures, differences = scored
    seconds = {name: seconds_per_question(stage.run, name) for name in scores.models}
    rows = [*_score_rows(scores, figures, differences), *_seconds_rows(seconds)]
    heads = ("percent [95%]", "over base [95%]", *COUNTS)
    for table in fitted_tables(["metric"], heads, rows, width, caption):
        console.print(table)
    console.print("failed: no answer, scores 0, counts in n; empty: an answer without text", style="dim")
    if any(row.cells == _NO_CELLS for row in rows):
        console.print("–: none of the model's test samples has this metric", style="dim")
    for each in notes:
        console.print(each, style="dim")
    if differences:
        console.print("over base: on the same samples", style="dim")
        console.print(star_note(len(differences)), style="dim")


def _score_rows(scores: Scores, figures: dict[str, Figures], differences: dict[str, Figures]) -> Iterator[Row]:
    """For each metric a row with its name, then one for each model. A model that was not asked all samples has a row
    with base's score on its own samples above it. The facts, which are the same for every model, have one row."""
    for metric in scores.metrics:
        if metric in scores.facts:
            yield Row((metric,), _figure_cells(figures[BASE][metric]) if metric in figures[BASE] else _NO_CELLS)
            continue
        yield Row((metric,), ("",) * len(_NO_CELLS), "bold")
        for name, own in figures.items():
            gain = differences.get(name, {}).get(metric)
            if gain is not None and gain["beside"]["n"] != figures[BASE][metric]["n"]:
                yield Row((f"  base, of {name}'s samples",), _figure_cells(gain["beside"]), "dim")
            if metric in own:
                yield Row((f"  {name}",), _figure_cells(own[metric], gain), "dim" if name == BASE else "")
            else:
                yield Row((f"  {name}",), _NO_CELLS)


_NO_CELLS = ("–", "", "0", "", "")
"""The cells of a model for a metric that none of its samples has."""


def _figure_cells(figure: dict[str, Any], gain: dict[str, Any] | None = None) -> tuple[str, ...]:
    """A figure with its interval, its difference from base if there is one, and its counts. The difference has its own
    number of samples if that is another."""
    text = ""
    if gain is not None:
        text = _gain_text(gain) if gain["n"] == figure["n"] else f"{_gain_text(gain)}n {gain['n']}"
    return (format_interval(figure), text, *(str(figure[key]) for key in COUNTS))


def _seconds_rows(seconds: dict[str, float | None]) -> Iterator[Row]:
    """Rows with the seconds per question of each model, if any are recorded."""
    known = {name: took for name, took in seconds.items() if took is not None}
    if known:
        yield Row(("seconds per question",), ("",) * len(_NO_CELLS), "bold")
    for name, took in known.items():
        yield Row((f"  {name}",), (_format_seconds(took), "", "", "", ""))


def _vote_tables(vote: VoteOutcome, figures: dict[str, Figures], width: int, caption: str | None) -> Iterator["Table"]:
    """Each adapter and its part in the vote."""
    metric = next(iter(figures[VOTE]))
    rows = []
    for voter in vote.voters:
        test = figures.get(voter.name, {}).get(metric)
        numbers = [voter.validation, test and test["value"], voter.agreement]
        validation, tested, agreement = ("–" if number is None else f"{number:.1f}" for number in numbers)
        weight = "no vote" if voter.weight is None else f"{voter.weight:.2f}"
        rows.append(Row((voter.name, voter.mix), (validation, tested, weight, agreement)))
    heads = (f"{metric} validation", f"{metric} test", "weight", "agrees %")
    return fitted_tables(["adapter", "data mix"], heads, rows, width, caption)


def _vote_line(vote: VoteOutcome) -> str:
    """One line on the vote: its difference from the best voter, how it was decided, agreement, entropy, and the number
    of samples with a second round."""
    metric, gain = next(iter(vote.over_best.items()))
    decided = ", ".join(f"{by} {count}" for by, count in sorted(vote.decided_by.items()))
    return (
        f"vote over {vote.best}, {vote.best_by}: {metric} {_gain_text(gain).rstrip()}; decided by {decided};"
        f" mean agreement {vote.agreement:.1f}%, entropy {vote.entropy:.2f} bits; {vote.second_round} in a second round"
    )


def _ablation_tables(adapter: str, ablated: list[Ablation], width: int, caption: str | None) -> Iterator["Table"]:
    """The adapter's figures with everything, then its gain or loss without each component. Each row also has the number
    of failed answers and the seconds per question, and without a component the number of changed answers."""
    metrics = list(ablated[0].figures)
    rows = []
    for each in ablated:
        everything = each.component == EVERYTHING
        cells = [
            f"{each.figures[metric]['value']:.1f} " if everything else _format_points(each.difference[metric])
            for metric in metrics
        ]
        cells += ["" if everything else str(each.changed or "none")]
        cells += [str(max(figure[key] for figure in each.figures.values())) for key in ("failed", "empty")]
        name = each.component if everything else f"without {each.component}"
        rows.append(Row((name,), (*cells, _format_seconds(each.seconds))))
    heads = [*metrics, "answers_changed", "failed", "empty", "seconds_per_question"]
    return fitted_tables([adapter], [head.replace("_", " ") for head in heads], rows, width, caption)


def _format_seconds(took: float | None) -> str:
    """Format seconds with three significant digits. Returns an empty text if they are not recorded."""
    return "" if took is None else f"{took:.3g}"


def _gain_text(gain: dict[str, Any]) -> str:
    """A difference with its interval, then a star if it is clear, else a blank for alignment."""
    return format_interval(gain, sign="+") + ("*" if is_clear(gain) else " ")


def _format_points(gain: dict[str, Any]) -> str:
    """Format a difference in percentage points, then a star if it is clear, else a blank for alignment."""
    return f"{gain['value']:+.1f}{'*' if is_clear(gain) else ' '}"
