"""`lorry compare`: runs that were scored on the same test set, side by side, with paired differences."""

import io
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

import click

from entrypoints.common import one_line_errors

if TYPE_CHECKING:
    from stages.contract.roots import Roots
    from stages.results.comparison import Compared, Evaluated


@click.command()
@click.argument("runs", metavar="RUN RUN [RUN]...", nargs=-1, required=True)
@one_line_errors
def compare(runs: tuple[str, ...]) -> None:
    """Show what the models of several RUNs scored, with 95% intervals of the differences on the same samples.

    All are compared with one model of the first RUN: its vote, its first adapter, or base. Runs that were not scored on
    the same test set, by the same rules, are refused. Answers that no two models give are told as suspicious.
    """
    from entrypoints.ledger import named_runs
    from stages.contract.errors import UsageError
    from stages.contract.roots import Roots

    roots = Roots.from_environment()
    names = named_runs(runs, roots.runs)
    if len(names) < 2:
        raise UsageError(f"lorry compare {' '.join(runs)}: name two runs or more")
    try:
        from stages.results.comparison import asked_otherwise, compared_with, refuse_other_sets, suspicions
        from stages.results.comparison import compare as compared
    except ModuleNotFoundError as error:
        raise UsageError(
            f"lorry compare needs {error.name}: install requirements/host.txt, as `make setup` does"
        ) from error
    found, missing = _evaluated(roots, names)
    if len(found) < 2:
        raise UsageError(f"{'; '.join(missing)}: there is nothing to compare; run what is missing first")
    refuse_other_sets(found)
    settings = _recipe_settings(roots, found[0].run)
    rows = compared(found, *settings)
    beside = f"{found[0].run}/{compared_with(found[0])}"
    coloured = sys.stdout.isatty()
    for metric in dict.fromkeys(row.metric for row in rows):
        click.echo(_table([row for row in rows if row.metric == metric], beside, coloured), nl=False)
    samples, questions = len(found[0].lines), len({line["together"] for line in found[0].lines})
    counted = f"{samples} test samples" + (f", counted as {questions}" if questions < samples else "")
    click.echo(f"{counted}; percent and points with 95% intervals; * where the interval leaves out 0")
    for line in [*missing, *asked_otherwise(found), *(f"suspicious: {line}" for line in suspicions(found))]:
        click.secho(line, fg="red", bold=True)


def _evaluated(roots: "Roots", names: Sequence[str]) -> tuple[list["Evaluated"], list[str]]:
    """What eval left of each run; and of those with nothing evaluated a sentence. Raises UsageError for figures that
    are of other answers than the run holds now."""
    found, missing = [], []
    for name in names:
        read = _read(roots, name)
        if isinstance(read, str):
            missing.append(f"{name}: nothing evaluated: {read}")
        else:
            found.append(read)
    return found, missing


def _read(roots: "Roots", name: str) -> "Evaluated | str":
    from stages.contract.errors import UsageError
    from stages.contract.run import Run
    from stages.results.comparison import Evaluated
    from stages.results.ledger import DamagedError, RunReader, recipe_of

    folder = roots.runs / name
    try:
        recipe = recipe_of(folder)
        reader = RunReader(name, Run(name, recipe, roots), None)
        if "eval" not in reader.manifests:
            return next(iter(reader.troubles.values()))
        for stage in ("infer", "eval"):
            if stage in reader.troubles:
                raise UsageError(f"{folder}: {reader.troubles[stage]}: run eval again before it is compared")
        figures, lines = reader.proved("eval", "scores.json"), reader.proved("eval", "scored.jsonl")
    except DamagedError as error:
        raise UsageError(f"{folder}: {error}: run eval again") from error
    if lines is None:
        raise UsageError(
            f"{folder}: its eval kept no samples' scores, as older versions did: run eval again, with --force"
        )
    if not any(figure["n"] for model in (figures or {}).values() for figure in model.values()) or not lines:
        return "eval scored no sample"
    base = reader.manifests["infer"]["inputs"].get("models/base", "")
    return Evaluated(name, recipe.task, recipe.eval.scoring, recipe.preprocess.samples, base, figures, lines)


def _recipe_settings(roots: "Roots", name: str) -> tuple[int, int]:
    """Resamples and seed of the bootstrap: the first run's."""
    from stages.results.ledger import recipe_of

    recipe = recipe_of(roots.runs / name)
    return recipe.eval.bootstrap, recipe.seed


def _table(rows: Sequence["Compared"], beside: str, coloured: bool) -> str:
    """The rows of one metric."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from entrypoints.ledger import with_interval

    text = io.StringIO()
    console = Console(
        file=text, width=Console().width, force_terminal=coloured, highlight=False, markup=False, emoji=False
    )
    table = Table("run", "model", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for head in (rows[0].metric, f"over {beside}", "same answers", "n", "failed"):
        table.add_column(Text(head), justify="right", overflow="fold")
    for row in rows:
        score, gain = row.figure, row.difference
        told = "" if gain is None else with_interval(gain["value"], gain["low"], gain["high"], "+")
        clear = gain is not None and (gain["low"] > 0 or gain["high"] < 0)
        cells = [row.run, row.model, with_interval(score["value"], score["low"], score["high"], "")]
        cells += [told + (" *" if clear else "  ") if told else "", _percent(row.same_answers)]
        cells += [str(score["n"]), str(score["failed"])]
        table.add_row(*map(Text, cells), style="dim" if row.model == "base" else "")
    console.print(table)
    return text.getvalue()


def _percent(share: float | None) -> str:
    return "" if share is None else f"{share:.1f}%"
