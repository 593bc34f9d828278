"""The options that name a run and its recipe."""

import re
from collections.abc import Callable
from typing import Any

import click


class _Setting(click.types.StringParamType):
    """A KEY=VALUE of --set. In an environment variable there may be several, with blanks between them."""

    def split_envvar_value(self, rv: str) -> list[str]:
        """The settings in an environment variable. A value may hold blanks: the next setting starts at a KEY=."""
        return re.split(r"\s+(?=[A-Za-z_][\w.]*=)", rv.strip())


def recipe_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add RECIPE, --profile, --data, --set and --run to a command. The command gets them as the keyword arguments of
    `open_run`, which finds the run.

    All except --data may also come from environment variables, as in Compose files and Kubernetes Jobs; the command
    line takes precedence.
    """
    for decorate in (
        click.option(
            "--run",
            "run_name",
            metavar="NAME",
            envvar="LORRY_RUN",
            help="Name of the run: its folder below the runs mount. Default: the recipe's name. [env: LORRY_RUN]",
        ),
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
            "--data", metavar="PATH", help="Folder or file with the input data. Default: the recipe's data.path."
        ),
        click.option(
            "--profile",
            metavar="NAME",
            envvar="LORRY_PROFILE",
            help="Profile of the recipe to apply, such as tiny. [env: LORRY_PROFILE]",
        ),
        click.argument("recipe", required=False, envvar="LORRY_RECIPE"),
    ):
        command = decorate(command)
    return command


def card_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add --gpus and --target to a command: the GPUs of this host that it may use."""
    for decorate in (
        click.option(
            "--target",
            metavar="NAME",
            envvar="TARGET",
            help="Kind of card. Default: this machine's cards. [env: TARGET]",
        ),
        click.option(
            "--gpus",
            metavar="LIST",
            envvar="GPUS",
            help="GPUs of this machine, by nvidia-smi's numbers or by UUID, such as 0,2. auto takes those with enough"
            " free memory, auto:4 takes exactly four; other Lorry processes leave those alone. GPUs in LORRY_GPU_DENY"
            " are never taken. Default: 0. [env: GPUS]",
        ),
    ):
        command = decorate(command)
    return command
