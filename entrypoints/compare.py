"""`lorry compare`: several runs side by side."""

import sys

import click

from entrypoints.common import one_line_errors


@click.command()
@click.argument("runs", metavar="RUN RUN [RUN]...", nargs=-1, required=True)
@one_line_errors
def compare(runs: tuple[str, ...]) -> None:
    """Compare the scores of several RUNs on the same samples, with 95% intervals of the differences.

    All models are compared with one model of the first RUN: its vote, else its first adapter, else base. A RUN with
    another test set or scoring is refused. A warning says if two models give identical answers, wrong ones included, if
    a model gives the same few answers to many questions, or if all its answers failed.
    """
    from stages.contract.errors import UsageError
    from stages.contract.roots import Roots
    from stages.results.run_reader import select_runs

    roots = Roots.from_environment()
    names = select_runs(runs, roots.runs)
    if len(names) < 2:
        raise UsageError(f"lorry compare {' '.join(runs)}: only one run; name two runs or more")
    try:
        from stages.results.comparison import comparable_runs, comparison_warnings
        from stages.results.comparison_table import comparison_tables
    except ModuleNotFoundError as error:
        raise UsageError(f"lorry compare: needs {error.name}, which is not installed here; run `make setup`") from error
    found, notes = comparable_runs(roots, names)
    for text in comparison_tables(found, sys.stdout.isatty()):
        click.echo(text)
    for line in [*notes, *comparison_warnings(found)]:
        click.secho(line, fg="red", bold=True)
