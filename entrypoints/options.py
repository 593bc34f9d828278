"""Options that several commands share."""

import re
from collections.abc import Callable, Mapping
from functools import wraps
from typing import Any

import click
from click.core import ParameterSource

from stages.contract.errors import Exit

Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]


class _Setting(click.types.StringParamType):
    """A KEY=VALUE of --set. In an environment variable there may be several, with blanks between them."""

    def split_envvar_value(self, rv: str) -> list[str]:
        """The settings in an environment variable. A value may hold blanks: the next setting starts at a KEY=."""
        return re.split(r"\s+(?=[A-Za-z_][\w.]*=)", rv.strip())


def option_group(*decorators: Decorator) -> Decorator:
    """A decorator that adds these arguments and options to a command. Its help has them in this order."""

    def add(command: Callable[..., Any]) -> Callable[..., Any]:
        for decorate in reversed(decorators):
            command = decorate(command)
        return command

    return add


def as_arguments(options: Mapping[str, Any]) -> list[str]:
    """Values of options as on a command line, for the same command in a container. Empty ones and 0 are left out."""
    return [part for name, value in options.items() if value for part in (f"--{name.replace('_', '-')}", str(value))]


recipe_options = option_group(
    click.argument("recipe", required=False, envvar="LORRY_RECIPE"),
    click.option(
        "--profile",
        metavar="NAME",
        envvar="LORRY_PROFILE",
        help="Profile of the recipe to apply, such as tiny. [env: LORRY_PROFILE]",
    ),
    click.option("--data", metavar="PATH", help="Folder or file with the input data. Default: the recipe's data.path."),
    click.option(
        "--set",
        "overrides",
        type=_Setting(),
        multiple=True,
        metavar="KEY=VALUE",
        envvar="LORRY_SET",
        help="Override a recipe value, such as train.epochs=2; may be repeated. [env: LORRY_SET]",
    ),
    click.option(
        "--run",
        "run_name",
        metavar="NAME",
        envvar="LORRY_RUN",
        help="Name of the run: its folder below the runs mount. Default: the recipe's name. [env: LORRY_RUN]",
    ),
)
"""RECIPE, --profile, --data, --set and --run, which a command gets as the keyword arguments of `open_run`.

All except --data may also come from environment variables, as in Compose files and Kubernetes Jobs; the command line
takes precedence.
"""


card_options = option_group(
    click.option(
        "--gpus",
        metavar="LIST",
        envvar="GPUS",
        help="GPUs of this machine, by nvidia-smi's numbers or by UUID, such as 0,2. auto takes those with enough"
        " free memory, auto:4 takes exactly four; other Lorry processes leave those alone. GPUs in LORRY_GPU_DENY"
        " are never taken. Default: 0. [env: GPUS]",
    ),
    click.option(
        "--target", metavar="NAME", envvar="TARGET", help="Kind of card. Default: this machine's cards. [env: TARGET]"
    ),
)
"""--gpus and --target: the GPUs of this host that a command may use."""


def cluster_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add --on and the options of `--on kubernetes` to a command. It gets these as the mapping `cluster`, with the
    fields of `Place`; None on this host, where they are refused."""

    @wraps(command)
    def wrapped(on: str, **options: Any) -> Any:
        cluster = {name: options.pop(name) for name in ("namespace", "registry", "settings", "dry_run")}
        context = click.get_current_context()
        for parameter in context.command.params if on == "host" else ():
            typed = context.get_parameter_source(str(parameter.name)) is ParameterSource.COMMANDLINE
            if typed and parameter.name in cluster:
                flag = parameter.opts[0]
                click.echo(f"error: {flag}: only with --on kubernetes; add that, or leave it out", err=True)
                context.exit(Exit.USAGE)
        return command(cluster=cluster if on == "kubernetes" else None, **options)

    return option_group(
        click.option(
            "--on", type=click.Choice(["host", "kubernetes"]), default="host", help="Where to run. Default: host."
        ),
        click.option(
            "--namespace",
            metavar="NAME",
            envvar="NAMESPACE",
            help="Namespace of the Jobs. Default: that of the current context. [env: NAMESPACE]",
        ),
        click.option(
            "--registry", metavar="PREFIX", envvar="REGISTRY", help="Prefix of the images' names. [env: REGISTRY]"
        ),
        click.option("--kubernetes", "settings", metavar="FILE", help="YAML file with settings of the cluster."),
        click.option("--dry-run", is_flag=True, help="With --on kubernetes: print the Jobs as YAML, start nothing."),
    )(wrapped)
