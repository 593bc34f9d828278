"""`lorry plan`: estimate whether a training fits."""

import sys
from typing import Any

import click

from entrypoints.common import one_line_errors, print_lines, warn
from entrypoints.options import recipe_options


@click.command()
@recipe_options
@click.option("--target", metavar="NAME", help="Kind of card, which need not be here. Default: this machine's cards.")
@click.option(
    "--gpus",
    "count",
    metavar="N",
    type=click.IntRange(min=1),
    default=1,
    help="Number of GPUs to plan for. Default: 1.",
)
@click.option(
    "--memory",
    metavar="GIB",
    type=click.FloatRange(min=0, min_open=True),
    help="Memory of each GPU, in GiB. Default: the target's.",
)
@one_line_errors
def plan(target: str | None, count: int, memory: float | None, **options: Any) -> None:
    """Estimate the memory that training RECIPE takes on each GPU, and say whether it fits.

    If it does not fit, the smallest changes that do are listed. If a connector is trained first, both phases are
    estimated. A line says how inference fits the same GPUs. Reads the model's config.json and the headers of its
    weights; starts nothing. Exits with 4 if training does not fit.
    """
    from stages.host import planning
    from stages.host.runs import open_run

    sys.exit(print_lines(planning.plan(open_run(**options, say=warn), target, count, memory)))
