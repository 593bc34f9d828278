"""Does the work of `lorry launch`: starts a stage and the stages that it needs.

If a Docker engine answers, they run in containers; else as local processes. A Docker engine that refuses this user, a
missing image or a missing GPU ends the launch.
"""

import os
from collections.abc import Generator, Iterator
from contextlib import closing
from typing import Any

from stages.contract.errors import DoesNotFitError, Exit, InterruptedRunError, UsageError
from stages.hardware.holds import Holds
from stages.hardware.probe import Cards, read_cards
from stages.hardware.targets import load_targets, refuse_driver_too_old_for_cuda, refuse_old_driver
from stages.host.cards import CardChoice, choose_cards, choose_target
from stages.host.checks import refuse_mistakes
from stages.host.containers import container_runner, find_engine
from stages.host.needs import STAGES
from stages.host.outcome import Lines, Note, Problem, Runner
from stages.host.processes import installed_cuda, local_runner
from stages.host.runs import open_run, recipe_path, result_lines, run_folder, unfinished_stages


def launch(
    stage: str, options: dict[str, Any], gpus: str | None, target: str | None, force: bool, shard: str | None
) -> Lines:
    """Run the stages that a stage needs, then the stage itself. Yields lines to print; returns the exit code.

    The first stage that does not exit with 0 ends the launch.

    `options` name the run (`open_run`), `gpus` is the value of GPUS, `target` a target's name. `force` and `shard`
    (such as `0/2`) are for the stage itself; a shard starts without the earlier stages. Raises the errors of `open_run`
    and `choose_cards`, UsageError or DoesNotFitError for a stage that cannot start here, InterruptedRunError if stopped
    between two stages, and the errors of `_check_gpus` after a failure.
    """
    if options["recipe"]:
        options = {**options, "recipe": str(recipe_path(options["recipe"]).absolute())}
    stages = (stage,) if shard else STAGES[: STAGES.index(stage) + 1]
    if gpus and gpus.strip().startswith("auto") and not shard:  # finished stages need no GPU and are not started
        left = unfinished_stages(stages, stage, force, options)
        yield from (Note(f"{name}: up to date") for name in stages if name not in left)
        if not left:
            yield from result_lines(run_folder(options), stage)
            return Exit.DONE
        stages = left
    own_arguments = [*(["--force"] if force else []), *(["--shard", shard] if shard else [])]
    with closing(Holds()) as holds:  # the kernel releases them if this process is killed
        found = read_cards()
        choice = choose_cards(gpus, target, stages, options, found, holds)
        yield from map(Note, choice.lines)
        run, in_containers = yield from _choose_runner(stages, options, target, choice, found)
        for number, name in enumerate(stages):
            code = yield from _run_stage(run, name, own_arguments if name == stage else [], choice)
            if code != Exit.DONE:
                return code
            later = [following for following in stages[number + 1 :] if following in choice.computing]
            holds.keep_only({gpu.uuid for following in later for gpu in choice.stage_cards(following)})
    if in_containers and not shard:  # a container names the paths that it sees, such as /runs/job
        yield from result_lines(run_folder(options), stage)
    return Exit.DONE


def _run_stage(run: Runner, stage: str, arguments: list[str], choice: CardChoice) -> Generator[str, None, int]:
    """Run one stage to its end. Returns its exit code; yields lines on a failure that the stage could not print.

    Raises InterruptedRunError if stopped before the stage starts, and the errors of `_check_gpus`.
    """
    outcome = run(stage, arguments)
    if outcome.problem:
        yield outcome.problem
    if outcome.code in (Exit.CRASHED, Exit.DOES_NOT_FIT, Exit.INTERRUPTED):
        yield from _check_gpus(choice, stage, Exit(outcome.code))
    return outcome.code


def _choose_runner(
    stages: tuple[str, ...], options: dict[str, Any], target: str | None, choice: CardChoice, found: Cards
) -> Generator[str, None, tuple[Runner, bool]]:
    """Return the function that runs a stage: in a container, or as a process if no Docker engine answers; and whether
    in a container.

    Yields a line that says which. Raises UsageError or DoesNotFitError if the stages cannot run here.
    """
    card = choose_target(target, choice, found.gpus)
    engine, address = find_engine()
    nodes = os.environ.get("LORRY_NODES") or "1"
    if engine is not None and nodes != "1":
        raise UsageError(
            f"LORRY_NODES={nodes}: containers started here have no network and cannot train on several machines; start"
            " `lorry-train` on each machine, or see k8s/scale-out/train-multinode.yaml"
        )
    uses_gpus = bool(choice.cards and choice.computing)
    if engine is None:
        yield Note(f"no Docker engine answers at {address}; running as a local process")
        cuda = installed_cuda() if uses_gpus else None
        if cuda:
            refuse_driver_too_old_for_cuda(cuda, found.driver, load_targets())
        refuse_mistakes(open_run(**options), stages, machine=False)
        return local_runner(stages, options, choice, target), False
    if uses_gpus:
        refuse_old_driver(card, found.driver)
    run, image = container_runner(engine, stages, options, choice, card)
    stage = stages[-1]
    gpus = f" with GPUs {choice.visible_devices(stage) or '0'}" if stage in choice.computing else ""
    yield Note(f"Docker engine {engine.version()['Version']} at {address}: running {image}{gpus}")
    return run, True


def _check_gpus(choice: CardChoice, stage: str, code: Exit) -> Iterator[str]:
    """Check whether a stage that ended with `code` failed because one of its GPUs no longer answers.

    If so, raises DoesNotFitError, or InterruptedRunError after exit code 75, as the stage's state is saved. Yields a
    line if the driver does not answer.
    """
    if not choice.cards:
        return
    now = read_cards()
    if now.problem:
        yield Problem(f"{stage}: {now.problem}")
        return
    alive = {gpu.uuid for gpu in now.gpus if not gpu.lost}
    for gpu in choice.stage_cards(stage):
        if gpu.uuid not in alive:
            says = next((other.lost for other in now.gpus if other.index == gpu.index and other.lost), "no such GPU")
            others = ",".join(str(other.index) for other in choice.cards if other.uuid in alive)
            error = InterruptedRunError if code == Exit.INTERRUPTED else DoesNotFitError
            raise error(
                f"{stage}: {gpu} has fallen off the bus (NVML: {says}); see `dmesg | grep Xid`, then reset it or"
                f" reboot; to run without it: GPUS={others or 'auto'}"
            )
