"""Stages as containers: `docker compose run` with compose.yaml, watched through the engine.

The only place that knows docker-py.
"""

import importlib.metadata
import os
import shutil
import signal
import socket
import subprocess
import sys
import uuid
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import click

from stages.contract.errors import DoesNotFitError, Exit, InterruptedRunError, UsageError
from stages.contract.roots import Roots
from stages.contract.stop import die_with_parent
from stages.hardware.targets import Target
from stages.host.needs import ON_CARDS

REPOSITORY = Path(__file__).parents[2]
VERSION_LABEL = "org.opencontainers.image.version"
USER = 1000
"""Whom the images run as when root starts them: never as root."""

Runner = Callable[[str, list[str]], int]
"""Runs one stage with some more arguments; returns its exit code."""


def find_engine(timeout: float = 20) -> tuple[Any, str]:
    """A client of the Docker engine (None when there is none) and the address asked. `timeout` in seconds.

    That is DOCKER_HOST, or the current context's, as for `docker` itself. Raises UsageError when an engine is there
    and refuses us.
    """
    try:
        import docker
    except ImportError as error:
        raise UsageError("docker-py is not installed here: run `make setup`") from error
    address = os.environ.get("DOCKER_HOST") or docker.ContextAPI.get_current_context().Host
    try:
        engine = docker.from_env(environment={**os.environ, "DOCKER_HOST": address}, timeout=timeout)
        engine.ping()
    except (docker.errors.DockerException, OSError) as error:
        cause = _system_error(error)
        if isinstance(cause, FileNotFoundError | ConnectionRefusedError | socket.gaierror):
            return None, address
        if isinstance(cause, PermissionError):
            raise UsageError(
                f"no permission on the Docker engine's socket {address}: join its group (`sudo usermod -aG docker"
                " $USER`, then log in again)"
            ) from error
        raise UsageError(f"the Docker engine at {address} cannot be used: {' '.join(str(error).split())}") from error
    return engine, address


def _system_error(error: BaseException) -> OSError | None:
    """The operating system's error at the bottom of what docker-py, requests and urllib3 made of it."""
    left = [error]
    while left:
        one = left.pop()
        if isinstance(one, OSError) and one.errno is not None:
            return one
        inner = (one.__cause__, one.__context__, getattr(one, "reason", None), *one.args)
        left += [other for other in inner if isinstance(other, BaseException)]
    return None


def in_containers(
    engine: Any,
    stages: tuple[str, ...],
    options: dict[str, Any],
    devices: Callable[[str], list[str]],
    target: Target,
) -> tuple[Runner, str]:
    """A runner for containers, and the image of the last stage. Raises what would keep one of them from running.

    `devices` names the cards that a stage is to see, by UUID.
    """
    compose = compose_command()
    if target.capability and set(stages) & set(ON_CARDS):
        refuse_without_nvidia(engine.info(), target)
    version = os.environ.get("LORRY_VERSION") or importlib.metadata.version("lorry")
    images = {stage: image_name(stage, version, target) for stage in stages}
    for stage, image in images.items():
        refuse_image(engine, image, version, image_target(stage, target))
    environment = {**os.environ, **_host_side(options), "LORRY_VERSION": version}
    signals = _listen()

    def run(stage: str, more: list[str]) -> int:
        if signals:
            raise InterruptedRunError(f"stopped by {signals[0].name}; run the same command again")
        name = f"lorry-{stage}-{uuid.uuid4().hex[:8]}"
        command = [*compose, *_container_side(name, options), stage, *stage_arguments(_as_mounted(options)), *more]
        environment.update({"TARGET": image_target(stage, target), "GPUS": ",".join(devices(stage))})
        code = _follow(engine, name, command, environment, signals)
        return killed(stage, code - 128) if code > 128 else code

    return run, images[stages[-1]]


def image_name(stage: str, version: str, target: Target) -> str:
    """The image of a stage, as images/docker-bake.hcl names it."""
    registry = os.environ.get("REGISTRY")
    prefix = f"{registry}/" if registry else ""
    return f"{prefix}lorry-{stage}:{version}-{image_target(stage, target)}"


def image_target(stage: str, target: Target) -> str:
    """A variant has an image of its own for train only; the other stages take that of its card."""
    return target.name if stage == "train" or target.variant_of is None else target.variant_of


# -- what would keep a container from running ----------------------------------------------------------------------


def compose_command() -> list[str]:
    """`docker compose` of the first docker client that has it. Raises UsageError where none has."""
    for folder in os.environ.get("PATH", os.defpath).split(os.pathsep):
        client = shutil.which("docker", path=folder)
        if client and subprocess.run([client, "compose", "version"], capture_output=True, check=False).returncode == 0:
            return [client, "compose", "--project-directory", str(REPOSITORY), "--progress", "quiet"]
    raise UsageError(
        "a Docker engine answers, but no docker client on PATH has the compose plugin: install it (Debian:"
        " docker-compose; Docker's own packages: docker-compose-plugin)"
    )


def refuse_without_nvidia(info: dict[str, Any], target: Target) -> None:
    """Raise DoesNotFitError when the engine cannot hand a GPU to a container: no runtime, hook or CDI device for it."""
    devices = [str(device.get("ID")) for device in info.get("DiscoveredDevices") or ()]  # CDI, from Docker 28 on
    cdi = any(device.startswith("nvidia.com/gpu") for device in devices)
    if "nvidia" not in (info.get("Runtimes") or {}) and not cdi and not shutil.which("nvidia-container-runtime-hook"):
        raise DoesNotFitError(
            f"target {target.name} needs GPUs, and this Docker engine has no NVIDIA runtime to hand them on: install"
            " nvidia-container-toolkit, run `nvidia-ctk runtime configure --runtime=docker` and restart Docker; or"
            " take TARGET=cpu"
        )


def refuse_image(engine: Any, image: str, version: str, target: str) -> None:
    """Raise UsageError when the engine has no such image, or one that holds another version of Lorry."""
    from docker.errors import ImageNotFound

    if os.environ.get("PULL", "never") not in ("", "never"):
        return  # Compose fetches it
    try:
        found = engine.images.get(image).labels.get(VERSION_LABEL)
    except ImageNotFound as error:
        raise UsageError(f"no image {image}: make images TARGET={target} (or PULL=missing, from REGISTRY)") from error
    if found != version:
        raise UsageError(
            f"image {image} holds Lorry {found or 'of no version'}, and its name says {version}: make images"
            f" TARGET={target}"
        )


# -- the container -------------------------------------------------------------------------------------------------


def stage_arguments(options: dict[str, Any]) -> list[str]:
    """The options of `recipe_options` as a stage's command takes them."""
    found = [options["recipe"]] if options["recipe"] else []
    for name, value in (("--profile", options["profile"]), ("--data", options["data"]), ("--run", options["run_name"])):
        found += [name, value] if value else []
    return found + [part for override in options["overrides"] for part in ("--set", override)]


def _host_side(options: dict[str, Any]) -> dict[str, str]:
    """What compose.yaml reads of this machine: the folders, and whom the outputs are to belong to."""
    roots = Roots.from_environment()
    data = Path(options["data"]).absolute() if options["data"] else roots.data
    for folder, name in ((data, "LORRY_DATA"), (roots.models, "LORRY_MODELS")):
        if not folder.is_dir():
            raise UsageError(f"{folder}: no such folder to mount ({name})")
    uid, gid = container_user()
    roots.runs.mkdir(parents=True, exist_ok=True)
    if os.getuid() == 0 and roots.runs.stat().st_uid == 0:  # a checkout of root's: containers never run as root
        os.chown(roots.runs, uid, gid)
    mounts = {"LORRY_DATA": str(data), "LORRY_MODELS": str(roots.models), "LORRY_RUNS": str(roots.runs)}
    # empty rather than unset: what `.env` says of these has not been looked at above
    images = {"REGISTRY": os.environ.get("REGISTRY", ""), "PULL": os.environ.get("PULL", "")}
    return {**mounts, **images, "LORRY_UID": str(uid), "LORRY_GID": str(gid)}


def container_user() -> tuple[int, int]:
    """The uid and gid that containers run as."""
    uid = int(os.environ.get("LORRY_UID") or os.getuid()) or USER
    gid = int(os.environ.get("LORRY_GID") or os.getgid()) or USER
    return uid, gid


def _container_side(name: str, options: dict[str, Any]) -> list[str]:
    """Options of `docker compose run`. Earlier stages were run, and their exit codes seen, before: --no-deps."""
    found = [
        "run",
        "--rm",
        "--no-deps",
        "--name",
        name,
        *([] if sys.stdin.isatty() and sys.stdout.isatty() else ["-T"]),
    ]
    for setting in ("LORRY_RECIPE", "LORRY_PROFILE", "LORRY_RUN", "LORRY_SET"):
        found += ["--env", f"{setting}="]  # the command line says it; no default of compose.yaml may mix in
    if options["recipe"]:  # this machine's file, not what was in recipes/ when the image was built
        found += ["--volume", f"{options['recipe']}:{_as_mounted(options)['recipe']}:ro"]
    return found


def _as_mounted(options: dict[str, Any]) -> dict[str, Any]:
    """The options with the paths that they have inside a container."""
    recipe = f"/recipe/{Path(options['recipe']).name}" if options["recipe"] else None
    return {**options, "recipe": recipe, "data": "/data" if options["data"] else None}


def _listen() -> list[signal.Signals]:
    """Collect stop signals from now on."""
    signals: list[signal.Signals] = []
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda got, _: signals.append(signal.Signals(got)))
    return signals


def _follow(
    engine: Any, name: str, command: list[str], environment: dict[str, str], signals: list[signal.Signals]
) -> int:
    """Run `docker compose run` to its end and hand signals on to the container. Returns the container's exit code.

    They go through the engine: Compose itself would leave the container running and exit at once. So it must not
    see a Ctrl-C either, unless it has the terminal and passes the key on.
    """
    terminal = "-T" not in command
    process = subprocess.Popen(
        command,
        env=environment,
        stdin=None if terminal else subprocess.DEVNULL,
        start_new_session=not terminal,
        preexec_fn=partial(die_with_parent, os.getpid()),  # noqa: PLW1509 - no other thread runs here
    )
    sent = 0
    while True:
        try:
            return process.wait(timeout=0.2)
        except subprocess.TimeoutExpired:
            if len(signals) > sent and _send(engine, name, signals[sent]):
                sent += 1


def _send(engine: Any, name: str, number: signal.Signals) -> bool:
    """Whether the container was there to get the signal; before that, it is tried again."""
    from docker.errors import DockerException

    try:
        engine.containers.get(name).kill(signal.SIGINT if number is signal.SIGINT else signal.SIGTERM)
    except (DockerException, OSError):
        return False
    return True


def killed(stage: str, number: int) -> int:
    """Exit code of a stage that a signal ended."""
    if number not in signal.valid_signals():
        click.echo(f"{stage}: ended with {128 + number}", err=True)
        return int(Exit.CRASHED)
    name = signal.Signals(number).name
    click.echo(f"{stage}: ended by {name}; run the same command again to go on", err=True)
    return int(Exit.INTERRUPTED) if name in ("SIGTERM", "SIGINT") else int(Exit.CRASHED)
