"""`lorry tune`: from a file of conversations and a model to a tuned and scored model."""

import sys
from typing import Any

import click

from entrypoints.common import one_line_errors, print_lines


@click.command()
@click.argument("data")
@click.option("--model", required=True, metavar="MODEL", help="Folder of the base, or its name on a hub: OWNER/NAME.")
@click.option("--run", "run_name", metavar="NAME", help="Name of run and recipe. Default: those of DATA and MODEL.")
@click.option("--gpus", metavar="LIST", help="GPUs as for `lorry launch`: 0,2 or auto. Default: as for `lorry run`.")
@click.option("--target", metavar="NAME", help="Kind of card, such as cpu. Default: this machine's cards.")
@click.option("--data-form", "form", metavar="FORM", help="Form of DATA, such as alpaca. Default: it is found.")
@click.option("--epochs", type=click.FloatRange(min=0, min_open=True), help="Passes over DATA. Default: by its size.")
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Recipe value; may be repeated.")
@one_line_errors
def tune(**options: Any) -> None:
    """Tune MODEL on DATA, a file or folder of conversations, score it on a part held out, and write the report.

    Lorry looks at DATA and MODEL, writes a recipe with a reason for each value to ./NAME.yaml, shows the plan, and runs
    all four stages, with --gpus as `lorry launch eval` does. Later, `lorry run NAME.yaml` does the same. A recipe that
    is here is used as it is. A MODEL that is not here is downloaded first, as `lorry fetch` does. Exits with 4 if the
    model does not fit.
    """
    from stages.host.tune.job import Wanted
    from stages.host.tune.job import tune as tune_model

    sys.exit(print_lines(tune_model(Wanted(**options))))
