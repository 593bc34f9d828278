"""Runs stages as local processes."""

import importlib.util
import os
import re
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stages.contract.errors import Exit, UsageError
from stages.contract.stop import StopRequest, begin_child
from stages.host.checks import refuse_mistakes
from stages.host.needs import STAGES, missing_libraries
from stages.host.outcome import Lines, Note, Outcome, Runner, signal_outcome
from stages.host.runs import is_done, open_run, result_lines, stage_arguments

if TYPE_CHECKING:
    from stages.host.cards import CardChoice


def run_all_stages(options: dict[str, Any], force: bool) -> Lines:
    """Run the four stages in order, each in a process of its own. Skips stages that are done, unless `force`.

    `options` name the run (`open_run`). Yields lines to print. The first stage that does not exit with 0 ends the run;
    returns its exit code, else 0. Raises the errors of `open_run` and `Run.refuse_other_job`, those of
    `refuse_mistakes` before the first stage that is not done, and InterruptedRunError if this process is stopped before
    a stage starts.
    """
    run = open_run(**options)
    run.refuse_other_job()
    arguments = [*stage_arguments(options), *(["--force"] if force else [])]
    stop = StopRequest()
    stop.install()
    checked = False
    for number, stage in enumerate(STAGES):
        done = not force and is_done(run, stage)
        stop.check()
        if done:
            yield Note(f"{stage}: up to date")
            continue
        if not checked:
            refuse_mistakes(run, STAGES[number:])
            checked = True
        outcome = run_process(stage, arguments, stop)
        if outcome.problem:
            yield outcome.problem
        if outcome.code != Exit.DONE:
            return outcome.code
    yield Note("all four stages are up to date")
    if done:  # else eval's process has just printed them
        yield from result_lines(run.folder, STAGES[-1])
    return Exit.DONE


def local_runner(stages: tuple[str, ...], options: dict[str, Any], cards: "CardChoice", target: str | None) -> Runner:
    """A function that runs a stage as a local process, on the chosen GPUs.

    `target` is a target's name; None: that of the GPUs. From now on, stop signals go to the process that runs. Raises
    UsageError if a library of one of the stages is missing.
    """
    for stage in stages:
        missing = missing_libraries(stage)
        if missing:
            raise UsageError(
                f"{stage}: needs {missing[0]}, which is not installed here; run `make setup`, or start Docker"
            )
    stop = StopRequest()
    stop.install()

    def run(stage: str, more: list[str]) -> Outcome:
        """Run a stage as a process to its end, and return its outcome. `more` are further arguments of its command.

        Raises InterruptedRunError if a stop signal came before the process starts.
        """
        stop.check()
        environment = {**os.environ, **local_environment(cards, stage, target)}
        return run_process(stage, [*stage_arguments(options), *more], stop, environment)

    return run


def local_environment(cards: "CardChoice", stage: str, target: str | None) -> dict[str, str]:
    """The environment variables that give a local process the GPUs chosen for a stage. `target` is a target's name;
    None: that of the GPUs."""
    found = {"LORRY_TARGET": target} if target else {}
    if cards.auto or cards.visible_devices(stage):  # an empty list, if `auto` took none, hides all GPUs
        found["CUDA_VISIBLE_DEVICES"] = cards.visible_devices(stage)
        found["CUDA_DEVICE_ORDER"] = "PCI_BUS_ID"  # the same numbers as in nvidia-smi
    return found


def run_process(
    stage: str, arguments: list[str], stop: StopRequest, environment: dict[str, str] | None = None
) -> Outcome:
    """Run a stage in its own process to its end, and pass stop signals on to it. Returns its outcome.

    `environment` None: that of this process.
    """
    process = subprocess.Popen(
        [sys.executable, "-m", f"entrypoints.{stage}", *arguments],
        env=environment,
        process_group=0,
        preexec_fn=partial(begin_child, os.getpid()),  # noqa: PLW1509 - no other thread runs here
    )
    stop.pass_on_to(process, ends_itself=True)
    code = process.wait()
    stop.pass_on_to(None)
    return signal_outcome(stage, -code) if code < 0 else Outcome(code)


def installed_cuda() -> str | None:
    """The CUDA version that the installed torch is built for, such as 12.8; None without torch, or for a CPU build."""
    torch = importlib.util.find_spec("torch")
    if torch is None or torch.origin is None:
        return None
    found = re.search(r"^cuda\b.*'([0-9.]+)'", Path(torch.origin).with_name("version.py").read_text(), re.MULTILINE)
    return found[1] if found else None
