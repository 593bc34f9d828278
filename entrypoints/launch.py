"""`lorry launch`: start a stage and those it needs on this host's GPUs."""

import sys
from typing import Any

import click

from entrypoints.common import one_line_errors, print_lines
from entrypoints.options import card_options, recipe_options
from stages.host.needs import STAGES


@click.command()
@click.argument("stage", type=click.Choice(STAGES))
@recipe_options
@click.option("--force", is_flag=True, help="Start STAGE again from nothing; earlier stages only run if needed.")
@click.option(
    "--shard",
    metavar="I/N",
    envvar="LORRY_SHARD",
    help="Do only shard I of N of STAGE, counted from 0, and no earlier stage. [env: LORRY_SHARD]",
)
@card_options
@one_line_errors
def launch(stage: str, gpus: str | None, target: str | None, force: bool, shard: str | None, **options: Any) -> None:
    """Start STAGE and the stages it needs on this host's GPUs, in containers if a Docker engine answers.

    Without a Docker engine the stages run as local processes, and a line says so. RECIPE and its options are those of
    the stage's own command, such as `lorry-train`.
    """
    from stages.host import launching

    sys.exit(print_lines(launching.launch(stage, options, gpus, target, force, shard)))
