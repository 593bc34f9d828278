"""`lorry export`: a trained adapter as a folder that other programs load."""

import sys
from pathlib import Path

import click

from entrypoints.common import one_line_errors, print_lines


@click.command()
@click.argument("run_name", metavar="RUN")
@click.argument("adapter", metavar="[ADAPTER]", required=False)
@click.option(
    "--merged",
    type=click.Path(path_type=Path),
    metavar="FOLDER",
    help="Write the base with the adapter merged into it: an ordinary model folder in the base's precision.",
)
@click.option(
    "--adapter",
    "alone",
    type=click.Path(path_type=Path),
    metavar="FOLDER",
    help="Write the adapter alone, in PEFT's format, with a base that libraries find.",
)
@click.option("--all", "every", is_flag=True, help="Export all adapters of RUN, each to FOLDER/<its name>.")
@click.option(
    "--base",
    metavar="NAME",
    help="Name of the base for libraries and the model card: OWNER/NAME on a hub, or a path. Default: its name on a"
    " hub, if known, else its path here.",
)
@one_line_errors
def export(
    run_name: str, adapter: str | None, merged: Path | None, alone: Path | None, every: bool, base: str | None
) -> None:
    """Write an adapter of RUN as a folder for other programs.

    Each folder has a model card with scores, data and recipe. At the end stand the commands for vLLM, llama.cpp,
    Ollama and a hub's upload. A folder is replaced only if an earlier export wrote all that is in it. Default: the
    run's only adapter.
    """
    from stages.host.exporting import Request
    from stages.host.exporting import export as export_run

    sys.exit(print_lines(export_run(Request(run_name, adapter, every, merged, alone, base))))
