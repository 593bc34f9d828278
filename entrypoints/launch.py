"""`lorry launch STAGE`: a stage, and what it needs before it, in containers where a Docker engine answers.

Without an engine the same commands run as local processes. Nothing else falls back: an engine that refuses us, an
image or a card that is not there, is told in one line.
"""

import importlib.util
import os
import subprocess
import sys
from functools import partial
from typing import Any

import click

from entrypoints.common import one_line_errors, recipe_options, recipe_path
from entrypoints.containers import Runner, find_engine, in_containers, killed, stage_arguments
from entrypoints.selftest import LIBRARIES, ON_CARDS
from stages.contract.errors import Exit, UsageError
from stages.contract.stop import StopRequest, die_with_parent
from stages.hardware.probe import Gpu, Machine, installed_gpus
from stages.hardware.targets import Target, load_targets, named_target, target_of

STAGES = tuple(LIBRARIES)


@click.command()
@click.argument("stage", type=click.Choice(STAGES))
@recipe_options
@click.option("--force", is_flag=True, help="Do STAGE again from nothing; the earlier ones only where needed.")
@click.option("--shard", metavar="I/N", envvar="LORRY_SHARD", help="Do only this share of STAGE, and no earlier stage.")
@click.option("--gpus", metavar="LIST", envvar="GPUS", help="GPUs of this machine, as nvidia-smi counts them: 0,2")
@click.option("--target", metavar="NAME", envvar="TARGET", help="Kind of card; default: by this machine's cards.")
@one_line_errors
def launch(stage: str, gpus: str | None, target: str | None, force: bool, shard: str | None, **options: Any) -> None:
    """Run STAGE and what it needs before it: in containers where a Docker engine answers, else as local processes.

    RECIPE and the other options are those of the stage's own command.
    """
    cards = installed_gpus()
    if not gpus and cards and (not target or named_target(target, load_targets()).capability):
        gpus = "0"  # as plain Compose does: not every card of a box that others share
    chosen = choose_gpus(gpus, cards)
    card = choose_target(target, chosen, cards)
    if options["recipe"]:
        options["recipe"] = str(recipe_path(options["recipe"]).absolute())
    stages = (stage,) if shard else STAGES[: STAGES.index(stage) + 1]
    only_last = [*(["--force"] if force else []), *(["--shard", shard] if shard else [])]
    engine, address = find_engine()
    if engine is not None and int(os.environ.get("LORRY_NODES") or 1) > 1:
        raise UsageError(
            "LORRY_NODES: containers started here have no network, and cannot train over several machines; start"
            " `lorry-train` itself on each, or see k8s/scale-out/train-multinode.yaml"
        )
    run: Runner
    if engine is None:
        click.echo(f"no Docker engine answers at {address}: running as a local process")
        run = _processes(stages, options, chosen, target)
    else:
        devices = [card.uuid for number in chosen for card in cards if card.index == number] or [*map(str, chosen)]
        run, image = in_containers(engine, stages, options, devices, card)
        told = f" with GPUs {gpus or '0'}" if stage in ON_CARDS and card.capability else ""
        click.echo(f"engine {engine.version()['Version']} at {address}: running {image}{told}")
    for name in stages:
        code = run(name, only_last if name == stage else [])
        if code != Exit.DONE:
            sys.exit(code)


# -- what was asked for --------------------------------------------------------------------------------------------


def choose_gpus(text: str | None, cards: tuple[Gpu, ...]) -> tuple[int, ...]:
    """The GPU numbers of a list such as `0,2`. Raises UsageError for one that this machine has not (if NVML tells)."""
    if not text:
        return ()
    here = "; ".join(f"{card.index} {card.name}" for card in cards) or "none that NVML shows"
    names = [name.strip() for name in text.split(",")]
    if not all(name.isdecimal() for name in names):
        raise UsageError(f"GPUS={text}: not a list of GPU numbers such as 0,2; this machine has: {here}")
    numbers = tuple(int(name) for name in names)
    if len(set(numbers)) < len(numbers):
        raise UsageError(f"GPUS={text}: names a GPU twice; this machine has: {here}")
    unknown = sorted(set(numbers) - {card.index for card in cards})
    if cards and unknown:
        raise UsageError(f"GPUS={text}: there is no GPU {unknown[0]}; this machine has: {here}")
    return numbers


def choose_target(name: str | None, chosen: tuple[int, ...], cards: tuple[Gpu, ...]) -> Target:
    """The target that was named, or that of the chosen (or all) cards of this machine."""
    targets = load_targets()
    if name:
        target = named_target(name, targets)
        if target.capability is None and chosen:
            raise UsageError(f"target {name} takes no GPUs: leave GPUS out, or name the cards' target")
        return target
    if chosen and not cards:
        raise UsageError(f"NVML shows no cards here: name their target, TARGET= one of {', '.join(targets)}")
    taken = tuple(card for card in cards if card.index in chosen or not chosen)
    return target_of(Machine(cpus=0, memory_bytes=0, gpus=taken), targets)


# -- local processes -----------------------------------------------------------------------------------------------


def _processes(stages: tuple[str, ...], options: dict[str, Any], chosen: tuple[int, ...], target: str | None) -> Runner:
    for stage in stages:
        missing = [library for library in LIBRARIES[stage] if importlib.util.find_spec(library) is None]
        if missing:
            raise UsageError(
                f"{stage} needs {missing[0]}, which is not installed here: run `make setup`, or start Docker"
            )
    environment = dict(os.environ)
    if chosen:  # numbers, counted as nvidia-smi does: libraries read them as integers and break on UUIDs
        environment |= {"CUDA_VISIBLE_DEVICES": ",".join(map(str, chosen)), "CUDA_DEVICE_ORDER": "PCI_BUS_ID"}
    if target:
        environment["LORRY_TARGET"] = target
    stop = StopRequest()
    stop.install()

    def run(stage: str, more: list[str]) -> int:
        stop.check()
        return run_process(stage, [*stage_arguments(options), *more], stop, environment)

    return run


def run_process(stage: str, arguments: list[str], stop: StopRequest, environment: dict[str, str] | None = None) -> int:
    """A stage in a process of its own, so that its memory is free before the next; a stop is passed on to it."""
    process = subprocess.Popen(
        [sys.executable, "-m", f"entrypoints.{stage}", *arguments],
        env=environment,
        preexec_fn=partial(die_with_parent, os.getpid()),  # noqa: PLW1509 - no other thread runs here
    )
    stop.pass_on_to(process)
    code = process.wait()
    return killed(stage, -code) if code < 0 else code
