"""What the commands share: a stage's command, printing, and errors as one line."""

import os
import sys
from collections.abc import Callable, Generator
from functools import partial, wraps
from typing import Any

import click

from entrypoints.options import recipe_options
from stages.contract.errors import Exit, LorryError
from stages.contract.machine_errors import machine_error
from stages.host.outcome import Note


def stage_command(name: str, summary: str) -> click.Command:
    """The click command of a stage. `summary` is the first sentence of its help."""

    @click.command(
        name=f"lorry-{name}",
        help=f"{summary}\n\nRECIPE is a file or the name of a recipe in recipes/. Default: recipe.yaml of the run that"
        f" --run names.\n\n`lorry-{name} selftest` checks that this image holds what the stage needs.",
    )
    @recipe_options
    @click.option("--force", is_flag=True, help="Start again from nothing, even if the stage or its shards are done.")
    @click.option(
        "--shard",
        metavar="I/N",
        help="Do only shard I of N, counted from 0. Without it, finished shards are merged. Not for eval."
        " [env: LORRY_SHARD]",
    )
    @one_line_errors
    def command(force: bool, shard: str | None, **options: Any) -> None:
        if options["recipe"] == "selftest":
            from stages.host.selftest import selftest

            sys.exit(print_lines(selftest(name)))
        from stages.contract.part import Node, requested_part
        from stages.host.checks import refuse_mistakes
        from stages.host.runner import run_stage
        from stages.host.runs import open_run, result_lines
        from stages.host.work import run_work

        part = requested_part(name, shard, os.environ)
        run = open_run(**options, say=partial(warn_of, name))
        code = run_stage(run, name, run_work, force, part, check=partial(refuse_mistakes, run, (name,)))
        if code == Exit.DONE and (part is None or (isinstance(part, Node) and part.rank == 0)):
            for line in result_lines(run.folder, name):
                click.echo(line)
        sys.exit(code)

    return command


def warn_of(stage: str, section: str, line: str) -> None:
    """Print a line on a key of this stage's section: in a run of all stages each comes once."""
    if section == stage:
        warn(section, line)


def warn(_section: str, line: str) -> None:
    """Print a line on a key of a recipe that is ignored, for `open_run`."""
    click.echo(line, err=True)


def print_lines(lines: Generator[str, None, int | None]) -> int:
    """Print lines as they come, notes on standard error. Returns the exit code that the generator returns."""
    while True:
        try:
            line = next(lines)
        except StopIteration as end:
            return end.value or 0
        click.echo(line, err=isinstance(line, Note))


def one_line_errors(function: Callable[..., Any]) -> Callable[..., Any]:
    """Make a command print a LorryError on standard error, each line of it an error, and exit with the error's code.
    After Ctrl-C it exits with 75.

    Errors of the machine, such as a forbidden folder, are printed like that too.
    """

    @wraps(function)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        try:
            return function(*args, **kwargs)
        except (LorryError, OSError) as error:
            explained = error if isinstance(error, LorryError) else machine_error(error)
            if explained is None:
                raise
            for line in str(explained).splitlines():
                click.echo(f"error: {line}", err=True)
            sys.exit(explained.exit_code)
        except KeyboardInterrupt:
            click.echo("error: interrupted; run the same command again", err=True)
            sys.exit(Exit.INTERRUPTED)

    return wrapped
