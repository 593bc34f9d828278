"""Runs stages as containers: with `docker compose run` and compose.yaml, watched through the Docker engine.

No other module uses docker-py, except for its error types.
"""

import importlib.metadata
import os
import shutil
import signal
import socket
import subprocess
import sys
import uuid
from functools import partial
from pathlib import Path
from typing import Any

from stages.contract.errors import DoesNotFitError, InterruptedRunError, UsageError
from stages.contract.roots import Roots
from stages.contract.stop import STOPS, die_with_parent
from stages.hardware.targets import Target
from stages.host.cards import CardChoice
from stages.host.outcome import Outcome, Runner, signal_outcome
from stages.host.runs import stage_arguments

REPOSITORY = Path(__file__).parents[2]
VERSION_LABEL = "org.opencontainers.image.version"
ADDRESS = ("LORRY_HOST", "LORRY_PORT")
"""The variables with which compose.yaml publishes the port of `serve`."""
USER = 1000
"""The uid and gid of containers that root starts: containers never run as root."""


def find_engine(timeout: float = 20) -> tuple[Any, str]:
    """The client of the Docker engine (None if none listens at its address), and the address.

    The address is DOCKER_HOST or that of the current context, as for `docker` itself. Raises UsageError if docker-py is
    not installed, or if the engine refuses this user, does not answer within `timeout` seconds or cannot be used.
    """
    try:
        import docker
    except ImportError as error:
        raise UsageError("docker-py: not installed here; run `make setup`") from error
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
                f"{address}: no permission on this socket of the Docker engine; join its group (`sudo usermod -aG"
                " docker $USER`, then log in again)"
            ) from error
        reason = " ".join(str(error).split())
        raise UsageError(
            f"{address}: the Docker engine there cannot be used ({reason}); see `docker info`, or set DOCKER_HOST"
        ) from error
    return engine, address


def _system_error(error: BaseException) -> OSError | None:
    """The operating system's error that caused an error of docker-py, requests or urllib3; None if there is none."""
    left = [error]
    while left:
        one = left.pop()
        if isinstance(one, OSError) and one.errno is not None:
            return one
        inner = (one.__cause__, one.__context__, getattr(one, "reason", None), *one.args)
        left += [other for other in inner if isinstance(other, BaseException)]
    return None


def container_runner(
    engine: Any,
    stages: tuple[str, ...],
    options: dict[str, Any],
    choice: CardChoice,
    target: Target,
) -> tuple[Runner, str]:
    """A function that runs a stage in a container, and the name of the last stage's image.

    `choice` says which stages get which GPUs. From now on, stop signals go to the container that runs.
    Also creates the runs folder. Raises UsageError or DoesNotFitError if a container could not run: no Compose plugin,
    no NVIDIA runtime, no image, an image of another version, or no folder to mount.
    """
    compose = compose_command()
    if choice.computing:
        refuse_without_nvidia(engine.info(), target)
    version = os.environ.get("LORRY_VERSION") or importlib.metadata.version("lorry")
    images = {stage: image_name(stage, version, target) for stage in stages}
    for stage, image in images.items():
        refuse_image(engine, image, version, image_target(stage, target))
    environment = {**os.environ, **_prepare_mounts(options), "LORRY_VERSION": version}
    signals = _collect_signals()

    def run(stage: str, more: list[str]) -> Outcome:
        """Run a stage in a container to its end, and return its outcome. `more` are further arguments of its command.

        Raises InterruptedRunError if a stop signal came before the container starts.
        """
        if signals:
            raise InterruptedRunError(
                f"{stage}: stopped by {signals[0].name} before it began; run the same command again"
            )
        name = f"lorry-{stage}-{uuid.uuid4().hex[:8]}"
        arguments = stage_arguments(_mounted_options(options))
        published = ["--service-ports"] if stage == "serve" else []  # else `run` publishes no port
        command = [*compose, *_run_options(name, options), *published, stage, *arguments, *more]
        environment.update({"TARGET": image_target(stage, target), "GPUS": ",".join(choice.devices(stage))})
        environment.update({each: os.environ[each] for each in ADDRESS if each in os.environ})
        if stage == "preprocess":
            environment["LORRY_PREPROCESS_DEVICES"] = "gpu" if stage in choice.computing else "none"
        code = _run_container(engine, name, command, environment, signals, reads=stage == "chat")
        return signal_outcome(stage, code - 128) if code > 128 else Outcome(code)

    return run, images[stages[-1]]


def image_name(stage: str, version: str, target: Target, registry: str | None = None) -> str:
    """The name of a stage's image, as in images/docker-bake.hcl, with `registry` before it; None: REGISTRY."""
    registry = os.environ.get("REGISTRY") if registry is None else registry
    prefix = f"{registry}/" if registry else ""
    return f"{prefix}lorry-{stage}:{version}-{image_target(stage, target)}"


def image_target(stage: str, target: Target) -> str:
    """The name of the target whose image a stage uses: for a variant's stages other than train, the target that it is
    a variant of; otherwise the target itself."""
    return target.name if stage == "train" or target.variant_of is None else target.variant_of


# -- checks before a container starts ------------------------------------------------------------------------------


def compose_command() -> list[str]:
    """The command line of `docker compose`, with the first docker client on PATH that has the plugin.

    Raises UsageError if no client has it, or if compose.yaml is not here.
    """
    if not (REPOSITORY / "compose.yaml").is_file():  # installed from a wheel
        raise UsageError(
            f"{REPOSITORY}: no compose.yaml here; launch containers from a checkout, or run the stages as local"
            " processes with `lorry run`"
        )
    for folder in os.environ.get("PATH", os.defpath).split(os.pathsep):
        client = shutil.which("docker", path=folder)
        if client and subprocess.run([client, "compose", "version"], capture_output=True, check=False).returncode == 0:
            return [client, "compose", "--project-directory", str(REPOSITORY), "--progress", "quiet"]
    raise UsageError(
        "PATH: a Docker engine answers, but no docker client on it has the compose plugin; install it (Debian:"
        " docker-compose; Docker's own packages: docker-compose-plugin)"
    )


def refuse_without_nvidia(info: dict[str, Any], target: Target) -> None:
    """Raise DoesNotFitError if the Docker engine has no way to give GPUs to containers: NVIDIA's runtime, hook or CDI.

    `info` is the answer of docker-py's `info()`.
    """
    devices = [str(device.get("ID")) for device in info.get("DiscoveredDevices") or ()]  # CDI, from Docker 28 on
    cdi = any(device.startswith("nvidia.com/gpu") for device in devices)
    if "nvidia" not in (info.get("Runtimes") or {}) and not cdi and not shutil.which("nvidia-container-runtime-hook"):
        raise DoesNotFitError(
            f"target {target.name}: needs GPUs, but this Docker engine has no NVIDIA runtime; install"
            " nvidia-container-toolkit, run `nvidia-ctk runtime configure --runtime=docker` and restart Docker, or set"
            " TARGET=cpu"
        )


def refuse_image(engine: Any, image: str, version: str, target: str) -> None:
    """Raise UsageError if the Docker engine lacks an image, or if the image holds another version of Lorry.

    Nothing is checked if PULL lets Compose fetch images.
    """
    from docker.errors import ImageNotFound

    if os.environ.get("PULL", "never") not in ("", "never"):
        return  # Compose fetches it
    try:
        found = engine.images.get(image).labels.get(VERSION_LABEL)
    except ImageNotFound as error:
        raise UsageError(
            f"{image}: no such image; run `make images TARGET={target}`, or set PULL=missing to fetch it from REGISTRY"
        ) from error
    if found != version:
        raise UsageError(
            f"{image}: holds Lorry {found or 'without a version'}, but its name says {version}; run `make images"
            f" TARGET={target}`"
        )


# -- the container -------------------------------------------------------------------------------------------------


def _prepare_mounts(options: dict[str, Any]) -> dict[str, str]:
    """Create the runs folder, and return the variables that compose.yaml reads.

    These are the folders to mount, registry, pull policy, and owner of the outputs. If this process is root's and root
    owns the runs folder, the containers' user becomes its owner. Raises UsageError if the data or model folder does not
    exist.
    """
    roots = Roots.from_environment()
    data = _mounted_data(options) or roots.data
    for folder, name in ((data, "LORRY_DATA"), (roots.models, "LORRY_MODELS")):
        if not folder.is_dir():
            raise UsageError(f"{folder}: no such folder to mount; create it, or set {name} to another")
    uid, gid = container_user()
    roots.runs.mkdir(parents=True, exist_ok=True)
    if os.getuid() == 0 and roots.runs.stat().st_uid == 0:  # root made the checkout, and containers never run as root
        os.chown(roots.runs, uid, gid)
    mounts = {"LORRY_DATA": str(data), "LORRY_MODELS": str(roots.models), "LORRY_RUNS": str(roots.runs)}
    # empty rather than unset, or Compose would read them from `.env`, which refuse_image does not
    images = {"REGISTRY": os.environ.get("REGISTRY", ""), "PULL": os.environ.get("PULL", "")}
    return {**mounts, **images, "LORRY_UID": str(uid), "LORRY_GID": str(gid)}


def container_user() -> tuple[int, int]:
    """The uid and gid that containers run as: LORRY_UID and LORRY_GID, or this process's own; USER in place of root."""
    uid = int(os.environ.get("LORRY_UID") or os.getuid()) or USER
    gid = int(os.environ.get("LORRY_GID") or os.getgid()) or USER
    return uid, gid


def _run_options(name: str, options: dict[str, Any]) -> list[str]:
    """The arguments of `docker compose` up to the stage: `run`, with its options."""
    # --no-deps: the earlier stages have run, and their exit codes were checked
    arguments = [
        "run",
        "--rm",
        "--no-deps",
        "--name",
        name,
        *([] if sys.stdin.isatty() and sys.stdout.isatty() else ["-T"]),
    ]
    for setting in ("LORRY_RECIPE", "LORRY_PROFILE", "LORRY_RUN", "LORRY_SET"):
        arguments += ["--env", f"{setting}="]  # the command line decides, not a default of compose.yaml
    if options["data"]:  # the recipe names the folder as this machine does, so that another folder is noticed
        arguments += ["--env", f"LORRY_DATA_FROM={_mounted_data(options)}"]
    if options["recipe"]:  # this machine's file, and not that in the image
        arguments += ["--volume", f"{options['recipe']}:{_mounted_options(options)['recipe']}:ro"]
    return arguments


def _mounted_data(options: dict[str, Any]) -> Path | None:
    """The folder to mount for `--data`: that folder, or the folder of that file, where its pictures are too; None
    without `--data`."""
    data = Path(options["data"]).absolute() if options["data"] else None
    return data.parent if data is not None and data.is_file() else data


def _mounted_options(options: dict[str, Any]) -> dict[str, Any]:
    """The options with the recipe's path as a container sees it, and the absolute path of the data on this machine."""
    recipe = f"/recipe/{Path(options['recipe']).name}" if options["recipe"] else None
    return {**options, "recipe": recipe, "data": str(Path(options["data"]).absolute()) if options["data"] else None}


def _collect_signals() -> list[signal.Signals]:
    """Handle the stop signals from now on, except for a SIGHUP that is ignored, as by nohup. Returns a list to which
    each signal is appended."""
    signals: list[signal.Signals] = []
    for number in STOPS:
        if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, lambda got, _: signals.append(signal.Signals(got)))
    return signals


def _run_container(
    engine: Any,
    name: str,
    command: list[str],
    environment: dict[str, str],
    signals: list[signal.Signals],
    reads: bool = False,
) -> int:
    """Run `docker compose run` to its end and pass signals on to the container. Returns the container's exit code.

    With `reads`, the container gets this process's standard input, also if that is no terminal.
    `signals` is the list of `_collect_signals`, which grows while the container runs. Signals go through the Docker
    engine, because Compose exits at once on a signal and leaves the container running. For the same reason Compose must
    not get a Ctrl-C, unless it has the terminal and passes the key on.
    """
    terminal = "-T" not in command
    process = subprocess.Popen(
        command,
        env=environment,
        stdin=None if terminal or reads else subprocess.DEVNULL,
        start_new_session=not terminal,
        preexec_fn=partial(die_with_parent, os.getpid()),  # noqa: PLW1509 - no other thread runs here
    )
    sent = 0
    while True:
        try:
            return process.wait(timeout=0.2)
        except subprocess.TimeoutExpired:
            if len(signals) > sent and _send_signal(engine, name, signals[sent]):
                sent += 1


def _send_signal(engine: Any, name: str, number: signal.Signals) -> bool:
    """Send SIGINT to a container, or SIGTERM for any other signal.

    Returns False if that fails, for example because the container has not started yet.
    """
    from docker.errors import DockerException

    try:
        engine.containers.get(name).kill(signal.SIGINT if number is signal.SIGINT else signal.SIGTERM)
    except (DockerException, OSError):
        return False
    return True
