"""The host command `lorry` and its shorter subcommands."""

import json
import sys
from typing import Any

import click

from entrypoints.chat import chat
from entrypoints.common import one_line_errors, print_lines, warn
from entrypoints.compare import compare
from entrypoints.doctor import doctor
from entrypoints.export import export
from entrypoints.fetch import fetch
from entrypoints.launch import launch
from entrypoints.ledger import ledger
from entrypoints.options import recipe_options
from entrypoints.plan import plan
from entrypoints.prune import prune
from entrypoints.serve import serve
from entrypoints.tune import tune


@click.group()
@click.version_option(package_name="lorry", prog_name="lorry", message="%(prog)s %(version)s")
def main() -> None:
    """Carry a fine-tuning job from raw documents to scored answers."""


for command in (tune, launch, doctor, plan, fetch, ledger, compare, prune, export, chat, serve):
    main.add_command(command)


@main.command()
@recipe_options
@click.option("--force", is_flag=True, help="Start every stage again from nothing.")
@one_line_errors
def run(force: bool, **options: Any) -> None:
    """Run all four stages here, as local processes.

    Stages that are done and unchanged are skipped. RECIPE is a file or the name of a recipe in recipes/. Default:
    recipe.yaml of the run that --run names.
    """
    from stages.host.processes import run_all_stages

    sys.exit(print_lines(run_all_stages(options, force)))


@main.command()
@click.argument("run_name", metavar="[RUN]", required=False)
@click.option("--json", "as_json", is_flag=True, help="Print the same facts as JSON: a list with one entry a run.")
@one_line_errors
def status(run_name: str | None, as_json: bool) -> None:
    """Show how far RUN is: steps, loss, speed and time left, or the error and its cure. Default: all runs."""
    from stages.contract.columns import terminal_width
    from stages.host.status import status_facts, status_lines

    if as_json:
        click.echo(json.dumps(status_facts(run_name), indent=2, ensure_ascii=False))
    else:
        sys.exit(print_lines(status_lines(run_name, terminal_width(sys.stdout))))


@main.group()
def recipe() -> None:
    """List, show and check recipes."""


@recipe.command("list")
@one_line_errors
def list_recipes() -> None:
    """List the recipes that come with Lorry."""
    from stages.host.runs import recipe_summary, shipped_recipes

    for path in shipped_recipes():
        description, profiles = recipe_summary(path)
        click.echo(f"{path.stem:<16}{description}" + (f" (profiles: {', '.join(profiles)})" if profiles else ""))


@recipe.command()
@recipe_options
@one_line_errors
def show(**options: Any) -> None:
    """Print a recipe as it would run, with its profile and overrides applied."""
    from stages.contract.recipe import dump_recipe
    from stages.host.runs import open_run

    click.echo(dump_recipe(open_run(**options, say=warn).recipe), nl=False)


@recipe.command()
@click.argument("recipe")
@one_line_errors
def validate(recipe: str) -> None:
    """Check a recipe, alone and with each of its profiles."""
    from stages.contract.recipe import profile_names
    from stages.host.runs import open_run, recipe_path

    for profile in [None, *profile_names(recipe_path(recipe))]:
        open_run(recipe, profile, say=warn)
        click.echo(f"{recipe}: valid" + (f" with profile {profile}" if profile else ""))


@recipe.command()
def schema() -> None:
    """Print the JSON schema of a recipe, for editors."""
    from stages.host.runs import recipe_schema

    click.echo(json.dumps(recipe_schema(), indent=2, ensure_ascii=False))


if __name__ == "__main__":
    main()
