"""Does the work of `lorry serve` and `lorry chat`: on this host's GPUs, in a container if a Docker engine answers.

`serve_here` and `chat_here` are what then runs, in the container or as a local process.
"""

import importlib
import os
import sys
from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from typing import TYPE_CHECKING, Any

from stages.contract.errors import Exit, UsageError
from stages.contract.roots import Roots
from stages.contract.stop import StopRequest
from stages.hardware.holds import Holds
from stages.hardware.pick import hide_unusable_gpus
from stages.hardware.probe import read_cards
from stages.hardware.targets import load_targets, refuse_driver_too_old_for_cuda, refuse_old_driver
from stages.host.cards import choose_cards, choose_target
from stages.host.containers import container_runner, find_engine
from stages.host.outcome import Lines, Note, Runner
from stages.host.processes import installed_cuda, local_environment, local_runner
from stages.host.runs import open_run, recipe_path

if TYPE_CHECKING:
    from stages.contract.run import Run

LOOPBACK = ("127.0.0.1", "::1", "localhost")
"""Addresses that only this machine reaches."""

TOKEN = "LORRY_API_KEY"
"""The environment variable that has the token: on a command line, everybody on the machine could read it."""


def serve_on_host(
    run_name: str, host: str, port: int, arguments: Sequence[str], gpus: str | None, target: str | None
) -> Lines:
    """Serve a run on this host, with GPUs as `lorry launch` has them. Yields lines to print; returns the exit code.

    `arguments` are those of `lorry-serve` beside run, host and port. Raises UsageError if others than this machine
    could use the server without a token, and the errors of `existing_run` and `lorry launch`.
    """
    if host not in LOOPBACK and not os.environ.get(TOKEN):
        raise UsageError(
            f"--host {host}: others reach this address, and there is no token; set {TOKEN}, or leave out --host"
        )
    existing_run(run_name)
    with closing(Holds()) as holds:  # the kernel releases them if this process is killed
        run, in_container = yield from _choose_runner(run_name, gpus, target, holds)
        address = ["--host", host, "--port", str(port)]
        os.environ.update(
            {"LORRY_HOST": host, "LORRY_PORT": str(port)} if in_container else {}
        )  # compose.yaml reads it
        if in_container:
            yield Note(f"serve: its port is published at http://{host}:{port}/v1")
        outcome = run("serve", [*([] if in_container else address), *arguments])
    if outcome.problem:
        yield outcome.problem
    return outcome.code


def chat_on_host(
    run_name: str, arguments: Sequence[str], chat: Callable[[], int], gpus: str | None, target: str | None
) -> Lines:
    """Chat with a run on this host, with GPUs as `lorry launch` has them. Yields lines to print; returns the exit code.

    `arguments` are those of `lorry-chat` beside the run, for a container. Without a Docker engine, `chat` does it in
    this process, which has the terminal. Raises the errors of `existing_run` and `lorry launch`.
    """
    existing_run(run_name)
    with closing(Holds()) as holds:
        run, in_container = yield from _choose_runner(run_name, gpus, target, holds)
        if not in_container:
            return chat()
        outcome = run("chat", list(arguments))
    if outcome.problem:
        yield outcome.problem
    return outcome.code


def _choose_runner(
    run_name: str, gpus: str | None, target: str | None, holds: Holds
) -> Generator[str, None, tuple[Runner, bool]]:
    """Choose and hold the GPUs. Returns the function that runs a command with them, and whether in a container.

    If it is no container, this process gets them, too. Yields lines to print. Raises the errors of `lorry launch`.
    """
    options = {"recipe": None, "profile": None, "data": None, "overrides": (), "run_name": run_name}
    found = read_cards()
    choice = choose_cards(gpus, target, ("infer",), options, found, holds)
    yield from map(Note, choice.lines)
    card = choose_target(target, choice, found.gpus)
    engine, address = find_engine()
    if engine is not None:
        if choice.cards:
            refuse_old_driver(card, found.driver)
        run, image = container_runner(engine, ("infer",), options, choice, card)
        yield Note(f"Docker engine {engine.version()['Version']} at {address}: running {image}")
        return run, True
    yield Note(f"no Docker engine answers at {address}; running as a local process")
    cuda = installed_cuda() if choice.cards else None
    if cuda:
        refuse_driver_too_old_for_cuda(cuda, found.driver, load_targets())
    os.environ.update(local_environment(choice, "infer", target))
    return local_runner((), options, choice, target), False


def existing_run(run_name: str | None) -> "Run":
    """The run of this name, with the recipe that it ran with; None: that of LORRY_RECIPE, as compose.yaml sets it.

    Raises UsageError if there is no such run.
    """
    recipe = os.environ.get("LORRY_RECIPE")
    name = run_name or (recipe_path(recipe).stem if recipe else None)
    if name is None:
        raise UsageError("RUN: not given; name a run that is trained")
    runs = Roots.from_environment().runs
    if not (runs / name / "recipe.yaml").is_file():
        known = sorted(path.parent.name for path in runs.glob("*/recipe.yaml"))
        names = f"known runs: {', '.join(known[:10])}{' and others' if known[10:] else ''}" if known else "no run there"
        raise UsageError(f"{runs / name}: no such run; {names}")
    return open_run(None, run_name=name)


def serve_here(
    run_name: str | None,
    engine: str | None,
    only: str | None,
    host: str,
    port: int,
    max_length: int | None,
    more: Sequence[str],
) -> int:
    """Serve a run by this process, until a signal ends it. Returns the exit code: 0 after a signal.

    `more` are further options of `vllm serve`. Raises the errors of `existing_run`, of `stages.serve.served.served_run`
    and of the engine's server.
    """
    stop = StopRequest()
    stop.install()
    try:
        run = existing_run(run_name)
        for line in hide_unusable_gpus():
            _say(line)
        token = os.environ.get(TOKEN) or None
        if token is None:
            _say(f"no token: whoever reaches {host}:{port} can use the models; set {TOKEN} to one")
        served = importlib.import_module("stages.serve.served").served_run(run, engine, only, max_length, _say)
        if served.kind.has_server:
            module = importlib.import_module("stages.serve.vllm_server")
            return int(module.serve_by_vllm(served, host, port, token, more, _say, stop))
        if more:
            raise UsageError(
                f"{more[0]}: is an option of vLLM, but the transformers engine serves this run; leave it out"
            )
        importlib.import_module("stages.serve.transformers_server").serve_by_transformers(
            served, host, port, token, _say
        )
    except KeyboardInterrupt:
        pass
    _say(f"stopped by {stop.signal.name}" if stop.signal is not None else "stopped")
    return Exit.DONE


def _say(line: str) -> None:
    """Print a line of the server on standard error."""
    sys.stderr.write(f"serve: {line}\n")
    sys.stderr.flush()


def chat_here(run_name: str | None, **options: Any) -> int:
    """Chat with a run in this process. Returns the exit code. `options` are those of `stages.serve.chat.chat`.

    Raises the errors of `existing_run` and of `stages.serve.served.served_run`.
    """
    run = existing_run(run_name)
    hide_unusable_gpus()
    return int(importlib.import_module("stages.serve.chat").chat(run, **options))
