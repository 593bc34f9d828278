"""`lorry ledger`: data mix, adapter and score over all runs."""

import sys
from pathlib import Path

import click

from entrypoints.common import one_line_errors


@click.command()
@click.argument("runs", metavar="[RUN]...", nargs=-1)
@click.option(
    "--sort",
    "order",
    metavar="COLUMN[:desc]",
    help="Column to sort by, as the CSV names it; :desc sorts in descending order. Rows without a value come last."
    " Default: run by run.",
)
@click.option(
    "--format",
    "form",
    type=click.Choice(["table", "csv", "html"]),
    help="Format of the output. Default: by the suffix of --out, else table.",
)
@click.option("--out", type=click.Path(path_type=Path), metavar="FILE", help="File to write. Default: the console.")
@click.option("--metric", metavar="NAME", help="Metric of the scores. Default: each run's first metric.")
@one_line_errors
def ledger(runs: tuple[str, ...], order: str | None, form: str | None, out: Path | None, metric: str | None) -> None:
    """Show what each adapter of each RUN was trained on and what it scored, beside base and the vote.

    Default: all runs. Scores are percent with 95% intervals; gains are points over base on the same samples. All is
    read from manifests and from files whose sha256 they record. A score is shown only if the training that was scored
    is still there.
    """
    from stages.contract.roots import Roots
    from stages.results.ledger import parse_order, read_ledger, refuse_unknown_metric, sorted_rows
    from stages.results.ledger_file import SUFFIXES, render_ledger, write_ledger
    from stages.results.run_reader import select_runs

    column, descending = parse_order(order)
    roots = Roots.from_environment()
    found = read_ledger(roots, select_runs(runs, roots.runs), metric)
    refuse_unknown_metric(metric, found.metrics)
    rows = sorted_rows(found.rows, column, descending)
    if not rows:
        click.echo(f"{roots.runs}: no run here; start one, or set LORRY_RUNS to another folder", err=True)
    form = form or SUFFIXES.get(out.suffix if out else "", "table")
    text = render_ledger(rows, form, column, descending, sys.stdout.isatty() and out is None)
    if out is None:
        click.echo(text, nl=False)
    else:
        write_ledger(out, text, form)
