"""What the commands share: their options, and errors in one line."""

import os
import sys
from collections.abc import Callable
from functools import wraps
from typing import Any

import click

from stages.contract.errors import LorryError
from stages.host.runs import open_run


def recipe_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """RECIPE, --profile, --data, --set and --run: which run, made from what. `open_run` takes them.

    Compose files and Kubernetes Jobs give them as environment variables; what the command line says wins.
    """
    for decorate in (
        click.option(
            "--run",
            "run_name",
            metavar="NAME",
            envvar="LORRY_RUN",
            help="Run folder below the runs mount; default: the recipe's name.",
        ),
        click.option(
            "--set",
            "overrides",
            multiple=True,
            metavar="KEY=VALUE",
            envvar="LORRY_SET",
            help="Override a value: train.epochs=2",
        ),
        click.option("--data", metavar="FOLDER", help="Folder with the input: overrides the recipe's data.path."),
        click.option(
            "--profile", metavar="NAME", envvar="LORRY_PROFILE", help="Profile of the recipe to apply, such as tiny."
        ),
        click.argument("recipe", required=False, envvar="LORRY_RECIPE"),
    ):
        command = decorate(command)
    return command


def stage_command(name: str, summary: str, load_work: Callable[[], Callable[..., None]]) -> click.Command:
    """The click command of a stage; `load_work` imports its work, which may take seconds, only when it runs."""

    @click.command(
        name=f"lorry-{name}",
        help=f"{summary}\n\nRECIPE is a file, or a name in recipes/; without it, the run's own recipe.yaml is used."
        f"\n\n`lorry-{name} selftest` shows whether this image holds what the stage needs.",
    )
    @recipe_options
    @click.option("--force", is_flag=True, help="Do it again from nothing, even if it is done or shards of it are.")
    @click.option(
        "--shard",
        metavar="I/N",
        help="Do only share I, from 0, of N; without it, finished shards are merged. Not for eval. [env: LORRY_SHARD]",
    )
    @one_line_errors
    def command(force: bool, shard: str | None, **options: Any) -> None:
        if options["recipe"] == "selftest":
            from stages.host.selftest import selftest

            return selftest(name)
        from stages.contract.part import part_of
        from stages.host.runner import run_stage

        part = part_of(name, shard, os.environ)
        run = open_run(**options)

        def work(stage: Any) -> None:
            load_work()(stage)

        sys.exit(run_stage(run, name, work, force, part))

    return command


def one_line_errors(function: Callable[..., Any]) -> Callable[..., Any]:
    """Show a LorryError as one line on standard error and exit with its code."""

    @wraps(function)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        try:
            return function(*args, **kwargs)
        except LorryError as error:
            click.echo(f"error: {error}", err=True)
            sys.exit(error.exit_code)

    return wrapped
