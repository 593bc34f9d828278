"""`lorry doctor`: check this machine before a job."""

import sys
from typing import Any

import click

from entrypoints.common import one_line_errors
from entrypoints.options import recipe_options


@click.command()
@recipe_options
@click.option(
    "--target", metavar="NAME", envvar="TARGET", help="Kind of card. Default: this machine's cards. [env: TARGET]"
)
@one_line_errors
def doctor(target: str | None, **options: Any) -> None:
    """Check this machine, and what RECIPE needs of it; print one line for each check.

    Lines that begin with warn or FAIL name the cure. Exits with 0 if nothing fails, with 4 if hardware, driver, memory
    or disk fails, and with 2 if only settings, permissions, images or weights do.
    """
    from stages.host.doctor import examine, exit_code
    from stages.host.runs import open_run

    run = open_run(**options) if options["recipe"] or options["run_name"] else None
    findings = []
    for finding in examine(target, run):
        click.echo(str(finding))
        findings.append(finding)
    sys.exit(exit_code(findings))
