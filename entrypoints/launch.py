"""`lorry launch`: start a stage and those it needs, on this host's GPUs or on a Kubernetes cluster."""

import sys
from typing import Any

import click

from entrypoints.common import one_line_errors, print_lines
from entrypoints.options import card_options, cluster_options, recipe_options
from stages.contract.errors import UsageError
from stages.host.needs import STAGES

LOAD = "load"
"""In place of a stage: the pod through which data and models come to a cluster."""


@click.command()
@click.argument("stage", type=click.Choice([*STAGES, LOAD]))
@recipe_options
@click.option("--force", is_flag=True, help="Start STAGE again from nothing; earlier stages only run if needed.")
@click.option(
    "--shard",
    metavar="I/N",
    envvar="LORRY_SHARD",
    help="Do only shard I of N of STAGE, counted from 0, and no earlier stage. [env: LORRY_SHARD]",
)
@card_options
@cluster_options
@one_line_errors
def launch(
    stage: str,
    gpus: str | None,
    target: str | None,
    force: bool,
    shard: str | None,
    cluster: dict[str, Any] | None,
    **options: Any,
) -> None:
    """Start STAGE and the stages it needs on this host's GPUs, in containers if a Docker engine answers.

    Without a Docker engine the stages run as local processes, and a line says so. RECIPE and its options are those of
    the stage's own command, such as `lorry-train`.

    With --on kubernetes, the stages run as Jobs of a cluster, one after the other, and the exit code is that of the
    first stage that fails. --target is needed, --data is a path below the claim of the data, and --gpus is auto, for
    the fewest GPUs that fit, or auto:4, for a training on exactly four. `lorry launch load --on kubernetes` starts a
    pod to copy data and models through.
    """
    if cluster is None:
        if stage == LOAD:
            raise UsageError(f"{LOAD}: only with --on kubernetes; add that, or name a stage: {', '.join(STAGES)}")
        from stages.host import launching

        sys.exit(print_lines(launching.launch(stage, options, gpus, target, force, shard)))
    from stages.host.kubernetes import launching as on_cluster

    place = on_cluster.Place(**cluster)
    if stage == LOAD:
        sys.exit(print_lines(on_cluster.load(target, place)))
    if shard:
        raise UsageError(f"--shard {shard}: not with --on kubernetes; k8s/scale-out/ has Jobs for shards")
    sys.exit(print_lines(on_cluster.launch(stage, options, gpus, target, force, place)))
