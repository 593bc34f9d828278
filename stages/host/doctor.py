"""`lorry doctor`: what on this machine would stop a job, one finding for each check, with the cure."""

import importlib.util
import os
import shutil
import stat
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stages.contract.errors import Exit, LorryError, UsageError
from stages.contract.roots import Roots
from stages.hardware.holds import Holds
from stages.hardware.pick import denied_cards, gib_text
from stages.hardware.probe import Cards, Gpu, Machine, has_card_on_bus, read_cards
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
from stages.host.needs import STAGES
from stages.host.processes import missing_libraries

if TYPE_CHECKING:
    from stages.contract.run import Run

GB = 10**9

DISK_WARNING = 50 * GB
"""The original of patent-qa leaves 50 GB of intermediate files, and a target's images take up to 13: with less, a job
may run out of disk."""
DISK_MINIMUM = 5 * GB
"""A checkpoint of a rank-64 adapter of a 7B model takes 2 GB with its optimizer (160 million parameters, 12 bytes each)
and two are kept: with less, not even they fit."""
SHARED_MEMORY = 2**30
"""Bytes of /dev/shm. NCCL takes some 10 MB for each pair of GPUs, and each data loader a batch; Docker's 64 MB are
known to fail."""
ENGINE_TIMEOUT = 2.0
"""Seconds to wait for an answer of the Docker engine."""


@dataclass(frozen=True)
class Finding:
    """The outcome of one check."""

    state: str
    """ok, warn, FAIL or not checked."""
    what: str
    """The check, such as driver or disk."""
    text: str
    code: Exit = Exit.DONE
    """The exit code that a FAIL calls for."""

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


def _error_finding(what: str, error: LorryError) -> Finding:
    """A FAIL with the words and the exit code that the job itself would end with."""
    return Finding("FAIL", what, " ".join(str(error).split()), error.exit_code)


def exit_code(findings: Iterable[Finding]) -> Exit:
    """What the command exits with: 4 if hardware, driver, memory or disk is among what fails, else 2, or 0."""
    codes = {finding.code for finding in findings if finding.state == "FAIL"}
    if not codes:
        return Exit.DONE
    return Exit.DOES_NOT_FIT if Exit.DOES_NOT_FIT in codes else Exit.USAGE


def examine(target: str | None, run: "Run | None") -> Iterator[Finding]:
    """Every check in turn, for a target or this machine's GPUs, and for a run's recipe if there is one. Raises
    UsageError for an unknown target."""
    known = load_targets()
    if target:
        named_target(target, known)
    roots, cards = Roots.from_environment(), read_cards()
    targets = _targets(target, cards, known)
    yield from _check_driver(cards, targets)
    engine, info, found = _find_engine()
    yield found
    if engine is not None:
        yield from _check_engine(engine, info, targets)
    else:
        yield from _check_libraries()
    yield from _check_disk(roots, info)
    yield _check_shared_memory(cards, engine is not None)
    yield from _check_folders(roots, run, engine is not None)
    yield from _check_weights(roots, run)
    yield from _check_gpus(cards)


# -- driver and Docker engine --------------------------------------------------------------------------------------


def _targets(name: str | None, cards: Cards, known: dict[str, Target]) -> list[Target]:
    """The named target, or those of all GPUs here; cpu without GPUs."""
    if name:
        return [known[name]]
    found = {}
    for gpu in cards.gpus:
        if not gpu.lost:
            try:
                target = target_of(Machine(0, 0, (gpu,)), known)
            except UsageError:  # older than every target: _check_gpu reports it
                continue
            found[target.name] = target
    return list(found.values()) or [known["cpu"]]


def _check_driver(cards: Cards, targets: list[Target]) -> Iterator[Finding]:
    wanted = [target for target in targets if target.capability is not None]
    if cards.problem:
        yield _fail("driver", cards.problem, Exit.DOES_NOT_FIT)
    elif not cards.driver and wanted:
        least = max(target.min_driver or 0 for target in wanted)
        yield _fail(
            "driver",
            f"none, and target {wanted[0].name} needs NVIDIA driver {least} or newer; install it, or set TARGET=cpu",
            Exit.DOES_NOT_FIT,
        )
    elif not cards.driver and has_card_on_bus():
        yield _warn(
            "driver",
            "none, and an NVIDIA GPU is on the PCI bus; install its driver, and until then set TARGET=cpu",
        )
    elif not cards.driver:
        yield _ok("driver", "no NVIDIA GPU here: target cpu")
    for target in wanted if cards.driver else []:
        try:
            refuse_old_driver(target, cards.driver)
        except LorryError as error:
            yield _error_finding("driver", error)
        else:
            yield _ok("driver", f"{cards.driver}; target {target.name} ({target.cuda}) needs {target.min_driver}")
    if cards.driver and not wanted:
        yield _ok("driver", f"{cards.driver}; target cpu needs none")


def _find_engine() -> tuple[Any, dict[str, Any], Finding]:
    """The Docker engine, None if none answers; what it says of itself; and a finding on both."""
    name = "Docker engine"
    if importlib.util.find_spec("docker") is None:  # as inside an image
        return None, {}, _unchecked(name, "docker-py is not installed here: stages run as local processes")
    from docker.errors import DockerException

    try:
        engine, address = find_engine(ENGINE_TIMEOUT)
        if engine is None:
            cure = "to run them in containers, start Docker or set DOCKER_HOST"
            return None, {}, _warn(name, f"none answers at {address}: stages run as local processes; {cure}")
        info = engine.info()
    except LorryError as error:
        return None, {}, _error_finding(name, error)
    except (DockerException, OSError) as error:
        reason = " ".join(str(error).split())
        return None, {}, _fail(name, f"does not answer ({reason}): restart Docker, or set DOCKER_HOST", Exit.USAGE)
    return engine, info, _ok(name, f"version {info.get('ServerVersion')} at {address}")


def _check_engine(engine: Any, info: dict[str, Any], targets: list[Target]) -> Iterator[Finding]:
    """Whether the Docker engine can run the stages of these targets."""
    try:
        yield _ok("compose", " ".join(compose_command()[:2]))
    except LorryError as error:
        yield _error_finding("compose", error)
    for target in targets:
        if target.capability is not None:
            try:
                refuse_without_nvidia(info, target)
                yield _ok("Docker engine", f"can give GPUs to containers of target {target.name}")
            except LorryError as error:
                yield _error_finding("Docker engine", error)
        yield from _check_images(engine, target)


def _check_images(engine: Any, target: Target) -> Iterator[Finding]:
    import importlib.metadata

    version = os.environ.get("LORRY_VERSION") or importlib.metadata.version("lorry")
    if os.environ.get("PULL", "never") not in ("", "never"):
        yield _unchecked("images", f"of {target.name}: PULL={os.environ['PULL']}, Compose fetches them")
        return
    there = []
    for stage in STAGES:
        try:
            refuse_image(engine, image_name(stage, version, target), version, image_target(stage, target))
            there.append(stage)
        except LorryError as error:
            yield _error_finding("images", error)
    if there:
        yield _ok("images", f"of {target.name}, version {version}: {', '.join(there)}")


def _check_libraries() -> Iterator[Finding]:
    """Whether the stages can run as local processes."""
    for stage in STAGES:
        missing = missing_libraries(stage)
        if missing:
            cure = "run `make setup`, or start Docker"
            yield _warn("libraries", f"{stage} needs {missing[0]}, which is not installed here; {cure}")


# -- disk, memory, permissions -------------------------------------------------------------------------------------


def _check_disk(roots: Roots, info: dict[str, Any]) -> Iterator[Finding]:
    yield _free_space("runs", roots.runs, "delete old runs, or name another folder (LORRY_RUNS)")
    if not info:
        return
    folder = Path(str(info.get("DockerRootDir")))
    if folder.is_dir():
        yield _free_space("Docker's images", folder, "docker image prune, docker builder prune")
    else:
        yield _unchecked("disk", f"Docker's images: {folder} is not on this machine")


def _free_space(whose: str, folder: Path, cure: str) -> Finding:
    """Whether the disk of a folder, which need not exist yet, has room."""
    existing = next(path for path in (folder, *folder.parents) if path.is_dir())
    free = shutil.disk_usage(existing).free
    text = f"{free / GB:.0f} GB free for {whose} ({folder})"
    if free < DISK_MINIMUM:
        return _fail("disk", f"{text}, less than {DISK_MINIMUM // GB}: {cure}", Exit.DOES_NOT_FIT)
    if free < DISK_WARNING:
        return _warn("disk", f"{text}, less than the {DISK_WARNING // GB} that a large job takes: {cure}")
    return _ok("disk", text)


def _check_shared_memory(cards: Cards, in_containers: bool, folder: Path = Path("/dev/shm")) -> Finding:
    if in_containers:
        return _ok("/dev/shm", "containers get their own (LORRY_SHM in compose/<target>.env)")
    if len(cards.gpus) < 2:
        return _unchecked("/dev/shm", "only needed for several GPUs")
    size = shutil.disk_usage(folder).total if folder.is_dir() else 0
    text = f"{size / 2**30:.1f} GiB for the processes of several GPUs"
    if size < SHARED_MEMORY:
        return _fail("/dev/shm", f"{text}, 1 GiB needed: sudo mount -o remount,size=16g {folder}", Exit.DOES_NOT_FIT)
    return _ok("/dev/shm", text)


@dataclass(frozen=True)
class _User:
    """The user that the stages run as."""

    uid: int
    groups: frozenset[int]

    def may(self, path: Path, wanted: int) -> bool:
        """Whether a path's mode gives this user the `wanted` access (r=4, w=2, x=1). Also right if root asks for
        another user."""
        found = path.stat()
        if self.uid == 0:
            return True
        shift = 6 if found.st_uid == self.uid else 3 if found.st_gid in self.groups else 0
        return (stat.S_IMODE(found.st_mode) >> shift) & wanted == wanted


def _check_folders(roots: Roots, run: "Run | None", in_containers: bool) -> Iterator[Finding]:
    uid, gid = container_user() if in_containers else (os.getuid(), os.getgid())
    user = _User(uid, frozenset([gid] if in_containers else [gid, *os.getgroups()]))
    data = run.roots.data / run.recipe.data.path if run is not None else roots.data
    for folder, name in ((data, "LORRY_DATA"), (roots.models, "LORRY_MODELS")):
        if not folder.is_dir():
            yield _fail("folders", f"{folder}: no such folder: create it, or name another ({name})", Exit.USAGE)
            continue
        closed = _unreadable(folder, user)
        if closed is not None:
            kind = "o+rX" if closed.is_dir() else "o+r"
            cure = f"sudo chmod {kind} {closed} (and what is below)"
            yield _fail("folders", f"{closed}: uid {uid} cannot read it: {cure}", Exit.USAGE)
        else:
            yield _ok("folders", f"{folder}: readable for uid {uid}")
    yield _check_runs_folder(roots.runs, user, gid, in_containers)
    for folder in _run_folders(run):
        if not user.may(folder, 7):
            cure = f"sudo chown -R {uid}:{gid} {folder}, or take another --run"
            yield _fail("folders", f"{folder}: uid {uid} cannot write there: {cure}", Exit.USAGE)


def _unreadable(folder: Path, user: _User) -> Path | None:
    """The first path that the user cannot read: the folder, or one of 2000 in it, two levels deep, to stay quick."""
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


def _check_runs_folder(runs: Path, user: _User, gid: int, in_containers: bool) -> Finding:
    """Whether the stages can write below the runs folder, which need not exist yet."""
    there = next(path for path in (runs, *runs.parents) if path.is_dir())
    cure = f"sudo chown {user.uid}:{gid} {there}, or name another folder (LORRY_RUNS)"
    if os.statvfs(there).f_flag & os.ST_RDONLY:
        return _fail("folders", f"{runs}: on a read-only file system; name another folder (LORRY_RUNS)", Exit.USAGE)
    if in_containers and os.getuid() == 0 and (there != runs or there.stat().st_uid == 0):
        return _ok("folders", f"{runs}: owned by root; the next launch gives it to uid {user.uid}")
    if there != runs:  # whoever launches creates it
        user = _User(os.getuid(), frozenset(os.getgroups()))
    if not user.may(there, 7 if there == runs else 3):
        return _fail("folders", f"{there}: uid {user.uid} cannot write there: {cure}", Exit.USAGE)
    note = "" if there == runs else " (created by the first launch)"
    return _ok("folders", f"{runs}: writable for uid {user.uid}{note}")


def _run_folders(run: "Run | None") -> list[Path]:
    """The existing folders of a run, which may belong to another user."""
    if run is None or not run.folder.is_dir():
        return []
    return [run.folder, *(path for path in sorted(run.folder.iterdir()) if path.is_dir())]


# -- weights -------------------------------------------------------------------------------------------------------


def _check_weights(roots: Roots, run: "Run | None") -> Iterator[Finding]:
    """Whether the models' safetensors files exist and are as long as their headers say. No weight is read."""
    if run is not None:
        named = {"model.path": run.recipe.model.path}
        if run.recipe.preprocess.retrieval is not None:
            named["preprocess.retrieval.embedder"] = run.recipe.preprocess.retrieval.embedder
        for key, path in named.items():
            try:
                yield _check_model(run.model(path, key))
            except UsageError as error:
                yield _error_finding("weights", error)
        return
    folders = sorted(path.parent for path in roots.models.glob("*/config.json"))
    if not folders:
        yield _warn("weights", f"no model in {roots.models}; put Hugging Face model folders there (LORRY_MODELS)")
    for folder in folders:
        yield _check_model(folder)


def _check_model(folder: Path) -> Finding:
    from stages.models.shape import UnknownShapeError, read_shape

    try:
        shape = read_shape(folder)
    except UnknownShapeError:  # not a model that Lorry trains
        return _unchecked("weights", f"{folder}: its config.json is not that of a known decoder or encoder")
    except UsageError as error:
        return _error_finding("weights", error)
    return _ok("weights", f"{folder}: {len(shape.weights)} tensors, {shape.disk_bytes / GB:.1f} GB, whole")


# -- GPUs ----------------------------------------------------------------------------------------------------------


def _check_gpus(cards: Cards) -> Iterator[Finding]:
    """Each GPU, with its free memory and who holds the rest."""
    if not cards.gpus:
        yield _unchecked("GPUs", "NVML shows none")
        return
    denied: frozenset[int] = frozenset()
    try:
        denied = denied_cards(os.environ.get("LORRY_GPU_DENY"), cards.gpus)
    except UsageError as error:
        yield _error_finding("GPUs", error)
    holds = Holds()
    for gpu in cards.gpus:
        notes = [str(lock) + (" (auto)" if lock.exclusive else "") for lock in holds.holders(gpu.uuid or "-")]
        yield _check_gpu(gpu, gpu.index in denied, notes)


def _check_gpu(gpu: Gpu, denied: bool, holders: list[str]) -> Finding:
    if gpu.lost:
        cure = f"see `dmesg | grep Xid`; nvidia-smi --gpu-reset -i {gpu.index}, or reboot; until then name other GPUs"
        return _fail("GPUs", f"{gpu} no longer answers (NVML: {gpu.lost}); {cure}", Exit.DOES_NOT_FIT)
    facts = [f"{gpu}: {gib_text(gpu.memory_free)} GiB free of {gib_text(gpu.memory_total)}"]
    facts += [f"{holder} {gib_text(holder.memory)} GiB" if holder.memory else str(holder) for holder in gpu.processes]
    facts += [f"held by {holder}" for holder in holders]
    facts += ["denied by LORRY_GPU_DENY"] if denied else []
    text = f"{'; '.join(facts)}; {gpu.uuid}"
    if gpu.mig:
        cure = f"Lorry binds whole GPUs: sudo nvidia-smi -i {gpu.index} -mig 0, or name other GPUs"
        return _warn("GPUs", f"{text}; in MIG mode: {cure}")
    oldest = min(target.capability for target in load_targets().values() if target.capability)
    if gpu.capability < oldest:
        return _warn("GPUs", f"{text}; older than every target; name other GPUs, or set TARGET=cpu")
    return _ok("GPUs", text)
