"""`lorry prune`: delete the adapters that a later training replaced."""

import sys

import click

from entrypoints.common import one_line_errors, print_lines


@click.command()
@click.argument("run_name", metavar="RUN")
@one_line_errors
def prune(run_name: str) -> None:
    """Delete the adapters of RUN that a later training with other settings replaced.

    They are in train/superseded/. The adapters that infer and eval use stay.
    """
    from stages.host.pruning import prune as prune_run

    sys.exit(print_lines(prune_run(run_name)))
