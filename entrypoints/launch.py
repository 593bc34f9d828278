"""`lorry launch STAGE`: a stage, and what it needs before it, in containers where a Docker engine answers.

Without an engine the same commands run as local processes. Nothing else falls back: an engine that refuses us, an
image or a card that is not there, is told in one line.
"""

import importlib.util
import os
import re
import subprocess
import sys
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import click

from entrypoints.common import one_line_errors, recipe_options
from stages.contract.errors import DoesNotFitError, Exit, InterruptedRunError, UsageError
from stages.contract.stop import StopRequest, die_with_parent
from stages.hardware.holds import Holds
from stages.hardware.probe import Cards, read_cards
from stages.hardware.targets import load_targets, refuse_old_driver, refuse_old_driver_for
from stages.host.cards import Chosen, choose_cards, choose_target, to_do
from stages.host.containers import Runner, find_engine, in_containers, killed, stage_arguments
from stages.host.needs import LIBRARIES, ON_CARDS
from stages.host.runs import recipe_path

STAGES = tuple(LIBRARIES)


@click.command()
@click.argument("stage", type=click.Choice(STAGES))
@recipe_options
@click.option("--force", is_flag=True, help="Do STAGE again from nothing; the earlier ones only where needed.")
@click.option("--shard", metavar="I/N", envvar="LORRY_SHARD", help="Do only this share of STAGE, and no earlier stage.")
@click.option(
    "--gpus",
    metavar="LIST",
    envvar="GPUS",
    help="GPUs of this machine, by nvidia-smi's numbers or UUIDs: 0,2; auto or auto:4: those with enough free memory,"
    " held against other lorries. Default: 0. Never one in LORRY_GPU_DENY.",
)
@click.option("--target", metavar="NAME", envvar="TARGET", help="Kind of card; default: by this machine's cards.")
@one_line_errors
def launch(stage: str, gpus: str | None, target: str | None, force: bool, shard: str | None, **options: Any) -> None:
    """Run STAGE and what it needs before it: in containers where a Docker engine answers, else as local processes.

    RECIPE and the other options are those of the stage's own command.
    """
    if options["recipe"]:
        options["recipe"] = str(recipe_path(options["recipe"]).absolute())
    stages = (stage,) if shard else STAGES[: STAGES.index(stage) + 1]
    if gpus and gpus.strip().startswith("auto") and not shard:  # what is done takes no card, and is not started
        left = to_do(stages, stage, force, options)
        click.echo("".join(f"{name}: up to date\n" for name in stages if name not in left), nl=False)
        if not left:
            return
        stages = left
    only_last = [*(["--force"] if force else []), *(["--shard", shard] if shard else [])]
    with closing(Holds()) as holds:  # the kernel closes them if this process is killed
        found = read_cards()
        chosen = choose_cards(gpus, target, stages, options, found, holds)
        for line in chosen.lines:
            click.echo(line)
        run = _runner(stages, options, target, chosen, found)
        for number, name in enumerate(stages):
            code = run(name, only_last if name == stage else [])
            if code in (Exit.CRASHED, Exit.DOES_NOT_FIT, Exit.INTERRUPTED):
                _tell_fallen(chosen, name, Exit(code))
            if code != Exit.DONE:
                sys.exit(code)
            later = [following for following in stages[number + 1 :] if following in ON_CARDS]
            holds.keep({gpu.uuid for following in later for gpu in chosen.cards_of(following)})


def _runner(
    stages: tuple[str, ...], options: dict[str, Any], target: str | None, chosen: Chosen, found: Cards
) -> Runner:
    """What runs a stage: containers, or local processes where no engine answers. Says which."""
    card = choose_target(target, chosen, found.gpus)
    engine, address = find_engine()
    if engine is not None and int(os.environ.get("LORRY_NODES") or 1) > 1:
        raise UsageError(
            "LORRY_NODES: containers started here have no network, and cannot train over several machines; start"
            " `lorry-train` itself on each, or see k8s/scale-out/train-multinode.yaml"
        )
    on_cards = bool(chosen.cards and set(stages) & set(ON_CARDS))
    if engine is None:
        click.echo(f"no Docker engine answers at {address}: running as a local process")
        cuda = installed_cuda() if on_cards else None
        if cuda:
            refuse_old_driver_for(cuda, found.driver, load_targets())
        return _processes(stages, options, chosen, target)
    if on_cards:
        refuse_old_driver(card, found.driver)
    run, image = in_containers(engine, stages, options, chosen.devices, card)
    stage = stages[-1]
    told = f" with GPUs {chosen.numbers(stage) or '0'}" if stage in ON_CARDS and card.capability else ""
    click.echo(f"engine {engine.version()['Version']} at {address}: running {image}{told}")
    return run


def _tell_fallen(chosen: Chosen, stage: str, code: Exit) -> None:
    """After a crash: raise DoesNotFitError if one of the stage's cards no longer answers, which would be the cause.
    A stage that ended with 75 has saved its state: then InterruptedRunError, so that the code stays what it said."""
    if not chosen.cards:
        return
    now = read_cards()
    if now.problem:
        click.echo(f"{stage}: {now.problem}", err=True)
        return
    alive = {gpu.uuid for gpu in now.gpus if not gpu.lost}
    for gpu in chosen.cards_of(stage):
        if gpu.uuid not in alive:
            says = next((other.lost for other in now.gpus if other.index == gpu.index and other.lost), "no such card")
            others = ",".join(str(other.index) for other in chosen.cards if other.uuid in alive)
            error = InterruptedRunError if code == Exit.INTERRUPTED else DoesNotFitError
            raise error(
                f"{stage}: {gpu} has fallen off the bus (NVML: {says}): see `dmesg | grep Xid`, and reset it or"
                f" reboot; run again without it: GPUS={others or 'auto'}"
            )


def installed_cuda() -> str | None:
    """The CUDA version that the torch of local processes is built for, read without importing it; None without one."""
    torch = importlib.util.find_spec("torch")
    if torch is None or torch.origin is None:
        return None
    found = re.search(r"^cuda\b.*'([0-9.]+)'", Path(torch.origin).with_name("version.py").read_text(), re.MULTILINE)
    return found[1] if found else None


# -- local processes -----------------------------------------------------------------------------------------------


def _processes(stages: tuple[str, ...], options: dict[str, Any], chosen: Chosen, target: str | None) -> Runner:
    for stage in stages:
        missing = [library for library in LIBRARIES[stage] if importlib.util.find_spec(library) is None]
        if missing:
            raise UsageError(
                f"{stage} needs {missing[0]}, which is not installed here: run `make setup`, or start Docker"
            )
    environment = dict(os.environ)
    if target:
        environment["LORRY_TARGET"] = target
    stop = StopRequest()
    stop.install()

    def run(stage: str, more: list[str]) -> int:
        stop.check()
        if chosen.auto or chosen.numbers(stage):  # counted as nvidia-smi does; none where `auto` took none
            environment["CUDA_VISIBLE_DEVICES"] = chosen.numbers(stage)
            environment["CUDA_DEVICE_ORDER"] = "PCI_BUS_ID"
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
