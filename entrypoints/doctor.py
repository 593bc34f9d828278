"""`lorry doctor`: what of this machine would keep a job from running, a line each, with the cure."""

import importlib.util
import os
import shutil
import stat
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from entrypoints.common import one_line_errors, recipe_options
from stages.contract.errors import Exit, LorryError, UsageError
from stages.contract.roots import Roots
from stages.hardware.holds import Holds
from stages.hardware.pick import denied_cards, gib
from stages.hardware.probe import Cards, Gpu, Machine, card_on_bus, read_cards
from stages.hardware.targets import Target, load_targets, named_target, refuse_old_driver, target_of
from stages.host.containers import (
    compose_command,
    container_user,
    find_engine,
    image_name,
    image_target,
    refuse_image,
    refuse_without_nvidia,
)
from stages.host.needs import LIBRARIES
from stages.host.runs import open_run

if TYPE_CHECKING:
    from stages.contract.run import Run

GB = 10**9

DISK_LITTLE = 50 * GB
"""Seed 000's intermediates take 50 GB, and the images of a target up to 13 more: below this a job may not end."""
DISK_NONE = 5 * GB
"""A checkpoint of a rank-64 adapter of a 7B model, with its optimizer, takes 2 GB (160 million parameters, 12 bytes
each), and two are kept: below this not even they are safe."""
SHARED_MEMORY = 2**30
"""NCCL takes some 10 MB for each pair of cards and data loaders a batch each; Docker's 64 MB are known to fail."""
PATIENCE = 2.0
"""Seconds for an answer of the engine."""


@dataclass(frozen=True)
class Finding:
    """The outcome of one check."""

    state: str
    """ok, warn, FAIL or not checked."""
    what: str
    text: str
    code: Exit = Exit.DONE
    """Of a FAIL: what the command exits with for it."""

    def __str__(self) -> str:
        return f"{self.state:<12}{self.what}: {self.text}"


def _ok(what: str, text: str) -> Finding:
    return Finding("ok", what, text)


def _warn(what: str, text: str) -> Finding:
    return Finding("warn", what, text)


def _unchecked(what: str, text: str) -> Finding:
    return Finding("not checked", what, text)


def _fail(what: str, text: str, code: Exit) -> Finding:
    return Finding("FAIL", what, text, code)


def _failed(what: str, error: LorryError) -> Finding:
    """A FAIL with the words and the code that the job itself would end with."""
    return Finding("FAIL", what, " ".join(str(error).split()), error.exit_code)


@click.command()
@recipe_options
@click.option("--target", metavar="NAME", envvar="TARGET", help="Kind of card; default: by this machine's cards.")
@one_line_errors
def doctor(target: str | None, **options: Any) -> None:
    """Check this machine, and what RECIPE needs of it; every warning and failure says the cure.

    Exits with 0 where nothing fails; else with 4 if hardware, driver, memory or disk is among what fails, and with 2
    if only settings, permissions, images or weights are.
    """
    if target:
        named_target(target, load_targets())
    run = open_run(**options) if options["recipe"] or options["run_name"] else None
    findings = []
    for finding in examine(target, run):
        click.echo(str(finding))
        findings.append(finding)
    codes = {finding.code for finding in findings if finding.state == "FAIL"}
    if codes:
        sys.exit(Exit.DOES_NOT_FIT if Exit.DOES_NOT_FIT in codes else Exit.USAGE)


def examine(target: str | None, run: "Run | None") -> Iterator[Finding]:
    """Every check in turn."""
    roots, cards = Roots.from_environment(), read_cards()
    targets = _targets(target, cards)
    yield from _driver(cards, targets)
    engine, info, found = _engine()
    yield found
    if engine is not None:
        yield from _containers(engine, info, targets)
    else:
        yield from _libraries()
    yield from _disk(roots, info)
    yield _shared_memory(cards, engine is not None)
    yield from _mounts(roots, run, engine is not None)
    yield from _weights(roots, run)
    yield from _gpus(cards)


# -- driver and engine ---------------------------------------------------------------------------------------------


def _targets(name: str | None, cards: Cards) -> list[Target]:
    """The target named, or that of every kind of card here; the CPU where there is no card."""
    known = load_targets()
    if name:
        return [named_target(name, known)]
    found = {}
    for gpu in cards.gpus:
        if not gpu.lost:
            try:
                target = target_of(Machine(0, 0, (gpu,)), known)
            except UsageError:  # older than every target: told with the card
                continue
            found[target.name] = target
    return list(found.values()) or [known["cpu"]]


def _driver(cards: Cards, targets: list[Target]) -> Iterator[Finding]:
    wanted = [target for target in targets if target.capability is not None]
    if cards.problem:
        yield _fail("driver", cards.problem, Exit.DOES_NOT_FIT)
    elif not cards.driver and wanted:
        least = max(target.min_driver or 0 for target in wanted)
        yield _fail(
            "driver",
            f"none, and target {wanted[0].name} needs NVIDIA's, {least} or newer: install it, or take TARGET=cpu",
            Exit.DOES_NOT_FIT,
        )
    elif not cards.driver and card_on_bus():
        yield _warn(
            "driver", "none, and an NVIDIA card is on the PCI bus: install NVIDIA's driver; until then TARGET=cpu"
        )
    elif not cards.driver:
        yield _ok("driver", "no NVIDIA card here: target cpu")
    for target in wanted if cards.driver else []:
        try:
            refuse_old_driver(target, cards.driver)
        except LorryError as error:
            yield _failed("driver", error)
        else:
            yield _ok("driver", f"{cards.driver}; target {target.name} ({target.cuda}) needs {target.min_driver}")
    if cards.driver and not wanted:
        yield _ok("driver", f"{cards.driver}; target cpu needs none")


def _engine() -> tuple[Any, dict[str, Any], Finding]:
    """The Docker engine, if one answers, what it says of itself, and what is to be said of it."""
    if importlib.util.find_spec("docker") is None:  # as inside an image
        return None, {}, _unchecked("engine", "docker-py is not installed here: stages run as local processes")
    from docker.errors import DockerException

    try:
        engine, address = find_engine(PATIENCE)
        if engine is None:
            cure = "start Docker, or name its address (DOCKER_HOST), for containers"
            text = f"none answers at {address}: stages run as local processes; {cure}"
            return None, {}, _warn("engine", text)
        info = engine.info()
    except LorryError as error:
        return None, {}, _failed("engine", error)
    except (DockerException, OSError) as error:
        return None, {}, _fail("engine", f"does not answer ({' '.join(str(error).split())})", Exit.USAGE)
    return engine, info, _ok("engine", f"Docker {info.get('ServerVersion')} at {address}")


def _containers(engine: Any, info: dict[str, Any], targets: list[Target]) -> Iterator[Finding]:
    """Whether the engine can run the stages of these targets."""
    try:
        yield _ok("compose", " ".join(compose_command()[:2]))
    except LorryError as error:
        yield _failed("compose", error)
    for target in targets:
        if target.capability is not None:
            try:
                refuse_without_nvidia(info, target)
                yield _ok("engine", f"can hand GPUs to containers of target {target.name}")
            except LorryError as error:
                yield _failed("engine", error)
        yield from _images(engine, target)


def _images(engine: Any, target: Target) -> Iterator[Finding]:
    import importlib.metadata

    version = os.environ.get("LORRY_VERSION") or importlib.metadata.version("lorry")
    if os.environ.get("PULL", "never") not in ("", "never"):
        yield _unchecked("images", f"of {target.name}: PULL={os.environ['PULL']}, Compose fetches them")
        return
    there = []
    for stage in LIBRARIES:
        try:
            refuse_image(engine, image_name(stage, version, target), version, image_target(stage, target))
            there.append(stage)
        except LorryError as error:
            yield _failed("images", error)
    if there:
        yield _ok("images", f"of {target.name}, version {version}: {', '.join(there)}")


def _libraries() -> Iterator[Finding]:
    """Without an engine: whether the stages can run here."""
    for stage, libraries in LIBRARIES.items():
        missing = [library for library in libraries if importlib.util.find_spec(library) is None]
        if missing:
            cure = "`make setup` installs it, or start Docker"
            yield _warn("libraries", f"{stage} cannot run as a local process without {missing[0]}: {cure}")


# -- disk, memory, permissions -------------------------------------------------------------------------------------


def _disk(roots: Roots, info: dict[str, Any]) -> Iterator[Finding]:
    yield _free("disk", "runs", roots.runs, "delete old runs, or name another folder (LORRY_RUNS)")
    if not info:
        return
    folder = Path(str(info.get("DockerRootDir")))
    if folder.is_dir():
        yield _free("disk", "Docker's images", folder, "docker image prune, docker builder prune")
    else:
        yield _unchecked("disk", f"Docker's images: {folder} is not on this machine")


def _free(what: str, whose: str, folder: Path, cure: str) -> Finding:
    """Whether there is room where the folder is, or is to be made."""
    there = next(path for path in (folder, *folder.parents) if path.is_dir())
    free = shutil.disk_usage(there).free
    text = f"{free / GB:.0f} GB free for {whose} ({folder})"
    if free < DISK_NONE:
        return _fail(what, f"{text}, less than {DISK_NONE // GB}: {cure}", Exit.DOES_NOT_FIT)
    if free < DISK_LITTLE:
        return _warn(what, f"{text}, less than the {DISK_LITTLE // GB} that a job of many documents takes: {cure}")
    return _ok(what, text)


def _shared_memory(cards: Cards, in_containers: bool, folder: Path = Path("/dev/shm")) -> Finding:
    if in_containers:
        return _ok("/dev/shm", "containers get their own (LORRY_SHM in compose/<target>.env)")
    if len(cards.gpus) < 2:
        return _unchecked("/dev/shm", "matters from two GPUs on")
    size = shutil.disk_usage(folder).total if folder.is_dir() else 0
    text = f"{size / 2**30:.1f} GiB for the processes of several GPUs"
    if size < SHARED_MEMORY:
        return _fail("/dev/shm", f"{text}, 1 needed: sudo mount -o remount,size=16g {folder}", Exit.DOES_NOT_FIT)
    return _ok("/dev/shm", text)


@dataclass(frozen=True)
class _User:
    """Whom the stages run as."""

    uid: int
    groups: frozenset[int]

    def may(self, path: Path, wanted: int) -> bool:
        """Whether the mode of a path allows this user what is wanted (of r=4, w=2, x=1), whoever asks."""
        found = path.stat()
        if self.uid == 0:
            return True
        shift = 6 if found.st_uid == self.uid else 3 if found.st_gid in self.groups else 0
        return (stat.S_IMODE(found.st_mode) >> shift) & wanted == wanted


def _mounts(roots: Roots, run: "Run | None", in_containers: bool) -> Iterator[Finding]:
    uid, gid = container_user() if in_containers else (os.getuid(), os.getgid())
    user = _User(uid, frozenset([gid] if in_containers else [gid, *os.getgroups()]))
    data = run.roots.data / run.recipe.data.path if run is not None else roots.data
    for folder, name in ((data, "LORRY_DATA"), (roots.models, "LORRY_MODELS")):
        if not folder.is_dir():
            yield _fail("folders", f"{folder}: no such folder: make it, or name another ({name})", Exit.USAGE)
            continue
        closed = _unreadable(folder, user)
        if closed is not None:
            kind = "o+rX" if closed.is_dir() else "o+r"
            cure = f"sudo chmod {kind} {closed} (and what is below)"
            yield _fail("folders", f"{closed}: uid {uid} cannot read it: {cure}", Exit.USAGE)
        else:
            yield _ok("folders", f"{folder}: readable for uid {uid}")
    yield _writable(roots.runs, user, gid, in_containers)
    for folder in _run_folders(run):
        if not user.may(folder, 7):
            cure = f"sudo chown -R {uid}:{gid} {folder}, or take another --run"
            yield _fail("folders", f"{folder}: uid {uid} cannot write there: {cure}", Exit.USAGE)


def _unreadable(folder: Path, user: _User) -> Path | None:
    """The folder, or the first in it, that the user cannot read: two levels deep, and so many that it stays quick."""
    for path in islice(_two_levels(folder), 2000):
        if not user.may(path, 5 if path.is_dir() else 4):
            return path
    return None


def _two_levels(folder: Path) -> Iterator[Path]:
    yield folder
    for pattern in ("*", "*/*"):
        for path in folder.glob(pattern):
            if path.exists():
                yield path


def _writable(runs: Path, user: _User, gid: int, in_containers: bool) -> Finding:
    there = next(path for path in (runs, *runs.parents) if path.is_dir())
    cure = f"sudo chown {user.uid}:{gid} {there}, or name another folder (LORRY_RUNS)"
    if os.statvfs(there).f_flag & os.ST_RDONLY:
        return _fail("folders", f"{runs}: on a read-only file system: name another folder (LORRY_RUNS)", Exit.USAGE)
    if in_containers and os.getuid() == 0 and (there != runs or there.stat().st_uid == 0):
        return _ok("folders", f"{runs}: root's; the next launch hands it to uid {user.uid}")
    if there != runs:  # whoever launches makes it, and is the user
        user = _User(os.getuid(), frozenset(os.getgroups()))
    if not user.may(there, 7 if there == runs else 3):
        return _fail("folders", f"{there}: uid {user.uid} cannot write there: {cure}", Exit.USAGE)
    made = "" if there == runs else " (made at the first launch)"
    return _ok("folders", f"{runs}: writable for uid {user.uid}{made}")


def _run_folders(run: "Run | None") -> list[Path]:
    """The folders that a run has already, which may be another user's."""
    if run is None or not run.folder.is_dir():
        return []
    return [run.folder, *(path for path in sorted(run.folder.iterdir()) if path.is_dir())]


# -- weights -------------------------------------------------------------------------------------------------------


def _weights(roots: Roots, run: "Run | None") -> Iterator[Finding]:
    """Whether the safetensors files are there and as long as their headers say. No weight is read."""
    if run is not None:
        named = {"model.path": run.recipe.model.path}
        if run.recipe.preprocess.retrieval is not None:
            named["preprocess.retrieval.embedder"] = run.recipe.preprocess.retrieval.embedder
        for key, path in named.items():
            try:
                yield _whole(run.model(path, key))
            except UsageError as error:
                yield _failed("weights", error)
        return
    folders = sorted(path.parent for path in roots.models.glob("*/config.json"))
    if not folders:
        yield _warn("weights", f"no model in {roots.models}: put Hugging Face model folders there (LORRY_MODELS)")
    for folder in folders:
        yield _whole(folder)


def _whole(folder: Path) -> Finding:
    from stages.models.shape import UnknownShapeError, read_shape

    try:
        shape = read_shape(folder)
    except UnknownShapeError:  # whole or not, it is no model to train
        return _unchecked("weights", f"{folder}: its config.json is not that of a decoder or an encoder known here")
    except UsageError as error:
        return _failed("weights", error)
    return _ok("weights", f"{folder}: {len(shape.weights)} tensors, {shape.disk_bytes / GB:.1f} GB, whole")


# -- cards ---------------------------------------------------------------------------------------------------------


def _gpus(cards: Cards) -> Iterator[Finding]:
    """Each card, with what of it is free and who has the rest."""
    if not cards.gpus:
        yield _unchecked("GPUs", "none are shown")
        return
    denied: frozenset[int] = frozenset()
    try:
        denied = denied_cards(os.environ.get("LORRY_GPU_DENY"), cards.gpus)
    except UsageError as error:
        yield _failed("GPUs", error)
    holds = Holds()
    for gpu in cards.gpus:
        notes = [str(lock) + (" (auto)" if lock.exclusive else "") for lock in holds.holders(gpu.uuid or "-")]
        yield _card(gpu, gpu.index in denied, notes)


def _card(gpu: Gpu, denied: bool, holders: list[str]) -> Finding:
    if gpu.lost:
        cure = f"see `dmesg | grep Xid`; nvidia-smi --gpu-reset -i {gpu.index}, or reboot; until then name other cards"
        return _fail("GPUs", f"{gpu} no longer answers (NVML: {gpu.lost}): {cure}", Exit.DOES_NOT_FIT)
    told = [f"{gpu}: {gib(gpu.memory_free)} GiB free of {gib(gpu.memory_total)}"]
    told += [f"{holder} {gib(holder.memory)} GiB" if holder.memory else str(holder) for holder in gpu.processes]
    told += [f"held by {holder}" for holder in holders]
    told += ["in LORRY_GPU_DENY"] if denied else []
    text = f"{'; '.join(told)}; {gpu.uuid}"
    if gpu.mig:
        cure = f"Lorry binds whole cards: sudo nvidia-smi -i {gpu.index} -mig 0, or name other cards"
        return _warn("GPUs", f"{text}; in MIG mode: {cure}")
    oldest = min(target.capability for target in load_targets().values() if target.capability)
    if gpu.capability < oldest:
        return _warn("GPUs", f"{text}; older than every target: name other cards, or TARGET=cpu")
    return _ok("GPUs", text)
